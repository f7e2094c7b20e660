"""Model: families of one's own, Specs and their functions, segments, params and their checks, gradients."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import infopt as ip
from infopt import ops, testing
from infopt.errors import InfoptError, ParamsError, PromptError
from infopt.model import Weights, assemble, build, segments, shapes, spec_from_json
from infopt.reference import reference
from infopt.sampling import Sampling
from infopt.spec import Llama3Rope, Window
from infopt.transforms.base import Transform

TINY = {"layers": 2, "dim": 16, "heads": 2, "kv_heads": 2, "head_dim": 8, "mlp": 16, "vocab": 29, "context": 48}
BARE = ip.models.llama(**TINY, tied=False)
PARAMS = BARE.init(jax.random.key(0))
CACHED = ip.cache_kv()(BARE)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 29, (2, 7)), jnp.int32)

apply = jax.jit(BARE.apply)
INT8, INT4 = ip.quantize(bits=8), ip.quantize(bits=4, group=8)


def refused(model: ip.Model, params: Any) -> ParamsError:
    """What a stack says to params that are not its own, without computing anything."""
    with pytest.raises(ParamsError) as e:
        jax.eval_shape(model.apply, params, TOKENS)
    return e.value


# ---------------------------------------------------------------------------------------- a family in one file: this


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeighbourConfig(ip.Config):
    """One sort of layer in two: heads of the odd layers turn twice as fast."""

    mlp: int
    speeds: tuple[tuple[int, ...], ...] = ((1, 1), (2, 1))

    @property
    def period(self) -> int:
        return 2


def neighbour_init(c: NeighbourConfig, key: Any) -> dict[str, Any]:
    names = {"embed": (c.vocab, c.dim), "final_norm": (c.dim,), "head": (c.vocab, c.dim)}
    for i in range(c.layers):
        names |= {f"layers.{i}.norm": (c.dim,), f"layers.{i}.up": (c.mlp, c.dim), f"layers.{i}.down": (c.dim, c.mlp)}
        for n in "qkv":
            heads = c.heads if n == "q" else c.kv_heads
            names[f"layers.{i}.attn.{n}"] = (heads * c.head_dim, c.dim)
        names[f"layers.{i}.attn.o"] = (c.dim, c.heads * c.head_dim)
    return ops.random_weights(key, names)


def neighbour_block(c: NeighbourConfig, phase: int, p: Any, x: Any, layer: Any, attend: Any, cache: Any) -> Any:
    h = ops.rms_norm(x, p["norm"], layer, 1e-5)
    q, k, v = ops.linear(h, (p["attn.q"], p["attn.k"], p["attn.v"]), layer)
    q, k, v = (ops.split_heads(u, c.head_dim) for u in (q, k, v))
    theta = 100.0 * c.speeds[phase][0]
    a, cache = attend(q, k, v, cache, layer, rope=lambda u, at: ops.rope(u, at, theta), scale=0.3, softcap=5.0)
    x = x + ops.linear(ops.join_heads(a), p["attn.o"], layer)
    return x + ops.linear(jax.nn.relu(ops.linear(h, p["up"], layer)), p["down"], layer), cache


NEIGHBOUR = ip.define(
    "neighbour",
    NeighbourConfig,
    init=neighbour_init,
    embed=lambda c, params, tokens, positions: ops.embed(params["embed"], tokens),
    block=neighbour_block,
    final=lambda c, params, x: ops.rms_norm(x, params["final_norm"], None, 1e-5),
)
OWN = ip.Model.of(
    NEIGHBOUR,
    NeighbourConfig(layers=3, dim=16, heads=2, kv_heads=1, head_dim=8, mlp=16, vocab=23, context=48),
)


@pytest.mark.parametrize("window", [None, Window(5), Window(5, sinks=2)])
@pytest.mark.parametrize("cap", [None, 1.5])
def test_a_learned_sink_is_one_more_key_without_a_value(window: Window | None, cap: float | None) -> None:
    """Beside any mask, and beside the sinks of a window, which are positions: an extra column of the softmax."""
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 12, 4 if i == 0 else 2, 8)) for i in range(3))
    sinks = jnp.array([-1.0, 0.0, 1.5, 4.0])
    at = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32)[None], (2, 12))
    context = ops.Context(at, at >= 0, jnp.full(2, 12), window, None)

    def attend(values: Any, sinks: Any = None) -> np.ndarray:
        how = {"rope": lambda u, positions: u, "scale": 0.7, "softcap": cap, "context": context}
        return np.asarray(ops.attend(q, k, values, None, None, sink_logits=sinks, **how)[0], np.float64)

    scores = 0.7 * np.einsum("bqhd,bphd->bhqp", q, np.repeat(k, 2, 2), dtype=np.float64)
    scores = scores if cap is None else cap * np.tanh(scores / cap)
    query, key = np.arange(12)[:, None], np.arange(12)
    seen = key <= query
    if window is not None:
        seen &= (key > query - window.size) | (key < window.sinks)
    scores = np.exp(np.where(seen, scores, -np.inf))
    total = scores.sum(-1, keepdims=True) + np.exp(np.asarray(sinks, np.float64))[None, :, None, None]
    want = np.einsum("bhqp,bphd->bqhd", scores / total, np.repeat(v, 2, 2))
    np.testing.assert_allclose(attend(v, sinks), want, atol=1e-5)
    assert attend(jnp.ones_like(v), sinks).max() < 0.999  # shares no longer add up to one
    np.testing.assert_allclose(attend(v, jnp.full(4, -1e9)), attend(v), atol=1e-6)


def test_a_family_of_ones_own_takes_the_transforms_and_equals_its_oracle() -> None:
    """Without a numpy reference, the oracle is its own uncached stack."""
    model = (ip.quantize(bits=4, group=8) | ip.sliding_window(6, sinks=1, layers=[1]) | ip.cache_kv())(OWN)
    assert testing.verify(model, model.init(jax.random.key(2)), generation=False) < testing.TOLERANCE
    assert [(s.first, s.period, s.repeats) for s in segments(model.spec)] == [(0, 2, 1), (2, 1, 1)]


def test_a_familys_mistake_is_a_mismatch() -> None:
    """A block that counts positions of its own, instead of asking attend's rope, is caught."""

    def block(c: Any, phase: int, p: Any, x: Any, layer: Any, attend: Any, cache: Any) -> Any:
        at = jnp.arange(x.shape[1], dtype=jnp.float32)[None, :, None]
        return neighbour_block(c, phase, p, x + 0.05 * at, layer, attend, cache)

    wrong = ip.define(
        "wrong", NeighbourConfig, init=neighbour_init, embed=NEIGHBOUR.embed, block=block, final=NEIGHBOUR.final
    )
    model = ip.cache_kv()(ip.Model.of(wrong, dataclasses.replace(OWN.spec.config, layers=1)))
    with pytest.raises(testing.Mismatch, match="logits differ"):
        testing.verify(model, model.init(jax.random.key(2)), generation=False)


