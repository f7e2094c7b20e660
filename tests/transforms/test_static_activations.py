"""quantize(static=True): one scale for all that goes into a matrix, read off a text through the rounded stack."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import infopt as ip
from infopt import ops, testing
from infopt.errors import InfoptError, ParamsError
from infopt.formats import Format
from infopt.kernels.int_matmul import int_matmul
from infopt.methods.layers import by_layer
from infopt.model import Weights
from infopt.qtensor import is_qtensor, quantize_array

READ = tuple(i * i * i % 61 for i in range(128))
HOW = dict(text=READ, tokens=64, length=32)


def static(method=None, **more):
    return ip.quantize(**dict(bits=8) | more, activations=8, static=True, method=method or ip.nearest(**HOW))


@functools.cache
def made(family="llama"):
    model, params = testing.base_of(family)
    stack = static()(model)
    return model, params, stack, stack.convert(params, model)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral"])
def test_a_stack_equals_the_float64_model_that_rounds_inputs_by_the_same_scales(family):
    (outcome,) = testing.check_orders(family, [("cached", (static(),))], generation=False)
    assert outcome.status == "equal", outcome.detail


@pytest.mark.parametrize(
    "method", [ip.gptq(**HOW), ip.smoothquant(**HOW), ip.awq(**HOW, grid=4)], ids=lambda m: type(m).__name__
)
@pytest.mark.parametrize("bits", [8, 4])
def test_methods_choose_weights_and_their_own_text_the_scales(method, bits):
    model, params = testing.base_of("llama")
    how = dict(bits=bits, group=16)
    stack, dynamic = static(method, **how)(model), ip.quantize(**how, activations=8, method=method)(model)
    one, other = (Weights.of(s.spec, s.convert(params, model)) for s in (stack, dynamic))
    for name, form in dynamic.spec.weights:
        np.testing.assert_array_equal(one[name].codes, other[name].codes)
        assert one[name].format == dataclasses.replace(form, static=True) and other[name].input is None
        assert np.isfinite(one[name].input).all()


def test_the_scale_is_the_greatest_value_that_went_in_as_the_rounded_stack_then_is():
    """Not what the base's layers give each other: those before are rounded, their inputs too."""
    model, params = testing.base_of("llama")
    stack = static(bits=3, group=16)(model)
    weights, seen, base = Weights.of(stack.spec, stack.convert(params, model)), {}, {}
    names = {n for n, _ in stack.spec.weights}
    for found, spec, source in ((seen, stack.spec, weights), (base, model.spec, Weights.of(model.spec, params))):

        def change(layer, found=found):
            found.update({layer.prefix + n: float(jnp.max(inputs.peak)) for n, inputs in layer.statistics.items()})
            return {n: layer.p[n] for n in layer.names}

        by_layer(spec, source, ip.nearest(**HOW).windows(model), names, change)
    for name in names:
        assert weights[name].input.item() == pytest.approx(seen[name], rel=0.01)
    assert max(abs(base[n] / seen[n] - 1) for n in names) > 0.1


def test_experts_have_scales_of_their_own():
    _, _, stack, own = made("mixtral")
    w = Weights.of(stack.spec, own)["layers.1.mlp.experts.down"]
    assert w.input.shape == (4, 1, 1) and len(np.unique(w.input)) == 4


def test_what_is_greater_than_the_scale_is_cut_off_and_the_rest_is_the_definition():
    rng = np.random.default_rng(0)
    w = quantize_array(jnp.asarray(rng.normal(size=(5, 32)), jnp.float32), Format("int8", activations=8), 2)
    most = np.float32(1.5)
    w = dataclasses.replace(w, format=dataclasses.replace(w.format, static=True), input=jnp.full((1, 1), most))
    x = rng.normal(size=(7, 32)).astype(np.float32)
    codes = np.clip(np.rint(x * (np.float32(127) / most)), -127, 127)
    sums = codes.astype(np.int64) @ np.asarray(w.codes, np.int64).T
    want = sums.astype(np.float32) * np.asarray(w.scale, np.float32).T * (most * np.float32(1 / 127))
    np.testing.assert_array_equal(int_matmul(jnp.asarray(x), w), want)
    assert (np.abs(x) > most).any()
    far = int_matmul(jnp.full((1, 32), 1e6, jnp.float32), w)
    np.testing.assert_allclose(far, int_matmul(jnp.full((1, 32), most), w), rtol=1e-6)
    kernel = int_matmul(jnp.asarray(x), w, implementation="pallas_tpu", interpret=True)
    np.testing.assert_array_equal(kernel, want)


def test_a_scale_that_was_never_read_gives_nan_and_no_wrong_number():
    w = quantize_array(jnp.ones((2, 32)), Format("int8", activations=8, static=True), 2)
    assert np.isnan(int_matmul(jnp.ones((1, 32)), w)).all()


