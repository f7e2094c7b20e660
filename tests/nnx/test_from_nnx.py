"""Flax modules gain caches, packed weights and windows, and stay what they were; what cannot is refused by line."""

from __future__ import annotations

import functools
import inspect
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import infopt as ip
from infopt.model import FAMILIES, Weights
from infopt.nnx.example import Transformer
from infopt.testing import verify
from tests.nnx import modules
from tests.nnx.modules import CONTEXT, GPT, VOCAB

GOOD: dict[str, Any] = {
    "gpt": GPT,
    "flag": modules.ByFlag,
    "position": modules.ByPosition,
    "local": modules.Local,
    "parallel": modules.Parallel,
    "shared": modules.Shared,
    "one layer": functools.partial(GPT, layers=1),
    "example": lambda rngs: Transformer(
        layers=3, dim=32, heads=4, kv_heads=2, head_dim=16, mlp=48, vocab=VOCAB, rngs=rngs
    ),
}


@functools.cache
def made(name: str) -> tuple[Any, ip.Model, Any]:
    module = GOOD[name](rngs=nnx.Rngs(1))
    model, params = ip.from_nnx(module)
    module.eval()
    for _, m in nnx.iter_graph(module):
        if isinstance(m, nnx.MultiHeadAttention):
            m.decode = False
    return module, model, params


def own_logits(module: Any, tokens: list[int]) -> np.ndarray:
    ids = jnp.asarray(tokens, jnp.int32)[None]
    return np.asarray(
        nnx.jit(lambda m, *args: m(*args))(module, ids, jnp.arange(len(tokens), dtype=jnp.int32)[None])[0]
    )


def in_chunks(model: ip.Model, params: Any, tokens: list[int], chunk: int) -> np.ndarray:
    state, step, got = model.init_state(1, len(tokens), chunk=chunk), jax.jit(model.apply), []
    for start in range(0, len(tokens), chunk):
        logits, state = step(params, jnp.asarray([tokens[start : start + chunk]], jnp.int32), state)
        got.append(logits[0])
    return np.concatenate(got)


def text(n: int = 26) -> list[int]:
    return np.random.default_rng(3).integers(0, VOCAB, n).tolist()


def off(a: Any, b: np.ndarray) -> float:
    return float(np.abs(np.asarray(a) - b).max() / np.std(b))


@pytest.mark.parametrize("name", GOOD)
def test_a_module_gives_its_own_logits_uncached_and_cached_in_chunks(name: str) -> None:
    module, model, params = made(name)
    want, ids = own_logits(module, text()), jnp.asarray(text(), jnp.int32)[None]
    assert off(jax.jit(model.apply)(params, ids)[0][0], want) < 1e-4
    assert off(in_chunks(ip.cache_kv()(model), params, text(), 7), want) < 1e-4


@pytest.mark.parametrize(
    "stack",
    [
        ip.cache_kv() | ip.paged(4),
        ip.quantize(bits=8) | ip.cache_kv(bits=8),
        ip.quantize(bits=4, group=16) | ip.sliding_window(6) | ip.cache_kv() | ip.paged(4),
        ip.cache_kv() | ip.speculative(ip.self_draft(ip.quantize(bits=4, group=16)), k=2),
    ],
    ids=repr,
)
@pytest.mark.parametrize("name", ["local", "parallel", "example"])
def test_stacks_over_a_module_keep_the_contract(name: str, stack: Any) -> None:
    _, model, params = made(name)
    fast = stack(model)
    assert verify(fast, fast.convert(params)) < 1e-4


def test_packed_weights_compute_what_the_module_computes_with_their_rounded_values() -> None:
    module, model, params = made("example")
    stack = ip.quantize(bits=4, group=16) | ip.quantize(bits=8, where="embed") | ip.quantize(bits=8, where="head")
    fast = (stack | ip.cache_kv())(model)
    back = ip.dequantize()(fast)
    packed = fast.convert(params)
    rounded = ip.to_nnx(back, back.convert(packed, source=fast))
    ids = jnp.asarray(text(), jnp.int32)[None]
    want = own_logits(rounded, text())
    assert off(jax.jit(fast.apply)(packed, ids)[0][0], want) < 1e-4
    assert off(want, own_logits(module, text())) > 1e-2
    assert fast.weight_bytes() < 0.3 * model.weight_bytes()


