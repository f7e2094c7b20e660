"""QTensor: an array stored in few bits, as a pytree, packed and unpacked by its row of `infopt.formats`."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from infopt.errors import InfoptError, ParamsError
from infopt.formats import FORMATS, Format, Row
from infopt.typing import Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scale", "minimum", "zero", "outer", "inner", "error", "input"],
    meta_fields=["format", "shape"],
)
@dataclasses.dataclass(frozen=True)
class QTensor:
    """An array in few bits.

    With `width = shape[-1]`, padded if the format says so, and `groups = width / group`:

    Args:
      codes: `[..., width]`, whole or of a float type; of fewer than 8 bits the bytes of words, uint8
        `[..., width * bits / 8]`.
      scale: `[..., groups]`; None for formats without one.
      minimum: `[..., groups]` for formats that store one, else None.
      format: the format, static.
      shape: the *trailing* shape, static: `(O, I)` of a weight, `(D,)` of a cache's heads. Leading axes (stacked
        layers, rows, slots) are only in the leaves, so that a stack and a slice of it are the same type of pytree.
      zero: zero points, uint8 `[..., groups]`, for formats that store them.
      outer: what scales are relative to, float32 `[..., 1, 1]` of a weight, for formats that store it.
      inner: the numbers of sub-groups, int8 or the bytes of words, `[..., groups * row.sub_bytes]`, for formats that
        have them.
      error: of a weight, float32 `[..., 1, 1]`: |x - what is stored| / |x| over the matrix, when it was rounded; NaN
        where it was loaded packed; with a minus where a method saw nothing go into it (an expert), or into one of its
        inputs. It travels with the weight for `Model.audit`, and nothing computes with it.
      input: of a weight whose inputs have a static scale, float32 `[..., 1, 1]`: the greatest |x| that it reaches to.
        A method says it; until then it is NaN.
    """

    codes: Any
    scale: Any
    minimum: Any
    format: Format
    shape: tuple[int, ...]
    zero: Any = None
    outer: Any = None
    inner: Any = None
    error: Any = None
    input: Any = None

    @property
    def nbytes(self) -> int:
        """Bytes of the live buffers."""
        return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(self))

    def __getitem__(self, index: Any) -> QTensor:
        """Index leading axes, of all leaves alike."""
        return jax.tree.map(lambda leaf: leaf[index], self)


def is_qtensor(x: Any) -> bool:
    return isinstance(x, QTensor)


@jax.custom_jvp
def _no_gradient(x: Array) -> Array:
    return x


@_no_gradient.defjvp
def _(primals: Any, tangents: Any) -> Any:
    raise ParamsError(
        "a gradient was asked through packed weights, or through keys, values or inputs that are rounded.",
        why="codes are whole numbers, and rounding has no slope: the gradient would be silently wrong.",
        fix="dense, join = ip.trainable(params); jax.grad(lambda dense: loss(join(dense)))(dense); "
        "and leave cache_kv(bits=8) and activations=8 out while training",
    )


def of_layer(w: Any, layer: Any) -> Any:
    """One layer of a stack; the weight itself where `layer` is None. A tuple indexes several axes, its Nones none."""
    index = tuple(i for i in (layer if isinstance(layer, tuple) else (layer,)) if i is not None)
    return jax.tree.map(lambda leaf: _at(leaf, index), w) if index else w


def _at(x: Array, index: tuple[Any, ...]) -> Array:
    rest = x.shape[len(index) :]
    return jax.lax.dynamic_slice(x, (*index, *(0 for _ in rest)), (*(1 for _ in index), *rest)).reshape(rest)


def no_gradient(x: Any) -> Any:
    """`x`, an array or a QTensor, through which no gradient may be asked."""
    return jax.tree.map(lambda leaf: _no_gradient(leaf) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, x)


def take(q: QTensor, rows: Array) -> QTensor:
    """Rows of a table `[V, D]`."""
    one = dataclasses.replace(q, outer=None, error=None)[rows]
    return one if q.outer is None else dataclasses.replace(one, outer=jnp.broadcast_to(q.outer[0, 0], (*rows.shape, 1)))


def kept_only(name: str) -> InfoptError:
    """The error where something would have to be rounded to a format that is only kept."""
    return InfoptError(
        f"nothing here rounds to {name}.",
        why="llama.cpp searches for such blocks; they are read from its files, and kept bit for bit.",
        fix='ip.load("model.gguf", dtype="keep") for a file that has them; or quantize(...) to '
        + ", ".join(known for known, row in FORMATS.items() if not row.kept),
    )


SHRINK = tuple(1 - i / 50 for i in range(26))
"""What `clip="mse"` tries: the share of its range that a group keeps, the first where two are equally good."""
STEPS = (1.0, 2.0, 0.5)
"""The same where scales are powers of two, and may cut a group's greatest values as they are."""

