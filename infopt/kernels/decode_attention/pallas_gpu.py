"""Decode attention for NVIDIA GPUs, by way of Triton as flash attention is (Dao et al. 2023, "Flash-Decoding").

The blocks of slots that a row needs are dealt out to several programs, since one a head would leave most of a GPU idle;
what they find is joined by its log-sum-exps. A program reads the slots where they lie in the whole stack, through the
block table if there is one, and undoes the codec in registers: no layer, page or dense key is written anywhere.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from infopt.cache import Layout
from infopt.kernels.decode_attention.call import Call
from infopt.kernels.flash_attention.options import NOT_LATE, Options, Places
from infopt.kernels.flash_attention.pallas_gpu import (
    Blocks,
    as_queries,
    as_rows,
    bounds,
    load,
    of_rows,
    power,
    triton,
    unsupported,
    walk,
)
from infopt.kernels.flash_attention.sums import joined
from infopt.qtensor import Format, QTensor, is_qtensor
from infopt.typing import Array

ROWS, KEYS = 64, 64
"""Rows and slots of a block of scores."""
PROGRAMS = 512
"""So many are asked for: a few for each multiprocessor, of which an H100 has 132."""
RULES = ("absmax", "extreme", "minmax")
"""Of formats that are dequantised here: scale * level, or scale * level + minimum."""


def refuses(call: Call) -> str:
    """Why a call cannot be served, or ""."""
    if call.options.late is not None:
        return NOT_LATE
    if found := unsupported(call.q, call.width):
        return found
    if not min(call.q.shape):
        return "an axis is empty"
    for x in (call.keys, call.values):
        if is_qtensor(x):
            row = x.format.row
            if row.bits not in (4, 8) or row.rule not in RULES or row.levels or row.dtype or row.tensor or row.sub:
                return f"it does not dequantise {x.format.name}"
        # JAX's lowering counts in 32 bits up to 4 GiB, which bytes beyond the first 2 GiB overflow
        if any(leaf.dtype.itemsize == 1 and 2**31 <= leaf.size <= 2**32 for leaf in jax.tree.leaves(x)):
            return "its codes take between 2 and 4 GiB"
    return ""


def forward(call: Call, interpret: bool = False, rows: int = ROWS, keys: int = KEYS) -> tuple[Array, Array]:
    """The output `[B, T, H, D]` and the log-sum-exp of scores `[B, T, H]`."""
    o, layout, heads, width = call.options, call.layout, call.heads, call.width
    batch, length, all_heads = call.q.shape[:3]
    group, slots = all_heads // heads, layout.slots
    if is_qtensor(call.keys) or is_qtensor(call.values):
        keys //= 2  # what a block is dequantised from lies in registers too
    b = Blocks.plan(length * group, slots, (width, width), call.q.dtype.itemsize, o.sinks, (rows, keys))
    p = of_rows(Places(call.positions, layout.positions(call.lengths)), group, b.rows, slots, b.keys)
    q = as_rows(call.q, heads, b.rows)
    sink_q = None if call.sink_q is None or not b.sinks else as_rows(call.sink_q, heads, b.rows)
    count, columns, wide = q.shape[2] // b.rows, p.key.shape[1], power(width)
    splits = max(1, min(-(-PROGRAMS // (batch * heads * count)), columns // b.keys))

    def of_block(*block: int, split: bool = False) -> Any:
        if split:
            return pl.BlockSpec((None, None, None, *block), lambda s, n, h, i: (i, h, s, n, *(0 for _ in block[1:])))
        return pl.BlockSpec((None, None, *block), lambda s, n, h, i: (i, h, n, *(0 for _ in block[1:])))

    def apart(leaf: Array) -> Array:
        return leaf.reshape(*leaf.shape[:-1], heads, -1)

    def of_head(leaf: Array) -> Any:  # of the whole stack, of which the kernel takes the layer's slots
        stack, *where, _, channels = leaf.shape
        if layout.page is None:
            return pl.BlockSpec((stack, None, where[1], None, channels), lambda s, n, h, i: (0, i, 0, h, 0))
        return pl.BlockSpec((stack, where[0], None, channels), lambda s, n, h, i: (0, 0, h, 0))

    def of_row(x: Any) -> Any:
        return None if x is None else pl.BlockSpec((None, x.shape[1]), lambda s, n, h, i: (i, 0))

    k, v = jax.tree.map(apart, (call.keys, call.values))
    layer = jnp.asarray(call.layer, jnp.int32).reshape(1)
    number = pl.BlockSpec((None, None), lambda s, n, h, i: (i, n))
    out, lse = pl.pallas_call(
        functools.partial(_kernel, o=o, b=b, layout=layout, width=width, splits=splits),
        out_shape=(
            jax.ShapeDtypeStruct((batch, heads, splits, q.shape[2], width), jnp.float32),
            jax.ShapeDtypeStruct((batch, heads, splits, q.shape[2]), jnp.float32),
        ),
        grid=(splits, count, heads, batch),
        in_specs=(
            pl.BlockSpec((1,), lambda s, n, h, i: (0,)),
            of_block(b.rows, wide),
            None if sink_q is None else of_block(b.rows, wide),
            *jax.tree.map(of_head, (k, v)),
            pl.BlockSpec((None, b.rows), lambda s, n, h, i: (i, n)),
            pl.BlockSpec((None, columns), lambda s, n, h, i: (i, 0)),
            of_row(call.table),
            number,
            number,
        ),
        out_specs=(of_block(b.rows, wide, split=True), of_block(b.rows, split=True)),
        compiler_params=triton.CompilerParams(num_warps=b.warps, num_stages=2),
        interpret=interpret,
        name="decode_attention",
    )(layer, q, sink_q, k, v, p.query, p.key, call.table, *bounds(o, p, b))
    out, lse = joined(out, lse, 2)  # of all splits
    return as_queries(out.astype(q.dtype), length, group), as_queries(lse[..., None], length, group)[..., 0]


def _kernel(
    layer: Any,  # [1]
    q: Any,  # [R, D]
    sink_q: Any,  # [R, D], or None
    k: Any,  # leaves [L, S, D] or of the pool of slots, or of what stands for D channels
    v: Any,
    query: Any,  # [R]
    key: Any,  # [S]
    table: Any,  # [pages], or None
    first: Any,  # []
    last: Any,  # []
    out: Any,  # [R, D]
    lse: Any,  # [R]
    *,
    o: Options,
    b: Blocks,
    layout: Layout,
    width: int,
    splits: int,
) -> None:
    channel = jnp.arange(out.shape[-1], dtype=jnp.int32)
    at_layer = layer[0]

    def read(start: Any, count: int) -> tuple[Array, Array, Array, None]:
        slot = start + jnp.arange(count, dtype=jnp.int32)
        real = slot < layout.slots
        if layout.page is not None:
            page = triton.load(table.at[jax.lax.div(slot, layout.page)], mask=real, other=-1)
            real &= page >= 0
            slot = page * layout.page + jax.lax.rem(slot, layout.page)
        there = real[:, None] & (channel < width)[None, :]

        def leaf(ref: Any, at: Array) -> Array:
            index = (at_layer, *jnp.broadcast_arrays(slot[:, None], at[None, :]))
            return triton.load(ref.at[index], mask=there, other=0)

        def values(x: Any) -> Array:
            return (_dequantised(x, leaf, channel, width) if is_qtensor(x) else leaf(x, channel)).astype(q.dtype)

        return values(k), values(v), key[pl.ds(start, count)], None

    def whole(ref: Any) -> Any:
        return None if ref is None else load(ref, 0, b.rows, b.rows, width)

    each, split = pl.cdiv(last[...] - first[...], splits), pl.program_id(0)
    start = first[...] + split * each
    # not `where` of two numbers, of which JAX makes a loop with bounds of unlike types
    sinks = (split == 0).astype(jnp.int32) * pl.cdiv(b.sinks, b.sunk) if b.sinks else None
    end = jnp.minimum(start + each, last[...])
    found, sums = walk(whole(q), whole(sink_q), query[:], None, read, start, end, sinks, out.shape[-1], o, b)
    mask = None if width == out.shape[-1] else jnp.broadcast_to((channel < width)[None, :], found.shape)
    triton.store(out, found, mask=mask)
    lse[:] = sums


def _dequantised(x: QTensor, leaf: Any, channel: Array, width: int) -> Array:
    """Channels of a head in float32; `leaf` reads those of a leaf."""
    format: Format = x.format
    row, group = format.row, format.group_of(width)
    of_group = jax.lax.div(channel, group)
    if row.bits == 8:
        codes = leaf(x.codes, channel).astype(jnp.int32)
    else:  # of a group's bytes the low halves are its first half
        half = group // 2
        within = jax.lax.rem(channel, group)
        byte = leaf(x.codes, of_group * half + jax.lax.rem(within, half)).astype(jnp.int32)
        codes = (byte >> (jax.lax.div(within, half) * 4)[None, :]) & 15
    found = (codes - row.zero).astype(jnp.float32) * leaf(x.scale, of_group).astype(jnp.float32)
    return found if x.minimum is None else found + leaf(x.minimum, of_group).astype(jnp.float32)
