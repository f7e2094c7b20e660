"""Learned rounding and distilled scales are never worse than where they began, and mostly much better."""

from __future__ import annotations

import importlib
import sys
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import infopt as ip
from infopt.errors import InfoptError
from infopt.formats import FORMATS
from infopt.methods.autoround import Free, _point, _stored, _values
from infopt.methods.base import to_nearest
from infopt.methods.distilled import _changed, _Distillation, _loss, _unchanged
from infopt.methods.kept import Kept
from infopt.methods.layers import Layer, by_layer
from infopt.model import Weights, assemble, shapes
from infopt.qtensor import Format, QTensor, dequantize_array

HOW: dict[str, Any] = dict(tokens=2048, length=32)


@pytest.fixture(scope="module")
def llama() -> tuple[ip.Model, Any]:
    return ip.testing.base_of("llama")


def ids(model: ip.Model, n: int = 4096) -> np.ndarray:
    return np.random.default_rng(0).integers(0, model.spec.config.vocab, n)


def nats(model: ip.Model, params: Any, teacher: tuple[ip.Model, Any], text: np.ndarray) -> float:
    return ip.measure(model, params, ip.windows(text.tolist(), 32), teacher).kl.value


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"])
@pytest.mark.parametrize("method", ["autoround", "distilled"])
def test_a_rounded_model_is_nearer_to_its_base(method: str, family: str) -> None:
    model, params = ip.testing.base_of(family)
    text = ids(model)
    how: Any = ip.autoround(text, **HOW, steps=30) if method == "autoround" else None
    how = how or ip.distilled(text, **HOW, batch=8, steps=30, rates=0.003)
    one, other = (ip.quantize(bits=3, group=16, method=m)(model) for m in (None, how))
    plain, better = (nats(s, s.convert(params), (model, params), text[::-1][:2048]) for s in (one, other))
    assert better < (0.8 if method == "autoround" else 0.95) * plain


def layer_errors(model: ip.Model, params: Any, text: np.ndarray, *found: Any) -> list[list[float]]:
    """Of each layer the squared error on what `found`'s layers before it give, for each of several params."""
    out = []
    for own in found:
        weights, errors = Weights.of(model.spec, own), list[float]()

        def change(layer: Layer, weights: Any = weights, errors: Any = errors) -> dict[str, Any]:
            assert layer.targets is not None
            new = {n: weights[layer.prefix + n] for n in layer.names}
            errors.append(sum(float(jnp.sum((layer.run(layer.p | new, x) - y) ** 2))
                              for x, y in zip(layer.inputs, layer.targets, strict=True)))  # fmt: skip
            return new

        names = {n for n, w in weights.items() if isinstance(w, QTensor)}
        by_layer(model.spec, Weights.of(model.spec, params), text, names, change, targets=True)
        out.append(errors)
    return out


def test_learned_rounding_lessens_what_it_says(llama: tuple[ip.Model, Any]) -> None:
    model, params = llama
    text = ids(model)
    for start in (None, ip.gptq(text, **HOW)):
        begun = ip.quantize(bits=3, group=16, method=start)(model).convert(params)
        how = ip.autoround(text, **HOW, start=start, steps=20)
        learned = ip.quantize(bits=3, group=16, method=how)(model).convert(params)
        one, other = layer_errors(model, params, how.windows(model), begun, learned)
        assert other[0] < one[0] and sum(other) < (0.85 if start is None else 0.99) * sum(one), start


def test_where_nothing_is_gained_the_start_stays(llama: tuple[ip.Model, Any]) -> None:
    """One step of rate 1/2 tears a layer that GPTQ served well."""
    model, params = llama
    text = ids(model)
    start = ip.gptq(text, **HOW)
    how = ip.autoround(text, **HOW, start=start, steps=1, rate=0.5)
    one, other = (ip.quantize(bits=4, group=16, method=m)(model).convert(params) for m in (start, how))
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True))


WHOLE = [n for n, r in FORMATS.items() if r.rule != "none" and not (r.kept or r.levels or r.dtype or r.tensor)]


@pytest.mark.parametrize("name", WHOLE)
def test_a_learned_matrix_that_did_not_move_is_its_start(name: str) -> None:
    row = FORMATS[name]
    form = Format(name, row.group and 16, row.scale, pad=True)
    w = jax.random.normal(jax.random.key(0), (8, 40), jnp.float32)
    q = to_nearest(w, form, None)
    point = _point(w, q, form)
    free = Free(jnp.zeros_like(point.level), jnp.ones_like(point.scale))
    np.testing.assert_allclose(_values(w, point, free, form), dequantize_array(q), rtol=1e-6, atol=1e-7)
    stored = dequantize_array(_stored(w, point, free, form))
    np.testing.assert_array_equal(stored, dequantize_array(q))
    moved = Free(jnp.full_like(point.level, 0.3), jnp.full_like(point.scale, 0.7))
    np.testing.assert_allclose(
        _values(w, point, moved, form), dequantize_array(_stored(w, point, moved, form)), rtol=1e-6, atol=1e-7
    )