_LEAST = 2.0**-126
"""What is smaller counts as 0, as processors that flush denormal numbers have it."""


def quantize_array(x: Array, format: Format, trailing: int = 1, clip: str | None = None) -> QTensor:
    """Round to the nearest level, by the scales as they are stored; whole levels by `x * (1 / scale)`, ties to even.

    Args:
      x: `[..., width]`, float.
      format: the format.
      trailing: how many axes the QTensor's static shape names (2 for a weight, 1 for cached heads).
      clip: None keeps a group's whole range; "mse" that share of it, of `SHRINK` or `STEPS`, with the least squared
        error.

    Raises:
      InfoptError: the group does not divide the width, or nothing rounds to the format.
    """
    row, width = format.row, x.shape[-1]
    if row.kept:
        raise kept_only(format.name)
    format.check_width(width, "the tensor")
    shape = *x.shape[-trailing:-1], width
    x = _no_gradient(x).astype(jnp.float32)
    if row.rule == "none":
        stored = jnp.clip(_filled(x, format), row.low, row.high).astype(row.code_dtype)
        error = _relative_error(x, stored.astype(jnp.float32)[..., :width]) if trailing == 2 else None
        return QTensor(stored, None, None, format, shape, error=error)
    groups, outer = in_groups(x, format, trailing)
    grid = grid_of(groups, format, outer, clip)
    return on_grid(codes_of(groups, grid, format), grid, format, x, trailing)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["stored", "scale", "low", "zero", "outer"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Grid:
    """The values that codes can stand for, a group at a time.

    Args:
      stored: what is kept beside the codes, `[..., groups]` each: scales, minima, zero points.
      scale: what codes are computed by, float32 `[..., groups]`; llama.cpp's formats use it before it is rounded.
      low, zero: what is taken off before, and added afterwards; None where there is none.
      outer: what stored scales are relative to, or None.
    """

    stored: dict[str, Array]
    scale: Array
    low: Any = None
    zero: Any = None
    outer: Any = None


def _filled(x: Array, format: Format) -> Array:
    """`x` up to whole groups if the format is padded: by its last value, which widens no range."""
    more = format.padded(x.shape[-1]) - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, more)], mode="edge") if more else x


def in_groups(x: Array, format: Format, trailing: int = 1) -> tuple[Array, Any]:
    """`x` `[..., width]` in float32 as `[..., groups, group]`, padded if the format says so; and its outer scale."""
    row, group = format.row, format.group_of(x.shape[-1])
    x, outer = _filled(x.astype(jnp.float32), format), None
    if row.tensor:
        most = jnp.max(jnp.abs(x), tuple(range(-trailing, 0)), keepdims=True)
        outer = _flushed(most * np.float32(1 / (row.high * float(jnp.finfo(format.scale).max))))
    x = x.reshape(*x.shape[:-1], -1, group)
    return x if row.ggml else _flushed(x), outer


def on_grid(codes: Array, grid: Grid, format: Format, x: Array, trailing: int = 1) -> QTensor:
    """The QTensor of codes `[..., groups, group]`, which stand for `x` `[..., width]`."""
    width, error = x.shape[-1], None
    if trailing == 2:
        values = values_of(codes, grid, format)
        error = _relative_error(x, values.reshape(*values.shape[:-2], -1)[..., :width])
    kept, shape = grid.stored, (*x.shape[-trailing:-1], width)
    return QTensor(
        pack(codes, format.row.bits), kept["scale"], kept.get("minimum"), format, shape, kept.get("zero"), grid.outer,
        error=error, input=_not_yet(format, codes.shape[:-3]) if trailing == 2 else None,
    )  # fmt: skip


