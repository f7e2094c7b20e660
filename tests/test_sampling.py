"""Sampling: each option against its definition in numpy, by support and by frequency; noise; refusals."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infopt.errors import SamplingError
from infopt.sampling import Sampling, noise, sample

WORDS, ROWS = 13, 2000
draw = jax.jit(sample)

LOGITS = np.random.default_rng(4).normal(scale=1.5, size=WORDS).astype(np.float32)
TEXT = [3, 5, 5, 0]


def defined(
    logits: np.ndarray,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seen: list[int] = TEXT,
) -> np.ndarray:
    """Each word's probability: penalty, temperature, top-k, top-p, min-p, in that order, in float64."""
    x = logits.astype(np.float64)
    for word in set(seen):
        x[word] = x[word] / repetition_penalty if x[word] > 0 else x[word] * repetition_penalty
    if temperature == 0:
        return np.eye(len(x))[x.argmax()]
    x = x / temperature

    def probs() -> np.ndarray:
        e = np.exp(x - x.max())
        return e / e.sum()

    if top_k:
        x = np.where(x >= np.sort(x)[::-1][min(top_k, len(x)) - 1], x, -np.inf)
    if top_p < 1:
        p = probs()
        ordered = np.sort(p)[::-1]
        x = np.where(p >= ordered[np.searchsorted(np.cumsum(ordered), top_p)], x, -np.inf)
    if min_p:
        p = probs()
        x = np.where(p >= min_p * p.max(), x, -np.inf)
    return probs()


def drawn(logits: np.ndarray, **options) -> np.ndarray:
    """How often each word came in ROWS draws with different seeds."""
    batch = jnp.broadcast_to(jnp.asarray(logits)[None, None], (ROWS, 1, len(logits)))
    tokens = jnp.broadcast_to(jnp.asarray([*TEXT, 7, 7], jnp.int32)[None], (ROWS, 6))
    lengths = jnp.full((ROWS, 1), len(TEXT), jnp.int32)
    token, _ = draw(batch, Sampling.of(ROWS, **{"temperature": 1.0, **options}), tokens, lengths)
    return np.bincount(np.asarray(token)[:, 0], minlength=len(logits)) / ROWS


def one(logits: np.ndarray, sampling: Sampling, position: int = 4, text: list[int] | None = None) -> np.ndarray:
    batch = len(logits)
    text = [0, 0, 0, 0, 0, 0] if text is None else text
    tokens = jnp.broadcast_to(jnp.asarray(text, jnp.int32)[None], (batch, 6))
    got = draw(jnp.asarray(logits)[:, None], sampling, tokens, jnp.full((batch, 1), position, jnp.int32))
    return np.asarray(got[0])[:, 0]


OPTIONS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 1},
    {"top_k": 4},
    {"top_k": WORDS + 30},
    {"top_p": 1e-6},
    {"top_p": 0.5},
    {"top_p": 0.9},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.5},
    {"temperature": 0.0, "repetition_penalty": 3.0},
    {"temperature": 0.7, "top_k": 6, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.3},
    {"temperature": 1.7, "top_k": 9, "top_p": 0.95},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()))
def test_words_come_as_often_as_the_definition_says(options: dict) -> None:
    want, got = defined(LOGITS, **options), drawn(LOGITS, **options)
    assert not got[want == 0].any(), "a word that was cut came"
    np.testing.assert_allclose(got, want, atol=4.5 * np.sqrt(0.25 / ROWS))
    likely = want > 0.01
    assert (got[likely] > 0).all(), "a word that stays never came"


def test_words_tied_with_the_kth_stay() -> None:
    logits = np.full(WORDS, -9.0, np.float32)
    logits[[1, 4, 6, 9]] = [2.0, 1.0, 1.0, 0.0]
    got = drawn(logits, top_k=2)
    assert np.flatnonzero(got).tolist() == [1, 4, 6]
    assert got[4] == pytest.approx(got[6], abs=0.05)


def test_top_k_of_one_tie_is_both() -> None:
    logits = np.zeros(WORDS, np.float32)
    logits[[2, 8]] = 5.0
    assert np.flatnonzero(drawn(logits, top_k=1)).tolist() == [2, 8]


def spread(*probs: float) -> np.ndarray:
    out = np.full(WORDS, -60.0, np.float32)
    out[: len(probs)] = np.log(probs)
    return out


def test_temperature_comes_before_top_p() -> None:
    """Flattened by T=2 the first two words hold 0.74; as they are, 0.8: only one order keeps the third at 0.75."""
    logits = spread(0.5, 0.3, 0.2)
    assert np.flatnonzero(drawn(logits, temperature=2.0, top_p=0.75)).tolist() == [0, 1, 2]
    assert np.flatnonzero(drawn(logits, temperature=1.0, top_p=0.75)).tolist() == [0, 1]


