"""Who sees whom: a pure function of positions, the one place where causality, windows and sinks are decided."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from infopt.spec import Window
from infopt.typing import Array, Bool, Int


def seen(
    query: Int[Array, "..."], key: Int[Array, "..."], size: int | None, sinks: int = 0, causal: bool = True
) -> Bool[Array, "..."]:
    """Whether each query position sees each key position; the two broadcast, inside kernels too.

        key >= 0  and  key <= query  and  (key > query - size  or  key < sinks)

    Args:
      query, key: absolute positions; a key position of -1 is an empty slot, seen by nobody.
      size: positions that a query sees, itself included; None: all.
      sinks: first positions that every query sees.
      causal: whether a query sees no later position.
    """
    allowed = key >= 0
    if causal:
        allowed &= key <= query
    if size is not None:
        inside = key > query - size
        allowed &= (inside | (key < sinks)) if sinks else inside
    return allowed


@dataclasses.dataclass(frozen=True)
class Late:
    """Of keys and values that are rounded in groups, late: those that a query sees rounded, or the others.

    A query at p sees position j rounded iff  (j // group + 1) * group + tail <= p + 1:  the group is whole, and `tail`
    tokens have followed it, the query's own among them.

    Args:
      group: tokens a group, at absolute positions.
      tail: tokens.
      rounded: which of the two.
    """

    group: int
    tail: int
    rounded: bool

    def seen(self, query: Int[Array, "..."], key: Int[Array, "..."]) -> Bool[Array, "..."]:
        """Whether the key position, of those, is in the query's share; the two broadcast."""
        past = (key // self.group + 1) * self.group + self.tail <= query + 1
        return past if self.rounded else ~past

    def window(self, window: Window | None) -> Window | None:
        """A window that leaves out nothing of the share that the layer's own window leaves in."""
        if self.rounded:
            return window
        size, sinks = self.group + max(self.tail, 1) - 1, window.sinks if window else 0
        return Window(max(size if window is None else min(size, window.size), sinks), sinks)


def allowed(query: Int[Array, "B T"], key: Int[Array, "B S"], window: Window | None) -> Bool[Array, "B T S"]:
    """Whether each query sees each key of its row, under a layer's window."""
    size, sinks = (None, 0) if window is None else (window.size, window.sinks)
    return seen(query[:, :, None], key[:, None, :], size, sinks)


def sink_query_position(query: Int[Array, "B T"], window: Window) -> Int[Array, "B T"]:
    """Where a query stands when it looks at a sink: never further from it than the window is long.

    Distances then stay inside what the model was trained on, however long the text grows
    (Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks", section 3.2).
    """
    return jnp.minimum(query, window.size - 1)
