"""Evaluation: windows, perplexity and KL against their definitions in float64, intervals that cover, refusals."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

import infopt as ip
from infopt import evaluate
from infopt.errors import EvaluationError, ParamsError, PromptError
from infopt.evaluate import Scores
from infopt.io.tokenizer import Tokenizer
from infopt.model import Weights
from infopt.reference import reference

FIXTURES = Path(__file__).parent / "fixtures"
VOCAB, CONTEXT = 61, 320
BARE = ip.models.llama(
    layers=2, dim=32, heads=4, kv_heads=2, head_dim=16, mlp=48, vocab=VOCAB, context=CONTEXT, tied=False
)
PARAMS = BARE.init(jax.random.key(1))
PACKED = ip.quantize(bits=4, group=16)(BARE)
PACKED_PARAMS = PACKED.convert(PARAMS)
TOKENS = np.random.default_rng(0).integers(0, VOCAB, 150).tolist()
CUT = ip.windows(TOKENS, length=40, stride=25)


def by_bytes(begin: bool) -> Tokenizer:
    """A tokenizer of single bytes; token 256 begins every text, if asked for."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(alphabet)} | {"<s>": 256, "</s>": 257}
    backend = tokenizers.Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    if begin:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return Tokenizer(backend, (257,))


@functools.cache
def texts(begin: bool = False) -> tuple[ip.Model, Any]:
    """A model with a tokenizer, and its params."""
    model = ip.models.llama(layers=1, dim=32, heads=2, kv_heads=1, head_dim=16, mlp=32, vocab=258, context=64)
    model = dataclasses.replace(model, tokenizer=by_bytes(begin))
    return model, model.init(jax.random.key(2))


def logp(model: ip.Model, params: Any, tokens: Any) -> np.ndarray:
    """Log-probabilities `[T, V]` of the numpy model."""
    logits = reference(ip.oracle(model.spec), Weights.of(model.spec, params), tokens)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


# ------------------------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize(
    ("count", "length", "stride"), [(50, 10, 4), (51, 10, 9), (10, 10, 3), (33, 16, None), (12, 4, 1)]
)
def test_each_token_is_scored_once_with_the_context_that_is_promised(
    begin: bool, count: int, length: int, stride: int | None
) -> None:
    tokens = list(range(100, 100 + count))
    cut = ip.windows(tokens, length, stride, tokenizer=by_bytes(begin))
    scored = [t for row, start in zip(cut.rows, cut.starts) for t in row[start:].tolist()]
    assert scored == tokens[0 if begin else 1 :]
    assert cut.scored == len(scored) and cut.length == length
    step = stride or (length - 1)
    assert all(start >= length - step for start in cut.starts[1:])
    assert all(start >= 1 and len(row) <= length for row, start in zip(cut.rows, cut.starts))
    assert all((row[0] == 256) == begin for row in cut.rows)
    assert cut.units == tuple(range(len(cut)))


def test_documents_are_cut_one_by_one_and_are_the_units() -> None:
    cut = ip.windows([[1, 2, 3, 4, 5, 6, 7], [8, 9]], length=4, stride=3)
    assert [row.tolist() for row in cut.rows] == [[1, 2, 3, 4], [4, 5, 6, 7], [8, 9]]
    assert cut.units == (0, 0, 1) and cut.starts == (1, 1, 1)


def test_bos_is_there_once_whether_the_ids_had_it_or_not() -> None:
    tokenizer = by_bytes(True)
    with_it = ip.windows(tokenizer.encode("hello, world"), 8, tokenizer=tokenizer)
    assert with_it.digest == ip.windows("hello, world", 8, tokenizer=tokenizer).digest
    assert with_it.digest == ip.windows(tokenizer.encode("hello, world", special=False), 8, tokenizer=tokenizer).digest


@pytest.mark.parametrize("begin", [False, True])
def test_bytes_are_those_of_the_scored_text(begin: bool) -> None:
    text = "Füße, 日本語 und 🎉 " * 5  # windows of bytes end within characters
    cut = ip.windows(text, 16, 5, tokenizer=by_bytes(begin))
    assert cut.bytes is not None
    assert sum(cut.bytes) == len(text.encode()) - (0 if begin else 1)
    assert max(abs(size - (len(row) - start)) for size, row, start in zip(cut.bytes, cut.rows, cut.starts)) <= 3


