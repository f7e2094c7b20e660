"""GPTQ is the paper's algorithm, no worse than rounding to nearest on its own inputs, and sees the stack before it."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import infopt as ip
from infopt import ops
from infopt.errors import InfoptError
from infopt.formats import FORMATS
from infopt.methods.gptq import solved
from infopt.methods.layers import Layer, by_layer
from infopt.model import Weights, assemble
from infopt.qtensor import Format, dequantize_array, quantize_array

IDS = np.random.default_rng(0).integers(0, 61, 4096)
HOW: dict[str, Any] = dict(text=IDS, tokens=1024, length=32)


def problem(rows: int = 24, width: int = 64, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A matrix, and the Gram matrix of inputs that are far from independent."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(400, width)) @ (rng.normal(size=(width, width)) / 4 + np.eye(width))
    return rng.normal(size=(rows, width)).astype(np.float32), (inputs.T @ inputs).astype(np.float32)


def paper(w: np.ndarray, gram: np.ndarray, form: Format, damp: float, order: bool) -> np.ndarray:
    """Algorithm 1 in float64, one column at a time, over the scales of rounding to nearest; symmetric formats."""
    row, q = form.row, quantize_array(jnp.asarray(w), form, 2)
    scale = np.repeat(np.asarray(q.scale, np.float64), form.group_of(w.shape[1]), 1)
    h = gram.astype(np.float64)
    h[np.diag_indices_from(h)] += damp * np.mean(np.diag(h))
    at = np.argsort(-np.diag(gram), kind="stable") if order else np.arange(len(h))
    upper = np.linalg.cholesky(np.linalg.inv(h[np.ix_(at, at)])).T
    rest, found = w.astype(np.float64)[:, at], np.zeros(w.shape)
    for i, j in enumerate(at):
        found[:, j] = np.clip(np.round(rest[:, i] / scale[:, j]), row.low, row.high) * scale[:, j]
        error = (rest[:, i] - found[:, j]) / upper[i, i]
        rest[:, i:] -= np.outer(error, upper[i, i:])
    return found


def harm(w: np.ndarray, q: Any, gram: np.ndarray) -> np.ndarray:
    off = w.astype(np.float64) - np.asarray(q, np.float64)
    return np.einsum("oi,ij,oj->o", off, gram.astype(np.float64), off)


@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("form", [Format("int4", 16), Format("int3", 32), Format("int8", None, "float32")], ids=str)
@pytest.mark.parametrize("width", [64, 192], ids=["one block", "two blocks"])
def test_it_is_the_papers_algorithm(width: int, form: Format, order: bool) -> None:
    w, gram = problem(width=width)
    found, fine = solved(jnp.asarray(w), gram, format=form, order=order)
    assert bool(fine)
    got, want = np.asarray(dequantize_array(found), np.float64), paper(w, gram, form, 0.01, order)
    plain = np.asarray(dequantize_array(quantize_array(jnp.asarray(w), form, 2)))
    kept = harm(w, want, gram) >= harm(w, plain, gram)  # rows that rounding to nearest serves better
    same = np.abs(got - np.where(kept[:, None], plain, want)) < 1e-5
    assert same.mean() > 0.995  # float32: a value on the edge may fall to the other side, and move its row's


@pytest.mark.parametrize("name", [n for n, row in FORMATS.items() if row.rule != "none" and not row.kept])
def test_no_row_is_worse_than_rounded_to_nearest_and_most_are_much_better(name: str) -> None:
    row = FORMATS[name]
    form = Format(name, row.group and min(row.group, 32), row.scale)
    w, gram = problem()
    got, plain = solved(jnp.asarray(w), gram, format=form)[0], quantize_array(jnp.asarray(w), form, 2)
    mine, theirs = (harm(w, dequantize_array(q), gram) for q in (got, plain))
    assert (mine <= theirs * (1 + 1e-4)).all()
    assert mine.sum() < 0.75 * theirs.sum()
    assert jax.tree.structure(got) == jax.tree.structure(plain)


def test_a_last_group_that_is_filled_up_is_served_too() -> None:
    w, gram = problem(width=56)
    padded, whole = Format("int4", 16, pad=True), Format("int4", 8)
    got = dequantize_array(solved(jnp.asarray(w), gram, format=padded)[0])
    plain = dequantize_array(quantize_array(jnp.asarray(w), padded, 2))
    assert got.shape == w.shape and dequantize_array(solved(jnp.asarray(w), gram, format=whole)[0]).shape == w.shape
    assert harm(w, got, gram).sum() < 0.75 * harm(w, plain, gram).sum()


def test_a_column_that_nothing_enters_is_rounded_to_nearest() -> None:
    w, gram = problem()
    gram[5] = gram[:, 5] = 0
    form = Format("int4", 16)
    got, plain = solved(jnp.asarray(w), gram, format=form)[0], quantize_array(jnp.asarray(w), form, 2)
    np.testing.assert_array_equal(dequantize_array(got)[:, 5], dequantize_array(plain)[:, 5])


@pytest.fixture(scope="module")
def llama() -> tuple[ip.Model, Any]:
    model = ip.models.llama(layers=3, dim=32, heads=4, kv_heads=2, vocab=61, context=64, tied=False)
    return model, model.init(jax.random.key(0))


def test_statistics_are_of_what_goes_in(llama: tuple[ip.Model, Any]) -> None:
    model, params = llama
    weights, tokens = Weights.of(model.spec, params), IDS[:192].reshape(6, 32)
    seen: dict[str, np.ndarray] = {}
    names = {"layers.0.attn.q", "layers.2.mlp.down", "head"}

    def change(layer: Layer) -> dict[str, Any]:
        seen.update({layer.prefix + n: np.asarray(s.gram) for n, s in layer.statistics.items()})
        return {n: layer.p[n] for n in layer.names}

    by_layer(model.spec, weights, tokens, names, change)
    h = ops.rms_norm(weights["embed"][tokens.reshape(-1)], weights["layers.0.attn_norm"], None, 1e-5)
    np.testing.assert_allclose(seen["layers.0.attn.q"], h.T @ h, rtol=2e-5, atol=1e-3)
    state = model.init_state(6, 32, 32)
    x, _ = model.hidden(params, jnp.asarray(tokens), state)
    x = x.reshape(-1, 32)
    np.testing.assert_allclose(seen["head"], x.T @ x, rtol=2e-4, atol=1e-2)
    assert set(seen) == names and seen["layers.2.mlp.down"].shape == (96, 96)


def test_they_are_those_of_the_stack_as_it_then_is(llama: tuple[ip.Model, Any]) -> None:
    model, params = llama
    for first in ("gqa(1)", "sliding_window(3)", "cache_kv(bits=4)", "cache_kv(bits=4, split=8, tail=8)"):
        last = ip.quantize(bits=4, group=16, where="*.attn.o", method=ip.gptq(**HOW))
        stack = (ip.parse_stack(first) | last)(model)
        bare = ip.parse_stack(first)(model)
        own = bare.convert(params)
        of_base = last.params(Weights.of(model.spec, params), model, last(model).spec)["layers.1.attn.o"]
        found = stack.convert(params)["segments"][0][0]["attn.o"]
        assert not np.array_equal(found.codes[1], of_base.codes), first
        again = last.params(Weights.of(bare.spec, own), bare, stack.spec)["layers.1.attn.o"]
        np.testing.assert_array_equal(found.codes[1], again.codes)


def nats(model: ip.Model, params: Any, teacher: tuple[ip.Model, Any]) -> float:
    cut = ip.windows(IDS[:2048].tolist(), 32)
    return ip.measure(model, params, cut, teacher).kl.value


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral", "gpt2", "gpt_oss"])
def test_a_rounded_model_is_nearer_to_its_base(family: str) -> None:
    model, params = ip.testing.base_of(family)
    plain = ip.quantize(bits=3, group=16)
    better = ip.quantize(bits=3, group=16, method=ip.gptq(**HOW))
    one, other = (nats(t(model), t(model).convert(params), (model, params)) for t in (plain, better))
    assert other < 0.9 * one


@pytest.mark.parametrize("method", [ip.gptq, ip.awq, ip.smoothquant])
def test_the_same_bytes_each_time(method: Any, llama: tuple[ip.Model, Any]) -> None:
    model, params = llama
    rounds = dict(bits=8, activations=8) if method is ip.smoothquant else dict(bits=4, group=16)
    stack = ip.quantize(**rounds, method=method(**HOW))(model)  # type: ignore[arg-type]
    one, other = (jax.tree.leaves(stack.convert(params)) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_stack_says_its_method_and_its_text() -> None:
    stack = ip.quantize(bits=4, group=16, method=ip.gptq(**HOW))
    (text, digest) = stack(ip.models.llama()).recipe.steps[0]
    assert text == f"quantize(bits=4, group=16, method=gptq(text={digest!r}, tokens=1024, length=32))"
    other = ip.quantize(bits=4, group=16, method=ip.gptq(IDS[::-1], tokens=1024, length=32))
    assert other(ip.models.llama()).recipe.steps[0][1] != digest
    assert ip.parse_stack("quantize(bits=4, method='gptq')") == ip.quantize(bits=4, method=ip.gptq())
    assert ip.parse_stack("quantize(bits=4, method=gptq(damp=0.1))") == ip.quantize(bits=4, method=ip.gptq(damp=0.1))


def test_memory_is_a_layers(llama: tuple[ip.Model, Any]) -> None:
    """Of the Gram matrices, those of one layer at a time: a layer's are gone when the next one's turn comes."""
    model, params = llama
    seen, alive = list[weakref.ref[Any]](), list[int]()
    weights, names = Weights.of(model.spec, params), {f"layers.{i}.mlp.up" for i in range(3)}

    def change(layer: Layer) -> dict[str, Any]:
        gc.collect()
        alive.append(sum(ref() is not None for ref in seen))
        seen.extend(weakref.ref(each.gram) for each in layer.statistics.values())
        return {n: layer.p[n] for n in layer.names}

    by_layer(model.spec, weights, IDS[:64].reshape(2, 32), names, change)
    assert len(seen) == 3 and alive == [0, 0, 0]


WRONG: dict[str, tuple[Any, str]] = {
    "short": (lambda: ip.gptq(IDS[:20], length=32), "the text has 20 tokens"),
    "too few": (lambda: ip.gptq(IDS[:200], tokens=201, length=32), "the text has 200 tokens"),
    "less than a window": (lambda: ip.gptq(IDS, tokens=31, length=32), "reads less than a window"),
    "a digest": (lambda: ip.gptq("0123456789ab", length=2), "the digest of a text"),
    "foreign": (lambda: ip.gptq(IDS + 7, length=32), "has a token 6"),
    "beyond int32": (lambda: ip.gptq([2**40] * 64, length=32), f"has a token {2**40}"),
    "no tokenizer": (lambda: ip.gptq("some text", length=4), "no tokenizer"),
    "beyond the context": (lambda: ip.gptq(IDS, length=65), "windows of 65 tokens"),
}


@pytest.mark.parametrize(("method", "said"), WRONG.values(), ids=WRONG)
def test_what_it_cannot_read_is_refused(method: Any, said: str, llama: tuple[ip.Model, Any]) -> None:
    model, params = llama
    stack = ip.quantize(bits=4, group=16, method=method())(model)
    with pytest.raises(InfoptError, match=said) as e:
        stack.convert(params)
    assert e.value.why and e.value.fix


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(text=1.5), "to read"), (dict(text=[[1]]), "to read"), (dict(text=[2**63]), "to read"),
        (dict(tokens=0), "tokens=0"),
        (dict(length=True), "length=True"), (dict(damp=-1), "damp=-1"), (dict(damp="1"), "damp='1'"),
        (dict(order=1), "order=1"),
    ],
)  # fmt: skip
def test_arguments_that_are_none_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InfoptError, match=said):
        ip.gptq(**options)


FINITE: dict[str, dict[str, Any]] = {
    "gptq": dict(bits=4, group=16, method=ip.gptq(**HOW)),
    "awq": dict(bits=4, group=16, method=ip.awq(**HOW)),
    "autoround": dict(bits=4, group=16, method=ip.autoround(**HOW, steps=2)),
    "distilled": dict(bits=4, group=16, method=ip.distilled(**HOW, steps=2, rates=0.001)),
    "smoothquant": dict(bits=8, activations=8, method=ip.smoothquant(**HOW)),
    "static scales": dict(bits=8, activations=8, static=True, method=ip.nearest(**HOW)),
}


@pytest.mark.parametrize("how", FINITE.values(), ids=FINITE)
@pytest.mark.parametrize("wrong", ["embed", "layers.1.mlp.up"])
def test_inputs_that_are_not_finite_are_refused(how: Any, wrong: str, llama: tuple[ip.Model, Any]) -> None:
    """They would compare as no worse than anything, and rounding to nearest would be what comes out."""
    model, params = llama
    value = jnp.nan if wrong == "embed" else 1e38
    spoiled = Weights.of(model.spec, params).map([wrong], lambda _, w: w.at[3].set(value))
    stack = ip.quantize(**how)(model)
    with pytest.raises(InfoptError, match="not finite"):
        stack.convert(assemble(model.spec, spoiled))


def test_nothing_falls_back_in_silence(llama: tuple[ip.Model, Any]) -> None:
    model, params = llama
    method = ip.gptq(**HOW)
    with pytest.raises(InfoptError, match="what goes into embed"):
        stack = ip.quantize(bits=4, group=16, where="embed", method=method)(model)
        stack.convert(params)
    with pytest.raises(InfoptError, match="has no grid"):
        ip.quantize(format="bf16", method=method)(model).convert(params)
    dead = jax.tree.map(lambda x: x, params)
    dead["segments"][0][0]["mlp_norm"] = jnp.zeros_like(dead["segments"][0][0]["mlp_norm"])
    with pytest.raises(InfoptError, match="nothing but zeros went into layers"):
        ip.quantize(bits=4, group=16, method=method)(model).convert(dead)
    same = ip.quantize(bits=4, group=16, method=ip.gptq(np.zeros(64, int), length=32, damp=0.0))(model)
    with pytest.raises(InfoptError, match="have no inverse"):
        same.convert(params)
    stack = ip.quantize(bits=4, group=16, method=method)(model)
    with pytest.raises(InfoptError, match="no value yet"):
        jax.jit(stack.convert)(params)
    with pytest.raises(InfoptError, match="no method"):
        ip.quantize(bits=4, method="gtpq")
