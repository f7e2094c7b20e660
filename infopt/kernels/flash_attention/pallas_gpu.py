"""Flash attention for NVIDIA GPUs: a Pallas kernel by way of Triton (Dao 2023, "FlashAttention-2", algorithm 1).

Mosaic GPU, which JAX >= 0.11 would rather have (it deprecates Triton), has no matrix product that Hopper and Blackwell
share, and none in plain float32. By way of Triton one kernel serves Ampere and all since.

The grid goes over rows of the batch, key/value heads and blocks of rows, a row being a pair of a query and one of the
heads that share its keys: no key is repeated. A program walks over the blocks of keys between the first and the last
that its rows need, with the softmax's sums in registers. Sinks are a walk of their own, since their queries stand
elsewhere, and the others need none of what lies between.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from infopt.kernels.flash_attention.options import (
    NEVER,
    NOT_LATE,
    Options,
    Places,
    capped,
    grouped,
    needed,
    product,
    ungrouped,
)
from infopt.masks import seen
from infopt.typing import Array

try:
    triton: Any = importlib.import_module("jax.experimental.pallas.triton")
except ImportError:  # JAX has announced that it will drop it
    triton = None

ROWS, KEYS = 64, 64
"""Rows and columns of a block of scores; less where a head is wide. Powers of two, as all shapes in Triton are."""
LEAST = 16
"""Rows, columns and channels of the smallest product."""
WIDEST = 256
"""Channels of a head: more do not fit in the registers of a block's output."""
SHARED = 2**15
"""Bytes that a block of rows, and one of keys with its values, may take: with two of these in flight a program fits the
99 KiB of the cards that have least."""
DTYPES = ("float32", "bfloat16", "float16")


def power(n: int) -> int:
    """The next power of two, from `LEAST` on."""
    return max(LEAST, 1 << (n - 1).bit_length())


def unsupported(q: Array, width: int) -> str:
    """Why no kernel of this route serves such queries and values of this width, or ""."""
    if triton is None:
        return f"JAX {jax.__version__} has no Triton route"
    if q.dtype.name not in DTYPES:
        return f"queries are {q.dtype.name}, which is none of {', '.join(DTYPES)}"
    if max(q.shape[-1], width) > WIDEST:
        return f"a head has more than {WIDEST} channels"
    return ""


