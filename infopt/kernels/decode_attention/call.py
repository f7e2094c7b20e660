"""What every implementation of decode attention is given."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from infopt.cache import Layout
from infopt.kernels.flash_attention.options import Options


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["q", "sink_q", "keys", "values", "layer", "positions", "lengths", "table"],
    meta_fields=["layout", "options", "heads"],
)
@dataclasses.dataclass(frozen=True)
class Call:
    """New tokens, and the cache that holds all keys and values up to theirs. A pytree.

    Args:
      q: queries `[B, T, H, D]`.
      sink_q: the queries as they look at sinks, or None where there are none.
      keys, values: whole stacks `[R, B, S, K * D]`, in pages `[R, pool of slots, K * D]`; arrays, or QTensors whose
        leaves have that form. In groups of tokens `[..., G * K * D]`, keys by channel.
      layer: which of the R.
      positions: `[B, T]` of the queries.
      lengths: `[B]` tokens that each row holds, the new ones included.
      table: `[B, pages]` which page of the pool holds each page of a row; None where the layout has none.
      layout: where a position lies. Static.
      options: Static.
      heads: K. Static.
    """

    q: Any
    sink_q: Any
    keys: Any
    values: Any
    layer: Any
    positions: Any
    lengths: Any
    table: Any
    layout: Layout
    options: Options
    heads: int

    @property
    def width(self) -> int:
        return self.q.shape[-1]

    @property
    def used(self) -> Any:
        """`[B]` slots that hold anything: they are the first ones, in every layout."""
        return jnp.minimum(self.lengths // self.layout.group, self.layout.slots)
