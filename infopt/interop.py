"""To and from `qwix.QArray`: the same values, in the formats that both know.

Weights are `[..., out, in]` here, with scales in groups along the last axis. A QArray may have them along any axis, and
a Flax kernel is `[in, out]`: `.mT` of a QArray turns it, scales and all.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from infopt.errors import InfoptError
from infopt.formats import FORMATS, Format, Row
from infopt.qtensor import QTensor, pack, unknown_error, unpack
from infopt.typing import Array

_OURS = {
    "int8": "int8",
    "int4": "int4",
    "int6": "int6",
    "int5": "int5",
    "int3": "int3",
    "int2": "int2",
    "nf4": "nf4",
    "float8_e4m3fn": "fp8_e4m3",
    "float8_e5m2": "fp8_e5m2",
    "mxfp8": "fp8_e4m3",  # whose scales happen to be powers of two
    "mxfp4": "mxfp4",
    "nvfp4": "nvfp4",
}
"""The format that `from_qwix` takes for a qtype."""


def to_qwix(q: QTensor) -> Any:
    """The `qwix.QArray` of the same shape and values: `qwix.dequantize` of it is `dequantize_array(q)`.

    Scales are widened to float32, since qwix computes in their type; packed codes become one a value. Whether inputs
    are rounded (`Format.activations`) is no part of an array: qwix has it as `act_qtype` of a rule; nor is a static
    scale of theirs.

    Args:
      q: `[..., out, in]`. `.mT` of the result is the kernel `[in, out]` of a Flax layer.

    Raises:
      InfoptError: qwix is not installed, or its arrays have no such format.

    >>> import infopt as ip, jax.numpy as jnp
    >>> from infopt.qtensor import quantize_array
    >>> q = quantize_array(jnp.linspace(-1, 1, 64).reshape(2, 32), ip.Format("int4", 16, "float16"), trailing=2)
    >>> a = ip.to_qwix(q)
    >>> a.qvalue.shape, str(a.qvalue.dtype), a.scale.shape
    ((2, 32), 'int4', (2, 2))
    """
    qwix = _qwix()
    if not isinstance(q, QTensor):
        raise InfoptError(
            f"to_qwix was given a {type(q).__name__}.",
            why="only packed weights stand for levels and scales.",
            fix="quantize first; or qwix.quantize, which rounds a dense array itself",
        )
    format, row = q.format, q.format.row
    qtype = _qtype(row)
    if qtype is None or row.tensor:
        why = (
            "it stores a minimum for each group, a QArray only whole zero points."
            if row.minimum
            else "its scales are relative to one of the whole matrix, a QArray has one scale a group."
            if row.tensor
            else "it has no scale: it is a plain array of a float type."
            if row.rule == "none"
            else "qwix has no type of such levels."
        )
        raise InfoptError(
            f"{format.name} has no counterpart in qwix.",
            why=why,
            fix=f"qwix.quantize(dequantize_array(q), ...), which rounds anew; or one of {', '.join(_known())}",
        )
    width = q.shape[-1]
    if format.padded(width) != width:
        raise InfoptError(
            f"rows of {width} values padded to {format.padded(width)} have no counterpart in qwix.",
            why="each scale of a QArray is shared by equally many values.",
            fix="a group that divides the rows, without pad=True",
        )
    codes, zero = _codes(q), None
    if row.levels is not None:
        codes = codes.astype(jnp.uint4)
        values = codes if qtype == "nf4" else jax.lax.bitcast_convert_type(codes, jnp.float4_e2m1fn)
    elif row.dtype is not None:
        values = codes
    else:
        values = _moved(codes, -_shift(row), _storage(row))
        zero = None if q.zero is None else _moved(q.zero, -_shift(row), _storage(row))
    named = qtype not in ("nf4", "mxfp4", "int2", "int3", "int5", "int6")  # for these qwix has strings
    return qwix.QArray(values, q.scale.astype(jnp.float32), zero, jnp.dtype(qtype) if named else qtype)


def from_qwix(a: Any, format: Format | None = None) -> QTensor:
    """The packed weight of the values of a QArray: `dequantize_array` of it is `qwix.dequantize(a.astype(float32))`.

    (qwix rounds values to its scales' type, which the cast widens; here they are computed in float32.) Nothing is
    rounded again. Scales and zero points that are shared along other axes too are repeated.

    Args:
      a: `[..., out, in]`: a Flax kernel `[in, out]` comes as `a.mT`.
      format: what it is to be: `from_qwix(to_qwix(q), q.format)` is `q`, leaf by leaf. By default the one that its
        qtype, scales and zero points say.

    Raises:
      InfoptError: qwix is not installed, there is no such format here, or `format` would change a value or has
        static scales of inputs.

    >>> import infopt as ip, jax.numpy as jnp, qwix
    >>> kernel = jnp.linspace(-1, 1, 64).reshape(32, 2)  # [in, out]
    >>> a = qwix.quantize(kernel, jnp.int4, channelwise_axes=[1], tiled_axes={0: 16})
    >>> ip.from_qwix(a.mT).format
    Format(name='int4', group=16, scale='float32')
    """
    qwix = _qwix()
    if not isinstance(a, qwix.QArray) or not isinstance(a.qvalue, jax.Array):
        raise InfoptError(
            f"from_qwix was given a {type(a).__name__}{' of no array' if isinstance(a, qwix.QArray) else ''}.",
            why="only a QArray of JAX arrays says which levels and scales it has.",
            fix="qwix.quantize(array, qtype, ...); out of a module's boxes the array itself",
        )
    try:
        qtype = jnp.dtype(a.qtype).name
    except TypeError:
        qtype = str(a.qtype)
    shapes = [a.scale.shape] + ([] if a.zero_point is None else [a.zero_point.shape])
    if not a.ndim or any(len(s) != a.ndim or any(n % m for n, m in zip(a.shape, s)) for s in shapes):
        raise InfoptError(
            f"a QArray {list(a.shape)} with scales {list(a.scale.shape)} is not a whole one.",
            why="along each axis equally many values share a scale, or a zero point.",
            fix="what qwix.quantize gives",
        )
    width, groups = a.shape[-1], math.lcm(*(s[-1] for s in shapes))
    if groups == width > 1:
        raise InfoptError(
            f"a QArray {list(a.shape)} has a scale for each place of its last axis.",
            why="here the last axis is the input, along which neighbours share a scale; Flax's kernels are [in, out].",
            fix="from_qwix(a.mT)",
        )
    name = "int4_zero" if qtype == "int4" and a.zero_point is not None else _OURS.get(qtype)
    if format is None and name is not None:
        scale = FORMATS[name].scale if name in ("mxfp4", "nvfp4") else a.scale.dtype.name
        format = Format(name, None if groups == 1 else width // groups, scale)
    if format is None or not _fits(format.row, qtype, a.zero_point is not None):
        raise InfoptError(
            f"qtype {qtype}{'' if a.zero_point is None else ' with zero points'} "
            + ("has no counterpart here." if format is None or name == format.name else f"is not {format.name}."),
            why="the levels that its codes mean are none of the format's.",
            fix=f"a qtype of {', '.join(_OURS)}, zero points with int4 only; "
            "or quantize_array(qwix.dequantize(a), format), which rounds anew",
        )
    if format.static:
        raise InfoptError(
            "a QArray has no static scale of what goes in.",
            why="that is of a rule in qwix, and here it is stored with the weight.",
            fix="dataclasses.replace(q.format, static=False), then dataclasses.replace(found, format=q.format, "
            "input=q.input)",
        )
    format.check_width(width, "the QArray")
    wanted = width // format.group_of(width)
    if wanted % groups or format.padded(width) != width:
        raise InfoptError(
            f"a QArray with {groups} scales a row is not {format}.",
            why=f"that has {wanted} scales for rows of {width} values, and would lose some.",
            fix=f"a group that divides {width // groups}, without pad=True",
        )
    row, shape = format.row, (*a.shape[:-1], wanted)
    stored = a.scale.astype(format.scale)
    if stored.dtype != a.scale.dtype and not bool(jnp.all(stored.astype(jnp.float32) == a.scale.astype(jnp.float32))):
        raise InfoptError(
            f"the scales of the QArray are not all {format.scale}.",
            why="rounding them would change values.",
            fix=f"Format({format.name!r}, {format.group}, {a.scale.dtype.name!r})"
            if not row.tensor and row.rule != "power"
            else "quantize_array(qwix.dequantize(a), format), which rounds anew",
        )
    zero = None
    if row.levels is not None:
        codes = a.qvalue if qtype == "nf4" else jax.lax.bitcast_convert_type(a.qvalue, jnp.uint4)
        codes = codes.astype(jnp.uint8)
    elif row.dtype is not None:
        codes = a.qvalue
    else:
        codes = _moved(a.qvalue, _shift(row), row.code_dtype)
        zero = None if a.zero_point is None else _spread(_moved(a.zero_point, _shift(row), jnp.uint8), shape)
    packed = pack(codes.reshape(*shape, width // wanted), row.bits)
    error = jnp.asarray(unknown_error(a.shape[:-2]))
    outer = jnp.ones((*a.shape[:-2], 1, 1), jnp.float32) if row.tensor else None
    return QTensor(packed, _spread(stored, shape), None, format, a.shape[-2:], zero, outer, error=error)


def _qwix() -> Any:
    try:
        import qwix
    except ImportError as error:
        raise InfoptError(
            "qwix cannot be imported.", why=f"it is no dependency of infopt: {error}.", fix="pip install qwix"
        ) from error
    return qwix


def _known() -> list[str]:
    return [name for name, row in FORMATS.items() if _qtype(row) and not row.tensor]


def _qtype(row: Row) -> str | None:
    """qwix's name of the levels of a row."""
    if row.rule == "none" or row.minimum:
        return None
    if row.dtype is not None:
        return row.dtype
    if row.levels is not None:
        if row.levels == FORMATS["nf4"].levels:
            return "nf4"
        e2m1 = row.levels == FORMATS["mxfp4"].levels
        return "nvfp4" if e2m1 and row.tensor else "mxfp4" if e2m1 and row.rule == "power" else None
    whole = _shift(row) == 2 ** (row.bits - 1) or row.code_dtype == "int8"
    return f"int{row.bits}" if whole and not (row.rule == "zero" and row.bits == 8) else None


def _fits(row: Row, qtype: str, zero: bool) -> bool:
    return _qtype(row) == {"mxfp8": "float8_e4m3fn"}.get(qtype, qtype) and (row.rule == "zero") == zero


def _shift(row: Row) -> int:
    """A code less its level in qwix, whose levels are signed."""
    return 2 ** (row.bits - 1) if row.rule == "zero" else row.zero


def _storage(row: Row) -> Any:
    return jnp.int4 if row.bits <= 4 else jnp.int8


def _moved(x: Array, by: int, dtype: Any) -> Array:
    return (x.astype(jnp.int16) + by).astype(dtype)


def _codes(q: QTensor) -> Array:
    """Codes one a value, in order, `[..., width]`."""
    found = unpack(q.codes, q.format.row.bits, q.format.group_of(q.shape[-1]))
    if len(found) == 1:
        return found[0]
    each = q.format.group_of(q.shape[-1]) // len(found)
    in_groups = [c.reshape(*c.shape[:-1], -1, each) for c in found]
    return jnp.stack(in_groups, -2).reshape(*found[0].shape[:-1], -1)


def _spread(x: Array, shape: tuple[int, ...]) -> Array:
    for axis, n in enumerate(shape):
        x = jnp.repeat(x, n // x.shape[axis], axis)
    return x