def test_a_matrix_that_the_code_reads_by_itself_may_be_packed_too() -> None:
    class Raw(GPT):
        def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
            x = self.embed(tokens) + self.place(positions)
            for block in self.blocks:
                x = block(x, is_causal=True)
            return self.norm(x) @ self.embed.embedding[...].T

    model, params = ip.from_nnx(Raw(nnx.Rngs(0)))
    fast = ip.quantize(bits=8, where="embed")(model)
    packed = fast.convert(params)
    back = ip.dequantize()(fast)
    rounded = ip.to_nnx(back, back.convert(packed, source=fast))
    rounded.eval()
    assert off(jax.jit(fast.apply)(packed, jnp.asarray([text()]))[0][0], own_logits(rounded, text())) < 1e-4


def test_inputs_that_the_code_would_not_round_are_refused() -> None:
    class Remade(modules.Block):
        def __call__(self, x: jax.Array, **attention: Any) -> jax.Array:
            x = x + self.attention(self.first(x), **attention)
            return x + self.down(nnx.gelu(nnx.remat(lambda up, x: up(x))(self.up, self.second(x))))

    class Outer(modules.ByFlag):
        def __init__(self, rngs: nnx.Rngs) -> None:
            super().__init__(rngs)
            self.blocks = nnx.List([Remade(rngs=rngs) for _ in range(2)])

    model, params = ip.from_nnx(Outer(nnx.Rngs(0)))
    ids = jnp.asarray([text()])
    with pytest.raises(ip.InfoptError, match=r"layers\.0\.up by itself") as e:
        fast = ip.quantize(bits=8, activations=8)(model)
        fast.apply(fast.convert(params), ids)
    assert "without activations" in str(e.value)
    others = ip.quantize(bits=8, activations=8, where="*.down")(model)
    assert np.isfinite(others.apply(others.convert(params), ids)[0]).all()


def test_a_window_is_what_flax_computes_under_the_same_mask() -> None:
    _, model, params = made("gpt")
    local = modules.Local(rngs=nnx.Rngs(1))
    local.eval()
    fast = (ip.sliding_window(7) | ip.cache_kv())(model)
    assert off(in_chunks(fast, params, text(40), 5), own_logits(local, text(40))) < 1e-4


def test_a_mask_with_a_window_becomes_the_layers_window_and_a_ring() -> None:
    _, model, _ = made("local")
    assert model.spec.window == (ip.Window(7), ip.Window(7))
    cached = ip.cache_kv()(model)
    assert cached.init_state(1, 60, chunk=4).layouts[0].slots < 12


def test_weights_are_named_by_their_layers() -> None:
    names = {name: set(Weights.of(made(name)[1].spec, made(name)[2])) for name in ("gpt", "parallel", "one layer")}
    assert {"embed", "place", "layers.0.attention.query", "layers.1.up", "norm.scale"} <= names["gpt"]
    assert {"layers.2.key", "layers.2.layers", "layers.0.query_ln.scale", "head", "head_bias", "scale"} <= names[
        "parallel"
    ]
    assert "layers.0.up" in names["one layer"]
    assert ip.quantize(bits=8)(made("parallel")[1]).spec.format_of("layers.2.layers") is not None
    assert "module." not in "".join(names["gpt"])


def test_the_context_is_the_table_of_positions() -> None:
    for name in ("gpt", "parallel"):
        model = made(name)[1]
        assert model.spec.config.context == CONTEXT and model.spec.config.learned_positions
        with pytest.raises(ip.InfoptError, match="64"):
            model.init_state(1, CONTEXT + 1)
    assert not made("example")[1].spec.config.learned_positions


def test_padding_beyond_a_table_does_not_spoil_real_tokens() -> None:
    _, model, params = made("gpt")
    cached = ip.cache_kv()(model)
    step, state = jax.jit(cached.apply), cached.init_state(1, CONTEXT, chunk=60)
    _, state = step(params, jnp.asarray([text(60)]), state)
    logits, _ = step(params, jnp.zeros((1, 8), jnp.int32), state, jnp.asarray([2]))
    assert np.isfinite(np.asarray(logits[0, :2])).all()


def test_generation_is_the_modules_own_greedy_text() -> None:
    module, model, params = made("example")
    fast = ip.cache_kv()(model)
    tokens = text(5)
    for _ in range(12):
        tokens.append(int(own_logits(module, tokens)[-1].argmax()))
    assert ip.generate(fast, params, text(5), max_new=12, stop_tokens=()).tokens == tokens[5:]