def test_a_spec_of_a_family_of_ones_own_survives_json() -> None:
    spec = ip.cache_kv()(OWN).spec
    assert spec_from_json(spec.to_json()) == spec


def test_a_spec_of_an_unknown_family_is_refused() -> None:
    text = OWN.spec.to_json().replace('"neighbour"', '"neighbor"')
    with pytest.raises(InfoptError, match="no family named 'neighbor'") as e:
        spec_from_json(text)
    assert "neighbour" in str(e.value)
    with pytest.raises(InfoptError, match="neighbor") as e:
        build(OWN.spec.replace(family="neighbor"))
    assert "define" in e.value.fix


def test_a_family_needs_a_name_like_an_identifier() -> None:
    with pytest.raises(InfoptError, match="cannot be named"):
        ip.define("my family", NeighbourConfig, init=neighbour_init, embed=None, block=None, final=None)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------------- Specs


def stacks() -> dict[str, ip.Model]:
    gemma = ip.models.gemma3(layers=7, dim=16, heads=2, kv_heads=1, head_dim=8, vocab=29)
    scaled = ip.models.llama(
        **TINY, rope_scaling=Llama3Rope(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=16)
    )
    draft = ip.self_draft(INT4 | ip.sliding_window(4))
    return {
        "bare": BARE,
        "scaled": scaled,
        "gemma": gemma,
        "quantised": (INT8 | ip.cache_kv(bits=8) | ip.paged(4))(gemma),
        "window": (ip.sliding_window(6, sinks=2, layers=[1]) | ip.cache_kv() | ip.gqa(1))(BARE),
        "speculative": (ip.cache_kv() | ip.speculative(draft, k=3))(scaled),
        "drafted": (ip.cache_kv() | ip.speculative(ip.cache_kv(bits=8)(BARE), k=1))(BARE),
    }


