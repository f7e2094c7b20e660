"""The integer product for TPUs, in Pallas: int8 by int8 on the matrix unit, summed in int32, scaled afterwards.

The grid goes over blocks of rows, of columns (a matrix's outputs), and of terms. The matrix is read where it lies in
the stack: which one it is, is handed in by scalar prefetch. Codes of 4 bits come out of their bytes in vector memory,
as two planes; so do inputs before, and a product is the sum of the planes' products.

Where a column has one scale, sums stay int32 to the end. Groups are summed apart: those that share 128 lanes in one
product, which is given each row once for each group, with zeros where other groups are. The matrix unit is filled
then, at as many times the rows; with few of them, as in decoding, that is time in which it would wait for weights.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from infopt.kernels.int_matmul.call import Call
from infopt.qtensor import of_layer, split_planes, unpack
from infopt.typing import Array

ROWS, COLUMNS, TERMS = 256, 512, 2048
"""The largest block: 0.5 MiB of each plane of rows, 1 of the matrix, both fetched twice, and 0.5 of sums."""
SUMS = 512
"""Rows times groups in one product, at most: 1 MiB of sums."""
LANES, SUBLANES = 128, 32
"""Of a tile of int8: a block's last axis is a multiple of the first, the one before it of the second."""
LEAST = LANES * SUBLANES // SUMS
"""Bytes of a group, so that no more of them share a product than `SUMS` has place for."""


def refuses(call: Call) -> str:
    """Why the kernel cannot serve a call, or ""."""
    form = call.weight.format
    row = form.row
    if row.bits not in (8, 4) or (row.bits == 8 and row.code_dtype != "int8"):
        return f"weights in {form.name}; it multiplies by int8, and by 4 bits two to a byte."
    if row.minimum or call.weight.zero is not None:
        return f"weights in {form.name}, which have minima or zero points; it takes levels about 0 alone."
    if 0 in (*call.codes.shape, *call.weight.shape):
        return "there is nothing to multiply."
    each = _each(call)
    if each and (not LEAST <= each <= TERMS or (LANES % each and each % LANES)):
        return f"groups of {form.group}, {each} bytes; it takes {LEAST} to {TERMS}, parts or multiples of {LANES}."
    return ""


def _each(call: Call) -> int | None:
    """Bytes of a group; None where there is one group."""
    groups = call.weight.scale.shape[-1]
    return None if groups == 1 else call.weight.codes.shape[-1] // groups


