"""AWQ and SmoothQuant: their scaling alone changes nothing, AWQ's search never loses, outliers are evened out."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import infopt as ip
from infopt.errors import InfoptError
from infopt.methods.awq import AWQ
from infopt.methods.base import to_nearest
from infopt.methods.folds import Place
from infopt.methods.layers import Layer, by_layer
from infopt.model import Weights, assemble
from infopt.qtensor import QTensor, dequantize_array

HOW: dict[str, Any] = dict(tokens=512, length=32)
STREAMS = ["llama", "gemma3", "gpt2", "gpt_oss", "mixtral", "phi3"]
METHODS = {"awq": ip.awq, "smoothquant": ip.smoothquant}


def ids(model: ip.Model, n: int = 1024) -> np.ndarray:
    return np.random.default_rng(0).integers(0, model.spec.config.vocab, n)


def with_outliers(model: ip.Model, params: Any) -> Any:
    """Norms of very unlike weights, so that a few channels are large."""

    def of(path: Any, x: Any) -> Any:
        name = path[-1].key
        if not name.endswith("_norm") or name.startswith("attn."):
            return x
        return x * jnp.exp(1.5 * jax.random.normal(jax.random.key(len(name)), x.shape, x.dtype))

    return jax.tree_util.tree_map_with_path(of, params)


def changed(model: ip.Model, params: Any, method: Any, **how: Any) -> dict[str, Any]:
    """What a method gives, by logical name."""
    stack = ip.quantize(**how, method=method)(model)
    formats = dict(stack.spec.weights)
    return method.rounded(model, Weights.of(model.spec, params), formats, None)


@pytest.mark.parametrize("family", STREAMS)
@pytest.mark.parametrize("name", METHODS)
def test_scaling_alone_changes_nothing(name: str, family: str) -> None:
    """What is scaled, and what feeds it, put back without rounding: the logits are those of the base."""
    model, params = ip.testing.base_of(family)
    params = with_outliers(model, params)
    seen: dict[str, Any] = {}

    def kept(w: Any, form: Any, clip: Any) -> Any:
        seen[len(seen)] = w
        return w

    import infopt.methods.folds as folds

    method, real = METHODS[name](ids(model), **HOW), folds.to_nearest
    try:
        folds.to_nearest = kept  # type: ignore[assignment]
        found = changed(model, params, method, bits=4, group=16)
    finally:
        folds.to_nearest = real
    dense = assemble(model.spec, Weights.of(model.spec, params).made(found, lambda n: found[n]))
    text = jnp.asarray(ids(model, 64).reshape(2, 32))
    one, other = (np.asarray(model.apply(p, text)[0]) for p in (params, dense))
    assert np.abs(one - other).max() < 2e-4 * one.std()
    moved = [n for n, w in found.items() if not np.allclose(w, Weights.of(model.spec, params)[n], rtol=1e-3)]
    assert len(moved) > len(found) // 3 and seen


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_awq_lessens_what_layers_lose(family: str) -> None:
    """Whole layers, on what its own layers before it give; matrix by matrix its search never loses, see below."""
    model, params = ip.testing.base_of(family)
    params = with_outliers(model, params)
    method, form = ip.awq(ids(model), **HOW), ip.quantize(bits=3, group=16)(model).spec.weights
    found = changed(model, params, method, bits=3, group=16)
    ratios = list[float]()

    def change(layer: Layer) -> dict[str, Any]:
        new = {n: found[layer.prefix + n] for n in layer.p if layer.prefix + n in found}
        plain = {n: to_nearest(layer.p[n], dict(form)[layer.prefix + n], None) for n in layer.names}

        def harm(p: dict[str, Any], x: Any) -> float:
            return float(jnp.sum((layer.run(layer.p | p, x) - layer.run(layer.p, x)) ** 2))

        ratios.append(sum(harm(new, x) for x in layer.inputs) / sum(harm(plain, x) for x in layer.inputs))
        return new

    weights = Weights.of(model.spec, params)
    by_layer(model.spec, weights, method.windows(model), {n for n, _ in form}, change)
    assert np.mean(ratios) < 0.9 and max(ratios) < 1.1


def test_the_least_harm_of_all_exponents_is_chosen() -> None:
    rng = np.random.default_rng(0)
    w = rng.normal(size=(16, 32)).astype(np.float32)
    x = (rng.normal(size=(200, 32)) * np.exp(1.5 * rng.normal(size=32))).astype(np.float32)
    form = ip.Format("int3", 16, "float16")
    inputs = ip.methods.layers.Inputs(jnp.asarray(x.T @ x), jnp.abs(x).max(0))
    place = Place({"a": jnp.asarray(w)}, {"a": inputs}, {"a": form}, None, (1, 1), False)
    found = np.asarray(AWQ(grid=10).factors(place), np.float64)
    rms, harms = np.sqrt((x.astype(np.float64) ** 2).sum(0)), []
    for i in range(10):
        s = rms ** (i / 10)
        s = (s / np.sqrt(s.max() * s.min())).astype(np.float32)
        q = np.asarray(dequantize_array(to_nearest(jnp.asarray(w * s), form, None)), np.float64) / s
        harms.append((float(np.sum(((w - q) @ x.T) ** 2)), s))
    least = min(harms, key=lambda each: each[0])
    np.testing.assert_allclose(found, least[1], rtol=1e-4)
    assert 0 < least[0] < 0.8 * harms[0][0]


def test_scale_1_is_among_what_is_tried() -> None:
    """Channels that much goes through have the greatest weights already: scaled up more, they would harm the others."""
    rng = np.random.default_rng(0)
    size = np.exp(1.5 * rng.normal(size=32))
    w = (rng.normal(size=(16, 32)) * size).astype(np.float32)
    x = (rng.normal(size=(200, 32)) * size).astype(np.float32)
    inputs = ip.methods.layers.Inputs(jnp.asarray(x.T @ x), jnp.abs(x).max(0))
    place = Place({"a": jnp.asarray(w)}, {"a": inputs}, {"a": ip.Format("int3", 16, "float16")}, None, (1, 1), False)
    np.testing.assert_allclose(AWQ(grid=10).factors(place), 1, rtol=1e-6)


def test_smoothquant_is_the_papers_equation() -> None:
    model = ip.models.llama(layers=1, dim=32, heads=4, kv_heads=4, vocab=61, context=64)
    params = with_outliers(model, model.init(jax.random.key(0)))
    method = ip.smoothquant(ids(model), **HOW, strength=0.7)
    found, weights = changed(model, params, method, bits=8), Weights.of(model.spec, params)
    x = np.asarray(ip.ops.rms_norm(weights["embed"][method.windows(model)], weights["layers.0.attn_norm"], None, 1e-5))
    widest = np.max([np.abs(weights[f"layers.0.attn.{n}"]).max(0) for n in "qk"], 0)
    v = np.asarray(weights["layers.0.attn.v"] / found_rows(found, weights))
    widest = np.maximum(widest, np.abs(v).max(0))
    s = np.abs(x).reshape(-1, 32).max(0) ** 0.7 / widest**0.3
    np.testing.assert_allclose(found["layers.0.attn_norm"], weights["layers.0.attn_norm"] / s, rtol=1e-4)


def found_rows(found: dict[str, Any], weights: Any) -> Any:
    """By what the values' rows were divided, seen in what their output's columns were multiplied by."""
    o = dequantize_array(found["layers.0.attn.o"])
    at = jnp.argmax(jnp.abs(weights["layers.0.attn.o"]), 0)
    picked = jnp.take_along_axis(o, at[None], 0) / jnp.take_along_axis(weights["layers.0.attn.o"], at[None], 0)
    return jnp.broadcast_to(picked[0][:, None], weights["layers.0.attn.v"].shape)


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"])
@pytest.mark.parametrize("name", METHODS)
def test_a_rounded_model_is_nearer_to_its_base(name: str, family: str) -> None:
    """AWQ where weights are rounded, SmoothQuant where inputs are too."""
    model, params = ip.testing.base_of(family)
    params, text = with_outliers(model, params), ids(model)
    how: dict[str, Any] = dict(bits=4, group=16) if name == "awq" else dict(bits=8, activations=8)
    one, other = (ip.quantize(**how, method=m)(model) for m in (None, METHODS[name](text, **HOW)))
    cut = ip.windows(text[:512].tolist(), 32)
    plain, better = (ip.measure(s, s.convert(params), cut, (model, params)).kl.value for s in (one, other))
    assert better < 0.96 * plain


def test_heads_that_share_values_share_factors() -> None:
    model, params = ip.testing.base_of("llama")
    c = model.spec.config
    assert c.heads > c.kv_heads
    found = changed(model, params, ip.awq(ids(model), **HOW), bits=3, group=16, where="*.attn.o")
    weights = Weights.of(model.spec, params)
    row = (np.asarray(weights["layers.0.attn.v"]) / np.asarray(found["layers.0.attn.v"]))[:, 0]
    assert isinstance(found["layers.0.attn.o"], QTensor) and np.ptp(row) > 0.1
    assert {n.split(".", 2)[2] for n in found} == {"attn.o", "attn.v"}  # what stays dense changes with it


def test_channels_that_are_turned_are_not_scaled() -> None:
    model, params = ip.testing.base_of("llama")
    turned = ip.rotate(online=True)(model)
    own = turned.convert(params)
    found = changed(turned, own, ip.awq(ids(model), **HOW), bits=4, group=16)
    weights = Weights.of(turned.spec, own)
    np.testing.assert_array_equal(
        dequantize_array(found["layers.1.mlp.down"]), dequantize_array(to_nearest(weights["layers.1.mlp.down"],
        found["layers.1.mlp.down"].format, None)))  # fmt: skip
    stack = ip.quantize(bits=8, method=ip.smoothquant(ids(model), **HOW))(turned)
    one, other = (
        m.apply(p, jnp.asarray(ids(model, 32)[None]))[0] for m, p in ((model, params), (stack, stack.convert(params)))
    )
    assert np.abs(np.asarray(one - other)).max() < 0.2 * np.asarray(one).std()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ip.awq(grid=0), "grid=0"), (lambda: ip.smoothquant(strength=1.5), "strength=1.5"),
        (lambda: ip.awq(length=1), "length=1"), (lambda: ip.smoothquant(strength=True), "strength=True"),
    ],
)  # fmt: skip
def test_arguments_that_are_none_are_refused(make: Any, said: str) -> None:
    with pytest.raises(InfoptError, match=said):
        make()


def test_what_cannot_be_scaled_is_refused() -> None:
    model, params = ip.testing.base_of("llama")
    method = ip.awq(ids(model), **HOW)
    packed = ip.quantize(bits=8, where="*.attn.k") | ip.quantize(bits=4, group=16, where="*.attn.q", method=method)
    with pytest.raises(InfoptError, match=r"scales layers.0.attn.k, which is packed as int8"):
        packed(model).convert(params)
    model, params = ip.testing.base_of("gpt2")
    with pytest.raises(InfoptError, match=r"nothing to scale before layers\.0\.mlp\.down"):
        stack = ip.quantize(bits=4, group=16, where="*.mlp.down", method=ip.awq(ids(model), **HOW))(model)
        stack.convert(params)
