"""Flash attention for TPUs, in Pallas (Dao 2023, "FlashAttention-2", algorithm 1): memory O(T + S).

The grid goes over rows of the batch, key/value heads, blocks of queries, and the blocks of keys that these need. Which
those are is handed in by scalar prefetch, so that what causality, a window or empty places rule out is never fetched,
and there are no more steps than the busiest block of queries has blocks of keys. The query heads that share keys are
rows of one matrix: no key is repeated for them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from infopt.kernels.flash_attention.options import (
    NEVER,
    NOT_LATE,
    Options,
    Places,
    capped,
    grouped,
    needed,
    product,
    rounded_up,
    ungrouped,
    visits,
)
from infopt.masks import seen
from infopt.typing import Array

LANES = 128
"""Values side by side in a vector register; an axis that a block cuts is a multiple."""
ROWS, KEYS = 1024, 1024
"""Rows (queries x heads that share keys) and columns of a block of scores."""
MOST_LISTED = 2**17
"""Numbers of blocks that may be listed: half of the megabyte of scalar memory."""
MEMORY = 48 * 2**20
"""Bytes of vector memory that a kernel may use: of the 64 MiB that the smallest of v5e, v5p and v6e has."""
WIDEST = 512
"""Channels of a head."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sizes of a call's grid and blocks. Static.

    Args:
      batch, heads, group: rows of the batch, key/value heads, and query heads to each.
      length, key_length: queries and keys, in whole blocks.
      width, out_width: channels of keys and of values.
      queries, keys: of a block.
      sinks, segments: whether there are.
      dtype: of queries, keys and values.
    """

    batch: int
    heads: int
    group: int
    length: int
    key_length: int
    width: int
    out_width: int
    queries: int
    keys: int
    sinks: bool
    segments: bool
    dtype: Any

    @staticmethod
    def of(q: Any, k: Any, v: Any, o: Options, segments: bool) -> Plan:
        (batch, length, all_heads, width), (_, key_length, heads, out_width) = q.shape, v.shape
        group = all_heads // heads
        queries = min(max(ROWS // group // LANES, 1) * LANES, rounded_up(length, LANES))
        keys = min(KEYS, rounded_up(key_length, LANES))
        while batch * -(-length // queries) * -(-key_length // keys) > MOST_LISTED and keys < key_length:
            keys *= 2
        dtype = jnp.bfloat16 if q.dtype == jnp.bfloat16 else jnp.float32
        plan = Plan(
            batch, heads, group, rounded_up(length, queries), rounded_up(key_length, keys), width, out_width, queries,
            keys, o.sinks > 0, segments, dtype,
        )  # fmt: skip
        while plan.scratch_bytes() > MEMORY and plan.keys > LANES:  # many queries share a head: less room for its keys
            keys = max(plan.keys // 2 // LANES, 1) * LANES
            plan = dataclasses.replace(plan, keys=keys, key_length=rounded_up(key_length, keys))
        return plan

    @property
    def blocks(self) -> tuple[int, int]:
        """Blocks of queries, and of keys."""
        return self.length // self.queries, self.key_length // self.keys

    def specs(self) -> tuple[list[pl.BlockSpec], list[pl.BlockSpec]]:
        """What a step of the grid (row, head, block of queries, visit) reads and writes."""
        n, m = self.blocks

        def at(b: Any, i: Any, j: Any, order: Any) -> Any:
            return order[(b * n + i) * m + j]

        def of_query(b: Any, h: Any, i: Any, j: Any, order: Any, count: Any) -> Any:
            return b, h, 0, i, 0

        def of_key(b: Any, h: Any, i: Any, j: Any, order: Any, count: Any) -> Any:
            return b, h, at(b, i, j, order), 0

        rows = (1, 1, self.group, self.queries)
        query = pl.BlockSpec((*rows, self.width), of_query)
        query_place = pl.BlockSpec((1, 1, self.queries), lambda b, h, i, j, order, count: (b, 0, i))
        key_place = pl.BlockSpec((1, 1, self.keys), lambda b, h, i, j, order, count: (b, 0, at(b, i, j, order)))
        reads = [query] * (1 + self.sinks) + [
            pl.BlockSpec((1, 1, self.keys, self.width), of_key),
            pl.BlockSpec((1, 1, self.keys, self.out_width), of_key),
        ]
        reads += [query_place, key_place] * (1 + self.segments)
        writes = [
            pl.BlockSpec((*rows, self.out_width), of_query),
            pl.BlockSpec(rows, lambda b, h, i, j, order, count: (b, h, 0, i)),
        ]
        return reads, writes

    def block_bytes(self) -> tuple[list[int], list[int]]:
        """Bytes of each block in `specs`, as they lie in memory: the last axis in whole lanes, few rows in eights."""
        size = np.dtype(self.dtype).itemsize
        query, of_out = (self.group * self.queries * rounded_up(w, LANES) * size for w in (self.width, self.out_width))
        key, value = (self.keys * rounded_up(w, LANES) * size for w in (self.width, self.out_width))
        places = [self.queries * 4, self.keys * 4] * (1 + self.segments)
        return [query] * (1 + self.sinks) + [key, value, *places], [
            of_out,
            rounded_up(self.group, 8) * self.queries * 4,
        ]

    def scratch_bytes(self) -> int:
        """Vector memory that a step needs, blocks twice: one is fetched while the other is used."""
        reads, writes = self.block_bytes()
        rows = self.group * self.queries
        return 2 * sum(reads + writes) + 4 * rows * (rounded_up(self.out_width, LANES) + 3 * LANES + 3 * self.keys)


def refuses(q: Any, k: Any, v: Any, o: Options) -> str:
    """Why the kernel cannot serve these shapes, or ""."""
    if o.late is not None:
        return NOT_LATE
    if min(q.shape[1], k.shape[1]) == 0:
        return "there is nothing to attend to."
    if max(q.shape[3], v.shape[3]) > WIDEST:
        return f"heads of {max(q.shape[3], v.shape[3])} channels; it holds at most {WIDEST}."
    if not all(jnp.issubdtype(x.dtype, jnp.floating) for x in (q, k, v)):
        return "it takes floating point."
    plan = Plan.of(q, k, v, o, True)
    if q.shape[0] * math.prod(plan.blocks) > MOST_LISTED:
        return f"{q.shape[0]} x {plan.blocks} blocks are more than the {MOST_LISTED} that it can list."
    if plan.scratch_bytes() > MEMORY:
        return (
            f"a step of {plan.group} x {plan.queries} rows and {plan.keys} keys takes {plan.scratch_bytes() >> 20} MiB "
            f"of vector memory, of {MEMORY >> 20}."
        )
    return ""


def traffic(plan: Plan, order: np.ndarray, count: np.ndarray) -> int:
    """Bytes between high-bandwidth memory and the kernel: a block is fetched where it is not the one before.

    Args:
      plan: of the call.
      order, count: of `visits`, as numpy arrays: `[B, N, M]` and `[B, N]`.
    """
    batch, n, _ = order.shape
    steps = max(1, int(np.max(count)))
    reads, writes = plan.block_bytes()
    of_key = [False] * (1 + plan.sinks) + [True, True] + [False, True] * (1 + plan.segments)
    visited = order[:, :, :steps].reshape(batch, -1)
    changes = np.sum(visited[:, 1:] != visited[:, :-1], -1)
    # from one head to the next the keys change by the head, and their places only if the block does
    each = int(plan.heads * np.sum(changes + 1))
    places = _changes(np.repeat(visited[:, None], plan.heads, 1).reshape(batch, -1))
    query, query_places = batch * plan.heads * n, batch * (plan.heads * n if n > 1 else 1)
    total = sum(writes) * query
    for index, (size, keyed) in enumerate(zip(reads, of_key)):
        is_place = index >= 3 + plan.sinks
        total += size * ((places if is_place else each) if keyed else (query_places if is_place else query))
    return total


def _changes(visited: np.ndarray) -> int:
    """Blocks fetched in all rows; the first of each row is another row's, so always."""
    return int(np.sum(visited[:, 1:] != visited[:, :-1]) + len(visited))


