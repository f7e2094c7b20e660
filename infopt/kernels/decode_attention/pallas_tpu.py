"""Decode attention for TPUs, in Pallas: split over keys (Dao et al. 2023, "Flash-Decoding"), codecs undone inside.

The grid goes over rows of the batch, tiles of queries, parts of the keys, and blocks of slots within a part. Layer,
lengths and block table are handed in by scalar prefetch: a layer is read where it lies in the stack, a page where it
lies in the pool, and slots that hold nothing are never fetched.

All heads of a slot lie side by side, so a block is a matrix `[slots, K * D]`. Heads are taken in bundles of whole
vector registers, queries being zero in the channels of their bundle's other heads. With few queries one bundle holds
all heads: what is multiplied by zeros costs nothing then, since the matrix unit is waiting for keys.

Mosaic knows no float16 on TPUs: XLA hands in the layer's scales (and minima) as whole numbers, slots along the lanes,
the form in which it keeps so narrow an array; of them alone, a sixteenth of 8-bit keys, it reads every slot. The kernel
spreads them over their channels by a product with zeros and ones, in two halves of which each is a bfloat16 exactly.
Of packed codes the low and the high nibbles stay apart: queries are handed in, and the output handed back, so ordered.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from infopt import cache as kv
from infopt.cache import Layout
from infopt.formats import Format
from infopt.kernels.decode_attention.call import Call
from infopt.kernels.flash_attention.options import NEVER, NOT_LATE, capped, product, rounded_up
from infopt.kernels.flash_attention.pallas_tpu import LANES, MEMORY, MOST_LISTED
from infopt.kernels.flash_attention.sums import joined
from infopt.masks import seen
from infopt.qtensor import is_qtensor
from infopt.typing import Array

SLOTS = 512
"""Slots that a step reads at most."""
TOKENS = 128
"""Queries of a tile at most."""
FEW = 128
"""Queries x heads up to which all heads make one bundle."""
MOST_PAGES = 16
"""Pages that a step reads at most: each is an input of its own."""
SUBLANES = 8
"""Rows of a vector register of 32-bit values; of narrower ones as many times more."""
CODECS = ("int8", "int4_min")


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sizes of a call's grid and blocks. Static.

    Args:
      batch, heads, group, width: rows of the batch, key/value heads, query heads to each, channels of a head.
      tokens, tiles: queries of a tile, and tiles.
      bundle: heads of a bundle.
      slots, refs: slots that an input block is read for, and how many blocks a step reads.
      fetched: slots that an input block holds: more where a page is less than the rows that a register has.
      parts: parts that the keys are split into.
      format: of keys and values, or None.
      layout: of the cache.
      dtype: that is computed in.
      sinks: whether there are.
    """

    batch: int
    heads: int
    group: int
    width: int
    tokens: int
    tiles: int
    bundle: int
    slots: int
    refs: int
    fetched: int
    parts: int
    format: Format | None
    layout: Layout
    dtype: Any
    sinks: bool

    @staticmethod
    def of(call: Call, parts: int | None = None) -> Plan:
        batch, length, all_heads, width = call.q.shape
        layout, heads = call.layout, call.heads
        form = call.keys.format if is_qtensor(call.keys) else None
        if layout.page is None:
            slots = fetched = min(SLOTS, rounded_up(layout.slots, LANES))
            refs = 1
        else:
            slots, fetched = layout.page, rounded_up(layout.page, _register_rows(call.keys))
            most = max(1, min(SLOTS // fetched, MOST_PAGES))
            if form is not None:  # scales have slots along the lanes
                most = next((n for n in range(most, 1, -1) if n * slots % LANES == 0), most)
            refs = min(most, layout.pages)
        if parts is None:  # two cores of a v5p share a lone row
            parts = 2 if batch == 1 and length == 1 else 1
        dtype = jnp.bfloat16 if call.q.dtype == jnp.bfloat16 else jnp.float32
        tokens = min(length, TOKENS)
        plan = Plan(
            batch, heads, all_heads // heads, width, tokens, -(-length // tokens), heads, slots, refs, fetched, parts,
            form, layout, dtype, call.options.sinks > 0,
        )  # fmt: skip
        if all_heads * tokens > FEW:
            fitting = (n for n in range(1, heads) if heads % n == 0 and n * plan.channels % LANES == 0)
            plan = dataclasses.replace(plan, bundle=next(fitting, heads))
        while plan.scratch_bytes() > MEMORY and plan.tokens > SUBLANES:
            tokens = plan.tokens // 2
            plan = dataclasses.replace(plan, tokens=tokens, tiles=-(-length // tokens))
        return plan

    @property
    def planes(self) -> int:
        """Values that share a byte."""
        return 1 if self.format is None else self.format.row.codes

    @property
    def channels(self) -> int:
        """Of a head, in a plane."""
        return self.width // self.planes

    @property
    def bundles(self) -> int:
        return self.heads // self.bundle

    @property
    def columns(self) -> int:
        """Of a bundle, in a plane."""
        return self.bundle * self.channels

    @property
    def rows(self) -> int:
        """Of a bundle: its query heads x the tile's queries, in whole registers."""
        return rounded_up(self.bundle * self.group * self.tokens, 2 * SUBLANES)

    @property
    def step(self) -> int:
        """Slots that a step reads."""
        return self.slots * self.refs

    @property
    def matrix(self) -> int:
        """Rows of a step's keys: its slots, and what lies beside them in their registers."""
        return self.fetched * self.refs

    def scratch_bytes(self) -> int:
        """Vector memory that a step needs, roughly; blocks twice, one being fetched while the other is used."""
        wide = self.bundles * self.planes * self.rows * rounded_up(self.columns, LANES)
        kept = 4 * wide + 2 * 4 * self.bundles * self.rows * LANES
        blocks = 2 * wide * (4 + (1 + self.sinks) * np.dtype(self.dtype).itemsize)
        cache = 2 * 2 * self.matrix * rounded_up(self.heads * self.width, LANES) * np.dtype(self.dtype).itemsize
        work = 4 * (4 * self.rows * self.matrix + 4 * self.matrix * rounded_up(self.columns, LANES))
        return kept + blocks + cache + work


def _register_rows(x: Any) -> int:
    """Rows that a register has of the narrowest leaf."""
    return SUBLANES * max(4 // leaf.dtype.itemsize for leaf in jax.tree.leaves(x))


def refuses(call: Call) -> str:
    """Why the kernel cannot serve a call, or ""."""
    if call.options.late is not None:
        return NOT_LATE
    if call.q.shape[1] == 0:
        return "there are no queries."
    for x in (call.keys, call.values):
        if is_qtensor(x):
            if x.format.name not in CODECS or x.format.scale != "float16":
                return f"keys or values in {x.format}; it undoes {' and '.join(CODECS)} with scales in float16."
            if x.format.group is None:
                return f"keys or values in {x.format} without a group."
        elif x.dtype not in (jnp.bfloat16, jnp.float32):
            return f"keys or values in {x.dtype}; it reads bfloat16 and float32."
    forms = [x.format if is_qtensor(x) else x.dtype for x in (call.keys, call.values)]
    if forms[0] != forms[1]:
        return f"keys in {forms[0]} and values in {forms[1]}; it undoes one codec."
    page, rows = call.layout.page, _register_rows(call.keys)
    if page is not None and page % rows and rows % page:
        return f"pages of {page} slots; it reads registers of {rows}, of which a page is a part or a multiple."
    if page is not None and page < SUBLANES:
        return f"pages of {page} slots; it reads at least {SUBLANES}."
    plan = Plan.of(call)
    if call.table is not None and call.table.size > MOST_LISTED:
        return f"a block table of {call.table.size} pages; it holds {MOST_LISTED}."
    if page is not None and plan.format is not None and plan.refs < call.layout.pages and plan.step % LANES:
        return f"pages of {page} slots, no few of which are a multiple of {LANES}."
    if plan.scratch_bytes() > MEMORY:
        return f"a step takes {plan.scratch_bytes() >> 20} MiB of vector memory, of {MEMORY >> 20}."
    return ""


def forward(call: Call, interpret: bool = False, parts: int | None = None) -> tuple[Array, Array]:
    """The output `[B, T, H, D]` and the log-sum-exp of scores `[B, T, H]`.

    Args:
      call: what is asked for.
      interpret: run in Pallas' interpreter.
      parts: that the keys are split into; by default two for a lone row and token, else one.
    """
    plan = Plan.of(call, parts)
    length, layout = call.q.shape[1], plan.layout
    used = call.used.astype(jnp.int32)
    last = jnp.max(call.positions.astype(jnp.int32), 1)
    if layout.lookahead is None:  # beyond the last query there is nothing to see
        used = jnp.minimum(used, last + 1)
    needed = jnp.maximum(-(-jnp.max(used) // plan.step), 1)
    steps = -(-needed // plan.parts)
    table = jnp.zeros((plan.batch, 1), jnp.int32) if call.table is None else call.table
    scalars = (
        jnp.asarray(call.layer, jnp.int32).reshape(1),
        call.lengths.astype(jnp.int32),
        used,
        steps.reshape(1).astype(jnp.int32),
        table.astype(jnp.int32).reshape(-1),
    )
    tiles, queries = (plan.batch, plan.tiles), (plan.bundles, plan.planes, plan.rows, plan.columns)
    at = _tiled(call.positions.astype(jnp.int32)[:, :, None], plan)  # [B, N, t, 1]
    at = jnp.broadcast_to(at[:, :, None], (*tiles, plan.bundle * plan.group, plan.tokens, 1)).reshape(*tiles, -1, 1)
    at = jnp.pad(at, ((0, 0), (0, 0), (0, plan.rows - at.shape[2]), (0, 0)), constant_values=-1)

    def of_tile(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, *shape), lambda b, n, p, j, *_: (b, n, *(0 for _ in shape)))

    def of_part(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, 1, *shape), lambda b, n, p, j, *_: (p, b, n, *(0 for _ in shape)))

    inputs = [at, _bundled(call.q, plan)] + ([_bundled(call.sink_q, plan)] if plan.sinks else [])
    specs = [of_tile(plan.rows, 1), *[of_tile(*queries)] * (1 + plan.sinks)]
    if plan.format is not None:
        spread = _spread(plan)
        inputs.append(spread)
        specs.append(pl.BlockSpec(spread.shape, lambda b, n, p, j, *_: (0, 0)))
    for x in (call.keys, call.values):
        codes = x.codes if is_qtensor(x) else x
        inputs += [codes] * plan.refs
        specs += [_of_cache(plan, codes.shape[-1], i) for i in range(plan.refs)]
        for numbers in _numbers(x, plan, call):
            inputs.append(numbers)
            specs.append(_of_numbers(plan, numbers.shape[1]))
    results = (plan.parts, *tiles)
    out, lse = pl.pallas_call(
        functools.partial(_kernel, plan, call.options),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(*tiles, plan.parts, steps),
            in_specs=specs,
            out_specs=[of_part(*queries), of_part(plan.bundles, plan.rows, 1)],
            scratch_shapes=[
                pltpu.VMEM((plan.bundles, plan.rows, LANES), jnp.float32),
                pltpu.VMEM((plan.bundles, plan.rows, LANES), jnp.float32),
                pltpu.VMEM(queries, jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((*results, *queries), plan.dtype if plan.parts == 1 else jnp.float32),
            jax.ShapeDtypeStruct((*results, plan.bundles, plan.rows, 1), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=MEMORY + 2**23
        ),
        cost_estimate=_cost(plan, inputs),
        interpret=interpret,
        name="decode_attention",
    )(*scalars, *inputs)
    outs = [_unbundled(out[p], plan, length) for p in range(plan.parts)]
    sums = [_unbundled_lse(lse[p], plan, length) for p in range(plan.parts)]
    out, lse = (outs[0], sums[0]) if plan.parts == 1 else joined(jnp.stack(outs), jnp.stack(sums), 0)
    return out.astype(call.q.dtype), lse


def _cost(plan: Plan, inputs: list[Array]) -> pl.CostEstimate:
    """What the compiler schedules by: every slot of one layer, since how many are in use it cannot know."""
    pairs = plan.batch * plan.tiles * plan.bundles * plan.rows * plan.layout.slots
    a_slot = (
        plan.heads * plan.width * (np.dtype(plan.dtype).itemsize if plan.format is None else plan.format.row.bits / 8)
    )
    queries = sum(x.size * x.dtype.itemsize for x in inputs[1 : 2 + plan.sinks])
    moved = 2 * queries + 2 * int(plan.batch * plan.tiles * plan.layout.slots * a_slot)
    return pl.CostEstimate(flops=4 * pairs * plan.planes * plan.columns, transcendentals=pairs, bytes_accessed=moved)


def _numbers(x: Any, plan: Plan, call: Call) -> list[Array]:
    """The layer's scales, and minima where there are any, `[B, groups, slots]`, as whole numbers."""
    if plan.format is None:
        return []
    found = [kv.read(n, call.layer, plan.layout, call.table) for n in (x.scale, x.minimum) if n is not None]
    found = [jax.lax.bitcast_convert_type(n, jnp.int16).transpose(0, 2, 1) for n in found]
    return [jnp.pad(n, ((0, 0), (0, 0), (0, -n.shape[2] % plan.step))) for n in found]


def _of_numbers(plan: Plan, groups: int) -> pl.BlockSpec:
    def block(b: Any, n: Any, p: Any, j: Any, layer: Any, lengths: Any, used: Any, steps: Any, table: Any) -> Any:
        last = jax.lax.div(used[b] + (plan.step - 1), plan.step) - 1
        return b, 0, jnp.minimum(p * steps[0] + j, jnp.maximum(last, 0))

    return pl.BlockSpec((1, groups, plan.step), block)


def _of_cache(plan: Plan, width: int, index: int) -> pl.BlockSpec:
    """The `index`-th block that a step reads: of slots in use, or the last of these again, not to be fetched twice."""

    def block(b: Any, p: Any, j: Any, used: Any, steps: Any) -> Any:
        wanted = (p * steps[0] + j) * plan.refs + index
        # `//` would ask which TPU this is, where there is none: a program may be compiled on a CPU
        return jnp.minimum(wanted, jnp.maximum(jax.lax.div(used[b] + (plan.slots - 1), plan.slots) - 1, 0))

    def of_row(b: Any, n: Any, p: Any, j: Any, layer: Any, lengths: Any, used: Any, steps: Any, table: Any) -> Any:
        return layer[0], b, block(b, p, j, used, steps), 0

    def of_pool(b: Any, n: Any, p: Any, j: Any, layer: Any, lengths: Any, used: Any, steps: Any, table: Any) -> Any:
        page = jnp.maximum(table[b * plan.layout.pages + block(b, p, j, used, steps)], 0)
        return layer[0], jax.lax.div(page, plan.fetched // plan.slots), 0

    if plan.layout.page is None:
        return pl.BlockSpec((1, 1, plan.slots, width), of_row)
    return pl.BlockSpec((1, plan.fetched, width), of_pool)


def _tiled(x: Array, plan: Plan) -> Array:
    """`[B, T, ...]` as `[B, tiles, tokens, ...]`; what is added has position 0, and is cut off again."""
    more = plan.tiles * plan.tokens - x.shape[1]
    x = jnp.pad(x, ((0, 0), (0, more), *((0, 0) for _ in x.shape[2:])))
    return x.reshape(x.shape[0], plan.tiles, plan.tokens, *x.shape[2:])


def _bundled(q: Array, plan: Plan) -> Array:
    """Queries `[B, T, H, D]` as `[B, tiles, bundles, planes, rows, columns]`."""
    x = _tiled(q.astype(plan.dtype), plan)
    each = 1 if plan.format is None else plan.format.group_of(plan.width) // plan.planes
    x = x.reshape(
        plan.batch, plan.tiles, plan.tokens, plan.bundles, plan.bundle, plan.group, -1, plan.planes, each
    ).transpose(0, 1, 3, 7, 4, 5, 2, 6, 8)  # B N bundles planes bundle group t groups each
    x = x.reshape(plan.batch, plan.tiles, plan.bundles, plan.planes, plan.bundle, -1, plan.channels)
    own = jnp.eye(plan.bundle, dtype=plan.dtype)
    x = x[..., None, :] * own.reshape(1, 1, 1, 1, plan.bundle, 1, plan.bundle, 1)
    x = x.reshape(*x.shape[:4], -1, plan.columns)
    return jnp.pad(x, (*((0, 0) for _ in range(4)), (0, plan.rows - x.shape[4]), (0, 0)))


def _unbundled(x: Array, plan: Plan, length: int) -> Array:
    """The output `[B, tiles, bundles, planes, rows, columns]` as `[B, T, H, D]`."""
    real = plan.bundle * plan.group * plan.tokens
    x = x[:, :, :, :, :real].reshape(*x.shape[:4], plan.bundle, -1, plan.bundle, plan.channels)
    x = jnp.moveaxis(jnp.diagonal(x, axis1=4, axis2=6), -1, 4)  # [B, N, bundles, planes, bundle, G * t, channels]
    each = 1 if plan.format is None else plan.format.group_of(plan.width) // plan.planes
    x = x.reshape(*x.shape[:5], plan.group, plan.tokens, -1, each).transpose(0, 1, 6, 2, 4, 5, 7, 3, 8)
    return x.reshape(plan.batch, plan.tiles * plan.tokens, -1, plan.width)[:, :length]


def _unbundled_lse(x: Array, plan: Plan, length: int) -> Array:
    x = x[:, :, :, : plan.bundle * plan.group * plan.tokens, 0]
    x = x.reshape(plan.batch, plan.tiles, -1, plan.tokens).transpose(0, 1, 3, 2)
    return x.reshape(plan.batch, plan.tiles * plan.tokens, -1)[:, :length]


def _spread(plan: Plan) -> Array:
    """Zeros and ones `[groups, channels of a plane, all heads]`: one value a group times it is one a code."""
    assert plan.format is not None
    each = plan.format.group_of(plan.width) // plan.planes
    groups = plan.heads * plan.channels // each
    return jnp.repeat(jnp.eye(groups, dtype=jnp.bfloat16), each, 1)


def _kernel(plan: Plan, o: Any, *refs: Any) -> None:
    """One step: so many slots of one row against one tile of queries.

    Refs: layer `[1]`, lengths `[B]`, used `[B]`, steps a part `[1]`, table; positions of rows `[1, 1, rows, 1]`;
    queries and the sinks' queries `[1, 1, bundles, planes, rows, columns]`; where there is a codec its matrix of
    `_spread`; keys and values: blocks `[1, 1, slots, channels]`, their scales and minima `[1, groups, slots]`; out
    `[1, 1, 1, bundles, planes, rows, columns]`, lse `[1, 1, 1, bundles, rows, 1]`; maximum and sum
    `[bundles, rows, 128]`, output `[bundles, planes, rows, columns]`.
    """
    _, lengths, used, steps, table, at, q, *rest = refs
    rest = list(rest)
    sink_q = rest.pop(0) if plan.sinks else None
    spread = rest.pop(0) if plan.format is not None else None
    more = 0 if plan.format is None else 1 + plan.format.row.minimum
    (keys, of_keys), (values, of_values) = (
        ([rest.pop(0) for _ in range(plan.refs)], [rest.pop(0) for _ in range(more)]) for _ in range(2)
    )
    out, lse, most, total, acc = rest
    b, p, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    start = (p * steps[0] + j) * plan.step

    @pl.when(j == 0)
    def _() -> None:
        most[...] = jnp.full(most.shape, NEVER, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        acc[...] = jnp.zeros(acc.shape, jnp.float32)

    def page_of(i: int) -> Array:
        """The page that the step's i-th block is, -1 where there is none."""
        index = jnp.minimum(jax.lax.div(start + i * plan.slots, plan.slots), plan.layout.pages - 1)
        return table[b * plan.layout.pages + index]

    def absent(slot: Array) -> Array:
        """Whether a slot's page is not there: its keys and values read as zeros, and as no other row's."""
        found = jnp.zeros(slot.shape, bool)
        for i in range(plan.refs):
            first = start + i * plan.slots
            inside = (slot >= first) & (slot < first + plan.slots)
            found |= inside & jnp.full(slot.shape, page_of(i) < 0)
        return found

    def slots(shape: tuple[int, int], axis: int) -> Array:
        """The slot that each row of the step's keys is; one beyond all where it belongs to another page."""
        row = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        if plan.fetched == plan.slots:
            return start + row
        found = jnp.full(shape, plan.layout.slots, jnp.int32)
        for i in range(plan.refs):
            first = start + i * plan.slots
            before = jax.lax.rem(jnp.maximum(page_of(i), 0), plan.fetched // plan.slots) * plan.slots
            within = row - (i * plan.fetched + before)
            found = jnp.where((within >= 0) & (within < plan.slots), first + within, found)
        return found

    def step(sunk: bool) -> None:
        slot = slots((1, plan.matrix), 1)
        position = _positions(plan.layout, lengths[b], slot)
        position = jnp.where(slot < used[b], position, -1)
        in_use, missing = slots((plan.matrix, 1), 0), None
        if plan.layout.page is not None:
            missing = absent(slot)
            in_use = jnp.where(absent(in_use), plan.layout.slots, in_use)
        in_use = in_use < used[b]
        allowed = seen(at[0, 0], position, o.window, o.sinks)  # [rows, slots]
        numbers = [[_half(x[0]) for x in side] for side in (of_keys, of_values)]
        for bundle in range(plan.bundles):
            cut = slice(bundle * plan.columns, (bundle + 1) * plan.columns)
            k = _plain(plan, keys, numbers[0], spread, cut)
            s = _sum(product(q[0, 0, bundle, i], plane, 1) for i, plane in enumerate(k))
            if sunk:
                assert sink_q is not None
                other = _sum(product(sink_q[0, 0, bundle, i], plane, 1) for i, plane in enumerate(k))
                s = jnp.where(jnp.broadcast_to(position < o.sinks, s.shape), other, s)
            if missing is not None:
                s = jnp.where(jnp.broadcast_to(missing, s.shape), 0.0, s)
            s = jnp.where(allowed, capped(s * o.scale, o.softcap), 2 * NEVER)
            before = most[bundle]
            high = jnp.maximum(before, jnp.max(s, -1, keepdims=True))
            weight, shrink = jnp.exp(s - high[:, :1]), jnp.exp(before - high)
            most[bundle] = high
            total[bundle] = total[bundle] * shrink + jnp.sum(weight, -1, keepdims=True)
            weight = weight.astype(plan.dtype)
            for i, plane in enumerate(_plain(plan, values, numbers[1], spread, cut)):
                plane = jnp.where(jnp.broadcast_to(in_use, plane.shape), plane, jnp.zeros_like(plane))  # 0 x NaN is NaN
                acc[bundle, i] = acc[bundle, i] * shrink[:, :1] + product(weight, plane, 0)

    filled = start < used[b]
    if plan.sinks:  # which stand in the slots of their own numbers
        has_sinks = start < o.sinks
        pl.when(filled & has_sinks)(lambda: step(True))
        filled &= ~has_sinks
    pl.when(filled)(lambda: step(False))

    @pl.when(j == pl.num_programs(3) - 1)
    def _() -> None:
        for bundle in range(plan.bundles):
            found = total[bundle][:, :1]
            some = jnp.where(found == 0, 1.0, found)
            for i in range(plan.planes):
                out[0, 0, 0, bundle, i] = (acc[bundle, i] / some).astype(out.dtype)
            lse[0, 0, 0, bundle] = jnp.where(found == 0, -jnp.inf, most[bundle][:, :1] + jnp.log(some))


def _positions(layout: Layout, length: Any, slot: Array) -> Array:
    """`Layout.positions` without a remainder for each slot."""
    if layout.lookahead is None:
        return jnp.where(slot < length, slot, -1)
    sinks = layout.window.sinks if layout.window else 0
    turn = layout.slots - sinks
    last = length - 1 - sinks
    behind = jax.lax.rem(jax.lax.rem(last, turn) + turn, turn)
    recent = slot - sinks + (last - behind)
    recent = jnp.where(slot - sinks > behind, recent - turn, recent) + sinks
    recent = jnp.where(recent >= sinks, recent, -1)
    return jnp.where(slot < sinks, jnp.where(slot < length, slot, -1), recent)


def _sum(parts: Any) -> Array:
    return functools.reduce(jnp.add, parts)


def _joined(blocks: list[Any], cut: slice) -> Array:
    """Channels of a step's blocks as one matrix `[slots, channels]`."""
    found = [x[(*(0 for _ in x.shape[:-2]), slice(None), cut)] for x in blocks]
    return found[0] if len(found) == 1 else jnp.concatenate(found, 0)


def _plain(plan: Plan, codes: list[Any], numbers: list[Array], spread: Any, cut: slice) -> list[Array]:
    """The planes of a bundle's keys or values, `[slots, columns]` each."""
    x = _joined(codes, cut)
    if plan.format is None:
        return [x.astype(plan.dtype)]
    scale, *minimum = (_spread_out(plan, n, spread[:, cut]) for n in numbers)
    x = x.astype(jnp.int32)
    planes = [x] if plan.planes == 1 else [x & 15, x >> 4]
    values = [plane.astype(jnp.float32) * scale for plane in planes]
    return [(v + minimum[0] if minimum else v).astype(plan.dtype) for v in values]


def _spread_out(plan: Plan, x: Array, spread: Array) -> Array:
    """One value a group, `[groups, slots]`, as one a channel, `[rows, columns]`. Exact: 11 bits are 8 and 3."""
    high = x.astype(jnp.bfloat16)
    rest = (x - high.astype(jnp.float32)).astype(jnp.bfloat16)
    found = _sum(
        jax.lax.dot_general(part, spread, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        for part in (high, rest)
    )
    if plan.fetched == plan.slots:
        return found
    found = found.reshape(plan.refs, 1, plan.slots, -1)  # wherever in its registers a page lies
    found = jnp.broadcast_to(found, (plan.refs, plan.fetched // plan.slots, *found.shape[2:]))
    return found.reshape(plan.matrix, -1)


def _half(x: Array) -> Array:
    """The float32 of a finite float16 that is given as a whole number."""
    x = x.astype(jnp.int32)
    exponent, fraction = (x >> 10) & 31, x & 1023
    normal = jax.lax.bitcast_convert_type(((exponent + 112) << 23) | (fraction << 13), jnp.float32)
    size = jnp.where(exponent == 0, fraction.astype(jnp.float32) * 2.0**-24, normal)
    return jnp.where(x < 0, -size, size)