def test_top_k_comes_before_top_p() -> None:
    """Among the two that top-k leaves, the first holds 0.57 and is enough for 0.55; among all it holds 0.4."""
    logits = spread(0.4, 0.3, 0.2, 0.1)
    assert np.flatnonzero(drawn(logits, top_k=2, top_p=0.55)).tolist() == [0]
    assert np.flatnonzero(drawn(logits, top_p=0.55)).tolist() == [0, 1]


def test_temperature_comes_before_min_p() -> None:
    logits = spread(0.6, 0.3, 0.1)
    assert np.flatnonzero(drawn(logits, min_p=0.4)).tolist() == [0, 1]
    assert np.flatnonzero(drawn(logits, min_p=0.4, temperature=2.0)).tolist() == [0, 1, 2]


def test_the_penalty_comes_before_the_cuts() -> None:
    """Word 0 is first as the model has it, and fourth once its text holds it."""
    logits = spread(0.4, 0.3, 0.2, 0.1) + np.float32(5.0)
    assert np.flatnonzero(drawn(logits, top_k=2, repetition_penalty=2.0)).tolist() == [1, 2]


def test_the_penalty_counts_the_text_before_the_position_only() -> None:
    logits = np.zeros((1, WORDS), np.float32)
    logits[0, [3, 8]] = [2.0, 1.5]
    s = Sampling.of(1, repetition_penalty=2.0)
    text = [1, 2, 3, 3, 3, 3]
    assert one(logits, s, position=2, text=text) == [3]  # written, but not there yet: taken back, or a later guess
    assert one(logits, s, position=3, text=text) == [8]


def test_rows_of_a_batch_keep_their_own_options() -> None:
    """What another row asks for changes nothing: each row draws what it draws alone."""
    rng = np.random.default_rng(8)
    logits = rng.normal(size=(8, WORDS)).astype(np.float32)
    options = {
        "seed": [9, 8, 7, 6, 5, 4, 3, 2],
        "temperature": [0.0, 1.0, 1.3, 0.7, 1.0, 1.0, 0.0, 2.0],
        "top_k": [0, 3, 0, 0, 2, 0, 1, 5],
        "top_p": [1.0, 1.0, 0.6, 1.0, 0.9, 1.0, 0.5, 1.0],
        "min_p": [0.0, 0.0, 0.0, 0.3, 0.0, 0.0, 0.0, 0.1],
        "repetition_penalty": [1.0, 1.0, 1.0, 1.0, 1.0, 1.5, 1.0, 0.8],
    }
    together = one(logits, Sampling.of(8, **options))
    alone = [one(logits[b : b + 1], Sampling.of(1, **{k: [v[b]] for k, v in options.items()}))[0] for b in range(8)]
    assert together.tolist() == alone


