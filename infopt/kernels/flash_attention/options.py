"""What every implementation of flash attention is asked for, and who sees whom."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from infopt.masks import Late, seen
from infopt.typing import Array, Bool, Float, Int

NOT_LATE = "it takes no keys that are rounded late."
NEVER = -1e30
"""A score that no softmax notices; finite, since the difference of two infinities is none."""


def precision_of(dtype: Any) -> jax.lax.Precision | None:
    """How factors are multiplied: float32 in full, which accelerators by default round to fewer bits."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def product(a: Array, b: Array, axis: int) -> Array:
    """a over the last axis times b over `axis`, of matrices, summed in float32."""
    return jax.lax.dot_general(
        a, b, (((1,), (axis,)), ((), ())), precision=precision_of(a.dtype), preferred_element_type=jnp.float32
    )


@dataclasses.dataclass(frozen=True)
class Options:
    """The static part of a call; equal Options compile once.

    Args:
      scale: multiplies scores.
      causal: whether a query sees no key after it.
      window: how many positions back a query sees, itself included; None: all.
      sinks: the first positions, which every query sees beside its window.
      softcap: scores become softcap * tanh(score / softcap).
      late: of keys that are rounded late, which ones these are; None: they are not.
    """

    scale: float
    causal: bool = True
    window: int | None = None
    sinks: int = 0
    softcap: float | None = None
    late: Late | None = None


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["query", "key", "query_segment", "key_segment"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Places:
    """Where queries and keys stand in their texts.

    Args:
      query: `[B, T]` absolute positions.
      key: `[B, S]`; -1 is an empty place, which nobody sees. Position p < `sinks` stands in place p, or nowhere.
      query_segment, key_segment: `[B, T]` and `[B, S]`, or None: who sees whom only within a segment.
    """

    query: Any
    key: Any
    query_segment: Any = None
    key_segment: Any = None

    def rows(self, start: Any, count: int) -> Places:
        """The queries from `start` on."""
        return dataclasses.replace(
            self, query=_cut(self.query, start, count), query_segment=_cut(self.query_segment, start, count)
        )

    def columns(self, start: Any, count: int) -> Places:
        """The keys from `start` on."""
        return dataclasses.replace(
            self, key=_cut(self.key, start, count), key_segment=_cut(self.key_segment, start, count)
        )

    def padded(self, queries: int, keys: int) -> Places:
        """So many more queries, and so many more empty places of keys."""

        def more(x: Any, n: int, value: int) -> Any:
            return None if x is None else jnp.pad(x, ((0, 0), (0, n)), constant_values=value)

        return Places(
            more(self.query, queries, -1),
            more(self.key, keys, -1),
            more(self.query_segment, queries, -1),
            more(self.key_segment, keys, -2),
        )


def _cut(x: Any, start: Any, count: int) -> Any:
    return None if x is None else jax.lax.dynamic_slice_in_dim(x, start, count, 1)


def mask(o: Options, p: Places) -> Bool[Array, "B T S"]:
    """Whether each query sees each key."""
    allowed = seen(p.query[:, :, None], p.key[:, None, :], o.window, o.sinks, o.causal)
    if o.late is not None:
        allowed &= o.late.seen(p.query[:, :, None], p.key[:, None, :])
    if p.query_segment is not None:
        allowed &= p.query_segment[:, :, None] == p.key_segment[:, None, :]
    return allowed


def needed(o: Options, p: Places, queries: int, keys: int) -> Bool[Array, "B N M"]:
    """Whether any query of each block of `queries` can see any key of each block of `keys`, judged by their bounds.

    Segments rule nothing out: their blocks are masked, not left out.
    """
    batch = p.query.shape[0]
    q, k = p.query.reshape(batch, -1, queries), p.key.reshape(batch, -1, keys)
    last, first = jnp.max(q, -1)[:, :, None], jnp.min(jnp.where(q < 0, 2**30, q), -1)[:, :, None]
    high, low = jnp.max(k, -1)[:, None, :], jnp.min(jnp.where(k < 0, 2**30, k), -1)[:, None, :]
    some = (high >= 0) & (last >= 0)
    if o.causal:
        some &= low <= last
    if o.window is not None:
        some &= (high > first - o.window) | (low < o.sinks)
    return some


def visits(needed: Bool[Array, "B N M"]) -> tuple[Int[Array, "B N M"], Int[Array, "B N"]]:
    """The blocks that are needed, in order, and how many. What follows repeats the last one, to be fetched no more."""
    count = jnp.sum(needed, -1, dtype=jnp.int32)
    order = jnp.argsort(~needed, axis=-1, stable=True).astype(jnp.int32)
    last = jnp.take_along_axis(order, jnp.maximum(count - 1, 0)[..., None], -1)
    within = jnp.arange(needed.shape[-1], dtype=jnp.int32).reshape(1, 1, -1) < count[..., None]
    return jnp.where(within, order, last), count


def rounded_up(n: int, of: int) -> int:
    """The least multiple of `of` that is no less than n."""
    return -(-n // of) * of


def capped(s: Float[Array, "..."], softcap: float | None) -> Float[Array, "..."]:
    """softcap * tanh(s / softcap)."""
    return s if softcap is None else jnp.tanh(s * (1 / softcap)) * softcap


def grouped(q: Float[Array, "B T H D"], heads: int) -> Float[Array, "B K G T D"]:
    """Queries by the key/value head that they share."""
    batch, length, all_heads, width = q.shape
    return q.reshape(batch, length, heads, all_heads // heads, width).transpose(0, 2, 3, 1, 4)


def ungrouped(x: Float[Array, "B K G T D"]) -> Float[Array, "B T H D"]:
    batch, heads, group, length, width = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads * group, width)