def _whole(n: int, of: int) -> int:
    return -(-n // of) * of


@dataclasses.dataclass(frozen=True)
class _Groups:
    """How groups are summed: a product goes over `span` lanes, which `shared` groups lie in."""

    span: int
    shared: int


def forward(call: Call, interpret: bool = False) -> Array:
    """The product `[M, O]`."""
    weight, each = call.weight, _each(call)
    rows, (columns, width), lead = len(call.codes), weight.codes.shape[-2:], weight.codes.shape[:-2]
    layer = jnp.zeros(1, jnp.int32)
    for size, index in zip(lead, call.layer, strict=True):
        layer = layer * size + index
    how = _Groups(max(each, LANES), max(LANES // each, 1)) if each else None
    most = min(ROWS, SUMS // how.shared) if how else ROWS
    span = how.span if how else LANES
    block = (
        min(_whole(rows, SUBLANES), most),
        min(_whole(columns, LANES), COLUMNS),
        min(_whole(width, span), TERMS // span * span),
    )
    # zeros in the place of rows and terms that are not there: what is read of the matrix beyond its end then adds none
    m, k = _whole(rows, block[0]), _whole(width, block[2])
    planes = [jnp.pad(x, ((0, m - rows), (0, k - x.shape[1]))) for x in split_planes(call.codes, weight)]
    scale = jnp.pad(call.scale, ((0, m - rows), (0, 0)))
    matrix = weight.codes.reshape(math.prod(lead), columns, width)
    steps, groups = k // block[2], block[2] // each if each else 1
    of_column = of_layer(weight.scale, call.layer).astype(jnp.float32).T
    if each:
        of_column = jnp.pad(of_column, ((0, steps * groups - len(of_column)), (0, 0)))
    of_column = of_column.reshape(-1, groups, columns)
    out = pl.pallas_call(
        functools.partial(_kernel, weight.format.row, how),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(m // block[0], pl.cdiv(columns, block[1]), steps),
            in_specs=[
                pl.BlockSpec((1, block[1], block[2]), lambda i, j, t, layer: (layer[0], j, t)),
                pl.BlockSpec((block[0], 1), lambda i, j, t, layer: (i, 0)),
                pl.BlockSpec((1, groups, block[1]), lambda i, j, t, layer: (t if how else 0, 0, j)),
                *(pl.BlockSpec((block[0], block[2]), lambda i, j, t, layer: (i, t)) for _ in planes),
            ],
            out_specs=pl.BlockSpec((block[0], block[1]), lambda i, j, t, layer: (i, j)),
            scratch_shapes=[pltpu.VMEM((block[0], block[1]), jnp.float32 if how else jnp.int32)],
        ),
        out_shape=jax.ShapeDtypeStruct((m, columns), call.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * m * columns * k * len(planes) * (how.shared if how else 1),
            transcendentals=0,
            bytes_accessed=m * k * len(planes) * pl.cdiv(columns, block[1])
            + (columns * k + 4 * of_column.size) * (m // block[0])
            + m * columns * jnp.dtype(call.dtype).itemsize,
        ),
        interpret=interpret,
        name="int_matmul",
    )(layer, matrix, scale, of_column, *planes)
    return out[:rows]


def _kernel(row: Any, how: _Groups | None, layer: Any, matrix: Any, scale: Any, of_column: Any, *refs: Any) -> None:
    """One block of sums.

    Refs: the matrix `[1, O, K]`, scales of rows `[M, 1]` and of columns `[1, groups, O]`, planes of codes `[M, K]`
    each; out `[M, O]`, sums `[M, O]`: float32 of groups, else int32.
    """
    *planes, out, sums = refs
    t = pl.program_id(2)

    @pl.when(t == 0)
    def _() -> None:
        sums[...] = jnp.zeros(sums.shape, sums.dtype)

    if how is None:
        sums[...] += _product([x[...] for x in planes], _levels(matrix[0], row))
    else:
        for first in range(0, matrix.shape[-1], how.span):
            part = slice(first, first + how.span)
            of_groups = [_apart(x[:, part], how.shared) for x in planes]
            dots = _product(of_groups, _levels(matrix[0, :, part], row)).reshape(how.shared, *sums.shape)
            for i in range(how.shared):
                own = of_column[0, first // how.span * how.shared + i][None]
                sums[...] += dots[i].astype(jnp.float32) * jnp.broadcast_to(own, sums.shape)

    @pl.when(t == pl.num_programs(2) - 1)
    def _() -> None:
        y = sums[...].astype(jnp.float32)
        if how is None:
            y = y * jnp.broadcast_to(of_column[0], sums.shape)
        out[...] = (y * jnp.broadcast_to(scale[...], sums.shape)).astype(out.dtype)


def _product(rows: list[Array], levels: list[Array]) -> Array:
    """The sum of the planes' products, int32."""
    across = (((1,), (1,)), ((), ()))
    each = (jax.lax.dot_general(a, b, across, preferred_element_type=jnp.int32) for a, b in zip(rows, levels))
    return functools.reduce(jnp.add, each)


def _levels(codes: Array, row: Any) -> list[Array]:
    """Planes of levels, int8, of bytes."""
    if row.bits == 8:
        return [codes]
    found = unpack(codes.astype(jnp.int32), row.bits, 2 * codes.shape[-1])
    return [(plane - row.zero).astype(jnp.int8) for plane in found]


def _apart(x: Array, shared: int) -> Array:
    """Rows `[M, K]` once for each group of terms, `[shared * M, K]`, zeros where other groups are."""
    if shared == 1:
        return x
    wide = x.astype(jnp.int32)
    of_term = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) >> (x.shape[1] // shared).bit_length() - 1
    parts = [jnp.where(of_term == i, wide, 0).astype(jnp.int8) for i in range(shared)]
    return jnp.concatenate(parts, 0)
