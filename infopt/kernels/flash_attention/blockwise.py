"""Flash attention in XLA: an online softmax over blocks of keys, memory O(T + S), and the backward pass of all.

The forward pass is algorithm 1 of Dao 2023, "FlashAttention-2"; the backward pass computes each block's scores again
from the log-sum-exp (its algorithm 2). A block of scores that causality, the window or empty places rule out for every
row is skipped. Sinks are a block of their own, since their queries stand elsewhere.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from infopt.kernels.flash_attention.options import (
    NEVER,
    Options,
    Places,
    capped,
    grouped,
    mask,
    needed,
    precision_of,
    rounded_up,
    ungrouped,
)
from infopt.typing import Array

QUERIES, KEYS = 128, 512
"""Rows and columns of a block of scores: on a CPU, one that stays in the cache of a core."""


def _forward(q: Array, sink_q: Any, k: Array, v: Array, places: Places, o: Options) -> tuple[Array, Array]:
    """The output `[B, T, H, D]` and the log-sum-exp of scores `[B, T, H]`."""
    b = _Blocks.of(q, sink_q, k, v, places, o)

    def row(i: Array) -> tuple[Array, Array]:
        q = jnp.take(b.q, i, 0)
        heads, group, width = q.shape[1], q.shape[2], b.v.shape[-1]
        shape = (q.shape[0], heads, group, b.queries)
        start = jnp.full(shape, NEVER, jnp.float32), jnp.zeros(shape, jnp.float32)
        carry = (*start, jnp.zeros((*shape, width), jnp.float32))
        if b.sunk is not None:
            k, v = b.sunk
            carry = _step(carry, jnp.take(b.sink_q, i, 0), k, v, b.sink_mask(i), o)

        def block(j: Array, carry: Any) -> Any:
            return jax.lax.cond(
                b.needed[i, j], lambda c: _step(c, q, b.k[j], b.v[j], b.mask(i, j), o), lambda c: c, carry
            )

        most, total, out = jax.lax.fori_loop(b.first[i], b.last[i], block, carry)
        some = jnp.where(total == 0, 1.0, total)
        return (out / some[..., None]).astype(b.dtype), jnp.where(total == 0, -jnp.inf, most + jnp.log(some))

    out, lse = jax.lax.map(row, jnp.arange(b.q.shape[0]))
    return b.whole(out), b.whole(lse[..., None])[..., 0]


def backward(
    q: Array,
    sink_q: Any,
    k: Array,
    v: Array,
    places: Places,
    o: Options,
    out: Array,
    lse: Array,
    d_out: Array,
    d_lse: Array,
) -> tuple[Array, Any, Array, Array]:
    """The gradients of q, of the sinks' queries, of k and of v."""
    b = _Blocks.of(q, sink_q, k, v, places, o)
    # a row's own share of every gradient of its scores: sum(d_out * out), less what the log-sum-exp asks for
    share = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1) - d_lse
    d_out, lse, share = b.rows(d_out), b.rows(lse[..., None])[..., 0], b.rows(share[..., None])[..., 0]

    def row(carry: Any, i: Array) -> Any:
        dk, dv, d_sunk = carry
        q, d, l, s = (jnp.take(x, i, 0) for x in (b.q, d_out, lse, share))
        dq, d_sink_q = jnp.zeros(q.shape, jnp.float32), jnp.zeros((), jnp.float32)
        if b.sunk is not None:
            k, v = b.sunk
            d_sink_q, *more = _gradients(jnp.take(b.sink_q, i, 0), k, v, b.sink_mask(i), d, l, s, o)
            d_sunk = tuple(old + new for old, new in zip(d_sunk, more))

        def block(j: Array, carry: Any) -> Any:
            def some(carry: Any) -> Any:
                dq, dk, dv = carry
                found = _gradients(q, b.k[j], b.v[j], b.mask(i, j), d, l, s, o)
                return dq + found[0], dk.at[j].add(found[1]), dv.at[j].add(found[2])

            return jax.lax.cond(b.needed[i, j], some, lambda c: c, carry)

        dq, dk, dv = jax.lax.fori_loop(b.first[i], b.last[i], block, (dq, dk, dv))
        return (dk, dv, d_sunk), (dq, d_sink_q)

    zeros = jnp.zeros(b.k.shape, jnp.float32), jnp.zeros(b.v.shape, jnp.float32)
    sunk = () if b.sunk is None else tuple(jnp.zeros(x.shape, jnp.float32) for x in b.sunk)
    (dk, dv, d_sunk), (dq, d_sink_q) = jax.lax.scan(row, (*zeros, sunk), jnp.arange(b.q.shape[0]))
    dk, dv = b.columns(dk), b.columns(dv)
    if b.sunk is not None:
        n = b.sunk[0].shape[2]
        dk, dv = (x.at[:, :n].add(d.transpose(0, 2, 1, 3)) for x, d in zip((dk, dv), d_sunk))
    d_sinks = None
    if b.sunk is not None and sink_q is None:  # the queries themselves looked at the sinks
        dq = dq + d_sink_q
    elif sink_q is not None:
        d_sinks = 0 * sink_q if b.sunk is None else b.whole(d_sink_q).astype(q.dtype)
    return b.whole(dq).astype(q.dtype), d_sinks, dk.astype(k.dtype), dv.astype(v.dtype)


