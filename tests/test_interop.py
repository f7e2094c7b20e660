"""To and from `qwix.QArray`: qwix itself is asked what its arrays stand for."""

from __future__ import annotations

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import infopt as ip
from infopt.errors import InfoptError
from infopt.formats import FORMATS, Format, Row
from infopt.qtensor import dequantize_array, quantize_array

qwix = pytest.importorskip("qwix")

SHARED = [
    Format("int8"),
    Format("int8", 16, "float16"),
    Format("q8_0", 32, "float16"),
    Format("int4", 16, "float16"),
    Format("int4"),
    Format("int4_absmax", 8, "bfloat16"),
    Format("q4_0", 32, "float16"),
    Format("int4_zero", 16, "float16"),
    Format("int4_zero"),
    Format("int6", 16, "float16"),
    Format("int5", 16, "float16"),
    Format("int3", 16, "float16"),
    Format("int2", 8, "float16"),
    Format("nf4", 32, "float16"),
    Format("fp8_e4m3"),
    Format("fp8_e5m2", 16),
    Format("mxfp4", 32, "float8_e8m0fnu"),
]
pack = functools.partial(jax.jit, static_argnums=(1, 2))(quantize_array)


def sample(*shape: int) -> jax.Array:
    """Of both signs, lopsided, with a row of zeros and one of a single sign."""
    x = np.random.default_rng(0).normal(0.3, 1.0, shape).astype(np.float32)
    x[..., 1, :] = 0
    x[..., 2, :] = np.abs(x[..., 2, :])
    return jnp.asarray(x)


def same(a: jax.Array, b: jax.Array) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(np.array_equal(np.asarray(a), np.asarray(b)))


@pytest.mark.parametrize("format", SHARED, ids=repr)
def test_qwix_reads_the_same_values_and_the_way_back_gives_every_leaf(format: Format) -> None:
    q = pack(sample(2, 6, 64), format, 2)  # two layers
    a = ip.to_qwix(q)
    assert a.shape == (2, 6, 64)
    assert same(qwix.dequantize(a), dequantize_array(q))
    back = ip.from_qwix(a, format)
    assert (back.format, back.shape) == (q.format, q.shape)
    assert bool(jnp.isnan(back.error).all())  # of what was rounded elsewhere nothing is known
    back = dataclasses.replace(back, error=q.error)
    assert all(same(x, y) for x, y in zip(jax.tree.leaves(back), jax.tree.leaves(q), strict=True))
    assert same(dequantize_array(ip.from_qwix(a)), dequantize_array(q))


def test_what_qwix_cannot_hold_is_every_other_format() -> None:
    assert set(FORMATS) - {f.name for f in SHARED} == {
        *("fp16", "bf16", "int4_min", "int2_min", "q4_1", "nvfp4", "int8_zero", "int2_zero", "q4_k", "q5_k", "q6_k")
    }


@pytest.mark.parametrize(
    ("qtype", "tile", "method", "name"),
    [
        (jnp.int8, None, "absmax", "int8"),
        (jnp.int8, 16, "absmax", "int8"),
        (jnp.int4, 16, "absmax", "int4"),
        (jnp.int4, None, "minmax", "int4_zero"),
        (jnp.int4, 16, "minmax", "int4_zero"),
        ("int3", 16, "absmax", "int3"),
        ("int2", 16, "absmax", "int2"),
        ("nf4", 32, "absmax", "nf4"),
        (jnp.float8_e4m3fn, None, "absmax", "fp8_e4m3"),
        (jnp.float8_e5m2, 16, "absmax", "fp8_e5m2"),
        ("mxfp8", 32, "absmax", "fp8_e4m3"),
        ("mxfp4", 32, "absmax", "mxfp4"),
        ("nvfp4", 16, "absmax", "nvfp4"),
    ],
)
def test_what_qwix_rounded_reads_the_same_here(qtype, tile, method, name) -> None:
    x = sample(64, 6)  # a Flax kernel, [in, out]
    a = qwix.quantize(
        x, qtype, channelwise_axes=[1], tiled_axes={} if tile is None else {0: tile}, calibration_method=method
    )
    q = ip.from_qwix(a.mT)
    assert (q.format.name, q.format.group, q.shape) == (name, tile, (6, 64))
    assert same(dequantize_array(q), qwix.dequantize(a).T)
    if name != "nvfp4":
        assert same(qwix.dequantize(ip.to_qwix(q).mT), qwix.dequantize(a))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("qtype", [jnp.int8, "nf4"])
def test_scales_of_16_bits_stay_so_and_mean_what_they_mean_in_float32(dtype, qtype) -> None:
    a = qwix.quantize(sample(6, 64), qtype, channelwise_axes=[0], tiled_axes={1: 16}, scale_dtype=dtype)
    q = ip.from_qwix(a)
    assert q.scale.dtype == dtype and q.format.scale == jnp.dtype(dtype).name
    assert same(dequantize_array(q), qwix.dequantize(a.astype(jnp.float32)))


def test_shared_scales_and_zero_points_of_other_tiles_are_repeated() -> None:
    rng = np.random.default_rng(0)
    a = qwix.QArray(
        jnp.asarray(rng.integers(-8, 8, (6, 64)), jnp.int4),
        jnp.asarray(rng.uniform(1, 2, (2, 4)), jnp.float32),
        jnp.asarray(rng.integers(-8, 8, (1, 8)), jnp.int4),
    )
    q = ip.from_qwix(a)
    assert q.format == Format("int4_zero", 8, "float32")
    assert same(dequantize_array(q), qwix.dequantize(a))
    whole = ip.from_qwix(qwix.quantize(sample(6, 64), jnp.int8))
    assert whole.scale.shape == (6, 1)


