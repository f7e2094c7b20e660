"""Decode attention in XLA: of the cache only the slots in use are read, in lengths that double."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from infopt import cache as kv
from infopt.kernels.decode_attention.call import Call
from infopt.kernels.flash_attention import blockwise as blocks
from infopt.kernels.flash_attention import portable
from infopt.kernels.flash_attention.options import Places
from infopt.typing import Array

FEWEST = 256
"""Slots that are read at least; the next lengths are twice, four times as many, and so on."""


def read_lengths(slots: int, fewest: int = FEWEST) -> list[int]:
    """How many slots a step may read.

    >>> read_lengths(1000), read_lengths(64)
    ([256, 512, 1000], [64])
    """
    found, n = [], fewest
    while n < slots:
        found.append(n)
        n *= 2
    return [*found, slots]


def forward(call: Call) -> tuple[Array, Array]:
    """The output `[B, T, H, D]` and the log-sum-exp of scores `[B, T, H]`; many scores are computed by block."""
    return _read(call, portable.forward)


def blockwise(call: Call) -> tuple[Array, Array]:
    """The same, by block however few there are."""
    return _read(call, blocks.forward)


def _read(call: Call, attend: Callable[..., tuple[Array, Array]]) -> tuple[Array, Array]:
    lengths = read_lengths(call.layout.slots, max(FEWEST // call.layout.group, 1))
    branches = [functools.partial(_of_first, n, attend) for n in lengths]
    return branches[0](call) if len(branches) == 1 else jax.lax.switch(_enough(call, lengths), branches, call)


def _enough(call: Call, lengths: list[int]) -> Array:
    """Which of the lengths holds every row's slots in use."""
    most = jnp.max(call.used)
    return jnp.sum(most > jnp.asarray(lengths[:-1], jnp.int32), dtype=jnp.int32)


def _of_first(n: int, attend: Callable[..., tuple[Array, Array]], call: Call) -> tuple[Array, Array]:
    layout = call.layout
    keys, values = (kv.read(x, call.layer, layout, call.table, n) for x in (call.keys, call.values))
    if layout.group > 1:
        k, v = kv.decode_groups(keys, values, layout.group, call.heads, call.q.dtype)
    else:
        k, v = (kv.decode(x, call.heads, call.q.dtype) for x in (keys, values))
    places = Places(call.positions, layout.positions(call.lengths)[:, : n * layout.group])
    return attend(call.q, call.sink_q, k, v, places, call.options)
