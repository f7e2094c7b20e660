"""What a log-sum-exp is kept for: attention over more keys out of what was found over some."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from infopt.typing import Array


def joined(out: Array, lse: Array, axis: int) -> tuple[Array, Array]:
    """Attention over all keys, out of that over several sets of them.

        lse = log sum_i exp(lse_i);  out = sum_i exp(lse_i - lse) out_i

    Args:
      out, lse: the outputs `[..., D]` and log-sum-exps `[...]` of all sets, which lie along `axis`, counted from the
        front. A set in which nothing was seen has -inf; where all have, the output is 0.
    """
    most = jnp.max(lse, axis, keepdims=True)
    base = jnp.where(jnp.isneginf(most), 0.0, most)
    share = jnp.exp(lse - base)
    total = jnp.sum(share, axis)
    some = jnp.where(total == 0, 1.0, total)
    out = jnp.sum(out.astype(jnp.float32) * share[..., None], axis) / some[..., None]
    return out, jnp.where(total == 0, -jnp.inf, jnp.squeeze(base, axis) + jnp.log(some))


def with_sink_logits(out: Array, lse: Array, logits: Array) -> Array:
    """`out` `[B, T, H, E]` with one more score a head, `[H]`, in the softmax's sum: out * sigmoid(lse - logit)."""
    share = jax.nn.sigmoid(lse - jnp.broadcast_to(logits.astype(jnp.float32), lse.shape))
    return (out.astype(jnp.float32) * share[..., None]).astype(out.dtype)
