"""Flash attention's reference: all scores at once, in plain `jnp`. Memory grows with T x S."""

from __future__ import annotations

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
    precision_of,
    ungrouped,
)
from infopt.typing import Array


def forward(q: Array, sink_q: Any, k: Array, v: Array, places: Places, o: Options) -> tuple[Array, Array]:
    """The output `[B, T, H, D]` and the log-sum-exp of scores `[B, T, H]`."""

    product = functools.partial(jnp.einsum, precision=precision_of(k.dtype), preferred_element_type=jnp.float32)

    def scores(queries: Array, keys: Array) -> Array:
        return product("bkgtd,bskd->bkgts", grouped(queries, k.shape[2]), keys)

    s = scores(q, k)
    if sink_q is not None and (n := min(o.sinks, k.shape[1])):
        s = s.at[..., :n].set(scores(sink_q, k[:, :n]))
    allowed = mask(o, places)[:, None, None]
    s = jnp.where(allowed, capped(s * o.scale, o.softcap), NEVER)
    most = jax.lax.stop_gradient(jnp.max(s, -1, keepdims=True))
    p = jnp.where(allowed, jnp.exp(s - most), 0.0)
    total = jnp.sum(p, -1, keepdims=True)
    p = (p / jnp.where(total == 0, 1.0, total)).astype(v.dtype)
    out = product("bkgts,bskd->bkgtd", p, v)
    lse = jnp.where(total == 0, -jnp.inf, most + jnp.log(jnp.where(total == 0, 1.0, total)))
    return ungrouped(out).astype(q.dtype), ungrouped(lse)[..., 0]