def _kept(q: Array, sink_q: Any, k: Array, v: Array, places: Places, o: Options) -> Any:
    out, lse = forward(q, sink_q, k, v, places, o)
    return (out, lse), (q, sink_q, k, v, places, out, lse)


def of_kept(o: Options, kept: Any, d: tuple[Array, Array]) -> Any:
    """The gradients, from what a forward pass was given and gave."""
    q, sink_q, k, v, places, out, lse = kept
    return (*backward(q, sink_q, k, v, places, o, out, lse, *d), None)


forward: Any = jax.custom_vjp(_forward, nondiff_argnums=(5,))
forward.defvjp(_kept, of_kept)


def _scores(q: Array, k: Array, allowed: Array, o: Options) -> tuple[Array, Array]:
    """Scores of a block `[B, K, G, T, S]`, and which of them count."""
    batch, heads, group, rows, width = q.shape
    s = jax.lax.dot_general(  # one product a head: the queries that share its keys are rows of one matrix
        q.reshape(batch, heads, group * rows, width), k, (((3,), (3,)), ((0, 1), (0, 1))),
        precision=precision_of(k.dtype), preferred_element_type=jnp.float32,
    ).reshape(batch, heads, group, rows, -1)  # fmt: skip
    return capped(s * o.scale, o.softcap), allowed[:, None, None]


def _step(carry: Any, q: Array, k: Array, v: Array, allowed: Array, o: Options) -> Any:
    """Add a block to the running maximum, sum and output."""
    most, total, out = carry
    s, allowed = _scores(q, k, allowed, o)
    s = jnp.where(allowed, s, 2 * NEVER)  # below any maximum, so that its exponential is 0 in an empty row too
    high = jnp.maximum(most, jnp.max(s, -1))
    p, shrink = jnp.exp(s - high[..., None]), jnp.exp(most - high)
    batch, heads, group, rows, columns = p.shape
    more = jax.lax.dot_general(
        p.astype(v.dtype).reshape(batch, heads, group * rows, columns), v, (((3,), (2,)), ((0, 1), (0, 1))),
        precision=precision_of(v.dtype), preferred_element_type=jnp.float32,
    ).reshape(batch, heads, group, rows, -1)  # fmt: skip
    return high, total * shrink + jnp.sum(p, -1), out * shrink[..., None] + more