def _not_yet(format: Format, lead: tuple[int, ...]) -> Array | None:
    return jnp.full((*lead, 1, 1), jnp.nan, jnp.float32) if format.static else None


def _relative_error(x: Array, stored: Array) -> Array:
    """|x - stored| / |x| over a matrix, `[..., 1, 1]`; 0 where all of x counts as 0."""
    most = jnp.max(jnp.abs(x), (-2, -1), keepdims=True)
    exponent = jnp.clip(jax.lax.bitcast_convert_type(most, jnp.int32) >> 23, 1, 253)
    unit = jax.lax.bitcast_convert_type((254 - exponent) << 23, jnp.float32)  # or squares leave float32's range
    unit = jnp.broadcast_to(unit, x.shape)
    x, stored = x * unit, stored * unit

    def squares(y: Array) -> Array:  # rows first: one sum over millions of terms would lose digits
        of_rows = jax.lax.optimization_barrier(jnp.sum(y**2, -1, keepdims=True))
        return jnp.sum(of_rows, -2, keepdims=True)

    return jnp.sqrt(squares(x - stored) / jnp.where(most < _LEAST, 1, squares(x)))


def measured(q: QTensor, x: Array) -> QTensor:
    """A weight with its error anew: of what it stands for against `x`, which it was rounded from."""
    return dataclasses.replace(q, error=_relative_error(x.astype(jnp.float32), dequantize_array(q)))


def unknown_error(lead: tuple[int, ...]) -> np.ndarray:
    """The `error` of weights `[*lead, out, in]` that were loaded packed: what they were rounded from is not known."""
    return np.full((*lead, 1, 1), np.nan, np.float32)