@pytest.mark.parametrize("name", stacks())
def test_a_spec_survives_json_and_finds_the_same_functions(name: str) -> None:
    spec = stacks()[name].spec
    again = spec_from_json(json.dumps(json.loads(spec.to_json())))
    assert again == spec
    assert hash(again) == hash(spec)
    assert build(again) is build(spec)


def test_equal_specs_give_the_same_function_objects() -> None:
    a = (INT8 | ip.cache_kv())(ip.models.llama(**TINY, tied=False))
    b = ip.cache_kv()(INT8(BARE))
    for name in ("apply", "hidden", "head", "decode", "init_state"):
        assert getattr(a, name) is getattr(b, name)
    assert a.apply is not ip.cache_kv()(BARE).apply
    assert (INT8 | ip.dequantize() | ip.cache_kv())(BARE).apply is CACHED.apply


def test_equal_specs_with_other_recipes_are_other_models() -> None:
    a, b = BARE, (INT8 | ip.dequantize())(BARE)
    assert a.spec == b.spec
    assert a != b
    assert str(b.recipe) == "quantize(bits=8) | dequantize()"
    assert not b.exact


def test_the_oracle_keeps_what_changes_the_mathematics() -> None:
    model = (INT8 | ip.sliding_window(6) | ip.cache_kv(bits=8) | ip.paged(4) | ip.speculative(ip.self_draft()))(BARE)
    plain = ip.oracle(model.spec)
    assert (plain.cache, plain.page, plain.program) == (False, None, None)
    assert (plain.weights, plain.window, plain.kv) == (model.spec.weights, model.spec.window, model.spec.kv)


def test_every_part_of_a_model_is_frozen() -> None:
    for thing in (BARE, BARE.spec, BARE.recipe, BARE.spec.config, INT8):
        name = dataclasses.fields(thing)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, name, None)


# -------------------------------------------------------------------------------------------------------- segments


def runs(model: ip.Model) -> list[tuple[int, int, int]]:
    return [(s.first, s.period, s.repeats) for s in segments(model.spec)]


FIVE = ip.models.llama(**TINY | {"layers": 5})


@pytest.mark.parametrize(
    ("transform", "want"),
    [
        (ip.compose(), [(0, 1, 5)]),
        (INT8, [(0, 1, 5)]),
        (ip.quantize(bits=8, where="layers.0.*"), [(0, 1, 1), (1, 1, 4)]),
        (ip.quantize(bits=8, where="layers.2.mlp.up"), [(0, 1, 2), (2, 1, 1), (3, 1, 2)]),
        (ip.quantize(bits=8, where="layers.0.*") | ip.dequantize(), [(0, 1, 5)]),
        (ip.quantize(bits=8, where="layers.0.*") | ip.quantize(bits=8, where="layers.[1-4].*"), [(0, 1, 5)]),
        (ip.sliding_window(4, layers=[0]), [(0, 1, 1), (1, 1, 4)]),
        (ip.sliding_window(4, layers=[0]) | ip.sliding_window(4), [(0, 1, 5)]),
        (ip.sliding_window(4, layers=[0, 1]) | ip.sliding_window(4, 1, layers=[4]), [(0, 1, 2), (2, 1, 2), (4, 1, 1)]),
        (ip.quantize(bits=8, where="embed"), [(0, 1, 5)]),
    ],
    ids=repr,
)
def test_layers_split_where_they_differ_and_merge_where_they_do_not(transform: Transform, want: list) -> None:
    model = transform(FIVE)
    assert runs(model) == want
    abstract = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    assert len(abstract["segments"]) == len(want)


