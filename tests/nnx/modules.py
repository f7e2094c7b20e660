"""Flax modules as their users write them: some that can be cached, and some that cannot."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

VOCAB, DIM, CONTEXT = 61, 32, 64


class Block(nnx.Module):
    """GPT-2's kind: LayerNorm, biases, GELU, dropout; some of its variants."""

    def __init__(self, heads: int = 4, *, rngs: nnx.Rngs, **attention: Any) -> None:
        self.first, self.second = nnx.LayerNorm(DIM, rngs=rngs), nnx.LayerNorm(DIM, rngs=rngs)
        options: dict[str, Any] = {"decode": False, "dropout_rate": 0.1} | attention
        self.attention = nnx.MultiHeadAttention(heads, DIM, rngs=rngs, **options)
        self.up, self.down = nnx.Linear(DIM, 48, rngs=rngs), nnx.Linear(48, DIM, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x: jax.Array, **attention: Any) -> jax.Array:
        x = x + self.attention(self.first(x), **attention)
        return x + self.dropout(self.down(nnx.gelu(self.up(self.second(x)))))


class GPT(nnx.Module):
    """Learned positions, tied head."""

    def __init__(self, rngs: nnx.Rngs, layers: int = 2, **attention: Any) -> None:
        self.embed, self.place = nnx.Embed(VOCAB, DIM, rngs=rngs), nnx.Embed(CONTEXT, DIM, rngs=rngs)
        self.blocks = nnx.List([Block(rngs=rngs, **attention) for _ in range(layers)])
        self.norm = nnx.LayerNorm(DIM, rngs=rngs)

    def mask(self, tokens: jax.Array, positions: jax.Array) -> dict[str, Any]:
        return {"mask": nnx.make_causal_mask(tokens)}

    def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        x = self.embed(tokens) + self.place(positions)
        mask = self.mask(tokens, positions)
        for block in self.blocks:
            x = block(x, **mask)
        return self.embed.attend(self.norm(x))


class ByFlag(GPT):
    """Causal by a flag."""

    def mask(self, tokens: jax.Array, positions: jax.Array) -> dict[str, Any]:
        return {"is_causal": True}


class ByPosition(GPT):
    """A mask made of the positions that are given."""

    def mask(self, tokens: jax.Array, positions: jax.Array) -> dict[str, Any]:
        return {"mask": nnx.make_attention_mask(positions, positions, jnp.greater_equal)}


class Local(GPT):
    """Sees the last seven tokens."""

    def mask(self, tokens: jax.Array, positions: jax.Array) -> dict[str, Any]:
        near = nnx.make_attention_mask(positions, positions, lambda q, k: q - k < 7)
        return {"mask": nnx.combine_masks(nnx.make_causal_mask(tokens), near)}


class Parallel(nnx.Module):
    """Attention and feed-forward layers in lists of their own, side by side; normed queries; a head with a bias."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed, self.place = nnx.Embed(VOCAB, DIM, rngs=rngs), nnx.Param(jax.random.normal(rngs(), (CONTEXT, DIM)))
        self.attentions = nnx.List(
            [nnx.MultiHeadAttention(4, DIM, num_kv_heads=2, normalize_qk=True, rngs=rngs) for _ in range(3)]
        )
        self.layers = nnx.List([nnx.Linear(DIM, DIM, rngs=rngs) for _ in range(3)])
        self.scale = nnx.Param(jnp.ones((1, DIM)))
        self.head = nnx.Linear(DIM, VOCAB, rngs=rngs)

    def __call__(self, tokens: jax.Array, position_ids: jax.Array) -> jax.Array:
        x = self.embed(tokens) + self.place[...][position_ids]
        for attention, layer in zip(self.attentions, self.layers, strict=True):
            x = x + attention(x, is_causal=True) + nnx.tanh(layer(x)) * self.scale[None]
        return 20 * nnx.tanh(self.head(x) / 20)


class Shared(GPT):
    """One block, called twice."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        super().__init__(rngs, layers=1)

    def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        x = self.embed(tokens) + self.place(positions)
        for _ in range(2):
            x = self.blocks[0](x, **self.mask(tokens, positions))
        return self.embed.attend(self.norm(x))


# ----------------------------------------------------------------------------------------------------- what is refused