def test_distilled_codes_stay_and_scales_move(llama: tuple[ip.Model, Any]) -> None:
    model, params = llama
    text = ids(model)
    for name in ("int4_min", "nf4"):
        start = ip.quantize(format=name, group=16)(model).convert(params)
        how = ip.distilled(text, **HOW, batch=8, steps=12, rates=0.002)
        found = ip.quantize(format=name, group=16, method=how)(model).convert(params)
        for one, other in zip(start["segments"][0][0].values(), found["segments"][0][0].values(), strict=True):
            if isinstance(one, QTensor):
                np.testing.assert_array_equal(one.codes, other.codes)
                assert one.scale.dtype == other.scale.dtype and not np.array_equal(one.scale, other.scale)


@pytest.mark.parametrize("rows", [128, 12], ids="{} tokens at a time".format)
def test_slopes_are_those_of_the_whole_model(
    llama: tuple[ip.Model, Any], monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """Layer by layer, against one gradient of the mean KL in one program; the last of three parts is not full."""
    monkeypatch.setattr(sys.modules["infopt.methods.distilled"], "ROWS", rows)
    _loss.cache_clear()
    model, params = llama
    text = ids(model, 96).reshape(3, 32)
    weights = Weights.of(model.spec, params)
    form = Format("int4_min", 16, "float32")
    names = [n for n in shapes(model.spec) if n.endswith(("attn.v", "mlp.down", "head"))]
    begun = {n: to_nearest(weights[n], form, None) for n in names}
    run = _Distillation(ip.distilled(steps=1), model.spec, weights, begun, text[:2], text[2:], Kept(None))
    zero = {n: _unchanged(q) for n, q in begun.items()}
    loss, slopes = run._slopes(zero, [1])
    was = jax.nn.log_softmax(model.apply(params, jnp.asarray(text[1:2]))[0])

    def whole(changes: Any) -> Any:
        dense = {n: dequantize_array(_changed(q, changes[n])) for n, q in begun.items()}
        own = ip.model.assemble(model.spec, weights.made(dense, lambda n: dense[n]))
        now = jax.nn.log_softmax(model.apply(own, jnp.asarray(text[1:2]))[0])
        return jnp.mean(jnp.sum(jnp.exp(was) * (was - now), -1))

    want, found = jax.value_and_grad(whole)(zero)
    _loss.cache_clear()
    assert "head" in slopes and float(loss) == pytest.approx(float(want), rel=1e-4)
    for n, slope in slopes.items():
        size = float(jnp.max(jnp.abs(found[n].scale)))
        np.testing.assert_allclose(slope.scale, found[n].scale, atol=2e-3 * size)
        np.testing.assert_allclose(
            slope.minimum, found[n].minimum, atol=2e-3 * float(jnp.max(jnp.abs(found[n].minimum)))
        )


def test_held_back_windows_choose_and_a_rate_that_tears_is_left(llama: tuple[ip.Model, Any]) -> None:
    model, params = llama
    text = ids(model)
    good = ip.distilled(text, **HOW, batch=8, steps=12, rates=0.002)
    both = ip.distilled(text, **HOW, batch=8, steps=12, rates=(0.002, 0.9))
    one, other = (ip.quantize(bits=3, group=16, method=m)(model).convert(params) for m in (good, both))
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True))
    start = ip.quantize(bits=3, group=16)(model).convert(params)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torn = ip.quantize(bits=3, group=16, method=ip.distilled(text, **HOW, batch=8, steps=12, rates=0.99))(model)
        kept = torn.convert(params)
    assert nats(torn, kept, (model, params), text[:512]) <= nats(torn, start, (model, params), text[:512]) * 1.05