def planned(q: Any, k: Any, v: Any, places: Places, o: Options) -> tuple[Plan, Any, Any, Places]:
    """The plan, the blocks of keys that each block of queries visits, and how many, and the places in whole blocks."""
    plan = Plan.of(q, k, v, o, places.query_segment is not None)
    places = places.padded(plan.length - q.shape[1], plan.key_length - k.shape[1])
    return plan, *visits(needed(o, places, plan.queries, plan.keys)), places


def forward(
    q: Array, sink_q: Any, k: Array, v: Array, places: Places, o: Options, interpret: bool = False
) -> tuple[Array, Array]:
    """The output `[B, T, H, E]` and the log-sum-exp of scores `[B, T, H]`."""
    batch, length, all_heads, _ = q.shape
    if o.sinks and sink_q is None:
        sink_q = q
    plan, order, count, places = planned(q, k, v, places, o)

    def rows(x: Array) -> Array:
        x = jnp.pad(x.astype(plan.dtype), ((0, 0), (0, plan.length - length), (0, 0), (0, 0)))
        return grouped(x, plan.heads)

    def columns(x: Array) -> Array:
        x = jnp.pad(x.astype(plan.dtype), ((0, 0), (0, plan.key_length - x.shape[1]), (0, 0), (0, 0)))
        return x.transpose(0, 2, 1, 3)

    inputs = [rows(q)] + ([rows(sink_q)] if plan.sinks else []) + [columns(k), columns(v)]
    inputs += [places.query[:, None], places.key[:, None]]
    if plan.segments:
        inputs += [places.query_segment[:, None].astype(jnp.int32), places.key_segment[:, None].astype(jnp.int32)]
    reads, writes = plan.specs()
    n, _ = plan.blocks
    of_rows = (batch, plan.heads, plan.group, plan.length)
    matrix = plan.group * plan.queries
    out, lse = pl.pallas_call(
        functools.partial(_kernel, plan, o),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, plan.heads, n, jnp.maximum(jnp.max(count), 1)),
            in_specs=reads,
            out_specs=writes,
            scratch_shapes=[
                pltpu.VMEM((matrix, LANES), jnp.float32),
                pltpu.VMEM((matrix, LANES), jnp.float32),
                pltpu.VMEM((matrix, plan.out_width), jnp.float32),
                *[pltpu.VMEM((plan.queries, LANES), jnp.int32)] * (1 + plan.segments),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((*of_rows, plan.out_width), plan.dtype),
            jax.ShapeDtypeStruct(of_rows, jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=MEMORY + 2**23
        ),
        cost_estimate=_cost(plan, o),
        interpret=interpret,
        name="flash_attention",
    )(order.reshape(-1), count.reshape(-1), *inputs)
    return (
        ungrouped(out)[:, :length].astype(q.dtype),
        lse.reshape(batch, all_heads, -1)[:, :, :length].transpose(0, 2, 1),
    )