def test_a_sample_is_seeded_and_keeps_order() -> None:
    cut = ip.windows(list(range(1000)), 20)
    one, two = cut.sample(7, seed=3), cut.sample(7, seed=3)
    assert one.digest == two.digest != cut.sample(7, seed=4).digest
    assert len(one) == 7 and list(one.units) == sorted(one.units)
    assert cut.sample(10**6).digest == cut.digest


@pytest.mark.parametrize(
    ("text", "how", "said"),
    [
        ([1, 2, 3], dict(length=4), "the text has 3 tokens: too short"),
        ([[1, 2, 3], [4]], dict(length=4), "document 1 has 1 tokens"),
        ([], dict(length=4), "there is no text"),
        ([1] * 9, dict(length=4, stride=4), "stride <= 3"),
        ([1] * 9, dict(length=1), "length=1"),
        ([1] * 9, dict(length=4, stride=0), "stride=0"),
        ([1] * 9, dict(length=2.5), "length=2.5"),
        ([1, -1] * 9, dict(length=4), "a token -1"),
        ([1.5] * 9, dict(length=4), "neither a text nor token ids"),
        ("no tokenizer", dict(length=4), "without a tokenizer"),
        ("short", dict(length=64, tokenizer=by_bytes(True)), "too short"),
    ],
)
def test_what_cannot_be_cut_is_refused(text: Any, how: Any, said: str) -> None:
    with pytest.raises(EvaluationError, match=said):
        ip.windows(text, **how)


def test_overlapping_texts_are_refused_and_others_pass() -> None:
    rng = np.random.default_rng(1)
    one, two = rng.integers(0, 50, 500), rng.integers(0, 50, 500)
    ip.check_disjoint(one, two)
    mixed = np.concatenate([two[:100], one[200:232], two[100:]])
    with pytest.raises(EvaluationError, match="overlap: 1 runs of 32"):
        ip.check_disjoint(one, mixed)
    ip.check_disjoint(one, mixed, n=33)
    with pytest.raises(EvaluationError, match="overlap"):
        ip.check_disjoint([one, two], ip.windows(mixed, 64))
    with pytest.raises(EvaluationError, match="overlap: 1 runs"):
        ip.check_disjoint([[1, 2, 3], one], [[1, 2, 3]])  # short documents count as wholes


# ------------------------------------------------------------------------------------------------------------- measure


def test_perplexity_and_kl_are_their_definitions_in_float64() -> None:
    scores = ip.measure(PACKED, PACKED_PARAMS, CUT, base=(BARE, PARAMS))
    nll, kl, agree = [], [], []
    for row, start in zip(CUT.rows, CUT.starts):
        q, p = (logp(m, w, row)[start - 1 : -1] for m, w in ((PACKED, PACKED_PARAMS), (BARE, PARAMS)))
        nll.append(-q[np.arange(len(q)), row[start:]])
        kl.append((np.exp(p) * (p - q)).sum(-1))
        agree.append(p.argmax(-1) == q.argmax(-1))
    assert scores.tokens == tuple(map(len, nll))
    np.testing.assert_allclose(scores.nll, [x.sum() for x in nll], rtol=1e-5)
    np.testing.assert_allclose(scores.kl_sums, [x.sum() for x in kl], rtol=1e-3)
    assert scores.agree == tuple(x.sum() for x in agree)
    every = np.concatenate(kl)
    assert scores.ppl.value == pytest.approx(math.exp(np.concatenate(nll).mean()), rel=1e-5)
    assert scores.kl.value == pytest.approx(every.mean(), rel=1e-3)
    assert scores.kl99.value == pytest.approx(np.quantile(every, 0.99, method="inverted_cdf"), rel=2e-3)
    assert scores.top1.value == np.concatenate(agree).mean()
    with pytest.raises(EvaluationError, match="bits a byte were not measured"):
        _ = scores.bits_per_byte


def test_bits_a_byte_are_nats_over_the_bytes_of_the_text() -> None:
    model, params = texts()
    cut = ip.windows("The quick brown fox jumps over the lazy dog. " * 4, 48, tokenizer=model.tokenizer)
    scores = ip.measure(model, params, cut)
    assert scores.bytes == cut.bytes == scores.tokens  # a byte a token
    assert scores.bits_per_byte.value == pytest.approx(math.log2(scores.ppl.value))