def test_a_pattern_of_layers_is_one_segment_and_a_partial_period_another() -> None:
    gemma = ip.models.gemma3(layers=8, dim=16, heads=2, kv_heads=1, head_dim=8, pattern=(True, True, False), window=4)
    assert runs(gemma) == [(0, 3, 2), (6, 2, 1)]
    assert segments(gemma.spec)[0].windows == (Window(4), Window(4), None)
    assert runs(ip.quantize(bits=8, where="layers.4.*")(gemma)) == [(0, 3, 1), (3, 3, 1), (6, 2, 1)]


def test_weights_keep_their_layer_through_a_split_and_a_merge() -> None:
    base = FIVE.init(jax.random.key(5))
    one = ip.quantize(bits=8, where="layers.2.mlp.up")(FIVE)
    split, names = one.convert(base), [n for n in shapes(FIVE.spec) if n != "layers.2.mlp.up"]
    merged = (ip.quantize(bits=8, where="layers.2.mlp.up") | ip.dequantize())(FIVE).convert(base)
    before = Weights.of(FIVE.spec, base)
    for name in names:
        np.testing.assert_array_equal(Weights.of(one.spec, split)[name], before[name])
        np.testing.assert_array_equal(Weights.of(FIVE.spec, merged)[name], before[name])
    assert not np.array_equal(Weights.of(FIVE.spec, merged)["layers.2.mlp.up"], before["layers.2.mlp.up"])


# --------------------------------------------------------------------------------------------------- jit, vmap, grad


def mean_surprise(logits: Any, log_softmax: Callable[..., Any]) -> Any:
    """Mean surprise at each next token of TOKENS."""
    picked = log_softmax(logits[:, :-1]) * np.eye(29, dtype=np.float32)[np.asarray(TOKENS)[:, 1:]]
    return -picked.sum() / (2 * 6)


def loss(params: Any) -> Any:
    return mean_surprise(BARE.apply(params, TOKENS)[0], jax.nn.log_softmax)


def loss64(weights: dict[str, np.ndarray]) -> float:
    logits = np.stack([reference(BARE.spec, weights, np.asarray(row)) for row in TOKENS])
    return mean_surprise(logits, lambda x: x - np.log(np.exp(x).sum(-1, keepdims=True)))


