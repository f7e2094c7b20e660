"""Our stacks against `transformers` in float32, on the checkpoints that fixtures/make_checkpoints.py made."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import infopt as ip

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
FOLDERS = ["llama", "llama_tied", "gemma3"]
CHUNK, LENGTH, MAX_LEN = 7, 40, 48
TOLERANCE = 1e-4

Round = tuple[list[int], int]
"""How many tokens each row is fed, and how many wrong ones follow, to be taken back again."""


@pytest.fixture(
    scope="module",
    params=[(f, cached) for f in FOLDERS for cached in (False, True)],
    ids=lambda p: f"{p[0]}-{'cached' if p[1] else 'uncached'}",
)
def stack(request: pytest.FixtureRequest) -> tuple[Any, Any, Callable[..., Any], Any]:
    """A model, its params, its jitted `apply`, and the golden logits."""
    folder, cached = request.param
    model, params = ip.load(str(FIXTURES / folder))
    if cached:
        fast = ip.cache_kv()(model)
        model, params = fast, fast.convert(params)
    return model, params, jax.jit(model.apply), np.load(FIXTURES / folder / "golden.npz")


def feed(model: Any, params: Any, apply: Callable[..., Any], tokens: np.ndarray, rounds: Iterable[Round]) -> np.ndarray:
    """Logits `[B, T, V]`, gathered from calls of at most CHUNK tokens a row."""
    rng = np.random.default_rng(0)
    state = model.init_state(len(tokens), MAX_LEN, chunk=CHUNK)
    done, parts = np.zeros(len(tokens), int), [list[np.ndarray]() for _ in tokens]
    for counts, wrong in rounds:
        counts = np.minimum(counts, tokens.shape[1] - done)
        # What lies beyond a row's count is never read: other words of the vocabulary stand there.
        chunk = rng.integers(0, model.spec.config.vocab, (len(tokens), CHUNK))
        for row, n in enumerate(counts):
            chunk[row, :n] = tokens[row, done[row] : done[row] + n]
        logits, state = apply(params, jnp.asarray(chunk), state, jnp.asarray(counts))
        for row, n in enumerate(counts):
            parts[row].append(np.asarray(logits[row, :n]))
        done = done + counts
        if wrong:
            chunk = rng.integers(0, model.spec.config.vocab, (len(tokens), CHUNK))
            _, state = apply(params, jnp.asarray(chunk), state, jnp.full(len(tokens), wrong))
            state = ip.rollback(state, wrong)
        np.testing.assert_array_equal(state.lengths, done)
    return np.stack([np.concatenate(part) for part in parts])


def assert_golden(logits: np.ndarray, golden: Any) -> None:
    assert logits.shape[1] == LENGTH
    assert np.abs(logits[:, golden["positions"]] - golden["logits"]).max() < TOLERANCE


def test_whole_prompt_equals_transformers(stack: tuple[Any, ...]) -> None:
    model, params, apply, golden = stack
    state = model.init_state(2, LENGTH, chunk=LENGTH)
    logits, state = apply(params, jnp.asarray(golden["tokens"]), state)
    assert_golden(np.asarray(logits), golden)
    np.testing.assert_array_equal(state.lengths, [LENGTH, LENGTH])


def test_chunks_equal_transformers(stack: tuple[Any, ...]) -> None:
    *run, golden = stack
    assert_golden(feed(*run, golden["tokens"], [([CHUNK, CHUNK], 0)] * 6), golden)


def test_ragged_rows_equal_transformers(stack: tuple[Any, ...]) -> None:
    """Rows run ahead of each other by up to a dozen tokens; some calls give a row nothing."""
    *run, golden = stack
    counts = [[7, 1], [7, 0], [1, 7], [0, 7], [3, 5], [7, 2], [0, 7], [5, 1], [6, 7], [4, 3]]
    assert np.sum(counts, 0).tolist() == [LENGTH, LENGTH]
    assert_golden(feed(*run, golden["tokens"], [(c, 0) for c in counts]), golden)


def test_rows_alone_equal_transformers(stack: tuple[Any, ...]) -> None:
    model, params, apply, golden = stack
    logits = [feed(model, params, apply, golden["tokens"][row : row + 1], [([5], 0)] * 8)[0] for row in (0, 1)]
    assert_golden(np.stack(logits), golden)


@pytest.mark.parametrize("wrong", [1, 4, CHUNK])
def test_rollback_and_refeed_equal_transformers(stack: tuple[Any, ...], wrong: int) -> None:
    """After each call wrong tokens are stored and taken back: the text goes on as if they had never been."""
    *run, golden = stack
    rounds = [
        ([7, 3], wrong),
        ([2, 6], wrong),
        ([1, 1], wrong),
        ([7, 7], wrong),
        ([0, 4], wrong),
        ([7, 3], wrong),
        ([7, 7], wrong),
        ([3, 7], wrong),
        ([6, 2], 0),
    ]
    assert_golden(feed(*run, golden["tokens"], rounds), golden)


FAMILIES = ["gemma2", "gpt2", "gpt_oss", "mistral", "mixtral", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3"]
RAGGED: list[Round] = [([7, 1], 0), ([7, 0], 0), ([1, 7], 0), ([0, 7], 2), ([3, 5], 0), ([7, 2], 5), ([0, 7], 0)]
RAGGED += [([5, 1], 0), ([6, 7], 0), ([4, 3], 0)]


@pytest.mark.parametrize("family", FAMILIES)
def test_families_equal_transformers_whole_and_in_ragged_chunks_with_rollbacks(family: str) -> None:
    model, params = ip.load(FIXTURES / family)
    golden = np.load(FIXTURES / family / "golden.npz")
    assert model.spec.family == family
    state = model.init_state(2, LENGTH, chunk=LENGTH)
    assert_golden(np.asarray(jax.jit(model.apply)(params, jnp.asarray(golden["tokens"]), state)[0]), golden)
    fast = ip.cache_kv()(model)
    assert_golden(feed(fast, fast.convert(params), jax.jit(fast.apply), golden["tokens"], RAGGED), golden)


@pytest.mark.parametrize("dtype", ["keep", "float32"])
def test_experts_in_mxfp4_equal_transformers_packed_and_unpacked(dtype: str) -> None:
    model, params = ip.load(FIXTURES / "gpt_oss_mxfp4", dtype)
    golden = np.load(FIXTURES / "gpt_oss_mxfp4" / "golden.npz")
    assert len(model.spec.weights) == (6 if dtype == "keep" else 0)
    fast = ip.cache_kv()(model)
    assert_golden(feed(fast, fast.convert(params), jax.jit(fast.apply), golden["tokens"], RAGGED), golden)


@pytest.mark.parametrize(("kind", "context"), [("linear", None), ("yarn", None), ("dynamic", LENGTH)])
def test_stretched_positions_equal_transformers(kind: str, context: int | None, tmp_path: pathlib.Path) -> None:
    shutil.copy(FIXTURES / "ropes" / "model.safetensors", tmp_path)
    shutil.copy(FIXTURES / "ropes" / f"config_{kind}.json", tmp_path / "config.json")
    model, params = ip.load(tmp_path, context=context)
    golden = np.load(FIXTURES / "ropes" / f"golden_{kind}.npz")
    state = model.init_state(2, LENGTH, chunk=LENGTH)
    assert_golden(np.asarray(jax.jit(model.apply)(params, jnp.asarray(golden["tokens"]), state)[0]), golden)


def test_longrope_is_chosen_by_the_context_asked_for() -> None:
    """Not by the length so far: keys are stored rotated."""
    golden = np.load(FIXTURES / "phi3" / "golden_short.npz")
    model, params = ip.load(FIXTURES / "phi3", context=16)
    state = model.init_state(2, 16, chunk=16)
    logits = np.asarray(jax.jit(model.apply)(params, jnp.asarray(golden["tokens"]), state)[0])
    assert np.abs(logits[:, golden["positions"]] - golden["logits"]).max() < TOLERANCE
    assert model.spec.config.context == 16
    assert model.spec.config.rope_scaling != ip.load(FIXTURES / "phi3")[0].spec.config.rope_scaling


def test_a_context_beyond_the_models_is_refused() -> None:
    with pytest.raises(ip.InfoptError, match="context=129 is beyond"):
        ip.load(FIXTURES / "qwen3", context=129)
    with pytest.raises(ip.InfoptError, match="beyond the model's 48 positions"):
        ip.load(FIXTURES / "gpt2", context=49)


def test_published_spelling_of_gemma_config_means_the_same(tmp_path: pathlib.Path) -> None:
    for file in ("config_hub.json", "model.safetensors"):
        shutil.copy(FIXTURES / "gemma3" / file, tmp_path / file.replace("_hub", ""))
    model, params = ip.load(str(tmp_path))
    golden = np.load(FIXTURES / "gemma3" / "golden.npz")
    logits, _ = jax.jit(model.apply)(params, jnp.asarray(golden["tokens"]), model.init_state(2, LENGTH, chunk=LENGTH))
    assert_golden(np.asarray(logits), golden)
    assert model.spec == ip.load(str(FIXTURES / "gemma3"))[0].spec


def test_smollm2_writes_what_transformers_writes() -> None:
    """Greedy in float32: the very 48 tokens, and the five likeliest first ones with their logits."""
    golden = json.loads((FIXTURES / "smollm2_greedy.json").read_text())
    model, params = ip.load("smollm2-135m")
    assert model.tokenizer.encode(golden["prompt"]) == golden["prompt_tokens"]
    fast = ip.cache_kv()(model)
    params = fast.convert(params)
    prompt = jnp.asarray([golden["prompt_tokens"]])
    hidden, _ = jax.jit(fast.hidden)(params, prompt, fast.init_state(1, prompt.shape[1], chunk=prompt.shape[1]))
    logits = np.asarray(jax.jit(fast.head)(params, hidden[0, -1]))
    assert np.argsort(-logits)[:5].tolist() == golden["top_ids"]
    np.testing.assert_allclose(logits[golden["top_ids"]], golden["top_logits"], atol=2e-3)
    out = ip.generate(fast, params, golden["prompt"], max_new=len(golden["tokens"]))
    assert (out.tokens, out.text) == (golden["tokens"], golden["text"])