def test_what_is_judged_is_held_back_and_of_the_stack_as_it_then_is(
    llama: tuple[ip.Model, Any], monkeypatch: Any
) -> None:
    model, params = llama
    stack = ip.gqa(kv_heads=1)(model)
    own, made = stack.convert(params), list[_Distillation]()
    init = _Distillation.__init__
    monkeypatch.setattr(_Distillation, "__init__", lambda self, *args: (init(self, *args), made.append(self))[0])
    how = ip.distilled(ids(model), **HOW, batch=8, steps=6, rates=0.002)
    rounded = ip.quantize(bits=3, group=16)(stack)
    ip.quantize(bits=3, group=16, method=how)(stack).convert(own, stack)
    (found,) = made
    windows = how.windows(stack)
    held = windows[-(len(windows) // 8) :]
    np.testing.assert_array_equal(found.tokens, windows[: -len(held)])
    zero = {n: _unchanged(q) for n, q in found.begun.items()}
    cut = ip.windows([row.tolist() for row in held], held.shape[1])
    wanted = ip.measure(rounded, rounded.convert(own, stack), cut, (stack, own)).kl.value
    # the last token of a window says a next one, too, that no text scores
    assert float(found._kl(zero)) == pytest.approx(wanted, rel=0.05)
    other = float(found._kl(zero)) / nats(rounded, rounded.convert(own, stack), (model, params), held.reshape(-1))
    assert abs(other - 1) > 0.2  # the base before gqa says something else


def test_it_ends_where_held_back_windows_say_twice_that_it_is_worse(
    llama: tuple[ip.Model, Any], monkeypatch: Any
) -> None:
    model, params = llama
    steps, seen, says = list[int](), list[Any](), iter([1.0, 0.5, 0.6, 0.7])
    slopes = _Distillation._slopes
    monkeypatch.setattr(_Distillation, "_slopes", lambda self, *args: (steps.append(0), slopes(self, *args))[1])
    monkeypatch.setattr(_Distillation, "_kl", lambda self, changes: (seen.append(changes), jnp.asarray(next(says)))[1])
    how = ip.distilled(ids(model), **HOW, steps=12, rates=0.002)
    found = ip.quantize(bits=3, group=16, method=how)(model).convert(params)
    assert len(steps) == 6 and next(says, None) is None  # three parts of two steps, and no more
    start = ip.quantize(bits=3, group=16)(model).convert(params)
    for name, change in seen[1].items():  # the best state
        layer, kind = int(name.split(".")[1]), name.split(".", 2)[2]
        old, new = (p["segments"][0][0][kind].scale[layer] for p in (start, found))
        wanted = (old.astype(jnp.float32) * (1 + change.scale)).astype(old.dtype)
        np.testing.assert_array_equal(new, wanted.reshape(new.shape))


def test_the_error_is_of_what_came_out_and_dead_inputs_stay_marked(llama: tuple[ip.Model, Any]) -> None:
    model, params = llama
    dead = Weights.of(model.spec, params).map(["layers.1.attn_norm"], lambda _, w: w.at[3].set(0.0))
    own = assemble(model.spec, dead)
    start = ip.gptq(ids(model), **HOW)
    how = ip.distilled(ids(model), **HOW, start=start, batch=8, steps=6, rates=0.01)
    stack = ip.quantize(bits=3, group=16, method=how)(model)
    weights, before = Weights.of(stack.spec, stack.convert(own)), Weights.of(model.spec, own)
    for name, _ in stack.spec.weights:
        q, w = weights[name], np.asarray(before[name], np.float64)
        off = np.linalg.norm(np.asarray(dequantize_array(q), np.float64) - w) / np.linalg.norm(w)
        assert abs(float(q.error.reshape(()))) == pytest.approx(off, rel=1e-4), name
    marked = {n for n, _ in stack.spec.weights if np.signbit(weights[n].error.reshape(()))}
    assert {"layers.1.attn.q", "layers.1.attn.k", "layers.1.attn.v"} <= marked != {n for n, _ in stack.spec.weights}


def test_learned_rounding_stops_where_numbers_end(llama: tuple[ip.Model, Any], monkeypatch: Any) -> None:
    model, params = llama
    module, calls = importlib.import_module("infopt.methods.autoround"), list[int]()
    programs = module._programs

    def broken(*args: Any) -> Any:
        update, error = programs(*args)

        def spoiled(*own: Any) -> Any:
            calls.append(0)
            found = update(*own)
            return found if len(calls) % 100 < 8 else jax.tree.map(lambda x: x * jnp.nan, found)

        return spoiled, error

    def layers(*args: Any) -> Any:
        calls.extend([0] * (-len(calls) % 100))  # each layer counts from 0
        return broken(*args)

    monkeypatch.setattr(module, "_programs", layers)
    text = ids(model)
    how = ip.autoround(text, **HOW, steps=20)
    with pytest.warns(UserWarning, match="left what numbers can hold in layers.. before step 8"):
        found = ip.quantize(bits=3, group=16, method=how)(model).convert(params)
    assert len(calls) % 100 == 8  # of twenty
    start = ip.quantize(bits=3, group=16)(model).convert(params)
    one, other = layer_errors(model, params, how.windows(model), start, found)
    assert sum(other) < sum(one)  # the first four steps were kept
    assert all(bool(jnp.isfinite(x.astype(jnp.float32)).all()) for x in jax.tree.leaves(found))


def test_numbers_that_are_none_stop_it_with_a_word(llama: tuple[ip.Model, Any], monkeypatch: Any) -> None:
    model, params = llama
    own, calls = _Distillation._slopes, list[int]()

    def broken(self: Any, *args: Any) -> Any:
        calls.append(0)
        loss, slopes = own(self, *args)
        return (loss * jnp.nan if len(calls) > 6 else loss), slopes

    monkeypatch.setattr(_Distillation, "_slopes", broken)
    how = ip.distilled(ids(model), **HOW, batch=8, steps=12, rates=0.002)
    stack = ip.quantize(bits=3, group=16, method=how)(model)
    with pytest.warns(UserWarning, match="the best state before it is kept"):
        kept = stack.convert(params)
    assert len(calls) == 7
    assert all(bool(jnp.isfinite(x.astype(jnp.float32)).all()) for x in jax.tree.leaves(kept))


def test_a_heads_scales_take_part() -> None:
    model = ip.models.llama(layers=2, dim=32, vocab=61, tied=False)
    params = model.init(jax.random.key(0))
    params["final_norm"] = jnp.exp(1.5 * jax.random.normal(jax.random.key(1), (32,), jnp.float32))  # inputs unlike
    text = ids(model)
    how = ip.distilled(text, **HOW, batch=8, steps=24, rates=0.01)
    plain, better = (
        nats(s, s.convert(params), (model, params), text[:1024])
        for s in (ip.quantize(bits=3, group=16, where="head", method=m)(model) for m in (None, how))
    )
    assert better < 0.9 * plain


@pytest.mark.parametrize("method", [ip.autoround, ip.distilled])
def test_the_same_bytes_each_time_and_others_of_another_seed(method: Any, llama: tuple[ip.Model, Any]) -> None:
    model, params = llama
    how = dict(text=ids(model), **HOW, steps=6)
    one, two, other = (
        jax.tree.leaves(ip.quantize(bits=3, group=16, method=method(**how, seed=seed))(model).convert(params))
        for seed in (0, 0, 1)
    )
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ip.autoround(steps=0), "steps=0"), (lambda: ip.autoround(rate=0.6), "rate=0.6"),
        (lambda: ip.autoround(start="gptq"), "start='gptq'"), (lambda: ip.autoround(seed=-1), "seed=-1"),
        (lambda: ip.distilled(rates=()), "rates="), (lambda: ip.distilled(rates="fast"), "rates='fast'"),
        (lambda: ip.distilled(batch=True), "batch=True"), (lambda: ip.distilled(start=3), "start=3"),
        (lambda: ip.distilled(seed=1.5), "seed=1.5"), (lambda: ip.distilled(text=2.5), "to read"),
    ],
)  # fmt: skip
def test_arguments_that_are_none_are_refused(make: Any, said: str) -> None:
    with pytest.raises(InfoptError, match=said):
        make()


