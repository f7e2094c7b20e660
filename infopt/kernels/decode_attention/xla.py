"""Decode attention in XLA: of the cache only the slots in use are read, in lengths that double."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from infopt import cache as kv
from infopt.kernels.decode_attention.call import Call
from infopt.kernels.flash_attention import blockwise, reference
from infopt.kernels.flash_attention.options import Places
from infopt.typing import Array

FEWEST = 256
"""Slots that are read at least; the next lengths are twice, four times as many, and so on."""
PLAIN = 512 * 512
"""Scores a head up to which they are all kept at once."""


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
    """The output `[B, T, H, D]` and the log-sum-exp of scores `[B, T, H]`."""
    lengths = read_lengths(call.layout.slots, max(FEWEST // call.layout.group, 1))
    most = jnp.max(call.used)
    at = sum((most > n).astype(jnp.int32) for n in lengths[:-1])
    branches = [functools.partial(_of_first, n) for n in lengths]
    return branches[0](call) if len(branches) == 1 else jax.lax.switch(at, branches, call)


def _of_first(n: int, call: Call) -> tuple[Array, Array]:
    layout = call.layout
    stored = [kv.read(x, call.layer, layout, call.table, n) for x in (call.keys, call.values)]
    if layout.group > 1:
        k, v = kv.decode_groups(*stored, layout.group, call.heads, call.q.dtype)
    else:
        k, v = (kv.decode(x, call.heads, call.q.dtype) for x in stored)
    places = Places(call.positions, layout.positions(call.lengths)[:, : n * layout.group])
    forward = reference.forward if call.q.shape[1] * n * layout.group <= PLAIN else blockwise.forward
    return forward(call.q, call.sink_q, k, v, places, call.options)