@pytest.mark.parametrize("name", GOOD)
def test_params_go_back_into_a_module_of_the_same_class(name: str) -> None:
    module, model, params = made(name)
    again = ip.to_nnx(model, params)
    assert type(again) is type(module)
    for (path, one), (_, two) in zip(
        nnx.to_flat_state(nnx.state(module, nnx.Param)), nnx.to_flat_state(nnx.state(again, nnx.Param)), strict=True
    ):
        assert one.dtype == two.dtype and np.array_equal(one[...], two[...]), path


def test_what_was_trained_in_flax_keeps_the_compiled_functions() -> None:
    module, model, _ = made("gpt")
    graphdef, state = nnx.split(module)
    other, params = ip.from_nnx(nnx.merge(graphdef, jax.tree.map(lambda x: 2 * x if x.ndim > 1 else x, state)))
    assert other.spec == model.spec and other.apply is model.apply
    ids = jnp.asarray([text()])
    assert off(other.apply(params, ids)[0], np.asarray(model.apply(made("gpt")[2], ids)[0])) > 0.1


def test_two_sizes_of_one_class_are_two_families() -> None:
    one, two = (ip.from_nnx(GPT(nnx.Rngs(0), layers=n))[0] for n in (1, 2))
    assert one.spec.family != two.spec.family
    assert one.spec.config.layers == 1 and two.spec.config.layers == 2


def test_a_module_in_bfloat16_stays_in_it() -> None:
    with jax.numpy_dtype_promotion("standard"):
        model, params = ip.from_nnx(GPT(nnx.Rngs(0), param_dtype=jnp.bfloat16, dtype=jnp.bfloat16))
    assert Weights.of(model.spec, params)["layers.0.attention.query"].dtype == jnp.bfloat16
    assert Weights.of(model.spec, params)["embed"].dtype == jnp.float32


def test_a_layer_with_arithmetic_of_its_own_keeps_it() -> None:
    def doubled(*args: Any, **options: Any) -> jax.Array:
        return 2 * jax.lax.dot_general(*args, **options)

    module = GPT(nnx.Rngs(0))
    module.blocks[0].up = nnx.Linear(32, 48, dot_general=doubled, rngs=nnx.Rngs(5))
    model, params = ip.from_nnx(module)
    assert model.spec.family != made("gpt")[1].spec.family
    module.eval()
    assert off(jax.jit(model.apply)(params, jnp.asarray([text()]))[0][0], own_logits(module, text())) < 1e-4


def test_modules_that_differ_in_an_object_of_settings_are_two_families() -> None:
    found = []
    for scale in (1.0, 3.0):
        module = modules.Configured(nnx.Rngs(0), modules.Settings(scale))
        model, params = ip.from_nnx(module)
        module.eval()
        found.append((model, params, own_logits(module, text())))
    assert found[0][0].spec.family != found[1][0].spec.family
    for model, params, want in found:
        assert off(jax.jit(model.apply)(params, jnp.asarray([text()]))[0][0], want) < 1e-4


def test_modules_that_differ_in_what_has_no_text_are_two_families() -> None:
    made = []
    for factor in (1.0, 3.0):
        module = GPT(nnx.Rngs(0))
        module.blocks[0].up = nnx.Linear(
            32, 48, dot_general=lambda *a, f=factor, **k: f * jax.lax.dot_general(*a, **k), rngs=nnx.Rngs(5)
        )
        made.append((module, *ip.from_nnx(module)))
    assert made[0][1].spec.family != made[1][1].spec.family
    for module, model, params in made:
        module.eval()
        assert off(jax.jit(model.apply)(params, jnp.asarray([text()]))[0][0], own_logits(module, text())) < 1e-4


def test_causality_may_stand_within_the_attention_fn() -> None:
    class Inner(GPT):
        def mask(self, tokens: jax.Array, positions: jax.Array) -> dict[str, Any]:
            return {}

    def causal(query: jax.Array, key: jax.Array, value: jax.Array, **options: Any) -> jax.Array:
        return jax.nn.dot_product_attention(query, key, value, is_causal=True)

    assert ip.from_nnx(Inner(nnx.Rngs(0), attention_fn=causal))[0].spec.window == (None, None)