def _gradients(
    q: Array, k: Array, v: Array, allowed: Array, d_out: Array, lse: Array, share: Array, o: Options
) -> tuple[Array, Array, Array]:
    """A block's part of the gradients of q `[B, K, G, T, D]`, k and v `[B, K, S, D]`."""
    s, allowed = _scores(q, k, allowed, o)
    p = jnp.where(allowed, jnp.exp(s - jnp.where(jnp.isneginf(lse), 0.0, lse)[..., None]), 0.0)
    d_out = d_out.astype(jnp.float32)
    product = functools.partial(jnp.einsum, precision=precision_of(q.dtype))
    dv = product("bkgts,bkgtd->bksd", p, d_out)
    ds = p * (product("bkgtd,bksd->bkgts", d_out, v.astype(jnp.float32)) - share[..., None])
    if o.softcap is not None:
        ds = ds * (1 - jnp.square(s * (1 / o.softcap)))
    ds = ds * o.scale
    dq = product("bkgts,bksd->bkgtd", ds, k.astype(jnp.float32))
    dk = product("bkgts,bkgtd->bksd", ds, q.astype(jnp.float32))
    return dq, dk, dv


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """Queries and keys in blocks, and which pairs of blocks are needed.

    Args:
      q, sink_q: `[N, B, K, G, queries, D]`; `sink_q` is None where there are no sinks.
      k, v: `[M, B, K, keys, D]`.
      sunk: the sinks' keys and values `[B, K, sinks, D]`, or None.
      needed: `[N, M]`, for any row; `first`, `last`: `[N]`, what of it has to be looked at.
    """

    q: Array
    sink_q: Any
    k: Array
    v: Array
    sunk: Any
    places: Places
    sink_places: Any
    needed: Array
    first: Array
    last: Array
    options: Options
    queries: int
    keys: int
    length: int
    key_length: int
    dtype: Any

    @staticmethod
    def of(q: Array, sink_q: Any, k: Array, v: Array, p: Places, o: Options) -> _Blocks:
        length, key_length, heads = q.shape[1], k.shape[1], k.shape[2]
        queries, keys = min(QUERIES, rounded_up(length, 8)), min(KEYS, rounded_up(key_length, 8))
        more, more_keys = -length % queries, -key_length % keys
        sunk = sink_places = None
        if n := min(o.sinks, key_length):
            sunk = tuple(x[:, :n].transpose(0, 2, 1, 3) for x in (k, v))
            sink_places = p.columns(0, n).padded(more, 0)
            sink_q = q if sink_q is None else sink_q
            at = jnp.arange(key_length, dtype=jnp.int32)[None]
            p = dataclasses.replace(p, key=jnp.where(at < n, -1, p.key))  # they are counted once
        p = p.padded(more, more_keys)
        use = jnp.any(needed(o, p, queries, keys), 0)
        blocks = jnp.arange(use.shape[1], dtype=jnp.int32)[None]
        last = jnp.max(jnp.where(use, blocks + 1, 0), 1)
        first = jnp.minimum(jnp.min(jnp.where(use, blocks, 2**30), 1), last)

        def rows(x: Array) -> Array:
            x = jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0)))
            x = grouped(x, heads)
            x = x.reshape(*x.shape[:3], -1, queries, x.shape[-1])
            return jnp.moveaxis(x, 3, 0)

        def columns(x: Array) -> Array:
            x = jnp.pad(x, ((0, 0), (0, more_keys), (0, 0), (0, 0)))
            return x.reshape(x.shape[0], -1, keys, *x.shape[2:]).transpose(1, 0, 3, 2, 4)

        return _Blocks(
            rows(q), None if sunk is None else rows(sink_q), columns(k), columns(v), sunk, p, sink_places,
            use, first, last, o, queries, keys, length, key_length, q.dtype,
        )  # fmt: skip

    def rows(self, x: Array) -> Array:
        """`[B, T, H, D]` in blocks of rows."""
        x = grouped(jnp.pad(x, ((0, 0), (0, -self.length % self.queries), (0, 0), (0, 0))), self.k.shape[2])
        return jnp.moveaxis(x.reshape(*x.shape[:3], -1, self.queries, x.shape[-1]), 3, 0)

    def whole(self, x: Array) -> Array:
        """The blocks of rows as `[B, T, H, D]`."""
        x = jnp.moveaxis(x, 0, 3)
        return ungrouped(x.reshape(*x.shape[:3], -1, x.shape[-1]))[:, : self.length]

    def columns(self, x: Array) -> Array:
        """The blocks of columns as `[B, S, K, D]`."""
        x = x.transpose(1, 0, 3, 2, 4)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, : self.key_length]

    def mask(self, i: Array, j: Array) -> Array:
        at = self.places.rows(i * self.queries, self.queries).columns(j * self.keys, self.keys)
        return mask(self.options, at)

    def sink_mask(self, i: Array) -> Array:
        return mask(self.options, self.sink_places.rows(i * self.queries, self.queries))