def test_gradients_of_a_dense_stack_match_a_finite_difference() -> None:
    """Against the float64 numpy model, moved a little along a random direction of all weights."""
    value, grads = jax.jit(jax.value_and_grad(loss))(PARAMS)
    weights = {n: np.asarray(w, np.float64) for n, w in Weights.of(BARE.spec, PARAMS).items()}
    rng = np.random.default_rng(3)
    way = {n: rng.normal(size=w.shape) for n, w in weights.items()}
    h = 1e-5
    ahead, behind = (loss64({n: w + s * way[n] for n, w in weights.items()}) for s in (h, -h))
    slope = sum(float((np.asarray(g, np.float64) * way[n]).sum()) for n, g in Weights.of(BARE.spec, grads).items())
    assert float(value) == pytest.approx(loss64(weights), rel=1e-5)
    assert slope == pytest.approx((ahead - behind) / (2 * h), rel=1e-4)
    assert all(np.isfinite(np.asarray(g)).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("where", [None, "layers.1.mlp.up", "head", "embed"])
def test_a_gradient_of_packed_weights_says_what_to_do(where: str | None) -> None:
    model = ip.quantize(bits=8, where=where)(BARE)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    with pytest.raises(ParamsError, match="gradient") as e:
        jax.eval_shape(jax.grad(lambda p: model.apply(p, TOKENS)[0].sum(), allow_int=True), params)
    assert "ip.trainable" in e.value.fix


def test_a_plain_gradient_over_packed_weights_is_refused_by_jax_itself() -> None:
    """JAX looks at its inputs before it calls us; the README and `ip.trainable` say what to do then."""
    model = ip.quantize(bits=8)(BARE)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    with pytest.raises(TypeError, match="grad requires real- or complex-valued inputs"):
        jax.eval_shape(jax.grad(lambda p: model.apply(p, TOKENS)[0].sum()), params)
    assert "grad requires" in (ip.trainable.__doc__ or "")


def test_what_is_not_packed_can_be_trained() -> None:
    model = ip.quantize(bits=8, where="layers.*.mlp.*")(BARE)
    params = model.convert(PARAMS)
    dense, join = ip.trainable(params)
    assert jax.tree.structure(join(dense)) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(join(dense)), jax.tree.leaves(params)))
    grads = jax.eval_shape(jax.grad(lambda d: model.apply(join(d), TOKENS)[0].sum()), dense)
    assert jax.tree.structure(grads) == jax.tree.structure(dense)
    assert grads["segments"][0][0]["mlp.up"] is None
    assert grads["segments"][0][0]["attn.q"].shape == (2, 16, 16)


def test_vmap_over_stacked_params_is_each_alone() -> None:
    other = BARE.init(jax.random.key(9))
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), PARAMS, other)
    logits = jax.jit(jax.vmap(lambda p: BARE.apply(p, TOKENS)[0]))(both)
    for i, params in enumerate((PARAMS, other)):
        np.testing.assert_allclose(np.asarray(logits[i]), np.asarray(apply(params, TOKENS)[0]), atol=2e-5)


@functools.cache
def step() -> Any:
    return jax.jit(CACHED.apply, donate_argnums=2)


def test_a_donated_state_is_used_up_and_gives_the_uncached_logits() -> None:
    want = np.asarray(apply(PARAMS, TOKENS)[0])
    state = CACHED.init_state(batch=2, max_len=8)
    first, after = step()(PARAMS, TOKENS, state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.kv))
    np.testing.assert_allclose(np.asarray(first), want, atol=2e-5)
    assert np.asarray(after.lengths).tolist() == [7, 7]
    np.testing.assert_array_equal(np.asarray(after.tokens)[:, :7], np.asarray(TOKENS))


def test_hidden_and_head_apart_are_apply() -> None:
    x, state = jax.jit(BARE.hidden)(PARAMS, TOKENS, BARE.init_state(2, 7))
    assert x.shape == (2, 7, 16)
    np.testing.assert_array_equal(np.asarray(state.lengths), [7, 7])
    np.testing.assert_allclose(
        np.asarray(BARE.head(PARAMS, x[:, -1])), np.asarray(apply(PARAMS, TOKENS)[0])[:, -1], atol=1e-5
    )


@pytest.mark.parametrize("name", ["plain", "speculative"])
def test_a_row_that_is_not_active_emits_nothing_and_is_untouched(name: str) -> None:
    model = CACHED if name == "plain" else ip.speculative(CACHED, k=2)(CACHED)
    params = PARAMS if name == "plain" else {"target": PARAMS, "draft": PARAMS}
    state = jax.jit(model.hidden)(params, TOKENS, model.init_state(2, 12))[1]
    active = jnp.asarray([True, False])
    e, after = jax.jit(model.decode)(params, jnp.asarray([3, 4], jnp.int32), state, Sampling.of(2), active)
    width = 1 if name == "plain" else 3
    assert e.tokens.shape == e.logprobs.shape == (2, width)
    assert np.asarray(e.count).tolist() == [width, 0]
    assert np.asarray(e.tokens)[1].tolist() == [-1] * width
    assert np.asarray(after.lengths).tolist() == [7 + width, 7]
    for a, b in zip(jax.tree.leaves(state.kv), jax.tree.leaves(after.kv), strict=True):
        np.testing.assert_array_equal(np.asarray(a)[:, 1], np.asarray(b)[:, 1])
        assert not np.array_equal(np.asarray(a)[:, 0], np.asarray(b)[:, 0])
    np.testing.assert_array_equal(np.asarray(state.tokens)[1], np.asarray(after.tokens)[1])


