"""Gemma 3 (text): five layers that see a window for each that sees all, norms on queries and keys, a norm on both
sides of each half, GeGLU, an embedding scaled by sqrt(dim).

Source: Gemma Team 2025, "Gemma 3 Technical Report".
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from infopt import ops
from infopt.errors import InfoptError
from infopt.model import Attend, Model, define
from infopt.spec import Config, Window
from infopt.typing import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma3Config(Config):
    """Gemma 3's config.

    Args:
      mlp: width of the feed-forward layer.
      window: positions that a local layer sees, itself included.
      pattern: a period of layers, True where a layer is local.
      query_scale: queries are multiplied by query_scale ** -0.5.
      norm_eps: added to the mean square.
      rope_theta, local_rope_theta: base of the rotary wavelengths in global and in local layers.
      rope_factor: global positions are divided by it (linear scaling); 1 changes nothing.
      tied: the head is the embedding.
    """

    mlp: int
    window: int
    pattern: tuple[bool, ...] = (True, True, True, True, True, False)
    query_scale: float = 256.0
    norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    local_rope_theta: float = 10_000.0
    rope_factor: float = 1.0
    tied: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.pattern:
            raise InfoptError(
                "Gemma3Config: pattern=() names no layer.",
                why="it says which layers of a period see all positions.",
                fix="pattern=(True, False), say",
            )
        object.__setattr__(self, "pattern", tuple(map(bool, self.pattern)))

    @property
    def period(self) -> int:
        return len(self.pattern)

    def windows(self) -> tuple[Window | None, ...]:
        return tuple(Window(self.window) if self.pattern[i % self.period] else None for i in range(self.layers))


def init(c: Gemma3Config, key: Array) -> dict[str, Array]:
    """Random weights, by logical name. Norms are stored as published: a weight w multiplies by 1 + w."""
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embed": (c.vocab, c.dim), "final_norm": (c.dim,)}
    if not c.tied:
        shapes["head"] = (c.vocab, c.dim)
    for i in range(c.layers):
        shapes |= {
            f"layers.{i}.attn_norm": (c.dim,),
            f"layers.{i}.attn.q": (q, c.dim),
            f"layers.{i}.attn.k": (kv, c.dim),
            f"layers.{i}.attn.v": (kv, c.dim),
            f"layers.{i}.attn.o": (c.dim, q),
            f"layers.{i}.attn.q_norm": (c.head_dim,),
            f"layers.{i}.attn.k_norm": (c.head_dim,),
            f"layers.{i}.attn_out_norm": (c.dim,),
            f"layers.{i}.mlp_norm": (c.dim,),
            f"layers.{i}.mlp.gate": (c.mlp, c.dim),
            f"layers.{i}.mlp.up": (c.mlp, c.dim),
            f"layers.{i}.mlp.down": (c.dim, c.mlp),
            f"layers.{i}.mlp_out_norm": (c.dim,),
        }
    return ops.random_weights(key, shapes, norm=0.0)


def embed(c: Gemma3Config, params: dict[str, Any], tokens: Array) -> Array:
    x = ops.embed(params["embed"], tokens)
    return x * jnp.asarray(c.dim**0.5, x.dtype)


def block(c: Gemma3Config, phase: int, p: dict[str, Any], x: Array, layer: Any, attend: Attend, cache: Any):
    """One layer. `phase` is its place in the period: it decides which rope it turns by."""
    local = c.pattern[phase]

    def rope(u: Array, positions: Array) -> Array:
        return ops.rope(
            u, positions, c.local_rope_theta if local else c.rope_theta, factor=1.0 if local else c.rope_factor
        )

    def norm(u: Array, name: str) -> Array:
        return ops.rms_norm(u, p[name], layer, c.norm_eps, offset=1.0)

    h = norm(x, "attn_norm")
    q, k, v = ops.linear(h, (p["attn.q"], p["attn.k"], p["attn.v"]), layer)
    q, k, v = (ops.split_heads(u, c.head_dim) for u in (q, k, v))
    q, k = norm(q, "attn.q_norm"), norm(k, "attn.k_norm")
    a, cache = attend(q, k, v, cache, layer, rope=rope, scale=c.query_scale**-0.5)
    x = x + norm(ops.linear(ops.join_heads(a), p["attn.o"], layer), "attn_out_norm")

    h = norm(x, "mlp_norm")
    gate, up = ops.linear(h, (p["mlp.gate"], p["mlp.up"]), layer)
    h = ops.linear(jax.nn.gelu(gate, approximate=True) * up, p["mlp.down"], layer)
    return x + norm(h, "mlp_out_norm"), cache


def final(c: Gemma3Config, params: dict[str, Any], x: Array) -> Array:
    return ops.rms_norm(x, params["final_norm"], None, c.norm_eps, offset=1.0)


GEMMA3 = define("gemma3", Gemma3Config, init=init, embed=embed, block=block, final=final)


def gemma3(
    *,
    layers: int = 8,
    dim: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    vocab: int = 256,
    context: int = 512,
    mlp: int | None = None,
    window: int = 8,
    **options: Any,
) -> Model:
    """A Gemma 3 of any size, for `model.init(key)`.

    Args:
      layers, dim, heads, kv_heads, head_dim, vocab, context: as in `Config`.
      mlp: 3 * dim by default.
      window: positions that a local layer sees.
      options: the other fields of `Gemma3Config`.

    >>> gemma3(layers=7).spec.window[4:]
    (Window(size=8, sinks=0), None, Window(size=8, sinks=0))
    """
    return Model.of(
        GEMMA3,
        Gemma3Config(
            layers=layers,
            dim=dim,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocab=vocab,
            context=context,
            mlp=mlp or 3 * dim,
            window=window,
            query_scale=options.pop("query_scale", float(head_dim)),
            **options,
        ),
    )
