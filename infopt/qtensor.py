"""QTensor: an array stored in few bits, as a pytree; and the table of its formats.

Every format rounds along the last axis, in groups of `group` neighbours (the whole axis where group is None):

    symmetric   x  =  scale * (code - zero)          codes 0..15 for 4 bits (zero 8), -127..127 for 8 bits (zero 0)
    minimum     x  =  scale * code + minimum         codes 0..15

4-bit codes lie two to a byte: byte j of a group holds element j in its low nibble and element j + group/2 in its high
one (the order of GGUF's blocks, so that a file's blocks are kept without loss).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from infopt.errors import InfoptError, ParamsError, nearest
from infopt.typing import Array


@dataclasses.dataclass(frozen=True)
class Row:
    """What a format is: the levels, the packing and the scale rule.

    Args:
      bits: bits a code takes in memory.
      low, high: the least and the greatest code.
      zero: the code that means 0 (symmetric formats).
      rule: `absmax` (scale = max|x| / high), `extreme` (scale = the value of greatest magnitude / low, so that it
        is hit exactly; Q4_0's rule) or `minmax` (scale = (max - min) / high, and a stored minimum; Q4_1's).
    """

    bits: int
    low: int
    high: int
    zero: int
    rule: str

    @property
    def minimum(self) -> bool:
        return self.rule == "minmax"


FORMATS: dict[str, Row] = {
    "int8": Row(bits=8, low=-127, high=127, zero=0, rule="absmax"),
    "int4": Row(bits=4, low=-8, high=7, zero=8, rule="extreme"),
    "int4_min": Row(bits=4, low=0, high=15, zero=0, rule="minmax"),
}


@dataclasses.dataclass(frozen=True, order=True)
class Format:
    """A row of `FORMATS` and its group; static, hashable, JSON-able.

    Args:
      name: a key of `FORMATS`.
      group: neighbours that share a scale; None is the whole last axis (one scale a channel of a weight, one a head
        of a token in a cache).
      scale: dtype of scales and minima.

    >>> Format("int4", 32, "float16").bytes_per_value(576)
    0.5625
    """

    name: str
    group: int | None = None
    scale: str = "float32"

    def __post_init__(self) -> None:
        if self.name not in FORMATS:
            raise InfoptError(
                f"unknown weight format {self.name!r}.",
                why="codes mean values only by a row of the table of formats.",
                fix=nearest(self.name, list(FORMATS)),
            )
        if self.group is not None and self.group < 1:
            raise InfoptError(
                f"a group of {self.group} values cannot share a scale.",
                why="a group is some neighbours along the input axis.",
                fix="group >= 1, or None",
            )
        if self.row.bits == 4 and self.group is not None and self.group % 2:
            raise InfoptError(
                f"a group of {self.group} 4-bit codes does not fill whole bytes.",
                why="two codes share a byte, and a group must not share one.",
                fix="an even group",
            )

    @property
    def row(self) -> Row:
        return FORMATS[self.name]

    def group_of(self, width: int) -> int:
        return self.group or width

    def bytes_per_value(self, width: int) -> float:
        """Bytes that one value takes, scales and minima included, in a last axis of `width` values."""
        scales = np.dtype(self.scale).itemsize * (2 if self.row.minimum else 1)
        return self.row.bits / 8 + scales / self.group_of(width)

    def check_width(self, width: int, name: str) -> None:
        """Raise unless the last axis of the tensor `name` splits into whole groups and bytes."""
        group = self.group_of(width)
        if width % group:
            divisors = [d for d in range(2, width + 1) if width % d == 0 and d % (2 if self.row.bits == 4 else 1) == 0]
            raise InfoptError(
                f"group={group} does not divide {name}, whose rows have {width} values.",
                why="every value needs a scale, and groups share none between rows.",
                fix=f"a group that divides {width}: {', '.join(map(str, divisors[-6:]))}"
                if divisors
                else "leave it out with where=..., or use bits=8 without a group",
            )
        if self.row.bits == 4 and group % 2:
            raise InfoptError(
                f"{name} has rows of {width} values, which 4-bit codes cannot fill in whole bytes.",
                why="two codes share a byte, and a row must not share one.",
                fix="leave it out with where=..., or use bits=8",
            )


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["codes", "scale", "minimum"], meta_fields=["format", "shape"]
)
@dataclasses.dataclass(frozen=True)
class QTensor:
    """An array in few bits.

    With `width = shape[-1]` and `groups = width / group`:

    Args:
      codes: int8 `[..., width]`, or uint8 `[..., width / 2]` for 4 bits.
      scale: `[..., groups]`.
      minimum: `[..., groups]` for formats that store one, else None.
      format: the format, static.
      shape: the *trailing* shape, static: `(O, I)` of a weight, `(D,)` of a cache's heads. Leading axes (stacked
        layers, rows, slots) are only in the leaves, so that a stack and a slice of it are the same type of pytree.
    """

    codes: Any
    scale: Any
    minimum: Any
    format: Format
    shape: tuple[int, ...]

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
        "a gradient was asked through packed weights, or through keys and values that are rounded.",
        why="codes are whole numbers, and rounding has no slope: the gradient would be silently wrong.",
        fix="dense, join = ip.trainable(params); jax.grad(lambda dense: loss(join(dense)))(dense); "
        "and leave cache_kv(bits=8) out while training",
    )


def quantize_array(x: Array, format: Format, trailing: int = 1) -> QTensor:
    """Round to nearest, ties to even, against the scales as they are stored.

    Args:
      x: `[..., width]`, float.
      format: the format.
      trailing: how many axes the QTensor's static shape names (2 for a weight, 1 for cached heads).

    Raises:
      InfoptError: the group does not divide the width.
    """
    row, width = format.row, x.shape[-1]
    format.check_width(width, "the tensor")
    group = format.group_of(width)
    x = _no_gradient(x).astype(jnp.float32).reshape(*x.shape[:-1], width // group, group)
    minimum = None
    most = float(jnp.finfo(format.scale).max)  # an infinite scale would turn codes of 0 into NaN
    if row.rule == "absmax":
        scale = jnp.max(jnp.abs(x), -1) / row.high
    elif row.rule == "extreme":
        at = jnp.argmax(jnp.abs(x), -1, keepdims=True)
        scale = jnp.take_along_axis(x, at, -1)[..., 0] / row.low
    else:
        minimum = jnp.clip(jnp.min(x, -1), -most, most).astype(format.scale)
        scale = (jnp.max(x, -1) - minimum.astype(jnp.float32)) / row.high
    scale = jnp.clip(scale, -most, most).astype(format.scale)
    stored = scale.astype(jnp.float32)[..., None]
    if minimum is not None:
        x = x - minimum.astype(jnp.float32)[..., None]
    codes = jnp.clip(jnp.round(x / jnp.where(stored == 0, 1, stored)), row.low, row.high)
    if row.bits == 4:
        low, high = jnp.split((codes + row.zero).astype(jnp.uint8), 2, -1)
        codes = low | (high << 4)
    else:
        codes = codes.astype(jnp.int8)
    codes = codes.reshape(*codes.shape[:-2], -1)
    shape = (*codes.shape[-trailing:-1], width)
    return QTensor(codes, scale, minimum, format, shape)


def planes(q: QTensor) -> tuple[Array, ...]:
    """The values that `q` stands for, in float32, in the order in which they are packed.

    One plane `[..., width]` for 8 bits; for 4 bits the first and the second halves of all groups, `[..., width / 2]`
    each. A product over planes, `split_planes(x)` against these, spares XLA from putting nibbles back in order, which
    on a CPU costs more than the product.
    """
    row = q.format.row
    codes = (q.codes & 15, q.codes >> 4) if row.bits == 4 else (q.codes,)
    each = q.format.group_of(q.shape[-1]) // len(codes)

    def spread(x: Array) -> Array:  # one value a group -> one a code
        x = x.astype(jnp.float32)[..., None]
        return jnp.broadcast_to(x, (*x.shape[:-1], each)).reshape(*x.shape[:-2], -1)

    values = tuple((c.astype(jnp.float32) - row.zero) * spread(q.scale) for c in codes)
    return values if q.minimum is None else tuple(v + spread(q.minimum) for v in values)


def split_planes(x: Array, q: QTensor) -> tuple[Array, ...]:
    """`x` `[..., width]` in the order of the planes of `q`."""
    if q.format.row.bits == 8:
        return (x,)
    halves = x.reshape(*x.shape[:-1], -1, 2, q.format.group_of(x.shape[-1]) // 2)
    return tuple(halves[..., i, :].reshape(*x.shape[:-1], -1) for i in (0, 1))


def dequantize_array(q: QTensor, dtype: Any = jnp.float32) -> Array:
    """The values that `q` stands for, `[..., width]`, in `dtype`; computed in float32."""
    found = planes(q)
    each = q.format.group_of(q.shape[-1]) // len(found)
    in_groups = [plane.reshape(*plane.shape[:-1], -1, each) for plane in found]
    return jnp.stack(in_groups, -2).reshape(*found[0].shape[:-1], q.shape[-1]).astype(dtype)


def round_trip(x: Array, format: Format | None) -> Array:
    """`x` as it reads after it went through a format; `x` itself where there is none."""
    return x if format is None else dequantize_array(quantize_array(x, format), x.dtype)