def test_a_model_against_itself_has_no_kl_at_all() -> None:
    for model, params in ((BARE, PARAMS), (PACKED, PACKED_PARAMS), (ip.cache_kv(bits=8)(BARE), PARAMS)):
        scores = ip.measure(model, params, CUT, base=(model, params))
        assert scores.kl_sums == (0.0,) * len(CUT) and scores.kl99.value == 0.0
        assert scores.top1 == ip.Estimate(1.0, 0.0, 1.0, 1.0, scores.top1.note)
        assert ip.noise_floor(model, params, CUT) == 0.0


def test_batches_and_padding_change_nothing() -> None:
    want = ip.measure(PACKED, PACKED_PARAMS, CUT, base=(BARE, PARAMS), batch=len(CUT))
    for batch in (1, 2, 100):
        got = ip.measure(PACKED, PACKED_PARAMS, CUT, base=(BARE, PARAMS), batch=batch)
        np.testing.assert_allclose(got.nll, want.nll, rtol=1e-6)
        np.testing.assert_allclose(got.kl_sums, want.kl_sums, rtol=1e-4)
    longer = ip.windows([TOKENS, TOKENS[:9]], 100, 60)  # the short one is padded to the others
    alone = ip.measure(BARE, PARAMS, ip.windows([TOKENS[:9]], 100))
    assert ip.measure(BARE, PARAMS, longer).nll[-1] == pytest.approx(alone.nll[0], rel=1e-6)


def test_the_product_with_the_vocabulary_goes_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    want = ip.measure(PACKED, PACKED_PARAMS, CUT, base=(BARE, PARAMS))
    monkeypatch.setattr(evaluate, "_BYTES", 4 * 4 * VOCAB * 7)  # seven tokens at once
    seen = []
    against = evaluate._against
    monkeypatch.setattr(evaluate, "_against", lambda *a: seen.append(a[0].shape) or against(*a))
    got = ip.measure(PACKED, PACKED_PARAMS, CUT, base=(BARE, PARAMS))
    assert set(seen) == {(7, VOCAB)}
    np.testing.assert_allclose(got.nll, want.nll, rtol=1e-6)
    np.testing.assert_allclose(got.kl_sums, want.kl_sums, rtol=1e-4)


LONG = ip.windows(np.random.default_rng(4).integers(0, VOCAB, 700).tolist(), length=300, stride=200)


@pytest.mark.parametrize(
    "stack",
    ["cache_kv()", "cache_kv(bits=8)", "sliding_window(50, sinks=2) | cache_kv(bits=8) | paged(16)", "speculative"],
)
def test_a_stack_on_its_own_path_scores_as_its_oracle_does(stack: str) -> None:
    if stack == "speculative":
        model = (ip.cache_kv() | ip.speculative(ip.self_draft(ip.quantize(bits=8)), k=2))(BARE)
    else:
        model = ip.parse_stack(stack)(BARE)
    bare = ip.Model(ip.oracle(model.spec))
    assert bare.spec.kv == model.spec.kv  # the codec stays
    cached = ip.measure(model, model.convert(PARAMS), LONG)
    np.testing.assert_allclose(cached.nll, ip.measure(bare, PARAMS, LONG).nll, rtol=1e-5)
    plain = np.array(ip.measure(BARE, PARAMS, LONG).nll)
    changed = float(np.max(np.abs(np.array(cached.nll) / plain - 1)))
    assert (changed > 1e-6) == (not model.exact), "what is not exact is seen, what is exact is not"