def test_mixed_precision_is_taken_as_it_is() -> None:
    with jax.numpy_dtype_promotion("standard"):
        model, _ = ip.from_nnx(GPT(nnx.Rngs(0), dtype=jnp.bfloat16))
    assert model.spec.config.layers == 2


def test_two_layers_may_share_a_kernel() -> None:
    module = GPT(nnx.Rngs(0))
    module.blocks[1].up.kernel = module.blocks[0].up.kernel
    model, params = ip.from_nnx(module)
    assert "layers.1.up" not in Weights.of(model.spec, params)
    fast = ip.quantize(bits=8)(model)
    packed = fast.convert(params)
    back = ip.dequantize()(fast)
    rounded = ip.to_nnx(back, back.convert(packed, source=fast))
    assert off(jax.jit(fast.apply)(packed, jnp.asarray([text()]))[0][0], own_logits(rounded, text())) < 1e-4


@pytest.mark.parametrize("stack", [None, ip.cache_kv(), ip.sliding_window(6) | ip.cache_kv(bits=8)], ids=repr)
@pytest.mark.parametrize("name", ["gpt", "parallel", "example"])
def test_dense_stacks_are_saved_and_loaded(name: str, stack: Any, tmp_path: Path) -> None:
    _, model, params = made(name)
    fast = model if stack is None else stack(model)
    ip.save(tmp_path / "stack", fast, params)
    loaded, again = ip.load(tmp_path / "stack")
    assert loaded.spec == fast.spec
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True))


def test_saved_and_loaded_a_stack_generates_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model, params = made("gpt")
    fast = (ip.quantize(bits=8) | ip.cache_kv())(model)
    packed = fast.convert(params)
    ip.save(tmp_path / "stack", fast, packed)
    loaded, again = ip.load(tmp_path / "stack")
    assert loaded.spec == fast.spec
    tokens = [
        ip.generate(m, p, text(5), max_new=8, stop_tokens=()).tokens for m, p in ((fast, packed), (loaded, again))
    ]
    assert tokens[0] == tokens[1]
    monkeypatch.delitem(FAMILIES, fast.spec.family)
    with pytest.raises(ip.InfoptError, match=r"ip\.from_nnx"):
        ip.load(tmp_path / "stack")
    ip.from_nnx(GPT(nnx.Rngs(7)))  # of other weights and the same structure: what another process would do
    assert ip.load(tmp_path / "stack")[0].spec == fast.spec


def test_a_plan_counts_the_modules_bytes() -> None:
    _, model, params = made("gpt")
    fast = (ip.quantize(bits=8) | ip.cache_kv())(model)
    plan = ip.plan(fast, device="rtx4090", context=CONTEXT)
    packed = fast.convert(params)
    assert sum(part.bytes for part in plan.account.weights) == sum(x.nbytes for x in jax.tree.leaves(packed))


# ------------------------------------------------------------------------------------------------------------- refused


def marked_line(cls: type[Any]) -> str:
    lines, first = inspect.getsourcelines(cls)
    return f"modules.py:{first + next(i for i, line in enumerate(lines) if '# LINE' in line)}"


@pytest.mark.parametrize(
    "cls, why",
    [
        (modules.NoPositions, "takes no positions"),
        (modules.OwnPositions, "depends on more than itself"),
        (modules.Mixes, "depends on more than itself"),
        (modules.Shifts, "depends on more than itself"),
        (modules.OwnAttention, "depends on more than itself"),
        (modules.LongTexts, "depends on more than itself"),
    ],
    ids=lambda x: x.__name__ if isinstance(x, type) else "",
)
def test_what_cannot_be_cached_is_refused_by_line(cls: Any, why: str) -> None:
    with pytest.raises(ip.InfoptError, match=why) as e:
        ip.from_nnx(cls(rngs=nnx.Rngs(0)))
    assert marked_line(cls) in str(e.value)


@pytest.mark.parametrize(
    "cls, why",
    [
        (modules.Looped, "within a transformation"),
        (modules.Bidirectional, "not causal"),
        (modules.Padded, "depends on which tokens"),
        (modules.Pair, "logits"),
        (modules.NeedsMask, "needs mask"),
        (modules.Uneven, "differ in heads or width"),
        (modules.Named, "logits"),
        (modules.Fails, "too short"),
        (modules.InnerWindow, "a window of its own"),
        (modules.Capped, "soft-cap"),
        (functools.partial(GPT, attention_fn=modules.halved), "another scale"),
    ],
    ids=lambda x: getattr(x, "__name__", "halved") if not isinstance(x, str) else "",
)
def test_what_would_compute_something_else_is_refused(cls: Any, why: str) -> None:
    with pytest.raises(ip.InfoptError, match=why) as e:
        ip.from_nnx(cls(rngs=nnx.Rngs(0)))
    assert re.search(r"modules\.py:\d+", str(e.value)) or cls is modules.Fails