def test_a_finer_group_keeps_the_values() -> None:
    a = qwix.quantize(sample(6, 64), jnp.int4, channelwise_axes=[0], tiled_axes={1: 32})
    fine = ip.from_qwix(a, Format("int4", 8, "float32"))
    assert fine.scale.shape == (6, 8)
    assert same(dequantize_array(fine), qwix.dequantize(a))


def test_a_stack_serves_what_qwix_rounded() -> None:
    model = ip.models.llama()
    params = model.init(jax.random.key(0))
    stack = ip.quantize(bits=8)(model)
    packed = stack.convert(params)
    again = jax.tree.map(
        lambda q: ip.from_qwix(ip.to_qwix(q), q.format) if isinstance(q, ip.QTensor) else q,
        packed,
        is_leaf=lambda x: isinstance(x, ip.QTensor),
    )
    tokens = jnp.arange(5)[None]
    logits, _ = stack.apply(again, tokens, stack.init_state(1, 8))
    expected, _ = stack.apply(packed, tokens, stack.init_state(1, 8))
    assert same(logits, expected)


def test_to_qwix_is_traced_as_any_function() -> None:
    q = pack(sample(6, 64), Format("int4", 16, "float16"), 2)
    assert same(qwix.dequantize(jax.jit(ip.to_qwix)(q)), dequantize_array(q))


@pytest.mark.parametrize(
    ("format", "why"),
    [
        (Format("int4_min", 16, "float16"), "a minimum for each group"),
        (Format("q4_1", 32, "float16"), "a minimum for each group"),
        (Format("nvfp4", 16, "float8_e4m3fn"), "relative to one of the whole matrix"),
        (Format("fp16"), "no scale"),
        (Format("bf16"), "no scale"),
    ],
    ids=repr,
)
def test_a_format_without_a_counterpart_is_refused_with_the_reason(format: Format, why: str) -> None:
    with pytest.raises(InfoptError, match=f"(?s){format.name} has no counterpart.*{why}.*fix: .*int4_zero, "):
        ip.to_qwix(pack(sample(6, 64), format, 2))


def test_other_levels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "other_levels", Row(bits=2, low=-1, high=1, zero=1, group=64))
    with pytest.raises(InfoptError, match="no type of such levels"):
        ip.to_qwix(quantize_array(sample(6, 64), Format("other_levels", 16, "float16"), 2))


def test_padding_and_what_is_not_packed_are_refused() -> None:
    with pytest.raises(InfoptError, match="rows of 60 values padded to 64"):
        ip.to_qwix(quantize_array(sample(6, 60), Format("int4", 16, "float16", pad=True), 2))
    with pytest.raises(InfoptError, match="fix: quantize first"):
        ip.to_qwix(sample(6, 64))  # pyright: ignore[reportArgumentType]
    with pytest.raises(InfoptError, match="was given a ndarray"):
        ip.from_qwix(np.zeros((6, 64)))
    boxed = qwix.QArray("a box", "another", None, "int8")
    with pytest.raises(InfoptError, match="of no array"):
        ip.from_qwix(boxed)


def test_an_unturned_kernel_is_refused_with_the_turn() -> None:
    a = qwix.quantize(sample(64, 6), jnp.int8, channelwise_axes=[1])
    with pytest.raises(InfoptError, match=r"(?s)each place of its last axis.*fix: from_qwix\(a.mT\)"):
        ip.from_qwix(a)


@pytest.mark.parametrize(
    ("qtype", "method", "said"),
    [
        (jnp.int8, "minmax", "qtype int8 with zero points has no counterpart"),
        ("int7", "absmax", "qtype int7 has no counterpart"),
        (jnp.float4_e2m1fn, "absmax", "qtype float4_e2m1fn has no counterpart"),
    ],
)
def test_a_qtype_without_a_counterpart_is_refused(qtype, method, said) -> None:
    a = qwix.quantize(sample(6, 64), qtype, channelwise_axes=[0], calibration_method=method)
    with pytest.raises(InfoptError, match=f"(?s){said}.*fix: a qtype of int8, int4"):
        ip.from_qwix(a)


def test_a_format_that_would_change_a_value_is_refused() -> None:
    a = qwix.quantize(sample(6, 64), jnp.int4, channelwise_axes=[0], tiled_axes={1: 16})
    with pytest.raises(InfoptError, match="qtype int4 is not int8"):
        ip.from_qwix(a, Format("int8", 16))
    with pytest.raises(InfoptError, match="qtype int4 is not int4_zero"):
        ip.from_qwix(a, Format("int4_zero", 16))
    with pytest.raises(InfoptError, match=r"(?s)are not all float16.*fix: Format\('int4', 16, 'float32'\)"):
        ip.from_qwix(a, Format("int4", 16, "float16"))
    with pytest.raises(InfoptError, match=r"(?s)4 scales a row.*fix: a group that divides 16"):
        ip.from_qwix(a, Format("int4", 32, "float32"))
    with pytest.raises(InfoptError, match="does not divide"):
        ip.from_qwix(a, Format("int4", 24, "float32"))
    with pytest.raises(InfoptError, match="no static scale"):
        ip.from_qwix(a, Format("int4", 16, "float32", activations=8, static=True))
    uneven = dataclasses.replace(a, scale=a.scale[:, :3])
    with pytest.raises(InfoptError, match="not a whole one"):
        ip.from_qwix(uneven)


def test_without_qwix_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    q = pack(sample(6, 64), Format("int8"), 2)
    monkeypatch.setitem(sys.modules, "qwix", None)
    for call in (ip.to_qwix, ip.from_qwix):
        with pytest.raises(InfoptError, match="fix: pip install qwix"):
            call(q)