def blank(x: Array, format: Format, trailing: int = 1) -> QTensor:
    """Zeros in the place of `x`, in a format that is only kept."""
    row, codes = format.row, format.padded(x.shape[-1])
    groups = codes // format.group_of(codes)

    def zeros(each: int, dtype: str) -> Array:
        return jnp.zeros((*x.shape[:-1], each), dtype)

    minimum = zeros(groups, format.scale) if row.minimum else None
    inner = zeros(groups * row.sub_bytes, row.sub_dtype) if row.sub else None
    packed, scale = zeros(codes * row.bits // 8, row.code_dtype), zeros(groups, format.scale)
    error = jnp.asarray(unknown_error(x.shape[:-2])) if trailing == 2 else None
    return QTensor(packed, scale, minimum, format, x.shape[-trailing:], inner=inner, error=error)


def _flushed(x: Array) -> Array:
    return jnp.where(jnp.abs(x) < _LEAST, jnp.zeros_like(x), x)


def grid_of(x: Array, format: Format, outer: Any = None, clip: str | None = None) -> Grid:
    """The grid that the format's rule lays over groups `[..., groups, group]`; `clip` as for `quantize_array`."""
    return _grid(x, format, outer, None if clip is None else _least_error(x, format, outer))


def _grid(x: Array, format: Format, outer: Any, shrink: Any) -> Grid:
    row, parts = format.row, dict[str, Array]()
    most = float(jnp.finfo(format.scale).max)  # an infinite scale would turn codes of 0 into NaN

    def stored(x: Array) -> Array:
        return jnp.clip(x, -most, most).astype(format.scale)

    def kept(x: Array) -> Array:
        return x if shrink is None else x * shrink

    low = None
    if row.rule in ("minmax", "zero"):
        low, high = kept(jnp.min(x, -1)), kept(jnp.max(x, -1))
        if row.rule == "zero":
            low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
        else:
            parts["minimum"] = stored(low)
            low = low if row.ggml else parts["minimum"].astype(jnp.float32)
        scale = _over(high - low, row.high, row.ggml)
    elif row.rule == "extreme":
        at = jnp.argmax(jnp.abs(x), -1, keepdims=True)
        scale = _over(kept(jnp.take_along_axis(x, at, -1)[..., 0]), row.low, row.ggml)
    else:
        greatest = kept(jnp.max(jnp.abs(x), -1))
        scale = _power(greatest, row.high) if row.rule == "power" else _over(greatest, row.high, row.ggml)
    if outer is not None:
        scale = scale / jnp.broadcast_to(jnp.where(outer == 0, 1, outer), scale.shape)
    parts["scale"] = stored(scale if row.ggml else _flushed(scale))
    used = scale if row.ggml else _times(parts["scale"], outer)
    if row.rule == "zero":
        assert low is not None
        zero = jnp.clip(jnp.round(-low * _inverse(used)), row.low, row.high)
        parts["zero"] = zero.astype(jnp.uint8)
        return Grid(parts, used, None, zero, outer)
    return Grid(parts, used, low, None, outer)


def _inverse(scale: Array) -> Array:
    return jnp.where(scale == 0, 0.0, 1 / jnp.where(scale == 0, 1, scale))


def codes_of(x: Array, grid: Grid, format: Format) -> Array:
    """The code of the nearest value of the grid, for each of `x` `[..., groups, group]`."""
    row, inverse = format.row, _inverse(grid.scale)[..., None]
    if grid.zero is not None:
        return jnp.clip(jnp.round(x * inverse) + grid.zero[..., None], row.low, row.high).astype(row.code_dtype)
    if grid.low is not None:
        x = x - grid.low[..., None]
    y = x * inverse
    if row.ggml:
        return _as_ggml(y, row)
    if row.levels is not None:
        return _nearest(y, row.levels)
    y = jnp.clip(y if row.dtype else jnp.round(y), row.low, row.high)
    return (y + row.zero if row.zero else y).astype(row.code_dtype)


def _over(x: Array, by: int | float, exactly: bool) -> Array:
    """x / by as XLA computes it, by the reciprocal, or exactly: it lets a whole array of divisors be."""
    if exactly:
        return x / jax.lax.optimization_barrier(jnp.full(x.shape, by, jnp.float32))
    return x * np.float32(1 / by)


def _times(scale: Array, outer: Any) -> Array:
    scale = scale.astype(jnp.float32)
    return scale if outer is None else _flushed(scale * jnp.broadcast_to(outer, scale.shape))


def _power(most: Array, high: float) -> Array:
    """The power of two of the rule, between 2 ** -126 and 2 ** 127, out of the exponent's bits."""
    exponent = jax.lax.bitcast_convert_type(most, jnp.int32) >> 23
    exponent = jnp.clip(exponent - (math.frexp(high)[1] - 1), 1, 254)
    return jax.lax.bitcast_convert_type(exponent << 23, jnp.float32)


def _nearest(y: Array, levels: tuple[float, ...]) -> Array:
    """The code of the nearest level, ties to the even code."""
    order = sorted(dict.fromkeys(levels))  # -0.0 is 0.0: of equal values the first code stays
    codes = [levels.index(level) for level in order]
    place = jnp.zeros(y.shape, jnp.uint8)
    for lower, upper, code in zip(order, order[1:], codes[1:]):
        exact = (lower + upper) / 2
        middle = np.float32(exact)  # which may itself be nearer to the upper one
        is_up = middle > exact or (middle == exact and code % 2 == 0)
        place = place + (y >= middle if is_up else y > middle).astype(jnp.uint8)
    return jnp.asarray(codes, jnp.uint8).at[place].get(mode="promise_in_bounds")


def _as_ggml(y: Array, row: Row) -> Array:
    y = jax.lax.optimization_barrier(y)  # or the product and the sum below become one operation, rounded once
    if row.bits == 8:
        return jax.lax.round(y, jax.lax.RoundingMethod.AWAY_FROM_ZERO).astype(jnp.int8)
    return jnp.clip(jnp.trunc(y + np.float32(row.zero + 0.5)), 0, 15).astype(jnp.uint8)


def _least_error(x: Array, format: Format, outer: Any) -> Array:
    """For each group, `[..., groups]`, the share of its range whose codes have the least squared error."""

    def attempt(best: tuple[Array, Array], share: Array) -> tuple[tuple[Array, Array], None]:
        grid = _grid(x, format, outer, share)
        error = jnp.sum((values_of(codes_of(x, grid, format), grid, format) - x) ** 2, -1)
        better = error < best[0]
        return (jnp.where(better, error, best[0]), jnp.where(better, share, best[1])), None

    shares = STEPS if format.row.rule == "power" else SHRINK
    first = jnp.full(x.shape[:-1], jnp.inf, jnp.float32), jnp.ones(x.shape[:-1], jnp.float32)
    (_, share), _ = jax.lax.scan(attempt, first, jnp.asarray(shares, jnp.float32))
    return share


def values_of(codes: Array, grid: Grid, format: Format) -> Array:
    """What codes `[..., groups, group]` stand for, as they are read back."""
    scale, kept = _times(grid.stored["scale"], grid.outer)[..., None], grid.stored
    level = _levels(codes, format.row)
    if "zero" in kept:
        level = level - kept["zero"].astype(jnp.float32)[..., None]
    value = level * scale
    return value + kept["minimum"].astype(jnp.float32)[..., None] if "minimum" in kept else value


def _levels(codes: Array, row: Row) -> Array:
    if row.levels is not None:
        return jnp.asarray(row.levels, jnp.float32).at[codes].get(mode="promise_in_bounds")
    return codes.astype(jnp.float32) - row.zero if row.zero else codes.astype(jnp.float32)


def pack(codes: Any, bits: int, numpy: Any = jnp) -> Any:
    """Codes `[..., groups, group]` as they lie in memory; `numpy` says whose arrays they are."""
    n, lead = math.lcm(bits, 8) // bits, codes.shape[:-2]
    if n == 1:
        return codes.reshape(*lead, -1)
    of_word = [k * bits for k in range(n)], numpy.split(codes, n, -1)

    def byte(m: int) -> Any:  # of each word: of what lies elsewhere, nothing is left in 8 bits
        inside = [(at - 8 * m, c) for at, c in zip(*of_word) if -bits < at - 8 * m < 8]
        return functools.reduce(operator.or_, (c << at if at >= 0 else c >> -at for at, c in inside))

    return numpy.concatenate([byte(m) for m in range(n * bits // 8)], -1).reshape(*lead, -1)


def unpack(codes: Any, bits: int, group: int) -> tuple[Any, ...]:
    """Codes in planes: the k-th codes of all words, `[..., width / planes]` each; of numpy's arrays too."""
    n, lead = math.lcm(bits, 8) // bits, codes.shape[:-1]
    if n == 1:
        return (codes,)
    size, mask, each = n * bits // 8, 2**bits - 1, [codes]
    if size > 1:
        words = codes.reshape(*lead, -1, size, group // n)
        each = [words[..., m, :].reshape(*lead, -1) for m in range(size)]

    def plane(k: int) -> Any:
        m, at = divmod(k * bits, 8)
        x = each[m] >> at
        return (x | each[m + 1] << 8 - at if at + bits > 8 else x) & mask

    return tuple(plane(k) for k in range(n))


def planes(q: QTensor) -> tuple[Array, ...]:
    """The values that `q` stands for, in float32, in the order in which they are packed.

    One plane `[..., width]` for whole bytes; for 4 bits the first and the second halves of all groups,
    `[..., width / 2]` each, and so on for fewer. A product over planes, `split_planes(x)` against these, spares XLA
    from putting codes back in order, which on a CPU costs more than the product.
    """
    row, group = q.format.row, q.format.group_of(q.shape[-1])
    codes = unpack(q.codes, row.bits, group)
    levels = [_levels(c, row) for c in codes]
    if q.scale is None:
        return tuple(levels)
    n = len(codes)
    each = row.sub or group // n
    if q.zero is not None:
        levels = [level - _spread(q.zero, each) for level in levels]
    numbers = [None, None] if q.inner is None else _of_subgroups(q)
    scales = _by_plane(_times(q.scale, q.outer), numbers[0], each, n)
    values = tuple(level * scale for level, scale in zip(levels, scales))
    if q.minimum is None:
        return values
    return tuple(v + low for v, low in zip(values, _by_plane(q.minimum, numbers[1], each, n)))


def _spread(x: Array, each: int) -> Array:
    """One value a group, or a sub-group -> one a code."""
    x = x.astype(jnp.float32)[..., None]
    return jnp.broadcast_to(x, (*x.shape[:-1], each)).reshape(*x.shape[:-2], -1)


def _by_plane(x: Array, of_subgroup: Array | None, each: int, n: int) -> list[Array]:
    """Each plane's numbers, one a code, of the groups' and the sub-groups' own."""
    if of_subgroup is None:
        return [_spread(x, each)] * n
    products = jnp.split(x.astype(jnp.float32)[..., None] * of_subgroup, n, -1)
    return [_spread(part.reshape(*x.shape[:-1], -1), each) for part in products]


def whole_planes(q: QTensor) -> tuple[tuple[Array, ...], Any]:
    """Whole numbers in the order of `planes`, and what is to be taken off to make levels of them.

    Returns:
      int8 `[..., width / planes]` each; and int32 `[..., groups]`, None where it is 0. Together they are the levels:
      one alone would not hold those from 0 to 255, or less a zero point.

    >>> q = quantize_array(jnp.arange(8.0)[None], Format("int8_zero", 4), trailing=2)
    >>> whole, less = whole_planes(q)
    >>> levels = (whole[0].astype(jnp.int32) - less.repeat(4, -1)).astype(jnp.float32)
    >>> jnp.array_equal(levels * q.scale.repeat(4, -1), dequantize_array(q))
    Array(True, dtype=bool)
    """
    row = q.format.row
    shift = 128 if row.bits == 8 and row.code_dtype == "uint8" else row.zero
    codes = unpack(q.codes, row.bits, q.format.group_of(q.shape[-1]))
    # a code less 128 is the code with its highest bit turned, read as int8
    signed = [jax.lax.bitcast_convert_type(c ^ 128, jnp.int8) if shift == 128 else c.astype(jnp.int8) for c in codes]
    whole = tuple(c if shift in (0, 128) else c - np.int8(shift) for c in signed)
    if q.zero is not None:
        return whole, q.zero.astype(jnp.int32) + (row.zero - shift)
    return whole, None if row.zero == shift else jnp.full(q.scale.shape, row.zero - shift, jnp.int32)


def _of_subgroups(q: QTensor) -> list[Array]:
    """The whole numbers `[..., groups, sub-groups]` that scales are multiplied by, and, where there are any, minima."""
    row, count = q.format.row, q.format.row.sub_numbers
    found = [x.reshape(*q.scale.shape, -1) for x in unpack(q.inner, row.sub_bits, count)]
    return jnp.split(jnp.concatenate(found, -1).astype(jnp.float32), 1 + row.minimum, -1)


def split_planes(x: Array, q: QTensor) -> tuple[Array, ...]:
    """`x` `[..., width]` in the order of the planes of `q`, zeros where that is padded."""
    n, width = q.format.row.codes, x.shape[-1]
    if (more := q.format.padded(width) - width) > 0:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, more)])
    if n == 1:
        return (x,)
    parts = x.reshape(*x.shape[:-1], -1, n, q.format.group_of(width) // n)
    return tuple(parts[..., i, :].reshape(*x.shape[:-1], -1) for i in range(n))


def dequantize_array(q: QTensor, dtype: Any = jnp.float32) -> Array:
    """The values that `q` stands for, `[..., width]`, in `dtype`; computed in float32."""
    found, width = planes(q), q.shape[-1]
    values = found[0]
    if len(found) > 1:
        each = q.format.group_of(width) // len(found)
        in_groups = [plane.reshape(*plane.shape[:-1], -1, each) for plane in found]
        values = jnp.stack(in_groups, -2).reshape(*values.shape[:-1], -1)
    return values[..., :width].astype(dtype)


def round_trip(x: Array, format: Format | None) -> Array:
    """`x` as it reads after it went through a format; `x` itself where there is none."""
    return x if format is None else dequantize_array(quantize_array(x, format), x.dtype)
