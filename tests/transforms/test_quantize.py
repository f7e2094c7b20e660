"""quantize: which weights, in which format, against numpy; and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import infopt as ip
from infopt import testing
from infopt.errors import InfoptError, ParamsError, TransformOrderError
from infopt.formats import FORMATS
from infopt.model import Weights
from infopt.planner import abstract_params
from infopt.qtensor import Format, is_qtensor

BARE = ip.models.llama(layers=2, dim=32, heads=2, kv_heads=1, head_dim=16, mlp=64, vocab=29, context=48, tied=False)
PARAMS = BARE.init(jax.random.key(0))
MATRICES = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
ROUNDED = [name for name, row in FORMATS.items() if not row.kept]


def packed(transform: ip.Transform) -> set[str]:
    return {n for n, _ in transform(BARE).spec.weights}


def test_by_default_it_takes_the_blocks_linear_layers() -> None:
    assert packed(ip.quantize(bits=8)) == {f"layers.{i}.{m}" for i in (0, 1) for m in MATRICES}


@pytest.mark.parametrize(
    ("where", "want"),
    [
        ("layers.0.*", {f"layers.0.{m}" for m in MATRICES}),
        ("layers.*.mlp.up", {"layers.0.mlp.up", "layers.1.mlp.up"}),
        ("embed", {"embed"}),
        ("head", {"head"}),
        ("*", {"embed", "head", *(f"layers.{i}.{m}" for i in (0, 1) for m in MATRICES)}),
    ],
)
def test_where_is_a_pattern_over_logical_names(where: str, want: set[str]) -> None:
    assert packed(ip.quantize(bits=8, where=where)) == want


@pytest.mark.parametrize(
    ("transform", "format"),
    [
        (ip.quantize(), Format("int8")),
        (ip.quantize(bits=8, group=16), Format("int8", 16, "float16")),
        (ip.quantize(bits=4), Format("int4", 32, "float16")),
        (ip.quantize(bits=4, group=16), Format("int4", 16, "float16")),
    ],
    ids=repr,
)
def test_bits_and_group_say_the_format(transform: ip.Transform, format: Format) -> None:
    spec = transform(BARE).spec
    assert {f for _, f in spec.weights} == {format}
    assert spec.replace(weights=()) == BARE.spec
    assert not transform.exact


@pytest.mark.parametrize(("bits", "group"), [(8, None), (8, 16), (4, 32)])
def test_weights_are_the_nearest_levels_of_numpys_definition(bits: int, group: int | None) -> None:
    model = ip.quantize(bits=bits, group=group)(BARE)
    before, after = Weights.of(BARE.spec, PARAMS), Weights.of(model.spec, model.convert(PARAMS))
    for name, got in after.items():
        if not is_qtensor(got):
            np.testing.assert_array_equal(got, before[name])
            continue
        x = np.asarray(before[name], np.float64)
        groups = x.reshape(x.shape[0], -1, group or x.shape[1])
        if bits == 8:
            scale = np.abs(groups).max(-1) / 127
        else:
            at = np.abs(groups).argmax(-1)[..., None]
            scale = np.take_along_axis(groups, at, -1)[..., 0] / -8
        np.testing.assert_allclose(np.asarray(got.scale, np.float64), scale, rtol=6e-4)
        used = np.asarray(got.scale, np.float64)[..., None]
        codes = np.asarray(got.codes).astype(np.int64).reshape(*groups.shape[:2], -1)
        level = codes if bits == 8 else np.concatenate([codes % 16, codes // 16], -1) - 8
        bound = (-127, 127) if bits == 8 else (-8, 7)
        assert np.abs(level - np.clip(groups / used, *bound)).max() <= 0.5 + 1e-4


def test_int4_is_0_5625_bytes_a_weight_of_the_live_buffers() -> None:
    params = ip.quantize(bits=4)(BARE).convert(PARAMS)
    for name in MATRICES:
        dense = PARAMS["segments"][0][0][name]
        assert params["segments"][0][0][name].nbytes == dense.size * 0.5625 + 4 * len(dense)  # and an error a matrix


def test_a_weight_packed_twice_is_refused_and_another_is_not() -> None:
    with pytest.raises(TransformOrderError, match="needs dense weights") as e:
        (ip.quantize(bits=8, where="layers.0.mlp.up") | ip.quantize(bits=4))(BARE)
    assert "layers.0.mlp.up is packed as int8" in e.value.what
    assert e.value.why
    assert "dequantize()" in e.value.fix
    mixed = (ip.quantize(bits=8, where="layers.0.*") | ip.quantize(bits=4, where="layers.1.*"))(BARE)
    assert len(mixed.spec.weights) == 14
    assert mixed.spec.weights == tuple(sorted(mixed.spec.weights))


def test_a_pattern_that_matches_nothing_suggests_what_is_near() -> None:
    with pytest.raises(InfoptError, match=r"no weight is named like 'layers\.0\.mlp\.upp'") as e:
        ip.quantize(bits=8, where="layers.0.mlp.upp")(BARE)
    assert "layers.0.mlp.up" in e.value.why
    assert e.value.fix
    for where in ("layers.0.attn_norm", "final_norm", ""):  # norms are no matrices
        with pytest.raises(InfoptError, match="no weight is named"):
            ip.quantize(bits=8, where=where)(BARE)


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ("mlp", "did you mean '*.mlp.*'?"),
        ("mlp.*", "did you mean '*.mlp.*'?"),
        ("layers.7.*", "layers 0 to 1"),
        ("layers.*.atn.q", "did you mean 'layers.*.attn.q'"),
        ("embd", "did you mean 'embed'"),
    ],
)
def test_a_near_pattern_is_told_once_for_all_layers(where: str, why: str) -> None:
    with pytest.raises(InfoptError) as e:
        ip.quantize(where={where: 8, "*": None})(BARE)
    assert why in e.value.why


def test_a_tied_model_has_no_head_to_pack() -> None:
    tied = ip.models.llama(layers=1, dim=32, vocab=29)
    with pytest.raises(InfoptError, match="no weight is named like 'head'") as e:
        ip.quantize(bits=8, where="head")(tied)
    assert "its embedding: 'embed'" in e.value.why


def test_a_group_that_does_not_divide_names_the_weight_and_those_that_do() -> None:
    with pytest.raises(InfoptError, match="group=24 does not divide") as e:
        ip.quantize(bits=4, group=24)(BARE)
    assert "layers.0." in e.value.what
    assert "2, 4, 8, 16, 32" in e.value.fix


def test_float32_is_no_format_and_the_way_to_leave_weights_so_is_said() -> None:
    for name in ("fp32", "float32"):
        with pytest.raises(InfoptError, match="is what weights are without it") as e:
            ip.quantize(format=name)
        assert "where={'*.mlp.*': None, 'layers.*': 8}" in e.value.fix
    kept = ip.quantize(where={"*.mlp.*": None, "layers.*": 8})(BARE).spec
    assert kept.format_of("layers.0.mlp.up") is None
    assert kept.format_of("layers.0.attn.q") is not None


@pytest.mark.parametrize("bits", [0, 7, 16, "8", 4.5, True, [8]])
def test_bits_that_are_no_format_are_refused(bits: object) -> None:
    with pytest.raises(InfoptError, match="is not a format") as e:
        ip.quantize(bits=bits)  # type: ignore[arg-type]
    assert e.value.fix == 'bits=8, 6, 5, 4, 3 or 2, or format="nf4", say'


@pytest.mark.parametrize("group", [0, 1, -4, 2.0, "32", True])
def test_a_group_that_is_none_is_refused(group: object) -> None:
    with pytest.raises(InfoptError, match="group="):
        ip.quantize(bits=8, group=group)  # type: ignore[arg-type]


def test_an_odd_group_of_four_bits_is_refused() -> None:
    with pytest.raises(InfoptError, match="whole bytes"):
        ip.quantize(bits=4, group=5)


@pytest.mark.parametrize("where", [3, [], ["head", 3], ["head", "head"], {}, {3: 8}, b"head"], ids=repr)
def test_a_pattern_that_is_no_text_is_refused(where: object) -> None:
    with pytest.raises(InfoptError, match="where"):
        ip.quantize(where=where)(BARE)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    bad = dict(PARAMS)
    layer = dict(bad["segments"][0][0])
    layer["mlp.up"] = layer["mlp.up"].at[1, 3, 4].set(value)
    bad["segments"] = ((layer,),)
    with pytest.raises(ParamsError, match=r"layers\.1\.mlp\.up holds NaN or infinite") as e:
        ip.quantize(bits=8)(BARE).convert(bad)
    assert e.value.fix


def test_a_packed_embedding_and_head_read_as_their_values() -> None:
    model = ip.quantize(bits=8, where="[eh]*")(BARE)
    params = model.convert(PARAMS)
    dense = (ip.quantize(bits=8, where="[eh]*") | ip.dequantize())(BARE)
    tokens = jnp.asarray([[1, 2, 3]], jnp.int32)
    got, want = (jax.jit(m.apply)(p, tokens)[0] for m, p in ((model, params), (dense, dense.convert(PARAMS))))
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("name", ROUNDED)
def test_a_format_by_name_equals_its_oracle_alone(name: str) -> None:
    """Logits in chunks and after rollbacks, against the numpy model; matrices, embedding and head."""
    bare, params = testing.base_of("llama")
    group = None if FORMATS[name].rule == "none" else 16
    model = (ip.quantize(format=name, group=group, where="*") | ip.cache_kv())(bare)
    assert {f.name for _, f in model.spec.weights} == {name}
    testing.verify(model, model.convert(params), generation=False)


DEEP = "gqa(1) | quantize({}) | sliding_window(5, sinks=2) | cache_kv(bits=8) | speculative(self_draft(), k=2)"


@pytest.mark.parametrize(
    "arguments",
    [
        "format='fp8_e4m3'",
        "format='nvfp4', group=16, clip='mse'",
        "group=16, where={'head': 'int4_min', '*.attn.*': 'nf4', 'layers.0.*': 'mxfp4', 'layers.1.*': 'int4_zero', "
        "'layers.*': 2}",
        "group=16, where={'head': 'int8_zero', '*.attn.*': 'int4_absmax', 'layers.0.*': 4, 'layers.*': 'int2_zero'}",
        "bits=3, group=24, pad=True",
        "where={'head': 8, 'layers.0.*': None, '*.mlp.*': 'fp8_e5m2', 'layers.*': 'bf16'}",
    ],
)
def test_one_of_each_packing_equals_its_oracle_in_a_deep_stack(arguments: str) -> None:
    bare, params = testing.base_of("llama")
    model = ip.parse_stack(DEEP.format(arguments))(bare)
    testing.verify(model, model.convert(params))


@pytest.mark.parametrize("name", ROUNDED)
def test_live_bytes_of_a_model_are_those_that_it_says(name: str) -> None:
    model = ip.quantize(format=name, where="*", pad=True)(BARE)
    params = model.convert(PARAMS)
    assert model.weight_bytes() == sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(params))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), abstract_params(model.spec)) == jax.tree.map(
        lambda a: (a.shape, a.dtype), params
    )


@pytest.mark.parametrize("name", ROUNDED)
def test_a_format_is_saved_bit_for_bit(name: str, tmp_path) -> None:
    model = ip.quantize(format=name, where="*", pad=True)(BARE)
    params = model.convert(PARAMS)
    ip.save(tmp_path / "stack", model, params)
    loaded, again = ip.load(tmp_path / "stack")
    assert loaded.spec == model.spec and repr(loaded) == repr(model)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params)):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("name", ["fp16", "fp8_e4m3", "mxfp4", "int4_zero"])
def test_gradients_through_any_packing_are_refused(name: str) -> None:
    model = ip.quantize(format=name, where="*", pad=True)(BARE)
    params, tokens = model.convert(PARAMS), jnp.ones((1, 3), jnp.int32)
    with pytest.raises(ParamsError, match="gradient"):
        jax.grad(lambda p: model.apply(p, tokens)[0].sum(), allow_int=True)(params)


def test_experts_are_packed_each_with_its_own_scale() -> None:
    base, params = testing.base_of("mixtral")
    model = ip.quantize(format="nvfp4", where="*.mlp.experts.*")(base)
    assert model.convert(params)["segments"][0][0]["mlp.experts.up"].outer.shape == (3, 4, 1, 1)
    model = ip.cache_kv()(model)
    testing.verify(model, model.convert(params), generation=False)


@pytest.mark.parametrize("where", [None, "*.mlp.*", "layers.*"])
def test_biases_of_experts_are_no_matrices(where: str | None) -> None:
    model = ip.quantize(bits=8, where=where)(testing.base_of("gpt_oss")[0])
    packed = {name.split(".", 2)[2] for name, _ in model.spec.weights}
    assert {"mlp.experts.gate", "mlp.experts.up", "mlp.experts.down"} <= packed
    assert not [name for name in packed if name.endswith(("_bias", "sinks"))]


def test_clipping_is_of_the_recipe_and_changes_the_weights() -> None:
    plain, clipped = ip.quantize(bits=3), ip.quantize(bits=3, clip="mse")
    assert plain(BARE).spec == clipped(BARE).spec
    assert plain(BARE) != clipped(BARE)
    one, two = (t(BARE).convert(PARAMS)["segments"][0][0]["mlp.up"] for t in (plain, clipped))
    assert (np.asarray(one.codes) != np.asarray(two.codes)).any()


def test_padding_is_asked_for_and_counted() -> None:
    with pytest.raises(InfoptError, match="does not divide") as e:
        ip.quantize(bits=4, group=24)(BARE)
    assert "pad=True" in e.value.fix
    model = ip.quantize(bits=4, group=24, pad=True)(BARE)
    assert "pad=True" in repr(model)
    assert model.spec.format_of("layers.0.attn.q").bytes((32, 32)) == 32 * (48 // 2 + 2 * 2) + 4


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: ip.quantize(format="nf5"), "'nf4'"),
        (lambda: ip.quantize(format="q4_k"), "nothing here rounds to q4_k"),
        (lambda: ip.quantize(where={"head": "q6_k"}), "nothing here rounds to q6_k"),
        (lambda: ip.quantize(bits=4, format="nf4"), "both say the format"),
        (lambda: ip.quantize(bits=4, where={"head": 8}), "both say the format"),
        (lambda: ip.quantize(format="nf4", where={"head": 8}), "both say the format"),
        (lambda: ip.quantize(where={"head": 7}), "bits=7"),
        (lambda: ip.quantize(where={"head": "int7"}), "int"),
        (lambda: ip.quantize(clip="kl"), "clip"),
        (lambda: ip.quantize(pad="yes"), "pad"),
        (lambda: ip.quantize(format="fp16", group=32), "no scales"),
        (lambda: ip.quantize(format="bf16", clip="mse"), "no scales"),
        (lambda: ip.quantize(format="int3", group=12), "multiple of 8"),
    ],
)
def test_what_makes_no_format_is_refused(call, says: str) -> None:
    with pytest.raises(InfoptError) as e:
        call()
    assert says in str(e.value)
    assert e.value.fix


# --------------------------------------------------------------------------------------------------------------- rules


def test_of_several_rules_the_first_that_matches_holds() -> None:
    rules = {"head": 8, "layers.0.*": None, "*.mlp.*": "nf4", "*.mlp.gate": 2, "layers.*": 4}
    with pytest.raises(InfoptError, match=r"the rule '\*\.mlp\.gate' touches nothing: rules before it") as e:
        ip.quantize(where=rules)(BARE)
    assert "before them" in e.value.fix
    del rules["*.mlp.gate"]
    spec = ip.quantize(where={"*.1.mlp.gate": 2, **rules}, group=16)(BARE).spec
    assert spec.format_of("head") == Format("int8", 16, "float16")
    assert spec.format_of("embed") is spec.format_of("layers.0.mlp.up") is None
    assert spec.format_of("layers.1.mlp.gate") == Format("int2", 16, "float16")
    assert spec.format_of("layers.1.mlp.up") == Format("nf4", 16, "float16")
    assert spec.format_of("layers.1.attn.q") == Format("int4", 16, "float16")


def test_several_patterns_take_the_one_format() -> None:
    assert packed(ip.quantize(bits=8, where=["head", "*.mlp.up"])) == {"head", "layers.0.mlp.up", "layers.1.mlp.up"}


def test_each_rule_must_match_something() -> None:
    with pytest.raises(InfoptError, match="no weight is named like 'heat'") as e:
        ip.quantize(where={"*.mlp.*": 4, "heat": 8})(BARE)
    assert "'head'" in e.value.why


@pytest.mark.parametrize(
    "transform",
    [
        ip.quantize(where={"head": 8, "*.mlp.*": "int4", "layers.0.*": None}),
        ip.quantize(bits=4, where=["head", "*.mlp.*"]),
        ip.quantize(format="nf4", group=64, clip="mse", pad=True),
        ip.quantize(),
        ip.quantize(bits=8, where="layers.0.*"),
    ],
    ids=repr,
)
def test_a_repr_is_the_text_of_the_same_transform(transform: ip.Transform) -> None:
    assert ip.parse_stack(repr(transform)) == transform
    assert hash(transform) == hash(ip.parse_stack(repr(transform)))


CONVERT = """
import sys, threading, time, jax, infopt as ip
model, params = ip.load(sys.argv[1])
jax.block_until_ready(params)
def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
before, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
own = jax.block_until_ready(ip.quantize(bits=4, group=32)(model).convert(params))
done = True
thread.join()
base = {id(x) for x in jax.tree.leaves(params)}
fresh = sum(x.nbytes for x in jax.tree.leaves(own) if id(x) not in base)
print(peak - before, fresh, params["embed"].nbytes)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RssAnon is read from Linux's /proc")
def test_converting_holds_the_result_and_twice_the_largest_tensor_at_most(smollm2: Path) -> None:
    """Beside the base, whose dense weights the result shares; the process is one of its own."""
    command = [sys.executable, "-c", CONVERT, str(smollm2)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    taken, fresh, largest = map(int, run.stdout.split())
    assert 55e6 < fresh < 65e6
    assert taken <= fresh + 2 * largest
