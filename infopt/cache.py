"""The key/value cache: layout x codec. A layout is two index functions; positions follow from lengths alone.

A position p of a row is written to a slot, and a slot's position is derived from the row's length, never stored:

    linear  slot = p
    ring    slot = p                                   for p < sinks
            slot = sinks + (p - sinks) mod (slots - sinks)   otherwise, slots = size + sinks + lookahead - 1

so rolling back is lowering a length. A page table, where there is one, maps slots to places in a pool of pages.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from infopt.errors import InfoptError
from infopt.qtensor import Format, dequantize_array, is_qtensor, quantize_array
from infopt.spec import Window
from infopt.typing import Array, Bool, Float, Int, is_traced

_NOWHERE = np.int32(2**30)  # a slot that no cache has: a write to it is dropped (a negative index would wrap)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a layer's keys and values lie. Static.

    Args:
      slots: slots a row.
      window: the layers' window.
      lookahead: a ring's: the most tokens that may be appended, or rolled back, at once. None is a linear layout.
      page: slots a page, or None.
    """

    slots: int
    window: Window | None = None
    lookahead: int | None = None
    page: int | None = None

    @staticmethod
    def plan(window: Window | None, max_len: int, lookahead: int, page: int | None) -> Layout:
        """A ring where that is shorter than `max_len`, else linear."""
        if window is not None:
            slots = window.size + window.sinks + lookahead - 1
            if slots < max_len:
                return Layout(slots, window, lookahead, page)
        return Layout(max_len, window, None, page)

    @property
    def pages(self) -> int:
        """Pages a row (paged layouts)."""
        assert self.page is not None
        return -(-self.slots // self.page)

    @property
    def _sinks(self) -> int:
        return self.window.sinks if self.window else 0

    def slot(self, position: Int[Array, "*N"]) -> Int[Array, "*N"]:
        """The slot that a position is written to."""
        if self.lookahead is None:
            return position
        sinks = self._sinks
        return jnp.where(position < sinks, position, sinks + (position - sinks) % (self.slots - sinks))

    def positions(self, lengths: Int[Array, " B"]) -> Int[Array, "B S"]:
        """The position that each slot holds in rows of these lengths; -1 where it is empty."""
        slot = jnp.arange(self.slots, dtype=jnp.int32)[None]
        last = lengths[:, None] - 1
        if self.lookahead is None:
            return jnp.where(slot <= last, slot, -1)
        sinks = self._sinks
        age = (last - slot) % (self.slots - sinks)
        recent = jnp.where(last - age >= sinks, last - age, -1)
        return jnp.where(slot < sinks, jnp.where(slot <= last, slot, -1), recent)

    def place(self, slot: Int[Array, "B N"], table: Any) -> Int[Array, "B N"]:
        """Where slots lie in the pool of pages, by a row's block table `[B, pages]`; unallocated: nowhere."""
        assert self.page is not None
        index = slot // self.page
        page = jnp.take_along_axis(table, jnp.minimum(index, table.shape[1] - 1), axis=1)
        allocated = (index < table.shape[1]) & (page >= 0) & (slot < self.slots)
        return jnp.where(allocated, page * self.page + slot % self.page, _NOWHERE)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["lengths", "peak", "tokens", "kv", "tables"], meta_fields=["layouts"]
)
@dataclasses.dataclass(frozen=True)
class State:
    """What a row of a batch has seen. A pytree; donate it.

    Args:
      lengths: `[B]` tokens whose keys and values are stored.
      peak: `[B]` the greatest length since the row began: what a rollback may not fall too far behind.
      tokens: `[B, max_len]` the tokens themselves.
      kv: for each segment, for each layer of its period: `(keys, values)`, stacked. Empty for an uncached model,
        a pair (target, draft) under speculation.
      tables: a block table `[B, pages]` for each window group; empty unless paged. A pair under speculation.
      layouts: a Layout for each window group, static. A pair under speculation.
    """

    lengths: Any
    peak: Any
    tokens: Any
    kv: Any
    tables: Any
    layouts: Any

    @property
    def batch(self) -> int:
        return self.tokens.shape[0]

    @property
    def max_len(self) -> int:
        return self.tokens.shape[1]

    @property
    def lookahead(self) -> int | None:
        """The most tokens that one call may append and one rollback may take; None: no bound but the length."""
        bounds = [layout.lookahead for layout in jax.tree.leaves(self.layouts, is_leaf=_is_layout)]
        return min((b for b in bounds if b is not None), default=None)

    def replace(self, **changes: Any) -> State:
        return dataclasses.replace(self, **changes)


def _is_layout(x: Any) -> bool:
    return isinstance(x, Layout)