@pytest.mark.parametrize("option", ["bias", "scale", "sow_weights"])
def test_attention_that_is_given_more_than_attend_takes_is_refused(option: str) -> None:
    class Odd(nnx.Module):
        def __init__(self) -> None:
            self.embed = nnx.Embed(VOCAB, 32, rngs=nnx.Rngs(0))
            self.attention_fn = nnx.dot_product_attention
            self.attention = nnx.MultiHeadAttention(4, 32, decode=False, rngs=nnx.Rngs(0))

        def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
            x = self.embed(tokens)
            if option == "sow_weights":
                return self.embed.attend(self.attention(x, is_causal=True, sow_weights=True))
            h = x.reshape(*x.shape[:2], 4, 8)
            more: Any = {"bias": jnp.zeros((1, 4, x.shape[1], x.shape[1]))} if option == "bias" else {"scale": 2.0}
            return self.embed.attend(self.attention_fn(h, h, h, is_causal=True, **more).reshape(x.shape))

    with pytest.raises(ip.InfoptError, match=r"test_from_nnx\.py:\d+"):
        ip.from_nnx(Odd())


def test_a_block_that_serves_two_layers_belongs_to_neither() -> None:
    _, model, _ = made("shared")
    assert model.spec.config.layers == 2
    with pytest.raises(ip.InfoptError, match="where"):
        ip.quantize(bits=8)(model)
    assert ip.quantize(bits=8, where="blocks.0.*")(model).spec.weights


def test_sinks_and_pooled_heads_are_refused_with_a_fix() -> None:
    model = made("example")[1]
    with pytest.raises(ip.InfoptError, match="rotated already"):
        ip.sliding_window(8, sinks=2)(model)
    with pytest.raises(ip.InfoptError, match="separate key and value"):
        ip.gqa(1)(model)


def test_a_context_beyond_the_table_is_refused() -> None:
    with pytest.raises(ip.InfoptError, match="rows of a table"):
        ip.from_nnx(GPT(nnx.Rngs(0)), context=CONTEXT + 1)


@pytest.mark.parametrize("name", ["llama", "my model"])
def test_a_name_that_cannot_be_is_refused(name: str) -> None:
    with pytest.raises(ip.InfoptError, match=name):
        ip.from_nnx(GPT(nnx.Rngs(0)), name=name)


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(ip.InfoptError, match="not a Flax NNX module"):
        ip.from_nnx(ip.models.llama())  # type: ignore[arg-type]


def test_packed_params_do_not_go_back() -> None:
    _, model, params = made("gpt")
    fast = ip.quantize(bits=8)(model)
    with pytest.raises(ip.InfoptError, match=r"dequantize\(\)"):
        ip.to_nnx(fast, fast.convert(params))
    with pytest.raises(ip.InfoptError, match="no Flax module"):
        ip.to_nnx(ip.models.llama(), {})


def test_gradients_reach_the_modules_weights() -> None:
    module, model, params = made("gpt")
    ids = jnp.asarray([text()])
    grads = jax.grad(lambda p: model.apply(p, ids)[0].var())(params)
    graphdef, state = nnx.split(module)
    positions = jnp.arange(26)[None]
    own = jax.grad(lambda s: nnx.merge(graphdef, s)(ids, positions).var(), allow_int=True)(state)
    want = own["blocks"][1]["up"]["kernel"][...]
    got = Weights.of(model.spec, grads)["layers.1.up"].T
    assert off(got, np.asarray(want)) < 1e-3


def test_a_method_says_that_a_module_has_no_layers_to_run() -> None:
    _, model, _ = made("gpt")
    with pytest.raises(ip.InfoptError, match=r"(?s)cannot be run a layer at a time.*write its layers with ip.define"):
        ip.quantize(bits=4, group=16, method=ip.gptq(list(range(VOCAB)) * 8, tokens=64, length=16))(model)