def test_a_spec_and_a_shape_are_compiled_once() -> None:
    evaluate._programs.cache_clear()
    for seed in (0, 1):
        params = BARE.init(jax.random.key(seed))
        ip.measure(BARE, params, CUT, base=(BARE, PARAMS), batch=2)
    read, words = evaluate._programs(evaluate.build(BARE.spec))
    assert read._cache_size() == words._cache_size() == 1


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray, lambda x: np.asarray(x, np.float64)])
def test_any_function_of_tokens_stands_in_for_a_model(kind: Any) -> None:
    want = ip.measure(PACKED, PACKED_PARAMS, CUT, base=(BARE, PARAMS), batch=3)
    apply = jax.jit(PACKED.apply)
    shapes = set()

    def peer(tokens: np.ndarray) -> Any:
        shapes.add(tokens.shape)
        return kind(apply(PACKED_PARAMS, tokens)[0])

    got = ip.measure(peer, None, CUT, base=(BARE, PARAMS), batch=3)
    np.testing.assert_allclose(got.nll, want.nll, rtol=1e-5)
    np.testing.assert_allclose(got.kl_sums, want.kl_sums, rtol=1e-3)
    assert shapes == {(3, 40)}, "one shape, for functions that compile"
    assert got.windows == want.windows
    both = ip.measure(BARE, PARAMS, CUT, base=(peer, None), batch=3)
    assert both.kl.value > 0


def test_nan_is_said_and_nothing_raises() -> None:
    broken = jax.tree.map(lambda x: x * np.float32("nan"), PARAMS)
    scores = ip.measure(BARE, broken, CUT, base=(BARE, PARAMS))
    for metric in ("ppl", "kl", "kl99", "top1"):
        estimate = scores.estimate(metric)
        assert math.isnan(estimate.value) and "not finite" in str(estimate)
    good = ip.measure(BARE, PARAMS, CUT, base=(BARE, PARAMS))
    assert "not finite" in str(ip.difference(scores, good, "ppl"))
    again = Scores.from_json(scores.to_json())
    assert all(map(math.isnan, again.nll)) and math.isnan(again.kl.value)
    assert "NaN" not in scores.to_json()  # which is no JSON