def test_bfloat16_params_keep_to_bfloat16() -> None:
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    for model in (BARE, CACHED, ip.cache_kv(bits=8)(BARE), (ip.sliding_window(3, sinks=1) | ip.cache_kv())(BARE)):
        x, _ = jax.eval_shape(model.hidden, params, TOKENS, model.init_state(2, 8))
        logits, _ = jax.eval_shape(model.apply, params, TOKENS)
        assert (x.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        (jnp.zeros((2, 3)), "float32"),
        (jnp.zeros((3, 3), jnp.int32), "B = 2"),
        (jnp.zeros(3, jnp.int32), r"int32\[3\]"),
        (jnp.zeros((2, 9), jnp.int32), "9 tokens at once"),
        (jnp.full((2, 3), 29, jnp.int32), "token 29 is outside the vocabulary of 29"),
        (jnp.full((2, 3), -1, jnp.int32), "token -1 is outside"),
    ],
    ids=["floats", "batch", "rank", "long", "unknown", "negative"],
)
def test_tokens_that_do_not_fit_the_state_are_refused(tokens: Any, says: str) -> None:
    with pytest.raises(PromptError, match=says):
        CACHED.apply(PARAMS, tokens, CACHED.init_state(2, 8))


def test_what_lies_beyond_a_rows_count_may_be_anything() -> None:
    tokens = jnp.asarray([[1, 2, -7], [3, 29, 29]], jnp.int32)
    CACHED.apply(PARAMS, tokens, CACHED.init_state(2, 8), jnp.asarray([2, 1]))


@pytest.mark.parametrize("args", [(0, 8), (2, 0), (2, 8, 0), (2, 49)], ids=str)
def test_a_state_that_cannot_be_is_refused(args: tuple) -> None:
    with pytest.raises(PromptError) as e:
        CACHED.init_state(*args)
    assert e.value.fix


# ---------------------------------------------------------------------------------------------- params of whom

