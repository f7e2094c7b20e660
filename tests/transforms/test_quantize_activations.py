"""quantize(activations=8): inputs are rounded with the weights, and the fact goes wherever the format does."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import infopt as ip
from infopt import ops, testing
from infopt.errors import ParamsError
from infopt.formats import FORMATS, Format
from infopt.kernels.int_matmul import int_matmul
from infopt.methods.layers import by_layer
from infopt.model import Weights, build, spec_from_json
from infopt.models import base
from infopt.qtensor import quantize_array

W8A8, W8 = ip.quantize(bits=8, activations=8), ip.quantize(bits=8)
W4A8 = ip.quantize(bits=4, group=16, activations=8)


@functools.cache
def small():
    model = ip.models.llama(layers=2, dim=32, heads=4, kv_heads=2, mlp=48, vocab=61, context=64, tied=False)
    return model, model.init(jax.random.key(0))


@pytest.mark.parametrize(
    ("family", "stack"),
    [(f, W8A8) for f in ("llama", "gemma2", "gpt2", "mixtral", "nnx")] + [(f, W4A8) for f in ("llama", "gpt_oss")],
    ids=repr,
)
def test_a_stack_equals_the_float64_model_that_rounds_inputs_itself(family, stack):
    (outcome,) = testing.check_orders(family, [("cached", (stack,))], generation=False)
    assert outcome.status == "equal", outcome.detail


@pytest.mark.parametrize("where", ["*.mlp.router", "head", "*.mlp.experts.down"])
def test_a_router_a_head_and_experts_alone_round_their_inputs(where):
    (outcome,) = testing.check_orders("mixtral", [("bare", (dataclasses.replace(W8A8, where=where),))])
    assert outcome.status == "equal", outcome.detail


@pytest.mark.parametrize("other", [ip.gqa(1), ip.sliding_window(5, sinks=2), ip.cache_kv(bits=8)], ids=repr)
def test_other_transforms_stack_before_and_after_it(other):
    found = testing.check_orders("llama", [("bare", (W8A8, other)), ("bare", (other, W8A8))], generation=False)
    assert {o.status for o in found} <= {"equal", "refused"} and found[1].status == "equal"


def test_the_oracle_sees_whether_inputs_are_rounded():
    """The contract would be blind to a stack that left them as they are."""
    model, params = testing.base_of("llama")
    rounded, plain = (t(model).convert(params) for t in (W8A8, W8))
    weights = Weights.of(W8A8(model).spec, rounded)
    tokens = np.arange(20) % 61
    want = testing.expected_logits(W8A8(model).spec, weights, rounded, tokens)
    without = testing.expected_logits(W8(model).spec, Weights.of(W8(model).spec, plain), plain, tokens)
    assert np.abs(want - without).max() > 30 * testing.TOLERANCE * want.std()


@pytest.mark.parametrize("stack", [W8A8, W4A8], ids=repr)
def test_linear_takes_the_integer_product_where_the_format_says_so(stack):
    model, params = small()
    made = stack(model)
    w = Weights.of(made.spec, made.convert(params))["layers.1.mlp.up"]
    assert w.format.activations == 8 and made.spec.format_of("layers.1.mlp.up") == w.format
    x = jax.random.normal(jax.random.key(1), (2, 3, 32))
    np.testing.assert_array_equal(ops.linear(x, w), int_matmul(x, w))
    plain = dataclasses.replace(w, format=dataclasses.replace(w.format, activations=None))
    off = jnp.abs(ops.linear(x, w) - ops.linear(x, plain))
    assert 1e-4 < float(off.max()) < 0.1
    y = ops.linear(x, (w, w), None, (jnp.ones(48), None))
    np.testing.assert_array_equal(y[0], y[1] + 1)


def test_the_weights_are_those_of_quantize_without_it():
    model, params = small()
    one, other = (jax.tree.leaves(t(model).convert(params)) for t in (W8A8, W8))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)
    assert W8A8(model).weight_bytes() == W8(model).weight_bytes()
    assert W8A8(model).spec != W8(model).spec


def test_a_row_of_a_batch_computes_what_it_computes_alone():
    """Scales are a token's own: an outlier in another row changes nothing."""
    model, params = small()
    made = W8A8(model)
    own, step = made.convert(params), jax.jit(made.apply)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 61, (3, 8)), jnp.int32)
    together = step(own, tokens, made.init_state(3, 8))[0]
    alone = step(own, tokens[1:2], made.init_state(1, 8))[0]
    np.testing.assert_allclose(together[1], alone[0], atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_models_in_16_bits_round_their_inputs_too(dtype):
    model, params = small()
    made = W8A8(model)
    own = jax.tree.map(lambda x: x.astype(dtype) if x.dtype == jnp.float32 and x.ndim < 3 else x, made.convert(params))
    tokens = jnp.asarray([[3, 1, 4, 1, 5]], jnp.int32)
    want = made.hidden(made.convert(params), tokens, made.init_state(1, 8))[0]
    got = made.hidden(own, tokens, made.init_state(1, 8))[0]
    assert got.dtype == dtype
    assert float(jnp.abs(got.astype(jnp.float32) - want).max()) < 0.3 * float(want.std())


def test_nan_in_an_input_is_nan_in_the_logits():
    model, params = small()
    made = W8A8(model)
    own = made.convert(params) | {"embed": params["embed"].at[7].set(jnp.nan)}
    logits = made.apply(own, jnp.asarray([[3, 7, 4]], jnp.int32), made.init_state(1, 8))[0]
    assert np.isnan(logits[0, 1]).all()


def test_gradients_through_rounded_inputs_are_refused():
    model, params = small()
    made = dataclasses.replace(W8A8, where="layers.1.*")(model)
    own = made.convert(params)
    dense, join = ip.trainable(own)
    tokens = jnp.asarray([[3, 1, 4]], jnp.int32)
    with pytest.raises(ParamsError, match="inputs that are rounded") as e:
        jax.grad(lambda d: jnp.sum(made.apply(join(d), tokens, made.init_state(1, 8))[0]))(dense)
    assert "activations=8" in e.value.fix


# ------------------------------------------------------------------------------------------------ what says so, and how


def test_the_format_says_it_and_old_specs_read_as_before():
    form = W8A8(small()[0]).spec.format_of("layers.0.attn.q")
    assert repr(form) == "Format(name='int8', group=None, scale='float32', activations=8)"
    assert (form.label, Format("int8").label) == ("int8/a8", "int8")
    assert "activations" not in repr(Format("int8")) and "activations" not in W8(small()[0]).spec.to_json()
    spec = W8A8(small()[0]).spec
    assert json.loads(spec.to_json())["weights"][0][1]["activations"] == 8
    assert spec_from_json(spec.to_json()) == spec
    assert repr(W8A8) == "quantize(bits=8, activations=8)" and ip.parse_stack(repr(W8A8)) == W8A8
    assert "activations=8" in repr(W8A8(small()[0]))


def test_audit_and_planner_name_it():
    model, params = small()
    made = W4A8(model)
    lines = made.audit(made.convert(params)).lines
    assert {line.format for line in lines if line.name.startswith("layers.")} == {"int4/a8"}
    assert "int4/a8" in repr(ip.plan(made, batch=1, context=64))


def test_dequantize_takes_it_off():
    model, params = small()
    made = (W8A8 | ip.dequantize())(model)
    assert made.spec.weights == ()
    other = (W8 | ip.dequantize())(model)
    for a, b in zip(jax.tree.leaves(made.convert(params)), jax.tree.leaves(other.convert(params)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_saved_stack_keeps_it(tmp_path):
    model, params = small()
    made = W8A8(model)
    ip.save(tmp_path / "w8a8", made, made.convert(params))
    again, own = ip.load(tmp_path / "w8a8")
    assert again.spec == made.spec
    tokens = jnp.asarray([[3, 1, 4]], jnp.int32)
    one, other = (m.apply(p, tokens, m.init_state(1, 8))[0] for m, p in ((made, made.convert(params)), (again, own)))
    np.testing.assert_array_equal(one, other)


def test_a_gguf_file_cannot_say_it(tmp_path):
    model, params = small()
    made = ip.quantize(bits=4, group=32, where="*.attn.*", activations=8)(model)
    with pytest.raises(ip.InfoptError, match="inputs are rounded to 8 bits") as e:
        ip.save(tmp_path / "x.gguf", made, made.convert(params))
    assert "without activations" in e.value.fix


# ---------------------------------------------------------------------------------------------------------- calibration


def test_gptq_rounds_for_a_stack_that_rounds_inputs():
    model, params = small()
    text = tuple(np.random.default_rng(0).integers(0, 61, 600).tolist())
    method = ip.gptq(text, tokens=512, length=32)
    made = dataclasses.replace(W4A8, method=method)(model)
    own = made.convert(params)
    assert {
        w.format.activations for w in jax.tree.leaves(own, is_leaf=ip.qtensor.is_qtensor) if hasattr(w, "codes")
    } == {8}
    plain = W4A8(model).convert(params)
    tokens = jnp.asarray(np.asarray(text[:64])[None], jnp.int32)
    want = model.apply(params, tokens, model.init_state(1, 64))[0]
    off = [float(jnp.mean((made.apply(p, tokens, made.init_state(1, 64))[0] - want) ** 2)) for p in (own, plain)]
    assert off[0] < off[1]


def test_statistics_go_through_matrices_that_round_their_inputs():
    """Those of the MLP are of what attention gives with its inputs rounded, and are not refused as a gradient is."""
    model, params = small()
    before = dataclasses.replace(W8A8, where="*.attn.*")(model)
    weights = Weights.of(before.spec, before.convert(params))
    tokens = np.random.default_rng(0).integers(0, 61, (3, 16))
    found = {}

    def change(layer):
        found.update({layer.prefix + n: inputs.gram for n, inputs in layer.statistics.items()})
        return {n: layer.p[n] for n in layer.names}

    names = {f"layers.0.mlp.{n}" for n in ("gate", "down")} | {"layers.0.attn.q"}
    weights_dense = {n: weights[n] for n in weights} | {
        "layers.0.attn.q": Weights.of(model.spec, params)["layers.0.attn.q"]
    }
    by_layer(before.spec, weights_dense, tokens, names, change)

    c = before.spec.config
    at = jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32)[None], tokens.shape)
    context = ops.Context(at, at >= 0, jnp.full(3, 16, jnp.int32), None, None)
    attend = functools.partial(ops.attend, context=context)

    def off(of):  # what is told, from the Gram matrix that these weights make
        p = {n.removeprefix("layers.0."): of[n] for n in of if n.startswith("layers.0.")}
        x = jnp.asarray(of["embed"])[tokens]
        x, _ = base.attention(c, p, x, None, attend, None, base.rope(c))
        h = np.asarray(ops.rms_norm(x, p["mlp_norm"], None, c.norm_eps)).reshape(-1, 32)
        return np.linalg.norm(found["layers.0.mlp.gate"] - h.T @ h) / np.linalg.norm(h.T @ h)

    # an input on the edge of two codes may get the other one in another program
    assert off(weights_dense) < 1e-3 < 5e-3 < off(Weights.of(model.spec, params))
    assert all(np.trace(found[n]) > 0 for n in names)


def test_experts_statistics_count_only_the_tokens_that_are_used_there():
    """Behind a `down` that rounds its inputs too: the gradient that tells them apart goes straight through."""
    model, params = testing.base_of("mixtral")
    grams = []
    for stack in (W8A8, W8):
        before = dataclasses.replace(stack, where="*.mlp.experts.down")(model)
        weights = Weights.of(before.spec, before.convert(params))
        tokens = np.random.default_rng(0).integers(0, 61, (2, 12))

        def change(layer):
            grams.append({layer.prefix + n: inputs.gram for n, inputs in layer.statistics.items()})
            return {n: layer.p[n] for n in layer.names}

        by_layer(before.spec, weights, tokens, {"layers.0.mlp.experts.gate"}, change)
    one, other = (g["layers.0.mlp.experts.gate"] for g in grams)
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------- wrong


def tied():
    return ip.models.llama(layers=1, dim=32, tied=True)


WRONG = {
    "bits of inputs": (lambda: ip.quantize(bits=8, activations=4), "activations=4"),
    "True": (lambda: ip.quantize(bits=8, activations=True), "activations=True"),
    **{
        name: (lambda name=name: ip.quantize(format=name, activations=8), f"against weights in {name}")
        for name, row in FORMATS.items()
        if not row.whole and not row.kept
    },
    "one rule of a mapping": (
        lambda: ip.quantize(where={"*.attn.*": "nf4", "layers.*": 8}, activations=8),
        "against weights in nf4",
    ),
    "Format": (lambda: Format("int8", activations=16), "activations of 16 bits"),
    "embed": (lambda: ip.quantize(where="embed", activations=8)(small()[0]), "embed is no layer's matrix"),
    "tied": (lambda: ip.quantize(where=["layers.*", "embed"], activations=8)(tied()), "embed is no layer's matrix"),
    "positions": (
        lambda: ip.quantize(where="positions", activations=8)(ip.models.gpt2(layers=1)),
        "positions is no layer's matrix",
    ),
    "twice": (lambda: (W8A8 | W8)(small()[0]), "packed as int8/a8"),
    "a table, looked up": (
        lambda: ops.embed(
            quantize_array(jnp.ones((4, 8)), Format("int8", activations=8), trailing=2), jnp.zeros(2, jnp.int32)
        ),
        "was looked up",
    ),
}


@pytest.mark.parametrize(("call", "said"), WRONG.values(), ids=WRONG)
def test_activations_that_no_kernel_can_do_are_refused(call, said):
    with pytest.raises(ip.InfoptError, match=said) as e:
        call()
    assert e.value.why and e.value.fix


def test_params_that_do_not_round_inputs_are_another_stacks():
    model, params = small()
    with pytest.raises(ParamsError, match="activations=8"):
        made = W8A8(model)
        made.apply(W8(model).convert(params), jnp.zeros((1, 2), jnp.int32), made.init_state(1, 4))
    assert build(W8A8(model).spec) is not build(W8(model).spec)