class NoPositions(GPT):
    def __call__(self, tokens: jax.Array) -> jax.Array:
        positions = jnp.arange(tokens.shape[1])[None]  # LINE
        return super().__call__(tokens, positions)


class OwnPositions(GPT):
    def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        return super().__call__(tokens, jnp.arange(tokens.shape[1])[None])  # LINE


class Mixes(GPT):
    def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        x = super().__call__(tokens, positions)
        return x - x.mean(1, keepdims=True)  # LINE


class Shifts(GPT):
    def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        before = jnp.pad(tokens, ((0, 0), (1, 0)))[:, :-1]  # LINE
        return super().__call__(tokens, positions) + self.embed.attend(self.embed(before))


class Bidirectional(GPT):
    def mask(self, tokens: jax.Array, positions: jax.Array) -> dict[str, Any]:
        return {}


class Padded(GPT):
    def mask(self, tokens: jax.Array, positions: jax.Array) -> dict[str, Any]:
        there = nnx.make_attention_mask(tokens != 5, tokens != 5)
        return {"mask": nnx.combine_masks(nnx.make_causal_mask(tokens), there)}


class OwnAttention(GPT):
    """Attends by itself."""

    def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        x = (self.embed(tokens) + self.place(positions))[:, :, None]
        x = nnx.dot_product_attention(x, x, x, is_causal=True)  # LINE
        return self.embed.attend(self.norm(x[:, :, 0]))


class Looped(GPT):
    """Its layers under a transformation."""

    def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        x = self.embed(tokens) + self.place(positions)
        for block in self.blocks:
            x = nnx.remat(lambda b, x: b(x, is_causal=True))(block, x)
        return self.embed.attend(self.norm(x))


class Pair(GPT):
    def __call__(self, tokens: jax.Array, positions: jax.Array) -> Any:
        logits = super().__call__(tokens, positions)
        return logits, logits


class NeedsMask(GPT):
    def __call__(self, tokens: jax.Array, positions: jax.Array, mask: jax.Array) -> jax.Array:
        return super().__call__(tokens, positions)


class Uneven(GPT):
    def __init__(self, rngs: nnx.Rngs) -> None:
        super().__init__(rngs)
        self.blocks[1] = Block(heads=2, rngs=rngs)


def halved(query: jax.Array, key: jax.Array, value: jax.Array, **options: Any) -> jax.Array:
    """Attention of another scale."""
    return nnx.dot_product_attention(query / 2, key, value, **options)


class InnerWindow(GPT):
    """An `attention_fn` with a window of its own, wider than a short text."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        def near(query: jax.Array, key: jax.Array, value: jax.Array, **options: Any) -> jax.Array:
            return jax.nn.dot_product_attention(query, key, value, is_causal=True, local_window_size=(31, 0))

        super().__init__(rngs, attention_fn=near)


class Capped(GPT):
    """A soft-cap that only large scores meet."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        def capped(query: jax.Array, key: jax.Array, value: jax.Array, **options: Any) -> jax.Array:
            scores = 50 * jnp.tanh(jnp.einsum("bthd,bshd->bhts", query, key) / 50 / query.shape[-1] ** 0.5)
            shares = jax.nn.softmax(jnp.where(options["mask"] > 0, scores, -1e30), -1)
            return jnp.einsum("bhts,bshd->bthd", shares, value)

        super().__init__(rngs, attention_fn=capped)


class LongTexts(GPT):
    """Computes something else for texts of more than twenty tokens."""

    def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        return super().__call__(tokens, positions) * (2.0 if tokens.shape[1] > 20 else 1.0)  # LINE


class Fails(GPT):
    def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        assert tokens.shape[1] > 1, "too short"
        return super().__call__(tokens, positions)


class Named(GPT):
    """Returns what is no array."""

    def __call__(self, tokens: jax.Array, positions: jax.Array) -> Any:
        return {"logits": super().__call__(tokens, positions)}


@dataclasses.dataclass(frozen=True)
class Settings:
    scale: float


class Configured(GPT):
    """What it computes stands in an object of settings."""

    def __init__(self, rngs: nnx.Rngs, settings: Settings) -> None:
        super().__init__(rngs)
        self.settings = settings

    def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        return super().__call__(tokens, positions) * self.settings.scale