def test_no_token_changes_another_ones_scale():
    """With dynamic scales a token has its own; here a token equals itself in any company, and rows of 0 stay 0."""
    _, _, stack, own = made()
    w = Weights.of(stack.spec, own)["layers.0.mlp.up"]
    x = jax.random.normal(jax.random.key(0), (4, 32))
    np.testing.assert_array_equal(ops.linear(x, w)[2], ops.linear(x[2:3], w)[0])
    assert not np.any(ops.linear(x * 0, w))
    own = dataclasses.replace(w, format=dataclasses.replace(w.format, static=False), input=None)
    assert np.any(ops.linear(x, w) != ops.linear(x, own))


def test_bytes_files_audits_and_plans_know_the_scales(tmp_path):
    model, _, stack, own = made()
    dynamic = ip.quantize(bits=8, activations=8)(model)
    assert stack.weight_bytes() - dynamic.weight_bytes() == 4 * len(stack.spec.weights)
    assert stack.weight_bytes() == sum(x.nbytes for x in jax.tree.leaves(own))
    ip.save(tmp_path / "made", stack, own)
    again, loaded = ip.load(tmp_path / "made")
    assert again.spec == stack.spec
    for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(loaded), strict=True):
        np.testing.assert_array_equal(a, b)
    lines = stack.audit(own).lines
    assert {line.format for line in lines if line.name.startswith("layers.") and line.format != "dense"} >= {"int8/a8s"}
    assert "int8/a8s" in str(ip.plan(stack, device="h100", context=64))
    assert repr(stack.spec.format_of("layers.0.attn.q")).endswith("activations=8, static=True)")
    assert ip.parse_stack("quantize(bits=8, activations=8, static=True, method='nearest')").static


def test_static_scales_lose_more_than_dynamic_ones_but_little():
    """On tokens that were not read, some of which reach further."""
    model, params, stack, own = made()
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 61, (4, 40)), jnp.int32)
    dynamic = ip.quantize(bits=8, activations=8)(model)
    want = np.asarray(model.apply(params, tokens)[0])
    off = [np.abs(np.asarray(s.apply(p, tokens)[0]) - want).mean() for s, p in
           ((stack, own), (dynamic, dynamic.convert(params)))]  # fmt: skip
    assert 0 < off[1] < off[0] < 0.2 * want.std()


@pytest.mark.parametrize(
    ("how", "match"),
    [
        (dict(bits=8, static=True, method="nearest"), "without activations"),
        (dict(bits=8, activations=8, static=True), "without a method"),
        (dict(bits=8, activations=8, static=1, method="nearest"), "no truth"),
        (dict(bits=8, activations=8, static=True, method="distilled"), "inputs of"),
    ],
)
def test_what_cannot_be_static_is_refused(how, match):
    with pytest.raises(InfoptError, match=match):
        ip.quantize(**how)(testing.base_of("llama")[0])


@pytest.mark.parametrize("method", [ip.nearest(), ip.distilled(start=ip.nearest())])
def test_a_text_is_not_read_for_nothing(method):
    with pytest.raises(InfoptError, match=r"(?s)for nothing.*fix: static=True"):
        ip.quantize(bits=8, method=method)(testing.base_of("llama")[0])


def test_a_format_is_static_or_not():
    with pytest.raises(InfoptError, match="static=1"):
        Format("int8", activations=8, static=1)  # type: ignore[arg-type]


def test_params_without_the_scales_are_refused():
    _, _, stack, own = made()
    bare = jax.tree.map(lambda w: dataclasses.replace(w, input=None) if is_qtensor(w) else w, own, is_leaf=is_qtensor)
    with pytest.raises(ParamsError, match="without the scale of its inputs"):
        ip.generate(ip.cache_kv()(stack), bare, [1, 2], max_new=1)


def test_an_expert_that_nothing_goes_into_has_no_scale():
    model, params = testing.base_of("mixtral")
    few = ip.nearest((5,) * 32 + (7,) * 32, tokens=32, length=32)
    with pytest.raises(InfoptError, match=r"nothing but zeros went into layers\.0\.mlp\.experts"):
        static(few)(model).convert(params, model)


def test_a_weight_without_its_scale_is_refused():
    w = quantize_array(jnp.ones((2, 32)), Format("int8", activations=8, static=True), 2)
    with pytest.raises(InfoptError, match="no scale of inputs"):
        int_matmul(jnp.ones((1, 32)), dataclasses.replace(w, input=None))


def test_a_matrix_that_nothing_goes_into_has_no_scale():
    model, params = testing.base_of("llama")
    weights = Weights.of(model.spec, params)
    dead = weights.made(["layers.1.attn.v"], lambda n: jnp.zeros_like(weights[n]))
    zero = ip.model.assemble(model.spec, dead)
    with pytest.raises(InfoptError, match=r"nothing but zeros went into layers\.1\.attn\.o"):
        static()(model).convert(zero, model)


def test_formats_say_when_static_means_nothing():
    with pytest.raises(InfoptError, match="static scales, and no activations"):
        Format("int8", static=True)
    assert math.isclose(Format("int8", activations=8, static=True).bytes((4, 32)), 4 * 32 + 16 + 8)