def test_a_word_without_probability_makes_perplexity_infinite() -> None:
    def certain(tokens: np.ndarray) -> np.ndarray:
        return np.where(np.arange(VOCAB) == 0, 0.0, -np.inf) * np.ones((*tokens.shape, 1), np.float32)

    scores = ip.measure(certain, None, CUT, base=(BARE, PARAMS))
    assert scores.ppl.value == scores.kl.value == math.inf
    assert Scores.from_json(scores.to_json()).nll == scores.nll
    assert ip.measure(certain, None, CUT, base=(certain, None)).kl.value == 0.0


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: ip.measure(BARE, PARAMS, ip.windows([VOCAB] * 50, 40)), EvaluationError, f"token {VOCAB} is outside"),
        (lambda: ip.measure(BARE, PARAMS, ip.windows([1] * 999, 400)), PromptError, "windows of 400 tokens exceed"),
        (lambda: ip.measure(PACKED, PARAMS, CUT), ParamsError, "dense"),
        (lambda: ip.measure(BARE, PARAMS, TOKENS), EvaluationError, "given list as its windows"),
        (lambda: ip.measure(BARE, PARAMS, CUT, batch=0), EvaluationError, "batch=0"),
        (lambda: ip.measure("llama", None, CUT), EvaluationError, "a str"),
        (lambda: ip.measure(lambda t: t, PARAMS, CUT), EvaluationError, "a function of tokens alone"),
        (lambda: ip.measure(lambda t: t, None, CUT), EvaluationError, r"gave int32\[6, 40\]"),
        (
            lambda: ip.measure(lambda t: np.zeros((*t.shape, 9), np.float32), None, CUT),
            EvaluationError,
            "vocabulary of 9 words",
        ),
        (
            lambda: ip.measure(lambda t: np.zeros((*t.shape, 64), np.float32), None, CUT, base=(BARE, PARAMS)),
            EvaluationError,
            "has 64 words, its base 61",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(call: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        call()


def test_windows_of_another_tokenizer_are_refused() -> None:
    model, params = texts()
    other = by_bytes(False)
    other.backend.add_tokens(["another"])
    with pytest.raises(EvaluationError, match="another tokenizer"):
        ip.measure(model, params, ip.windows("x" * 99, 32, tokenizer=other))


def test_progress_counts_windows() -> None:
    seen: list[tuple[int, int]] = []
    ip.measure(BARE, PARAMS, CUT, batch=2, progress=lambda *done: seen.append(done))
    assert seen == [(2, 6), (4, 6), (6, 6)]


def test_smollm2_has_the_perplexity_that_transformers_computes(smollm2: Path) -> None:
    golden = json.loads((FIXTURES / "perplexity_golden.json").read_text("utf-8"))
    model, params = ip.load(smollm2)
    cut = ip.windows(golden["text"], golden["length"], golden["stride"], tokenizer=model.tokenizer)
    scores = ip.measure(model, params, cut)
    assert list(scores.tokens) == golden["tokens"]
    np.testing.assert_allclose(scores.nll, golden["nll"], rtol=2e-5)
    want = math.exp(sum(golden["nll"]) / sum(golden["tokens"]))
    assert f"{scores.ppl.value:.4g}" == f"{want:.4g}"


# ----------------------------------------------------------------------------------------------------------- intervals


def test_scores_come_back_from_json_as_they_were() -> None:
    scores = ip.measure(PACKED, PACKED_PARAMS, CUT, base=(BARE, PARAMS))
    again = Scores.from_json(scores.to_json())
    assert again == scores == Scores.from_json(json.loads(scores.to_json()))
    assert again.kl99 == scores.kl99
    with pytest.raises(EvaluationError, match="not a row of scores"):
        Scores.from_json('{"windows": "x"}')
    with pytest.raises(EvaluationError, match="not a row of scores"):
        Scores.from_json("{")


def test_a_paired_difference_is_narrower_than_its_two_sides() -> None:
    one, two = (ip.measure(m, p, CUT, base=(BARE, PARAMS)) for m, p in ((BARE, PARAMS), (PACKED, PACKED_PARAMS)))
    paired = ip.difference(two, one, "ppl")
    assert paired.value == pytest.approx(two.ppl.value - one.ppl.value)
    assert paired.stderr < one.ppl.stderr and paired.low < paired.value < paired.high
    share = ip.difference(two, one, "ppl", relative=True)
    assert share.value == pytest.approx(two.ppl.value / one.ppl.value - 1)
    assert ip.difference(two, two, "ppl") == ip.Estimate(0.0, 0.0, 0.0, 0.0, paired.note)
    assert ip.difference(two, one, "ppl", seed=1) == ip.difference(two, one, "ppl", seed=1) != paired
    assert "not finite" in ip.difference(two, one, "kl", relative=True).note  # the base's is 0


def test_ratios_are_of_sums_and_not_means_of_windows() -> None:
    scores = Scores("w", (0, 1), (10, 90), (10.0, 180.0))
    assert scores.ppl.value == pytest.approx(math.exp(1.9))


def test_documents_are_resampled_whole() -> None:
    nll = np.repeat(np.random.default_rng(2).normal(30, 3, 25), 8)  # eight equal windows a document
    alone = Scores("w", tuple(range(200)), (10,) * 200, tuple(nll))
    joined = dataclasses.replace(alone, units=tuple(np.repeat(np.arange(25), 8).tolist()))
    assert joined.ppl.value == pytest.approx(alone.ppl.value)
    assert joined.ppl.stderr == pytest.approx(alone.ppl.stderr * math.sqrt(8), rel=0.15)


def test_few_units_are_told_of() -> None:
    one = Scores("w", (0,), (10,), (20.0,))
    assert "no interval" in str(one.ppl) and math.isnan(one.ppl.low)
    few = Scores("w", tuple(range(6)), (10,) * 6, (20.0, 21.0, 22.0, 19.0, 18.0, 20.0))
    assert "6 units" in few.ppl.note
    many = Scores("w", tuple(range(20)), (10,) * 20, tuple(np.linspace(18, 22, 20).tolist()))
    assert many.ppl.note == ""


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda s, o: ip.difference(s, o, "ppl"), "not measured on the same text"),
        (lambda s, o: ip.difference(s, s, "kl"), "its base, and none was given"),
        (lambda s, o: ip.difference(s, s, "bleu"), "no metric 'bleu'"),
        (lambda s, o: s.estimate("top1"), "its base, and none was given"),
        (lambda s, o: s.estimate("greedy"), "no metric 'greedy'"),
        (lambda s, o: s.estimate("ppl", level=95), "level=95"),
        (lambda s, o: s.estimate("ppl", resamples=3), "resamples=3"),
    ],
)
def test_what_cannot_be_compared_is_refused(call: Any, said: str) -> None:
    scores = Scores("w", (0, 1), (10, 9), (20.0, 21.0))
    with pytest.raises(EvaluationError, match=said):
        call(scores, dataclasses.replace(scores, windows="v"))