def refuses(q: Array, k: Array, v: Array, o: Options) -> str:
    """Why a call cannot be served, or ""."""
    if o.late is not None:
        return NOT_LATE
    if found := unsupported(q, v.shape[-1]):
        return found
    if {k.dtype, v.dtype} != {q.dtype}:
        return "queries, keys and values differ in dtype"
    return "" if min(*q.shape, *k.shape, *v.shape) else "an axis is empty"


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The sizes of a kernel's blocks. Static.

    Args:
      rows: pairs of a query and a head.
      keys: columns.
      sinks: how many of the first slots are sinks.
      sunk: columns of a block of sinks.
    """

    rows: int
    keys: int
    sinks: int = 0

    @staticmethod
    def plan(
        rows: int, slots: int, widths: tuple[int, int], itemsize: int, sinks: int, most: tuple[int, int]
    ) -> Blocks:
        wide = [power(w) * itemsize for w in widths]
        rows, keys = power(min(rows, most[0])), power(min(slots, most[1]))
        while rows > LEAST and rows * max(wide) > SHARED:
            rows //= 2
        while keys > LEAST and keys * sum(wide) > SHARED:
            keys //= 2
        return Blocks(rows, keys, min(sinks, slots))

    @property
    def sunk(self) -> int:
        return min(self.keys, power(self.sinks))

    @property
    def warps(self) -> int:
        return 4 if self.rows <= LEAST else 8


def as_rows(q: Array, heads: int, rows: int) -> Array:
    """Queries `[B, T, H, D]` as whole blocks of rows `[B, K, T * G, D]`, the heads of a query side by side."""
    x = grouped(q, heads).swapaxes(2, 3)
    x = x.reshape(*x.shape[:2], -1, x.shape[-1])
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % rows), (0, 0)))


def as_queries(x: Array, length: int, group: int) -> Array:
    """Rows `[B, K, R, E]` as `[B, T, H, E]`."""
    x = x[:, :, : length * group].reshape(*x.shape[:2], length, group, -1)
    return ungrouped(x.swapaxes(2, 3))


def of_rows(p: Places, group: int, rows: int, columns: int, keys: int) -> Places:
    """Places in whole blocks of rows and of keys, and a place for each row in place of one for each query."""

    def each(x: Any) -> Any:
        return None if x is None else jnp.repeat(x, group, 1)

    p = dataclasses.replace(p, query=each(p.query), query_segment=each(p.query_segment))
    return p.padded(-p.query.shape[1] % rows, -columns % keys)


def bounds(o: Options, p: Places, b: Blocks) -> tuple[Array, Array]:
    """The first block of keys that each block of rows needs beside its sinks, and the end of the last, `[B, N]`."""
    if b.sinks:
        slot = jnp.arange(p.key.shape[1], dtype=jnp.int32)[None]
        p = dataclasses.replace(p, key=jnp.where(slot < b.sinks, -1, p.key))
    use = needed(o, p, b.rows, b.keys)
    block = jnp.arange(use.shape[-1], dtype=jnp.int32).reshape(1, 1, -1)
    last = jnp.max(jnp.where(use, block + 1, 0), -1)
    return jnp.minimum(jnp.min(jnp.where(use, block, 2**30), -1), last), last


Read = Callable[[Any, int], tuple[Array, Array, Array, Any]]
"""`(start, count) -> (keys [C, D], values [C, E], positions [C], segments [C] or None)` of slots."""


def walk(
    q: Array,
    sink_q: Any,
    query: Array,
    segment: Any,
    read: Read,
    first: Any,
    last: Any,
    sinks: Any,
    width: int,
    o: Options,
    b: Blocks,
) -> tuple[Array, Array]:
    """Inside a kernel: the output `[R, E]` of a block of rows and the log-sum-exp `[R]`, both float32.

    Args:
      q, sink_q: `[R, D]`; `sink_q` may be None.
      query, segment: `[R]`; `segment` may be None.
      read: reads slots.
      first, last: which blocks of keys.
      sinks: which of the blocks of sinks come before, from the first on; None where there are none.
      width: E.
    """

    def step(start: Any, count: int, q: Array, carry: Any, sunk: bool) -> Any:
        most, total, out = carry
        k, v, key, key_segment = read(start, count)
        if b.sinks:
            slot = start + jnp.arange(count, dtype=jnp.int32)
            key = jnp.where((slot < b.sinks) == sunk, key, -1)  # they are counted once
        allowed = seen(query[:, None], key[None, :], o.window, o.sinks, o.causal)
        if segment is not None:
            allowed &= segment[:, None] == key_segment[None, :]
        allowed = jnp.broadcast_to(allowed, (q.shape[0], count))
        s = capped(product(q, k, 1) * o.scale, o.softcap)
        s = jnp.where(allowed, s, 2 * NEVER)  # below any maximum, so that its exponential is 0 in an empty row too
        high = jnp.maximum(most, jnp.max(s, 1))
        p, shrink = jnp.exp(s - high[:, None]), jnp.exp(most - high)
        return high, total * shrink + jnp.sum(p, 1), out * shrink[:, None] + product(p.astype(v.dtype), v, 0)

    rows = q.shape[0]
    carry = (
        jnp.full((rows,), NEVER, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
        jnp.zeros((rows, width), jnp.float32),
    )
    if sinks is not None:
        at_sinks = q if sink_q is None else sink_q
        carry = jax.lax.fori_loop(0, sinks, lambda j, c: step(j * b.sunk, b.sunk, at_sinks, c, True), carry)
    most, total, out = jax.lax.fori_loop(first, last, lambda j, c: step(j * b.keys, b.keys, q, c, False), carry)
    some = jnp.where(total == 0, 1.0, total)
    return out / some[:, None], jnp.where(total == 0, -jnp.inf, most + jnp.log(some))


def inside(start: Any, count: int, length: int, width: int, real: int) -> Any:
    """Which of a block `[count, width]` lie in an array `[length, real]`; None: all, whatever the start."""
    if length % count == 0 and width == real:
        return None
    at, channel = start + jnp.arange(count, dtype=jnp.int32), jnp.arange(width, dtype=jnp.int32)
    return (at[:, None] < length) & (channel[None, :] < real)


def load(ref: Any, start: Any, count: int, length: int, width: int) -> Array:
    """`count` places of an array `[length, width]` from `start` on, zeros beyond its ends."""
    mask = inside(start, count, length, ref.shape[-1], width)
    return triton.load(ref.at[pl.ds(start, count), :], mask=mask, other=None if mask is None else 0)


def _kernel(
    q: Any,  # [R, D]
    sink_q: Any,  # [R, D], or None
    k: Any,  # [S, D]
    v: Any,  # [S, E]
    p: Places,  # [R], [S]
    first: Any,  # []
    last: Any,  # []
    out: Any,  # [R, E]
    lse: Any,  # [R]
    *,
    o: Options,
    b: Blocks,
    sizes: tuple[int, int, int],
) -> None:
    slots, width, out_width = sizes

    def read(start: Any, count: int) -> tuple[Array, Array, Array, Any]:
        at = pl.ds(start, count)
        keys, values = load(k, start, count, slots, width), load(v, start, count, slots, out_width)
        return keys, values, p.key[at], None if p.key_segment is None else p.key_segment[at]

    def whole(ref: Any) -> Any:
        return None if ref is None else load(ref, 0, b.rows, b.rows, width)

    segment = None if p.query_segment is None else p.query_segment[:]
    sinks = pl.cdiv(b.sinks, b.sunk) if b.sinks else None
    found, sums = walk(
        whole(q), whole(sink_q), p.query[:], segment, read, first[...], last[...], sinks, out.shape[-1], o, b
    )
    triton.store(out, found.astype(out.dtype), mask=inside(0, b.rows, b.rows, out.shape[-1], out_width))
    lse[:] = sums


def forward(
    q: Array,
    sink_q: Any,
    k: Array,
    v: Array,
    places: Places,
    o: Options,
    interpret: bool = False,
    rows: int = ROWS,
    keys: int = KEYS,
) -> tuple[Array, Array]:
    """The output `[B, T, H, E]` and the log-sum-exp of scores `[B, T, H]`."""
    (batch, length, all_heads, width), (slots, heads, out_width) = q.shape, v.shape[1:]
    group = all_heads // heads
    sizes = slots, width, out_width
    b = Blocks.plan(length * group, slots, (width, out_width), q.dtype.itemsize, o.sinks, (rows, keys))
    p = of_rows(places, group, b.rows, slots, b.keys)
    q = as_rows(q, heads, b.rows)
    sink_q = None if sink_q is None or not b.sinks else as_rows(sink_q, heads, b.rows)
    wide, high, columns = power(width), power(out_width), p.key.shape[1]

    def of_block(*block: int) -> Any:
        return pl.BlockSpec((None, None, *block), lambda n, h, i: (i, h, n, *(0 for _ in block[1:])))

    def of_head(channels: int) -> Any:
        return pl.BlockSpec((None, columns, None, channels), lambda n, h, i: (i, 0, h, 0))

    def optional(x: Any, spec: Any) -> Any:
        return None if x is None else spec

    row, column = (
        pl.BlockSpec((None, b.rows), lambda n, h, i: (i, n)),
        pl.BlockSpec((None, columns), lambda n, h, i: (i, 0)),
    )
    number = pl.BlockSpec((None, None), lambda n, h, i: (i, n))
    specs = Places(row, column, optional(p.query_segment, row), optional(p.key_segment, column))
    out, lse = pl.pallas_call(
        functools.partial(_kernel, o=o, b=b, sizes=sizes),
        out_shape=(
            jax.ShapeDtypeStruct((*q.shape[:3], out_width), q.dtype),
            jax.ShapeDtypeStruct(q.shape[:3], jnp.float32),
        ),
        grid=(q.shape[2] // b.rows, heads, batch),  # neighbours in time share their keys
        in_specs=(
            of_block(b.rows, wide), optional(sink_q, of_block(b.rows, wide)), of_head(wide), of_head(high), specs,
            number, number,
        ),
        out_specs=(of_block(b.rows, high), of_block(b.rows)),
        compiler_params=triton.CompilerParams(num_warps=b.warps, num_stages=2),
        interpret=interpret,
        name="flash_attention",
    )(q, sink_q, k, v, p, *bounds(o, p, b))  # fmt: skip
    return as_queries(out, length, group), as_queries(lse[..., None], length, group)[..., 0]