PAIRS: dict[str, tuple[Transform, Transform]] = {
    "dense to int8": (ip.compose(), INT8),
    "int8 to dense": (INT8, ip.compose()),
    "int4 to int8": (INT4, INT8),
    "other group": (INT4, ip.quantize(bits=4, group=16)),
    "one layer packed to all": (ip.quantize(bits=8, where="layers.0.*"), INT8),
    "all to one layer packed": (INT8, ip.quantize(bits=8, where="layers.0.*")),
    "fewer heads": (ip.gqa(1), ip.compose()),
    "more heads": (ip.compose(), ip.gqa(1)),
    "split by a window": (ip.sliding_window(4, layers=[0]), ip.compose()),
    "a pair to one": (ip.cache_kv() | ip.speculative(ip.self_draft()), ip.cache_kv()),
    "one to a pair": (ip.cache_kv(), ip.cache_kv() | ip.speculative(ip.self_draft())),
    "another draft": (
        ip.cache_kv() | ip.speculative(ip.self_draft(INT8)),
        ip.cache_kv() | ip.speculative(ip.self_draft(INT4)),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_params_of_another_stack_are_refused(name: str) -> None:
    giver, taker = (t(BARE) for t in PAIRS[name])
    params = jax.eval_shape(lambda: giver.init(jax.random.key(0)))
    error = refused(taker, params)
    assert "convert" in error.fix
    assert error.what.endswith(".")


@pytest.mark.parametrize(
    "other",
    [
        ip.models.llama(**TINY),
        ip.models.llama(**TINY | {"layers": 3}, tied=False),
        ip.models.llama(**TINY | {"vocab": 31}, tied=False),
        ip.models.llama(**TINY | {"mlp": 24}, tied=False),
        ip.models.gemma3(**TINY, tied=False, pattern=(True,)),
        OWN,
    ],
    ids=["tied", "layers", "vocab", "mlp", "gemma3", "own"],
)
def test_params_of_another_model_are_refused(other: ip.Model) -> None:
    refused(BARE, jax.eval_shape(lambda: other.init(jax.random.key(0))))


@pytest.mark.parametrize("params", [None, [], {}, {"segments": ()}, "weights"], ids=str)
def test_what_are_no_params_is_refused(params: Any) -> None:
    with pytest.raises(ParamsError):
        BARE.apply(params, TOKENS)
    with pytest.raises(ParamsError):
        BARE.convert(params)


SAME = [ip.cache_kv(), ip.cache_kv(bits=8) | ip.paged(4), ip.sliding_window(4)]


@pytest.mark.parametrize("transform", SAME, ids=repr)
def test_stacks_that_store_the_same_weights_take_each_others_params(transform: Transform) -> None:
    jax.eval_shape(transform(BARE).apply, PARAMS, TOKENS)


def test_assemble_names_what_is_missing_or_misshapen() -> None:
    weights = dict(Weights.of(BARE.spec, PARAMS).items())
    del weights["layers.1.mlp.up"]
    with pytest.raises(ParamsError, match=r"layers\.1\.mlp\.up"):
        assemble(BARE.spec, weights)
    weights["layers.1.mlp.up"] = np.zeros((3, 16), np.float32)
    with pytest.raises(ParamsError, match=r"\(3, 16\)"):
        assemble(BARE.spec, weights)


# -------------------------------------------------------------------------------------------------------- convert


def buffers(x: Any) -> list[int]:
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(x)]


def test_convert_does_not_copy_what_does_not_change() -> None:
    assert buffers(CACHED.convert(PARAMS)) == buffers(PARAMS)
    packed = ip.quantize(bits=8, where="*.mlp.*")(BARE).convert(PARAMS)
    for name in ("embed", "head", "final_norm"):
        assert buffers(packed[name]) == buffers(PARAMS[name])
    for name, stack in PARAMS["segments"][0][0].items():
        if ".mlp." not in name and not name.startswith("mlp."):
            assert buffers(packed["segments"][0][0][name]) == buffers(stack)
    pair = (ip.cache_kv() | ip.speculative(ip.self_draft()))(BARE).convert(PARAMS)
    assert buffers(pair["target"]) == buffers(pair["draft"]) == buffers(PARAMS)


def test_convert_from_an_ancestor_keeps_its_weights() -> None:
    """Trained after pooling its heads: those weights go on, and not the base's pooled again."""
    pooled = ip.gqa(1)(BARE)
    fast = (ip.quantize(bits=8, where="*.mlp.up") | ip.cache_kv())(pooled)
    trained = jax.tree.map(lambda x: x * 2 + 1, pooled.convert(PARAMS))
    got = fast.convert(trained, source=pooled)
    np.testing.assert_array_equal(got["segments"][0][0]["attn.k"], trained["segments"][0][0]["attn.k"])
    want = np.asarray(trained["segments"][0][0]["mlp.up"])
    up = got["segments"][0][0]["mlp.up"]
    assert np.abs(np.asarray(up.codes) * np.asarray(up.scale) - want).max() <= np.asarray(up.scale).max() / 2 + 1e-5
    with pytest.raises(ParamsError):
        fast.convert(trained)
    with pytest.raises(ParamsError):
        fast.convert(PARAMS, source=pooled)


def test_convert_from_itself_or_the_base_is_allowed() -> None:
    assert buffers(CACHED.convert(PARAMS, source=CACHED)) == buffers(PARAMS)
    assert buffers(CACHED.convert(PARAMS, source=BARE)) == buffers(PARAMS)


def test_convert_from_no_ancestor_is_refused() -> None:
    for source in (INT8(BARE), INT8(CACHED), FIVE):
        with pytest.raises(ParamsError, match="no ancestor") as e:
            CACHED.convert(PARAMS, source=source)
        assert e.value.fix


def test_extras_that_are_missing_or_unknown_are_refused() -> None:
    with pytest.raises(ParamsError, match="draft") as e:
        CACHED.convert(PARAMS, draft=PARAMS)
    assert e.value.fix == "convert(params)"
    drafted = ip.speculative(CACHED, k=2)(CACHED)
    with pytest.raises(ParamsError, match=r"needs \['draft'\]") as e:
        drafted.convert(PARAMS)
    assert "draft=draft_params" in e.value.fix
    with pytest.raises(ParamsError):
        drafted.convert(PARAMS, draft=PARAMS, darft=PARAMS)
    with pytest.raises(ParamsError):
        drafted.convert(PARAMS, draft=FIVE.init(jax.random.key(0)))


def test_init_of_a_stack_is_convert_of_the_bases_init() -> None:
    model = (ip.quantize(bits=8, where="*.mlp.up") | ip.cache_kv())(BARE)
    a, b = model.init(jax.random.key(0)), model.convert(PARAMS)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


# ----------------------------------------------------------------------------------------------------- repr, bytes


@pytest.mark.parametrize(
    "transform",
    [ip.compose(), INT8, INT4, ip.quantize(bits=8, group=8), ip.quantize(bits=4, group=8, where="head"), ip.gqa(1)],
    ids=repr,
)
def test_weight_bytes_are_those_of_the_live_buffers(transform: Transform) -> None:
    model = transform(BARE)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    assert model.weight_bytes() == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))