@functools.cache
def population() -> dict[str, np.ndarray]:
    """A large text in windows: tokens of each, and sums of -log p under a model and a worse one, of KL, of agreements.

    Tokens follow each other closely (0.7); windows differ in length, in how hard their text is, and in how much worse
    the worse model is there.
    """
    rng, length, windows = np.random.default_rng(7), 256, 20_000
    topic, hard = rng.normal(0, 0.15, windows), np.exp(rng.normal(0, 0.3, windows))
    tokens = rng.integers(length // 2, length + 1, windows)
    sums = {name: np.zeros(windows) for name in ("nll", "worse", "kl", "other", "agree", "agree_other")}
    z = rng.normal(size=windows)
    for t in range(length):
        z = 0.7 * z + math.sqrt(1 - 0.7**2) * rng.normal(size=windows)
        nll = np.exp(topic + 0.9 * z) * 1.9
        kl = 0.04 * hard * np.exp(0.7 * z + rng.normal(size=windows))
        agree = rng.normal(size=windows) + 0.4 * z > 0.3 * np.log(hard) - 1.3
        columns = {
            "nll": nll,
            "worse": nll + 0.06 * hard * (1 + 0.5 * z) + 0.25 * np.sqrt(hard) * rng.normal(size=windows),
            "kl": kl,
            "other": 0.8 * kl * np.exp(0.3 * rng.normal(size=windows)),
            "agree": agree,
            "agree_other": agree & (rng.random(windows) > 0.02 * hard),
        }
        for name, column in columns.items():
            sums[name] += column * (t < tokens)
    return {"tokens": tokens, **sums}


@pytest.mark.parametrize("metric", ["ppl", "kl", "top1"])
def test_intervals_of_paired_differences_cover_the_truth_93_to_97_times_in_100(metric: str) -> None:
    text, windows, runs = population(), 40, 1500

    def rows(chosen: np.ndarray) -> list[Scores]:
        part = {name: tuple(column[chosen].tolist()) for name, column in text.items()}
        one = Scores(
            "w", tuple(range(len(chosen))), part["tokens"], part["worse"], None, part["other"], part["agree_other"]
        )
        return [one, dataclasses.replace(one, nll=part["nll"], kl_sums=part["kl"], agree=part["agree"])]

    everything = rows(np.arange(len(text["tokens"])))
    truth = np.diff([scores._statistic(metric)(np.ones((1, scores._units)))[0] for scores in everything])[0] * -1
    rng, inside = np.random.default_rng(8), 0
    for run in range(runs):
        found = ip.difference(*rows(rng.integers(0, len(text["tokens"]), windows)), metric, resamples=400, seed=run)
        inside += found.low <= truth <= found.high
    assert 0.93 <= inside / runs <= 0.97, inside / runs


# ---------------------------------------------------------------------------------------------- texts and continuations


def test_greedy_agreement_counts_tokens_before_the_first_that_differs() -> None:
    model = ip.cache_kv()(BARE)
    stack = (ip.quantize(bits=4, group=16) | ip.cache_kv())(BARE)
    prompts = [TOKENS[i : i + 5] for i in range(0, 50, 5)]
    found = ip.greedy_agreement(stack, stack.convert(PARAMS), (model, PARAMS), prompts, max_new=12)
    ours = ip.generate(stack, stack.convert(PARAMS), prompts, max_new=12).tokens
    theirs = ip.generate(model, PARAMS, prompts, max_new=12).tokens
    for length, a, b in zip(found.lengths, ours, theirs, strict=True):
        assert a[:length] == b[:length] and (length == 12 or a[length] != b[length])
    assert 0 < found.estimate().value < 12
    same = ip.greedy_agreement(model, PARAMS, (model, PARAMS), prompts, max_new=12)
    assert same.lengths == (12,) * 10
    assert ip.difference(same, found, "greedy").value == 12 - found.estimate().value
    assert ip.Agreement.from_json(found.to_json()) == found
    with pytest.raises(EvaluationError, match="same text"):
        ip.difference(same, dataclasses.replace(found, max_new=13), "greedy")


def test_loglikelihood_is_the_sum_of_the_continuations_log_probabilities() -> None:
    pairs = [(TOKENS[:5], TOKENS[5:9]), (TOKENS[:50], TOKENS[50:51]), (TOKENS[7:8], TOKENS[8:60])]
    best = int(logp(BARE, PARAMS, TOKENS[:5])[-1].argmax())
    pairs.append((TOKENS[:5], [best]))
    for model in (BARE, ip.cache_kv()(BARE)):
        found = ip.loglikelihood(model, PARAMS, *map(list, zip(*pairs)))
        for (context, continuation), likelihood in zip(pairs, found):
            scores = logp(BARE, PARAMS, context + continuation)[len(context) - 1 : -1]
            chosen = scores[np.arange(len(continuation)), continuation]
            assert likelihood.logprob == pytest.approx(chosen.sum(), rel=1e-5)
            assert likelihood.greedy == bool((chosen == scores.max(-1)).all())
        assert found[-1].greedy
        assert ip.loglikelihood(model, PARAMS, *pairs[0]).logprob == pytest.approx(found[0].logprob, rel=1e-5)


def test_loglikelihood_of_texts_counts_blanks_to_the_continuation_and_starts_with_bos() -> None:
    model, params = texts(True)
    ids = model.tokenizer.encode("ab cd")
    want = ip.loglikelihood(model, params, ids[:3], ids[3:])
    assert ip.loglikelihood(model, params, "ab ", "cd") == want
    assert ip.loglikelihood(model, params, "ab", " cd") == want
    assert ip.loglikelihood(model, params, "", "ab cd") == ip.loglikelihood(model, params, ids[:1], ids[1:])


@pytest.mark.parametrize(
    ("context", "continuation", "error", "said"),
    [
        ([1], [], EvaluationError, "continuation is empty"),
        ([[1], [2]], [[3]], EvaluationError, "2 contexts were given with 1"),
        ([[]], [[3]], EvaluationError, "context is empty"),
        ([], [], EvaluationError, "0 contexts"),
        ("a", [3], EvaluationError, "one of context and continuation"),
        ("a", "b", EvaluationError, "without a tokenizer"),
        ([1], [VOCAB], PromptError, "outside the vocabulary"),
        ([1] * CONTEXT, [2], PromptError, "exceed the model's context"),
    ],
)
def test_what_has_no_likelihood_is_refused(context: Any, continuation: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        ip.loglikelihood(BARE, PARAMS, context, continuation)


def test_the_harness_adapter_answers_what_lm_eval_asks(monkeypatch: pytest.MonkeyPatch, example: Any) -> None:
    class LM:
        def __init__(self) -> None:
            self.made = True

    stub = types.ModuleType("lm_eval.api.model")
    stub.LM = LM  # type: ignore[attr-defined]
    for name, module in (("lm_eval", stub), ("lm_eval.api", stub), ("lm_eval.api.model", stub)):
        monkeypatch.setitem(sys.modules, name, module)
    model, params = texts(False)
    lm = example("lm_eval_adapter").harness_model(model, params)
    assert isinstance(lm, LM) and lm.made

    def request(*args: Any) -> Any:
        return types.SimpleNamespace(args=args)

    asked = [request("ab", " c"), request("", "abc"), request("x" * 200, " y")]
    one, two, three = lm.loglikelihood(asked)
    for found, want in ((one, ("ab", " c")), (two, ([257], model.tokenizer.encode("abc")))):
        value, greedy = ip.loglikelihood(model, params, *want)
        assert found == (pytest.approx(value, rel=1e-6), greedy)  # rows that are read together sum in another order
    assert three[0] == pytest.approx(ip.loglikelihood(model, params, "x" * 62, " y")[0])  # the end of it fits
    text = "ab cd " * 30  # more than the context of 64
    (rolled,) = lm.loglikelihood_rolling([request(text)])
    ids = [257, *model.tokenizer.encode(text)]
    want = ip.measure(model, params, ip.windows([ids], 64)).nll
    assert rolled == pytest.approx(-sum(want))
    (short,) = lm.loglikelihood_rolling([request("ab")])
    assert short == pytest.approx(lm.loglikelihood([request("", "ab")])[0][0])
    told = ip.generate(model, params, "ab", max_new=5).text
    assert lm.generate_until([request("ab", {"until": ["\n\n"], "max_gen_toks": 5})])[0] == told.split("\n\n")[0]