def test_noise_depends_on_seed_and_position_only() -> None:
    """The same seed and position give the same draw in any row, batch and number of positions at once."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(4, WORDS)).astype(np.float32)
    empty = jnp.zeros((2, 6), jnp.int32)
    at = jnp.asarray([[5, 6, 7, 8]] * 2, jnp.int32)
    s = Sampling.of(2, temperature=1.0, seed=[31, 77])
    together = np.asarray(draw(jnp.asarray(np.stack([x, x])), s, empty, at)[0])
    for e in range(4):
        alone = one(np.stack([x[e]] * 8), Sampling.of(8, temperature=1.0, seed=[77] * 4 + [31] * 4), position=5 + e)
        assert alone.tolist() == [together[1, e]] * 4 + [together[0, e]] * 4
    a, b, c = (np.asarray(noise(jnp.uint32(s), jnp.int32(p), WORDS)) for s, p in ((1, 5), (1, 6), (2, 5)))
    assert not np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_a_draw_is_the_argmax_of_logits_and_gumbel_noise() -> None:
    s = Sampling.of(8, temperature=0.9, seed=3)
    got = one(np.stack([LOGITS] * 8), s)
    for b in range(8):
        g = np.asarray(noise(s.seed[b], jnp.int32(4), WORDS), np.float64)
        assert got[b] == (LOGITS.astype(np.float64) / 0.9 + g).argmax()


def test_one_seed_gives_row_r_the_seed_plus_r_and_a_list_is_taken_as_it_is() -> None:
    assert np.asarray(Sampling.of(3, seed=7).seed).tolist() == [7, 8, 9]
    assert np.asarray(Sampling.of(3, seed=[7, 7, 1]).seed).tolist() == [7, 7, 1]
    assert np.asarray(Sampling.of(1, seed=2**32 - 1).seed).tolist() == [2**32 - 1]


def test_logprobs_are_of_the_model_as_it_is() -> None:
    s = Sampling.of(ROWS, temperature=0.5, top_k=3, top_p=0.9, repetition_penalty=1.7, logprobs=True, seed=0)
    batch = jnp.broadcast_to(jnp.asarray(LOGITS)[None, None], (ROWS, 1, WORDS))
    tokens = jnp.broadcast_to(jnp.asarray([*TEXT, 7, 7], jnp.int32)[None], (ROWS, 6))
    token, logprob = draw(batch, s, tokens, jnp.full((ROWS, 1), 4, jnp.int32))
    x = LOGITS.astype(np.float64)
    want = x - np.log(np.exp(x).sum())
    np.testing.assert_allclose(np.asarray(logprob)[:, 0], want[np.asarray(token)[:, 0]], atol=1e-5)


def test_logprobs_that_nobody_asked_for_are_nan() -> None:
    logits = jnp.asarray(np.stack([LOGITS] * 8))[:, None]
    tokens, at = jnp.zeros((8, 6), jnp.int32), jnp.full((8, 1), 4, jnp.int32)
    assert np.isnan(np.asarray(draw(logits, Sampling.of(8), tokens, at)[1])).all()
    assert np.isfinite(np.asarray(draw(logits, Sampling.of(8, logprobs=[True] + [False] * 7), tokens, at)[1])[0]).all()


def test_a_masked_word_never_comes_greedy_or_drawn() -> None:
    mask = np.ones((8, WORDS), bool)
    mask[:, LOGITS.argmax()] = False
    greedy_and_drawn = Sampling.of(8, temperature=[0.0, 0.0] + [1.0] * 6, top_k=2, mask=jnp.asarray(mask))
    got = one(np.stack([LOGITS] * 8), greedy_and_drawn)
    order = np.argsort(LOGITS)[::-1]
    assert got[:2].tolist() == [order[1]] * 2
    assert set(got.tolist()) <= set(order[1:3].tolist())


def test_nothing_in_it_is_static() -> None:
    """A batch mixes requests, and others follow, without a new compilation."""
    traces = []

    @jax.jit
    def step(logits, s, tokens, at):
        traces.append(1)
        return sample(logits, s, tokens, at)[0]

    logits = jnp.asarray(np.stack([LOGITS] * 2))[:, None]
    tokens, at = jnp.zeros((2, 6), jnp.int32), jnp.full((2, 1), 4, jnp.int32)
    for options in ({}, {"temperature": 1.0, "top_k": 3}, {"top_p": 0.5, "min_p": 0.1}, {"seed": 99, "logprobs": True}):
        step(logits, Sampling.of(2, **options), tokens, at)
    assert len(traces) == 1


def test_a_tiny_temperature_is_nearly_greedy() -> None:
    got = drawn(LOGITS, temperature=1e-6, top_p=0.9)
    assert got[LOGITS.argmax()] == 1


@pytest.mark.parametrize(
    "option",
    [
        {"temperature": -0.1},
        {"temperature": float("inf")},
        {"temperature": float("nan")},
        {"temperature": "hot"},
        {"temperature": None},
        {"top_p": 0},
        {"top_p": 1e-46},
        {"repetition_penalty": 1e-46},
        {"top_p": 1.5},
        {"top_p": -0.5},
        {"top_p": float("nan")},
        {"top_k": -1},
        {"top_k": 2.5},
        {"top_k": 2**40},
        {"min_p": 2},
        {"min_p": -0.1},
        {"repetition_penalty": 0},
        {"repetition_penalty": -1.0},
        {"seed": -1},
        {"seed": 1.5},
        {"seed": 2**32},
        {"seed": None},
        {"seed": "lucky"},
        {"logprobs": "yes"},
        {"temperature": [0.1, 0.2, 0.3]},
        {"temperature": [0.5, -0.5]},
        {"seed": [1]},
        {"top_k": [[1, 2]]},
        {"top_p": []},
    ],
    ids=str,
)
def test_an_option_out_of_range_is_refused_by_name(option: dict) -> None:
    (name,) = option
    with pytest.raises(SamplingError) as e:
        Sampling.of(2, **option)
    assert e.value.what.startswith(name)
    assert e.value.fix


@pytest.mark.parametrize(
    "option",
    [
        {"temperature": 0},
        {"top_p": 1},
        {"top_k": 0},
        {"top_k": 3.0},
        {"min_p": 0},
        {"min_p": 1},
        {"seed": 0},
        {"seed": np.int64(3)},
        {"temperature": np.float32(0.5)},
        {"temperature": (0.5, 0.6)},
        {"seed": np.array([3, 4])},
    ],
    ids=str,
)
def test_an_option_on_the_edge_of_its_range_is_taken(option: dict) -> None:
    Sampling.of(2, **option)