def test_what_cannot_be_learned_is_refused(llama: tuple[ip.Model, Any]) -> None:
    model, params = llama
    text = ids(model)
    for form, how, said in [
        ("nf4", ip.autoround(text, **HOW), "no whole numbers"),
        ("mxfp4", ip.distilled(text, **HOW), "cannot be trained"),
        ("bf16", ip.distilled(text, **HOW), "has no grid"),
        ("int4", ip.distilled(text[:40], length=32), "1 window"),
    ]:
        with pytest.raises(InfoptError, match=said) as e:
            ip.quantize(format=form, group=None if form == "bf16" else 16, method=how)(model).convert(params)
        assert e.value.fix


def test_rounded_inputs_and_heads_are_refused() -> None:
    model, _ = ip.testing.base_of("llama")
    text = ids(model)
    for method in (ip.autoround(text, **HOW), ip.distilled(text, **HOW)):
        with pytest.raises(InfoptError, match=r"inputs of layers\.0\.attn\.k are rounded"):
            ip.quantize(bits=8, activations=8, method=method)(model)
        before = ip.quantize(bits=8, activations=8, where="*.mlp.*")
        with pytest.raises(InfoptError, match=r"inputs of layers\.0\.mlp\.down are rounded"):
            (before | ip.quantize(bits=4, group=16, where="*.attn.*", method=method))(model)
    with pytest.raises(InfoptError, match="learns no head"):
        ip.quantize(bits=4, group=16, where="head", method=ip.autoround(text, **HOW))(model)
    with pytest.raises(InfoptError, match="to read"):
        ip.gptq([[1, 2], [3]])


def test_a_draft_of_ones_own_may_be_rounded_by_a_method() -> None:
    model, params = ip.load("tiny")
    how = ip.gptq(tokens=256, length=64)
    plain, better = (
        (ip.cache_kv() | ip.speculative(ip.self_draft(ip.quantize(bits=3, group=32, method=m)), k=2))(model)
        for m in (None, how)
    )
    one, other = (s.convert(params)["draft"]["segments"][0][0]["mlp.up"].codes for s in (plain, better))
    assert not np.array_equal(one, other)