def _cost(plan: Plan, o: Options) -> pl.CostEstimate:
    """What the compiler schedules by: blocks of queries that follow the keys' end, as in a text read from its start."""
    at = plan.key_length - plan.length + np.arange(plan.length)[None]
    key = np.arange(plan.key_length)[None]
    n, m = plan.blocks
    last = at.reshape(n, -1).max(-1)[:, None] if o.causal else np.full((n, 1), plan.key_length)
    first = 0 if o.window is None else at.reshape(n, -1).min(-1)[:, None] - o.window
    some = (key.reshape(m, -1).min(-1)[None] <= last) & (key.reshape(m, -1).max(-1)[None] > first)
    pairs = plan.batch * plan.heads * plan.group * int(some.sum()) * plan.queries * plan.keys
    each = plan.batch * plan.heads
    reads, writes = plan.block_bytes()
    of_queries, of_keys = 1 + plan.sinks, 2 + plan.sinks
    moved = each * (
        n * (sum(reads[:of_queries]) + sum(writes)) + int(some.sum()) * sum(reads[of_queries : of_keys + 1])
    )
    return pl.CostEstimate(flops=2 * pairs * (plan.width + plan.out_width), transcendentals=pairs, bytes_accessed=moved)


def _kernel(plan: Plan, o: Options, order: Any, count: Any, *refs: Any) -> None:
    """One block of scores.

    Refs: queries and the sinks' queries `[1, 1, G, Q, D]`, keys `[1, 1, S, D]`, values `[1, 1, S, E]`, places
    `[1, 1, Q]` and `[1, 1, S]`, segments alike; out `[1, 1, G, Q, E]`, lse `[1, 1, G, Q]`; maximum and sum
    `[G * Q, 128]`, output `[G * Q, E]`, places (and segments) of queries in a column `[Q, 128]`.
    """
    rest = list(refs)
    q = rest.pop(0)
    sink_q = rest.pop(0) if plan.sinks else None
    k, v = rest.pop(0), rest.pop(0)
    sides = [(rest.pop(0), rest.pop(0)) for _ in range(1 + plan.segments)]
    out, lse, most, total, acc, *columns = rest
    rows = plan.group * plan.queries
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    n, m = plan.blocks

    @pl.when(j == 0)
    def _() -> None:
        most[...] = jnp.full(most.shape, NEVER, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        acc[...] = jnp.zeros(acc.shape, jnp.float32)
        for column, (row, _) in zip(columns, sides):
            column[...] = jnp.broadcast_to(row[0], (LANES, plan.queries)).T

    def step(sunk: bool) -> None:
        key = sides[0][1][0]  # [1, S]
        s = product(q[0, 0].reshape(rows, plan.width), k[0, 0], 1)
        if sunk:
            assert sink_q is not None
            other = product(sink_q[0, 0].reshape(rows, plan.width), k[0, 0], 1)
            s = jnp.where(jnp.broadcast_to(key < o.sinks, s.shape), other, s)
        s = capped(s * o.scale, o.softcap)
        allowed = seen(columns[0][:, :1], key, o.window, o.sinks, o.causal)
        if plan.segments:
            allowed &= columns[1][:, :1] == sides[1][1][0]
        s = s.reshape(plan.group, plan.queries, plan.keys)
        # below any maximum, so that its exponential is 0 in an empty row too
        s = jnp.where(jnp.broadcast_to(allowed[None], s.shape), s, 2 * NEVER).reshape(rows, plan.keys)
        before = most[...]
        high = jnp.maximum(before, jnp.max(s, -1, keepdims=True))
        p, shrink = jnp.exp(s - high[:, :1]), jnp.exp(before - high)
        most[...] = high
        total[...] = total[...] * shrink + jnp.sum(p, -1, keepdims=True)
        acc[...] = acc[...] * shrink[:, :1] + product(p.astype(plan.dtype), v[0, 0], 0)

    visited = j < count[b * n + i]
    if plan.sinks:  # which stand in the places of their own numbers
        has_sinks = order[(b * n + i) * m + j] * plan.keys < o.sinks
        pl.when(visited & has_sinks)(lambda: step(True))
        visited &= ~has_sinks
    pl.when(visited)(lambda: step(False))

    @pl.when(j == pl.num_programs(3) - 1)
    def _() -> None:
        some = jnp.where(total[...] == 0, 1.0, total[...])
        out[0, 0] = (acc[...] / some[:, :1]).reshape(plan.group, plan.queries, -1).astype(plan.dtype)
        found = jnp.where(total[...] == 0, -jnp.inf, most[...] + jnp.log(some))
        for g in range(plan.group):  # a column of rows becomes a row: 128 times less to write
            lse[0, 0, g : g + 1, :] = found[g * plan.queries : (g + 1) * plan.queries].T[:1]
