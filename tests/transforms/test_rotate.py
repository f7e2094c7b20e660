"""rotate: nothing changes, on every family whose stream can be turned; what it costs; what comes before and after."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import infopt as ip
from infopt import hadamard, testing
from infopt.errors import InfoptError, TransformOrderError
from infopt.io.checkpoint import CheckpointError
from infopt.methods.gptq import solved
from infopt.methods.layers import Layer, by_layer
from infopt.model import Weights, assemble, family_of, stream_of
from infopt.transforms.rotate import rotation

FAMILIES = ("llama", "mistral", "smollm3", "qwen2", "qwen3", "phi3", "mixtral", "qwen3_moe", "gpt_oss")
TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, 61, (1, 24)))
IDS = np.random.default_rng(0).integers(0, 61, 4096)
HOW: dict[str, Any] = dict(text=IDS, tokens=1024, length=32)


def uneven(name: str, w: Any) -> Any:
    """Norms far from 1, biases far from 0, a channel of the stream that sticks out."""
    if name.endswith(("norm", "bias", "sinks")):
        return w + 0.5 * jnp.cos(jnp.arange(w.size, dtype=w.dtype)).reshape(w.shape)
    return w.at[:, 3].mul(20.0) if name == "embed" else w


def uneven_params(model: ip.Model) -> Any:
    params = model.init(jax.random.key(2))

    def change(path: Any, w: Any) -> Any:
        return uneven(str(path[-1].key), w)

    return jax.tree_util.tree_map_with_path(change, params)


def base(family: str, tied: bool = False) -> tuple[ip.Model, Any]:
    model, _ = testing.base_of(family)
    model = dataclasses.replace(
        model,
        spec=model.spec.replace(config=dataclasses.replace(model.spec.config, tied=tied)),  # type: ignore[call-arg]
    )
    return model, uneven_params(model)


def apart(model: ip.Model, params: Any, other: ip.Model, others: Any) -> float:
    """The greatest difference of a logit, as a share of the spread."""
    want, got = (jax.jit(m.apply)(p, TOKENS)[0] for m, p in ((model, params), (other, others)))
    return float(jnp.abs(got - want).max() / jnp.std(want))


@pytest.mark.parametrize(("tied", "online"), [(True, False), (False, True)], ids=["tied", "online"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_stay(family: str, tied: bool, online: bool) -> None:
    model, params = base(family, tied)
    made = ip.rotate(seed=5, online=online)(model)
    turned = made.convert(params)
    assert apart(model, params, made, turned) < 1e-4
    assert made.exact and not made.spec.config.tied  # type: ignore[attr-defined]
    weights, before = Weights.of(made.spec, turned), Weights.of(model.spec, params)
    for norm in stream_of(made.spec).reads:
        np.testing.assert_array_equal(weights[norm], np.ones(32, np.float32))
    changed = [*stream_of(made.spec).writes, "embed", "layers.0.attn.q"]
    assert all(float(jnp.abs(weights[n] - before[n]).max()) > 0.1 for n in changed)


def test_channels_that_stick_out_cost_less_when_turned() -> None:
    model, params = base("llama")
    weights = dict(Weights.of(model.spec, params))
    for norm, readers in stream_of(model.spec).reads.items():  # what a norm makes small, its readers make large
        weights[norm] = weights[norm].at[::7].divide(8.0)
        weights |= {name: weights[name].at[:, ::7].multiply(8.0) for name in readers}
    params, cut = assemble(model.spec, weights), ip.windows(IDS[:1024].tolist(), 32)

    def lost(stack: ip.Transform) -> float:
        made = stack(model)
        return ip.measure(made, made.convert(params), cut, (model, params)).kl.value

    low = ip.quantize(bits=4, group=16)
    assert lost(ip.rotate() | low) < 0.5 * lost(low)


@pytest.mark.parametrize("width", [32, 48, 576, 61, 6])
def test_the_rotation_is_orthogonal(width: int) -> None:
    q = rotation(width, 3).astype(np.float64)
    assert np.abs(q @ q.T - np.eye(width)).max() < 1e-6


def test_a_rotation_of_576_has_entries_of_one_size_and_random_signs() -> None:
    q = rotation(576, 3).astype(np.float64)
    assert np.abs(np.abs(q) * 24 - 1).max() < 1e-6
    assert 0.45 < (q > 0).mean() < 0.55


def test_a_width_without_a_hadamard_matrix_is_turned_too() -> None:
    model = ip.models.llama(layers=2, dim=22, heads=2, kv_heads=1, head_dim=8, mlp=22, vocab=61, context=64)
    params = uneven_params(model)
    for transform in (ip.rotate(), ip.rotate(online=True)):
        made = transform(model)
        assert apart(model, params, made, made.convert(params)) < 1e-4


def same(one: Any, other: Any) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def test_a_seed_gives_the_same_bytes_each_time_and_another_gives_others() -> None:
    model, params = base("llama")
    one, again, other = (ip.rotate(seed)(model).convert(params) for seed in (0, 0, 1))
    assert same(one, again)
    assert not np.array_equal(one["embed"], other["embed"])
    assert apart(ip.rotate()(model), one, ip.rotate()(model), other) < 1e-4


@pytest.mark.parametrize("stack", ["rotate() | rotate()", "rotate(online=True) | rotate(seed=2, online=True)"])
def test_twice_is_exact_too(stack: str) -> None:
    model, params = base("llama", tied=True)
    made = ip.parse_stack(stack)(model)
    assert apart(model, params, made, made.convert(params)) < 1e-4


def test_what_untying_costs_is_counted() -> None:
    model = ip.models.llama(tied=True, vocab=256, dim=64)
    made, extra = ip.rotate()(model), 256 * 64 * 4
    assert made.weight_bytes() - model.weight_bytes() == extra
    plans = [ip.plan(m, device="rtx4090", context=64) for m in (model, made)]
    one, other = (sum(part.bytes for part in plan.account.weights) for plan in plans)
    assert other - one == extra
    live = sum(x.nbytes for x in jax.tree.leaves(made.init(jax.random.key(0))))
    assert live == made.weight_bytes() == other


@pytest.mark.parametrize(
    "stack",
    ["gqa(1) | rotate()", "rotate() | sliding_window(6)", "rotate() | cache_kv(bits=8)", "rotate() | gqa(1)",
     "rotate() | flash_attention('blockwise') | cache_kv()"],
)  # fmt: skip
def test_others_do_with_it_what_they_do_without(stack: str) -> None:
    model, params = base("qwen2", tied=True)
    steps = stack.split(" | ")
    with_it, without = (ip.parse_stack(" | ".join(s))(model) for s in (steps, [s for s in steps if s != "rotate()"]))
    off = apart(with_it, with_it.convert(params), without, without.convert(params))
    assert off < (3e-2 if "bits" in stack else 1e-4)


@pytest.mark.parametrize("stack", ["rotate() | quantize(bits=4, group=16)", "rotate(online=True) | quantize(bits=8)"])
def test_it_meets_the_oracle_when_rounded_after(stack: str) -> None:
    model, params = testing.base_of("qwen3_moe")
    made = (ip.parse_stack(stack) | ip.cache_kv())(model)
    testing.verify(made, made.convert(params))


@pytest.mark.parametrize("where", [None, "embed", "head", "layers.1.mlp.down"])
def test_packed_weights_are_refused(where: str | None) -> None:
    model, _ = testing.base_of("llama")
    with pytest.raises(TransformOrderError, match=r"rotate\(\) needs dense weights") as e:
        (ip.quantize(bits=8, where=where) | ip.rotate())(model)
    assert "dequantize()" in e.value.fix
    (ip.quantize(bits=8, where=where) | ip.dequantize() | ip.rotate())(model)


@pytest.mark.parametrize(
    ("family", "why"), [("gemma2", "a norm scales"), ("gemma3", "a norm scales"), ("gpt2", "mean")]
)
def test_a_stream_that_cannot_be_turned_is_refused_with_the_reason(family: str, why: str) -> None:
    model, _ = testing.base_of(family)
    with pytest.raises(InfoptError, match=rf"rotate\(\): the residual stream of a {family} cannot be rotated") as e:
        ip.rotate()(model)
    assert why in e.value.why and e.value.fix


def test_a_stream_that_nobody_told_is_refused() -> None:
    model, _ = testing.base_of("nnx")
    with pytest.raises(InfoptError, match=r"rotate\(\): it is not known what reads and writes") as e:
        ip.rotate()(model)
    assert "stream=" in e.value.fix


def own(name: str, **changes: Any) -> ip.Model:
    """A Llama under another name, of which something is otherwise."""
    model = ip.models.llama(tied=True)
    f = family_of(model.spec)
    assert f.embed and f.block and f.final and f.stream
    given: dict[str, Any] = dict(config=f.config, init=f.init, embed=f.embed, block=f.block, final=f.final)
    given |= dict(stream=f.stream) | changes
    return ip.Model.of(ip.define(name, **given), model.spec.config)


STREAM = family_of(ip.models.llama().spec).stream
assert STREAM is not None
NO_HEAD = {norm: names for norm, names in STREAM.reads.items() if norm != "final_norm"}


def always_tied(config: Any, key: Any) -> Any:
    return family_of(ip.models.llama().spec).init(dataclasses.replace(config, tied=True), key)


def normed_with_a_bias(config: Any, key: Any) -> Any:
    return family_of(ip.models.llama().spec).init(config, key) | {"final_norm_bias": jnp.zeros(config.dim)}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(init=always_tied), "is always its embedding"),
        (dict(stream=dataclasses.replace(STREAM, reads=NO_HEAD)), "lacks the head"),
        (dict(stream=dataclasses.replace(STREAM, tables=())), "lacks the head or the embedding"),
        (dict(stream=dataclasses.replace(STREAM, writes=("attn.o", "mlp.up"))), "names layers.0.mlp.up, of shape"),
        (dict(init=normed_with_a_bias), "the norm final_norm of a mine has a bias"),
    ],
)
def test_a_stream_that_is_not_the_familys_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InfoptError, match=said) as e:
        ip.rotate()(own("mine", **changes))
    assert e.value.why and e.value.fix


def test_online_without_an_mlp_is_refused() -> None:
    stream = dataclasses.replace(STREAM, writes=("attn.o",))
    with pytest.raises(InfoptError, match="no matrix that writes to the stream and is named like"):
        ip.rotate(online=True)(own("mine", stream=stream))


def test_a_family_of_ones_own_with_norms_stored_minus_one_is_turned() -> None:
    llama = family_of(ip.models.llama().spec)
    assert llama.embed and llama.block and llama.final

    def whole(p: Any) -> Any:
        return {n: w + 1 if n.endswith("norm") else w for n, w in p.items()}

    def block(c: Any, phase: int, p: Any, *rest: Any) -> Any:
        return llama.block(c, phase, whole(p), *rest)  # type: ignore[misc]

    def final(c: Any, params: Any, x: Any) -> Any:
        return llama.final(c, whole(params), x)  # type: ignore[misc]

    model = own("minus_one", block=block, final=final, stream=dataclasses.replace(STREAM, offset=1.0))
    params, made = uneven_params(model), ip.rotate()(model)
    assert apart(model, params, made, made.convert(params)) < 1e-4


@pytest.mark.parametrize(
    ("options", "said"), [(dict(seed=-1), "seed=-1"), (dict(seed=1.5), "seed=1.5"), (dict(online=1), "online=1")]
)
def test_arguments_that_are_none_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InfoptError, match=said):
        ip.rotate(**options)


@pytest.mark.parametrize("text", ["rotate()", "rotate(seed=3)", "rotate(online=True)", "rotate(seed=1, online=True)"])
def test_a_stack_says_it_and_is_read_back(text: str) -> None:
    assert repr(ip.parse_stack(text)) == text == str(ip.parse_stack(text)(ip.models.llama()).recipe)


@pytest.mark.parametrize("online", [False, True])
def test_a_saved_stack_comes_back(online: bool, tmp_path: Path) -> None:
    model, params = base("llama", tied=True)
    made = (ip.rotate(online=online) | ip.quantize(bits=8, where="*.mlp.*"))(model)
    converted = made.convert(params)
    ip.save(tmp_path / "stack", made, converted)
    loaded, theirs = ip.load(tmp_path / "stack")
    assert loaded.spec == made.spec and same(converted, theirs)
    assert apart(made, converted, loaded, theirs) == 0
    loaded.audit(theirs)


def test_a_spec_without_it_is_written_as_before() -> None:
    spec = ip.models.llama().spec
    assert '"online"' not in spec.to_json()
    assert '"online": ["mlp.down"]' in ip.rotate(online=True)(ip.models.llama()).spec.to_json()


def test_a_rotated_model_is_exported_and_an_online_one_is_not(tmp_path: Path) -> None:
    model, params = base("llama", tied=True)
    made, online = ip.rotate()(model), ip.rotate(online=True)(model)
    ip.export(tmp_path / "made", made, made.convert(params))
    loaded, theirs = ip.load(tmp_path / "made")
    assert apart(model, params, loaded, theirs) < 1e-4
    with pytest.raises(CheckpointError, match=r"turns what goes into mlp\.down"):
        ip.export(tmp_path / "online", online, online.convert(params))


@pytest.mark.parametrize(("name", "online"), [("layers.1.attn.q", False), ("layers.1.mlp.down", True)])
def test_statistics_are_those_of_the_rotated_stack(name: str, online: bool) -> None:
    model, params = base("llama", tied=True)
    bare, method = ip.rotate(online=online)(model), ip.gptq(**HOW)
    last = ip.quantize(bits=4, group=16, where=name, method=method)
    weights, turned = Weights.of(model.spec, params), Weights.of(bare.spec, bare.convert(params))
    grams: dict[str, np.ndarray] = {}

    def change(layer: Layer) -> dict[str, Any]:
        grams.update({layer.prefix + n: np.asarray(inputs.gram) for n, inputs in layer.statistics.items()})
        return {n: layer.p[n] for n in layer.names}

    by_layer(model.spec, weights, method.windows(model), {name}, change)
    gram = grams[name].astype(np.float64)  # what enters it in the base, of which the stack's is known
    if online:
        turn = np.asarray(hadamard.turned(jnp.eye(48)), np.float64)
    else:
        turn = rotation(32) / np.asarray(weights["layers.1.attn_norm"], np.float64)[:, None]
    stack = last(bare)
    found = Weights.of(stack.spec, stack.convert(params))[name].codes
    own, of_base = (
        solved(jnp.asarray(turned[name]), jnp.asarray(g, jnp.float32), format=stack.spec.format_of(name))[0].codes
        for g in (turn.T @ gram @ turn, gram)
    )
    assert (found == own).mean() > 0.99  # a value on the edge may fall to the other side
    assert (found == of_base).mean() < 0.9
