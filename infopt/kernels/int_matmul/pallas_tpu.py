"""The integer product for TPUs, in Pallas: int8 by int8 on the matrix unit, summed in int32, scaled at the end.

The grid goes over blocks of rows, of columns (a matrix's outputs), and of terms. The matrix is read where it lies in
the stack: which one it is, is handed in by scalar prefetch. Weights have one scale a column, 8 bits and no minimum.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from infopt.kernels.int_matmul.call import Call
from infopt.qtensor import of_layer
from infopt.typing import Array

ROWS, COLUMNS, TERMS = 256, 512, 2048
"""The largest block: 0.5 MiB of rows, 1 of the matrix, both fetched twice, and 0.5 of sums."""
LANES, SUBLANES = 128, 32
"""Of a tile of int8: a block's last axis is a multiple of the first, the one before it of the second."""


def refuses(call: Call) -> str:
    """Why the kernel cannot serve a call, or ""."""
    form = call.weight.format
    if form.row.bits != 8 or form.row.code_dtype != "int8" or form.row.minimum:
        return f"weights in {form.name}; it multiplies by int8 as it is stored."
    if form.group is not None:
        return f"groups of {form.group}; it has one scale a column."
    if 0 in (*call.codes.shape, *call.weight.shape):
        return "there is nothing to multiply."
    return ""


def _whole(n: int, of: int) -> int:
    return -(-n // of) * of


def forward(call: Call, interpret: bool = False) -> Array:
    """The product `[M, O]`."""
    (rows, terms), columns = call.codes.shape, call.weight.shape[-2]
    lead = call.weight.codes.shape[:-2]
    layer = jnp.zeros(1, jnp.int32)
    for size, index in zip(lead, call.layer, strict=True):
        layer = layer * size + index
    block = min(_whole(rows, SUBLANES), ROWS), min(_whole(columns, LANES), COLUMNS), min(_whole(terms, LANES), TERMS)
    # zeros in the place of rows and terms that are not there: what is read of the matrix beyond its end then adds none
    m, k = _whole(rows, block[0]), _whole(terms, block[2])
    codes = jnp.pad(call.codes, ((0, m - rows), (0, k - terms)))
    scale = jnp.pad(call.scale, ((0, m - rows), (0, 0)))
    matrix = call.weight.codes.reshape(math.prod(lead), columns, call.weight.codes.shape[-1])
    of_column = of_layer(call.weight.scale, call.layer).astype(jnp.float32).T
    out = pl.pallas_call(
        _kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(m // block[0], pl.cdiv(columns, block[1]), k // block[2]),
            in_specs=[
                pl.BlockSpec((block[0], block[2]), lambda i, j, t, layer: (i, t)),
                pl.BlockSpec((1, block[1], block[2]), lambda i, j, t, layer: (layer[0], j, t)),
                pl.BlockSpec((block[0], 1), lambda i, j, t, layer: (i, 0)),
                pl.BlockSpec((1, block[1]), lambda i, j, t, layer: (0, j)),
            ],
            out_specs=pl.BlockSpec((block[0], block[1]), lambda i, j, t, layer: (i, j)),
            scratch_shapes=[pltpu.VMEM((block[0], block[1]), jnp.int32)],
        ),
        out_shape=jax.ShapeDtypeStruct((m, columns), call.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * m * columns * k,
            transcendentals=0,
            bytes_accessed=m * k * pl.cdiv(columns, block[1])
            + columns * k * (m // block[0])
            + m * columns * jnp.dtype(call.dtype).itemsize,
        ),
        interpret=interpret,
        name="int_matmul",
    )(layer, codes, matrix, scale, of_column)
    return out[:rows]


def _kernel(layer: Any, codes: Any, matrix: Any, scale: Any, of_column: Any, out: Any, sums: Any) -> None:
    """One block of sums.

    Refs: codes `[M, K]`, the matrix `[1, O, K]`, scales of rows `[M, 1]` and of columns `[1, O]`; out `[M, O]`, sums
    `[M, O]`.
    """
    t = pl.program_id(2)

    @pl.when(t == 0)
    def _() -> None:
        sums[...] = jnp.zeros(sums.shape, jnp.int32)

    sums[...] += jax.lax.dot_general(codes[...], matrix[0], (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)

    @pl.when(t == pl.num_programs(2) - 1)
    def _() -> None:
        y = sums[...].astype(jnp.float32) * jnp.broadcast_to(of_column[...], sums.shape)
        out[...] = (y * jnp.broadcast_to(scale[...], sums.shape)).astype(out.dtype)