def rollback(state: State, n: int | np.ndarray | Array) -> State:
    """Take back each row's last `n` tokens, exactly. O(1): the keys stay, the lengths fall.

    Args:
      state: what to take from; on the host, not inside jit.
      n: tokens, for all rows or `[B]`.

    Raises:
      InfoptError: more tokens than a row has, or than a ring still remembers the past of.

    >>> import infopt as ip, jax.numpy as jnp
    >>> model = (ip.sliding_window(4) | ip.cache_kv())(ip.models.llama())
    >>> state = model.init_state(batch=1, max_len=32, chunk=2)
    >>> rollback(state.replace(lengths=jnp.array([9]), peak=jnp.array([9])), 2).lengths
    Array([7], dtype=int32)
    """
    if is_traced(state.lengths):
        raise InfoptError(
            "rollback was called inside jit.",
            why="what it must refuse is known only on the host.",
            fix="call it between steps, outside jit",
        )
    lengths, peak, taken = np.asarray(state.lengths), np.asarray(state.peak), np.asarray(n)
    if taken.dtype.kind not in "iu" or taken.shape not in ((), lengths.shape):
        raise InfoptError(
            f"cannot take {n!r} tokens back.",
            why="each row steps back by its own whole number of tokens.",
            fix=f"a whole number, or {len(lengths)} of them",
        )
    left = lengths - taken.astype(np.int32)
    if np.any(taken < 0) or np.any(left < 0):
        raise InfoptError(
            f"cannot take {n} tokens back from rows of {lengths.tolist()}.",
            why="a row has no tokens beyond its start.",
            fix="0 <= n <= lengths",
        )
    if state.lookahead is not None and np.any(peak - left > state.lookahead):
        raise InfoptError(
            f"cannot take {n} tokens back: the ring was built to look ahead {state.lookahead}, "
            f"and rows have reached {peak.tolist()}.",
            why="older keys of the window have been overwritten, and the result would be silently wrong.",
            fix=f"init_state(..., chunk={int((peak - left).max())}) or roll back at most "
            f"{int((state.lookahead - (peak - lengths)).min())}",
        )
    return state.replace(lengths=jnp.asarray(left, jnp.int32))


def empty(layout: Layout, repeats: int, batch: int, heads: int, width: int, codec: Format | None, dtype: Any) -> Any:
    """An empty cache of `repeats` layers: keys or values, `[R, B, S, K * D]`, paged `[R, B * pages * page, K * D]`.

    The heads of a slot lie side by side, so that what a kernel reads is a matrix, whatever the number of heads.
    """
    place = (batch, layout.slots) if layout.page is None else (batch * layout.pages * layout.page,)
    zeros = jnp.zeros((*place, heads, width), dtype)
    # abstract evaluation gives the codec's leaves without encoding a cacheful of zeros
    leaves = jax.eval_shape(lambda x: encode(x, codec), zeros)
    return jax.tree.map(lambda leaf: jnp.zeros((repeats, *leaf.shape), leaf.dtype), leaves)


def identity_table(layout: Layout, batch: int) -> Int[Array, "B P"]:
    """The block table of rows that own their pages in order."""
    return jnp.arange(batch * layout.pages, dtype=jnp.int32).reshape(batch, layout.pages)


def write(
    cache: Any, new: Any, layer: Any, layout: Layout, table: Any, positions: Int[Array, "B T"], keep: Bool[Array, "B T"]
) -> Any:
    """Store what `encode` gave, `[B, T, ...]`, at the layer's slots; what is not kept is dropped."""
    slot = jnp.where(keep, layout.slot(positions), _NOWHERE)
    if layout.page is None:
        rows = jnp.arange(slot.shape[0], dtype=jnp.int32)[:, None]
        return jax.tree.map(lambda c, x: c.at[layer, rows, slot].set(x.astype(c.dtype), mode="drop"), cache, new)
    place = layout.place(slot, table)
    return jax.tree.map(lambda c, x: c.at[layer, place].set(x.astype(c.dtype), mode="drop"), cache, new)


def read(cache: Any, layer: Any, layout: Layout, table: Any, slots: int | None = None) -> Any:
    """The layer's first `slots` slots in order, all by default, `[B, S, ...]`, still encoded."""
    n = layout.slots if slots is None else slots
    if layout.page is None:

        def slice_(c: Array) -> Array:
            start = (layer, *(jnp.zeros((), jnp.int32) for _ in c.shape[1:]))
            return jax.lax.dynamic_slice(c, start, (1, c.shape[1], n, *c.shape[3:]))[0]

        return jax.tree.map(slice_, cache)
    batch = table.shape[0]
    place = layout.place(jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32)[None], (batch, n)), table)
    return jax.tree.map(lambda c: c.at[layer, place].get(mode="fill", fill_value=0), cache)


def encode(x: Float[Array, "*B K D"], codec: Format | None) -> Any:
    """Keys or values as they are stored, their heads side by side; each head is rounded by itself."""
    stored = x if codec is None else quantize_array(x, codec)
    return jax.tree.map(lambda leaf: leaf.reshape(*x.shape[:-2], -1), stored)


def decode(x: Any, heads: int, dtype: Any) -> Float[Array, "*B K D"]:
    """What `encode` was given, as it reads."""
    apart = jax.tree.map(lambda leaf: leaf.reshape(*leaf.shape[:-1], heads, -1), x)
    return dequantize_array(apart, dtype) if is_qtensor(apart) else apart.astype(dtype)