@pytest.mark.parametrize(
    "transform",
    [
        ip.cache_kv(),
        ip.cache_kv(bits=8),
        ip.cache_kv() | ip.paged(5),
        ip.gqa(1) | ip.cache_kv(bits=8) | ip.paged(2),
        ip.cache_kv() | ip.speculative(ip.self_draft(ip.gqa(1))),
    ],
    ids=repr,
)
def test_token_bytes_are_those_of_the_live_cache(transform: Transform) -> None:
    model = transform(BARE)
    state = jax.eval_shape(lambda: model.init_state(2, 20))
    assert model.token_bytes() * 2 * 20 == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.kv))


def test_repr_states_the_stack_its_bytes_and_whether_it_is_exact() -> None:
    assert repr(BARE).startswith("llama 2 x 16 | (bare)\n")
    assert "4.00 bytes a weight" in repr(BARE)
    assert repr(BARE).endswith("no cache, exact")
    fast = (INT4 | ip.cache_kv(bits=8))(BARE)
    assert "quantize(bits=4, group=8) | cache_kv(bits=8)" in repr(fast)
    assert f"{fast.token_bytes():,} bytes a token" in repr(fast)
    assert repr(fast).endswith("not exact")
    exact = (ip.cache_kv() | ip.paged(4) | ip.speculative(ip.self_draft(INT8)))(BARE)
    assert repr(exact).endswith(", exact")


@pytest.mark.parametrize("field", ["vocab", "dim", "layers", "heads", "kv_heads", "head_dim", "context"])
@pytest.mark.parametrize("value", [0, -1, 2.5])
def test_a_config_that_cannot_be_is_refused(field: str, value: Any) -> None:
    with pytest.raises(InfoptError, match=field):
        dataclasses.replace(BARE.spec.config, **{field: value})


def test_heads_that_do_not_share_evenly_are_refused() -> None:
    with pytest.raises(InfoptError, match="does not divide heads"):
        ip.models.llama(heads=4, kv_heads=3)
