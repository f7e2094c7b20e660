"""A small transformer as a Flax user writes one, without infopt: rotary positions, grouped queries, SwiGLU."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx


def rotate(x: jax.Array, positions: jax.Array, theta: float = 10000.0) -> jax.Array:
    """Rotary positions for `x[B, T, H, D]`."""
    frequencies = theta ** (-jnp.arange(0, x.shape[-1], 2, dtype=jnp.float32) / x.shape[-1])
    angle = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None]
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], -1)


class Attention(nnx.Module):
    """Causal attention of grouped queries; `attention_fn` is called as `nnx.MultiHeadAttention` calls it."""

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int,
        width: int,
        *,
        attention_fn: Callable[..., jax.Array] = nnx.dot_product_attention,
        rngs: nnx.Rngs,
    ) -> None:
        self.query = nnx.LinearGeneral(dim, (heads, width), use_bias=False, rngs=rngs)
        self.key = nnx.LinearGeneral(dim, (kv_heads, width), use_bias=False, rngs=rngs)
        self.value = nnx.LinearGeneral(dim, (kv_heads, width), use_bias=False, rngs=rngs)
        self.out = nnx.LinearGeneral((heads, width), dim, axis=(-2, -1), use_bias=False, rngs=rngs)
        self.attention_fn = attention_fn

    def __call__(self, x: jax.Array, positions: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        q, k = rotate(self.query(x), positions), rotate(self.key(x), positions)
        return self.out(self.attention_fn(q, k, self.value(x), mask=mask))


class Block(nnx.Module):
    """Pre-norm: attention, then a gated feed-forward layer."""

    def __init__(self, dim: int, heads: int, kv_heads: int, width: int, mlp: int, *, rngs: nnx.Rngs) -> None:
        self.attention_norm = nnx.RMSNorm(dim, rngs=rngs)
        self.attention = Attention(dim, heads, kv_heads, width, rngs=rngs)
        self.mlp_norm = nnx.RMSNorm(dim, rngs=rngs)
        self.gate = nnx.Linear(dim, mlp, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(dim, mlp, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(mlp, dim, rngs=rngs)

    def __call__(self, x: jax.Array, positions: jax.Array, mask: jax.Array) -> jax.Array:
        x = x + self.attention(self.attention_norm(x), positions, mask)
        h = self.mlp_norm(x)
        return x + self.down(nnx.silu(self.gate(h)) * self.up(h))


class Transformer(nnx.Module):
    """Tokens and their positions, `[B, T]`, to logits `[B, T, vocab]`."""

    def __init__(
        self,
        *,
        layers: int,
        dim: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        mlp: int,
        vocab: int,
        rngs: nnx.Rngs,
    ) -> None:
        self.embed = nnx.Embed(vocab, dim, rngs=rngs)
        self.blocks = nnx.List([Block(dim, heads, kv_heads, head_dim, mlp, rngs=rngs) for _ in range(layers)])
        self.norm = nnx.RMSNorm(dim, rngs=rngs)
        self.head = nnx.Linear(dim, vocab, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        x, mask = self.embed(tokens), nnx.make_causal_mask(tokens)
        for block in self.blocks:
            x = block(x, positions, mask)
        return self.head(self.norm(x))
