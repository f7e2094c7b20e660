"""QTensor and its formats, against float64 numpy definitions written here."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infopt import reference
from infopt.errors import InfoptError
from infopt.formats import FORMATS, Format
from infopt.qtensor import (
    QTensor,
    dequantize_array,
    is_qtensor,
    quantize_array,
    round_trip,
)

quantize = functools.partial(jax.jit, static_argnums=(1, 2))(quantize_array)
dequantize = jax.jit(dequantize_array)

CASES = [
    Format("int8"),
    Format("int8", 8, "float16"),
    Format("int4", 8, "float16"),
    Format("int4", 16, "float32"),
    Format("int4"),
    Format("int4_min", 8, "float16"),
    Format("int4_min", 16, "float32"),
]
WIDTH = 48


def sample(rows: int = 11) -> np.ndarray:
    """Rows of every kind that matters: random, zeros, constants, one sign only, one outlier, tiny."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, WIDTH)).astype(np.float32)
    x[1] = 0
    x[2] = 0.375
    x[3] = -0.375
    x[4] = np.abs(x[4]) + 0.5
    x[5] = -np.abs(x[5]) - 0.5
    x[6, 17] = 50
    x[7] *= 1e-3
    x[8, :24] = 0
    return x


def levels(q: QTensor) -> np.ndarray:
    """Codes `[..., groups, group]` as whole numbers, unpacked here a second time."""
    group = q.format.group or q.shape[-1]
    codes = np.asarray(q.codes).astype(np.int64)
    if FORMATS[q.format.name].bits == 8:
        return codes.reshape(*codes.shape[:-1], -1, group)
    out = np.zeros((*codes.shape[:-1], codes.shape[-1] * 2 // group, group), np.int64)
    for g in range(out.shape[-2]):
        for j in range(group // 2):
            byte = codes[..., g * group // 2 + j]
            out[..., g, j], out[..., g, j + group // 2] = byte % 16, byte // 16
    return out


def defined(x: np.ndarray, format: Format) -> tuple[np.ndarray, np.ndarray]:
    """Scales and minima by the book, in float64, then as they are stored."""
    groups = x.astype(np.float64).reshape(*x.shape[:-1], -1, format.group or x.shape[-1])
    stored = np.dtype(format.scale)
    if format.name == "int8":
        return (np.abs(groups).max(-1) / 127).astype(stored), np.zeros(groups.shape[:-1])
    if format.name == "int4":
        at = np.abs(groups).argmax(-1)[..., None]
        return (np.take_along_axis(groups, at, -1)[..., 0] / -8).astype(stored), np.zeros(groups.shape[:-1])
    low = groups.min(-1).astype(stored)
    return ((groups.max(-1) - low.astype(np.float64)) / 15).astype(stored), low


@pytest.mark.parametrize("format", CASES, ids=str)
def test_codes_and_scales_are_those_of_the_definition(format: Format) -> None:
    x = sample()
    q = quantize(jnp.asarray(x), format, 1)
    scale, minimum = defined(x, format)
    np.testing.assert_allclose(np.asarray(q.scale), scale, rtol=2e-3 if format.scale == "float16" else 1e-6, atol=1e-7)
    if format.name == "int4_min":
        np.testing.assert_array_equal(np.asarray(q.minimum), minimum)
    else:
        assert q.minimum is None
    # Codes are the nearest levels to the scales as they are stored, whatever a last bit of those.
    used = np.asarray(q.scale).astype(np.float64)[..., None]
    groups = x.astype(np.float64).reshape(*x.shape[:-1], -1, format.group or WIDTH)
    exact = (groups - np.asarray(minimum, np.float64)[..., None]) / np.where(used == 0, 1, used)
    low, high, zero = {"int8": (-127, 127, 0), "int4": (-8, 7, 8), "int4_min": (0, 15, 0)}[format.name]
    code = levels(q) - zero
    assert code.min() >= low
    assert code.max() <= high
    assert np.abs(code - np.clip(exact, low, high)).max() <= 0.5 + 1e-4


@pytest.mark.parametrize("format", CASES, ids=str)
def test_values_read_back_as_scale_times_code_plus_minimum(format: Format) -> None:
    q = quantize(jnp.asarray(sample()), format, 1)
    zero = {"int8": 0, "int4": 8, "int4_min": 0}[format.name]
    want = (levels(q) - zero) * np.asarray(q.scale).astype(np.float64)[..., None]
    if q.minimum is not None:
        want += np.asarray(q.minimum).astype(np.float64)[..., None]
    want = want.reshape(-1, WIDTH)
    np.testing.assert_allclose(np.asarray(dequantize(q)), want, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(reference.dequantize(q), want, rtol=1e-12)


@pytest.mark.parametrize("format", CASES, ids=str)
def test_error_is_at_most_half_a_level_and_zeros_stay_zero(format: Format) -> None:
    x = sample()
    q = quantize(jnp.asarray(x), format, 1)
    error = np.abs(np.asarray(dequantize(q)) - x).reshape(*x.shape[:-1], -1, format.group or WIDTH)
    step = np.abs(np.asarray(q.scale).astype(np.float64))[..., None]
    # int4 reaches -8 * scale but only 7 * scale: the side opposite to the extreme value may be cut by a whole level;
    # a scale of 16 bits may itself fall short by one part in two thousand of the range.
    half = step * (1.0 if format.name == "int4" else 0.5) + step * 15 / 2048
    assert (error <= half + 1e-6).all()
    assert (np.asarray(dequantize(q))[1] == 0).all()


@pytest.mark.parametrize("format", [Format("int4", 8, "float32"), Format("int8", 8, "float32")], ids=str)
def test_extreme_values_are_hit_exactly(format: Format) -> None:
    x = sample()
    groups = x.reshape(-1, 8)
    got = np.asarray(dequantize(quantize(jnp.asarray(groups), format, 1)))
    at = np.abs(groups).argmax(-1)
    rows = np.arange(len(groups))
    np.testing.assert_allclose(got[rows, at], groups[rows, at], rtol=3e-7)


def test_rounding_twice_changes_nothing() -> None:
    x = jnp.asarray(sample())
    for format in (Format("int8", None, "float32"), Format("int4", 8, "float16")):
        q = quantize(x, format, 1)
        again = quantize(dequantize(q), format, 1)
        np.testing.assert_array_equal(np.asarray(q.codes), np.asarray(again.codes))


def test_round_trip_reads_what_was_stored_and_none_changes_nothing() -> None:
    x = jnp.asarray(sample())
    assert round_trip(x, None) is x
    format = Format("int8")
    once = jax.jit(round_trip, static_argnums=1)(x, format)
    np.testing.assert_array_equal(np.asarray(once), np.asarray(dequantize(quantize(x, format, 1))))
    np.testing.assert_allclose(np.asarray(once), reference.round_kv(np.asarray(x, np.float64), format), atol=1e-6)


def packed(low_first: bool) -> QTensor:
    """One group of eight codes 0..7, whose bytes are written out by hand."""
    bytes_ = [0x40, 0x51, 0x62, 0x73] if low_first else [0x04, 0x15, 0x26, 0x37]
    return QTensor(jnp.array([bytes_], jnp.uint8), jnp.ones((1, 1), jnp.float32), None, Format("int4", 8), (8,))


def test_byte_j_holds_element_j_low_and_element_j_plus_half_a_group_high() -> None:
    x = np.arange(-8, 0, dtype=np.float32)[None]
    q = quantize(jnp.asarray(x), Format("int4", 8), 1)  # -8 is the extreme: the scale is 1, the codes 0..7
    assert [hex(b) for b in np.asarray(q.codes)[0]] == ["0x40", "0x51", "0x62", "0x73"]
    np.testing.assert_array_equal(np.asarray(dequantize(packed(True))), x)


def test_swapped_nibbles_would_be_seen() -> None:
    x = np.arange(-8, 0, dtype=np.float32)[None]
    assert not np.array_equal(np.asarray(dequantize(packed(False))), x)
    assert not np.array_equal(reference.dequantize(packed(False)), x)
    np.testing.assert_array_equal(reference.dequantize(packed(True)), x)


def test_groups_do_not_mix() -> None:
    """The second group's bytes follow the first's, and each has its own scale."""
    x = np.concatenate([np.arange(-8, 0), 2 * np.arange(-8, 0)]).astype(np.float32)[None]
    q = quantize(jnp.asarray(x), Format("int4", 8), 1)
    assert np.asarray(q.codes)[0].tolist() == [0x40, 0x51, 0x62, 0x73] * 2
    assert np.asarray(q.scale)[0].tolist() == [1.0, 2.0]
    np.testing.assert_array_equal(np.asarray(dequantize(q)), x)


@pytest.mark.parametrize("format", CASES, ids=str)
def test_live_buffers_take_the_bytes_that_the_format_says(format: Format) -> None:
    q = jax.eval_shape(lambda x: quantize_array(x, format), jax.ShapeDtypeStruct((5, WIDTH), jnp.float32))
    assert q.nbytes == sum(np.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(q))
    assert q.nbytes == pytest.approx(5 * WIDTH * format.bytes_per_value(WIDTH))


def test_bytes_of_the_usual_formats() -> None:
    assert Format("int4", 32, "float16").bytes_per_value(576) == 0.5625  # Q4_0
    assert Format("int4_min", 32, "float16").bytes_per_value(576) == 0.625  # Q4_1
    assert Format("int8", 32, "float16").bytes_per_value(576) == 1.0625  # Q8_0
    assert Format("int8").bytes_per_value(64) == 1.0625


@pytest.mark.parametrize(("format", "trailing"), [(Format("int8"), 1), (Format("int4", 8), 2), (Format("int4_min"), 2)])
def test_a_stack_and_its_slice_are_one_type_of_pytree(format: Format, trailing: int) -> None:
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4, 16)).astype(np.float32))
    stack = quantize(x, format, trailing)
    assert is_qtensor(stack)
    assert stack.shape == ((4, 16) if trailing == 2 else (16,))
    one = quantize(x[1], format, trailing)
    assert jax.tree.structure(stack) == jax.tree.structure(stack[1]) == jax.tree.structure(one)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), stack[1], one)
    written = jax.tree.map(lambda whole, part: whole.at[0].set(part), stack, one)
    np.testing.assert_array_equal(np.asarray(dequantize(written))[0], np.asarray(dequantize(one)))


@pytest.mark.parametrize(
    ("format", "width", "says"),
    [
        (Format("int8", 32), 48, "a group that divides 48: 6, 8, 12, 16, 24, 48"),
        (Format("int4", 32, "float16"), 36, "a group that divides 36: 2, 4, 6, 12, 18, 36"),
        (Format("int4"), 7, "where="),
        (Format("int8", 2), 7, "a group that divides 7: 7"),
    ],
)
def test_a_group_that_does_not_divide_is_refused_with_those_that_do(format: Format, width: int, says: str) -> None:
    with pytest.raises(InfoptError) as e:
        format.check_width(width, "layers.0.mlp.down")
    assert "layers.0.mlp.down" in e.value.what
    assert str(width) in e.value.what
    assert says in e.value.fix
    with pytest.raises(InfoptError):
        quantize_array(jnp.zeros((2, width)), format)


def test_a_width_that_no_group_divides_is_refused_with_a_way_out() -> None:
    """Seven 4-bit codes cannot be split into groups of whole bytes: the fix must not be an empty list."""
    with pytest.raises(InfoptError) as e:
        Format("int4", 4).check_width(7, "layers.0.mlp.down")
    assert "where=" in e.value.fix or "bits=8" in e.value.fix


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Format("int7"), "int7"),
        (lambda: Format("int9"), "int8"),
        (lambda: Format("int8", 0), "0"),
        (lambda: Format("int4", 5), "whole bytes"),
    ],
)
def test_a_format_that_cannot_be_is_refused(make, says: str) -> None:
    with pytest.raises(InfoptError) as e:
        make()
    assert says in str(e.value)
    assert e.value.fix


def test_finite_values_never_become_nan() -> None:
    """A scale that its 16 bits cannot hold would turn the group into infinity times zero."""
    x = jnp.full((1, 8), 1e6, jnp.float32)
    for format in (Format("int4", 8, "float16"), Format("int8", 8, "float16"), Format("int4_min", 8, "float16")):
        got = np.asarray(dequantize(quantize(x * jnp.arange(1, 9, dtype=jnp.float32)[None], format, 1)))
        assert np.isfinite(got).all(), format


def test_values_below_the_least_scale_round_to_zero() -> None:
    x = jnp.full((1, 8), 1e-12, jnp.float32)
    for format in (Format("int4", 8, "float16"), Format("int8", 8, "float16"), Format("int4_min", 8, "float16")):
        got = np.asarray(dequantize(quantize(x, format, 1)))
        np.testing.assert_allclose(got, 0, atol=1e-7)


def test_formats_are_hashable_ordered_and_plain_data() -> None:
    a, b = Format("int4", 32), Format("int8")
    assert len({a, Format("int4", 32), b}) == 2
    assert Format(**dataclasses.asdict(a)) == a
