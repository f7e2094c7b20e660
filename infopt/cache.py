"""The key/value cache: layout x codec. A layout is two index functions; positions follow from lengths alone.

A position p of a row is written to a slot, and a slot's position is derived from the row's length, never stored:

    linear  slot = p
    ring    slot = p                                   for p < sinks
            slot = sinks + (p - sinks) mod (slots - sinks)   otherwise, slots = size + sinks + lookahead - 1

so rolling back is lowering a length. A page table, where there is one, maps slots to places in a pool of pages.

Where keys are rounded in groups of tokens, a slot holds a whole group, all of the above counts groups in place of
tokens, and the latest tokens lie as computed in a ring of their own. A group is written from that ring when its last
token arrives; after a rollback it is written again.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from infopt.errors import InfoptError
from infopt.masks import Late
from infopt.qtensor import Format, QTensor, dequantize_array, is_qtensor, quantize_array
from infopt.spec import Codec, Window
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
      group: tokens in a slot; where there are several, it is written once it has all of them.
      recent: of a layout in groups: where the latest tokens lie as computed.
    """

    slots: int
    window: Window | None = None
    lookahead: int | None = None
    page: int | None = None
    group: int = 1
    recent: Layout | None = None

    @staticmethod
    def plan(
        window: Window | None, max_len: int, lookahead: int, page: int | None, codec: Codec | None = None
    ) -> Layout:
        """A ring where that is shorter than `max_len`, else linear."""
        if codec is not None and codec.split:
            return Layout._in_groups(window, max_len, lookahead, page, codec)
        if window is not None:
            slots = window.size + window.sinks + lookahead - 1
            if slots < max_len:
                return Layout(slots, window, lookahead, page)
        return Layout(max_len, window, None, page)

    @staticmethod
    def _in_groups(window: Window | None, max_len: int, lookahead: int, page: int | None, codec: Codec) -> Layout:
        """As many groups as a window may touch; of the latest tokens, what a query sees and a group is made of.

        slots  = ceil((size + lookahead - 1) / group) + ceil(sinks / group)  groups, and
        recent = group + max(tail, 1) + sinks + lookahead - 2  tokens
        """
        group, sinks = codec.split, window.sinks if window else 0
        recent = Layout.plan(Window(group + max(codec.tail, 1) - 1, sinks), max_len, lookahead, None)
        sees = Late(group, codec.tail, rounded=False).window(window)
        slots, ring = -(-max_len // group), None
        if window is not None:
            touched = -(-(window.size + lookahead - 1) // group) + -(-sinks // group)
            if touched < slots:
                slots, ring = touched, lookahead
        pages = None if page is None else page // group
        return Layout(slots, window, ring, pages, group, dataclasses.replace(recent, window=sees))

    @property
    def tokens(self) -> int:
        """Places for tokens a row, the latest ones' among them."""
        return self.slots * self.group + (self.recent.slots if self.recent else 0)

    @property
    def pages(self) -> int:
        """Pages a row (paged layouts)."""
        assert self.page is not None
        return -(-self.slots // self.page)

    @property
    def _sinks(self) -> int:
        return -(-self.window.sinks // self.group) if self.window else 0

    def slot(self, position: Int[Array, "*N"]) -> Int[Array, "*N"]:
        """The slot that a position, or in a layout of groups a group's number, is written to."""
        if self.lookahead is None:
            return position
        sinks = self._sinks
        return jnp.where(position < sinks, position, sinks + (position - sinks) % (self.slots - sinks))

    def positions(self, lengths: Int[Array, " B"]) -> Int[Array, "B S"]:
        """The position that each place for a token holds in rows of these lengths; -1 where it is empty."""
        held = self._held(lengths // self.group)
        if self.group == 1:
            return held
        tokens = held[..., None] * self.group + jnp.arange(self.group, dtype=jnp.int32).reshape(1, 1, -1)
        return jnp.where(held[..., None] < 0, -1, tokens).reshape(held.shape[0], -1)

    def _held(self, lengths: Int[Array, " B"]) -> Int[Array, "B S"]:
        """What each slot holds of so many positions, or whole groups."""
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
      kv: for each segment, for each layer of its period: `(keys, values)`, stacked, and in groups the latest tokens'
        keys and values too. Empty for an uncached model, a pair (target, draft) under speculation.
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
        layouts = jax.tree.leaves(self.layouts, is_leaf=_is_layout)
        rings = [*layouts, *(layout.recent for layout in layouts if layout.recent)]
        return min((ring.lookahead for ring in rings if ring.lookahead is not None), default=None)

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
    zeros = jax.ShapeDtypeStruct((*_places(layout, batch), heads, width), dtype)
    return _zeros(repeats, lambda x: encode(x, codec), zeros)


def empty_layers(
    layout: Layout, repeats: int, batch: int, heads: int, width: int, codec: Codec | None, dtype: Any
) -> tuple[Any, ...]:
    """Empty keys and values of `repeats` layers; in groups `[R, B, S, G * K * D]`, and the latest tokens' too."""
    if codec is None or layout.recent is None:
        form = None if codec is None else codec.format
        keys, values = (empty(layout, repeats, batch, heads, width, form, dtype) for _ in range(2))
        return keys, values
    groups = jax.ShapeDtypeStruct((*_places(layout, batch), layout.group, heads, width), dtype)
    whole = _zeros(repeats, lambda x: encode_groups(x, x, codec), groups)
    return whole + empty_layers(layout.recent, repeats, batch, heads, width, None, dtype)


def _places(layout: Layout, batch: int) -> tuple[int, ...]:
    return (batch, layout.slots) if layout.page is None else (batch * layout.pages * layout.page,)


def _zeros(repeats: int, encoded: Callable[[Any], Any], x: jax.ShapeDtypeStruct) -> Any:
    # abstract evaluation gives the codec's leaves without encoding a cacheful of zeros
    leaves = jax.eval_shape(encoded, x)
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


def encode_groups(
    keys: Float[Array, "*B G K D"], values: Float[Array, "*B G K D"], codec: Codec
) -> tuple[QTensor, QTensor]:
    """Whole groups as they are stored: keys with a scale for each channel of the group, values as `encode` has them."""
    stored = quantize_array(jnp.moveaxis(keys, -3, -1), codec.keys), quantize_array(values, codec.format)
    by_channel, by_token = (jax.tree.map(lambda leaf: leaf.reshape(*leaf.shape[:-3], -1), x) for x in stored)
    return by_channel, by_token


def decode_groups(
    keys: QTensor, values: QTensor, group: int, heads: int, dtype: Any
) -> tuple[Float[Array, "*B K D"], Float[Array, "*B K D"]]:
    """What `encode_groups` was given, as it reads, the tokens of all groups one after another."""
    width = values.shape[-1]
    by_channel, by_token = (
        jax.tree.map(lambda leaf, n=n: leaf.reshape(*leaf.shape[:-1], *n, -1), x)
        for x, n in ((keys, (heads, width)), (values, (group, heads)))
    )
    found = jnp.moveaxis(dequantize_array(by_channel, dtype), -1, -3), dequantize_array(by_token, dtype)
    k, v = (x.reshape(*x.shape[:-4], -1, heads, width) for x in found)
    return k, v


def round_groups(
    keys: Float[Array, "B T K D"], values: Float[Array, "B T K D"], codec: Codec
) -> tuple[Float[Array, "B T K D"], Float[Array, "B T K D"]]:
    """Keys and values of positions 0, 1, 2, ... as they read once they are rounded; a last part of a group, anyhow."""
    length, heads = keys.shape[1:3]
    more = [(0, 0), (0, -length % codec.split), (0, 0), (0, 0)]
    k, v = (jnp.pad(x, more).reshape(x.shape[0], -1, codec.split, *x.shape[2:]) for x in (keys, values))
    by_channel, by_token = encode_groups(k, v, codec)
    k, v = decode_groups(by_channel, by_token, codec.split, heads, keys.dtype)
    return k[:, :length], v[:, :length]


def completed(
    recent: tuple[Array, Array], layer: Any, layout: Layout, heads: int, positions: Int[Array, "B T"], lengths: Any
) -> tuple[tuple[Array, Array], Int[Array, "B N"], Bool[Array, "B N"]]:
    """The groups that the new tokens at `positions` may make whole, out of the ring that holds the latest.

    Returns:
      Their keys and values `[B, N, G, K, D]`, their numbers, and which of them are whole now.
    """
    assert layout.recent is not None
    batch, length = positions.shape
    number = positions[:, :1] // layout.group + jnp.arange(-(-length // layout.group), dtype=jnp.int32)[None]
    tokens = number[..., None] * layout.group + jnp.arange(layout.group, dtype=jnp.int32).reshape(1, 1, -1)
    slot = jnp.minimum(layout.recent.slot(tokens.reshape(batch, -1)), layout.recent.slots - 1)
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
    k, v = (x[layer, rows, slot].reshape(batch, -1, layout.group, heads, x.shape[-1] // heads) for x in recent)
    return (k, v), number, (number + 1) * layout.group <= lengths[:, None]
