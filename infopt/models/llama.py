"""Llama: SmolLM2, Llama 2 and 3. RMSNorm before each half, rotary positions, grouped queries, SwiGLU.

Source: Touvron et al. 2023, "LLaMA"; Llama 3's rope scaling as published in its config.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from infopt import ops
from infopt.model import Attend, Model, define
from infopt.spec import Config, Llama3Rope
from infopt.typing import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(Config):
    """Llama's config.

    Args:
      mlp: width of the feed-forward layer.
      norm_eps: added to the mean square.
      rope_theta: base of the rotary wavelengths.
      rope_scaling: Llama 3's stretch of the long wavelengths, or None.
      tied: the head is the embedding.
    """

    mlp: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: Llama3Rope | None = None
    tied: bool = True


def init(c: LlamaConfig, key: Array) -> dict[str, Array]:
    """Random weights, by logical name."""
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
            f"layers.{i}.mlp_norm": (c.dim,),
            f"layers.{i}.mlp.gate": (c.mlp, c.dim),
            f"layers.{i}.mlp.up": (c.mlp, c.dim),
            f"layers.{i}.mlp.down": (c.dim, c.mlp),
        }
    return ops.random_weights(key, shapes)


def embed(c: LlamaConfig, params: dict[str, Any], tokens: Array) -> Array:
    return ops.embed(params["embed"], tokens)


def block(c: LlamaConfig, phase: int, p: dict[str, Any], x: Array, layer: Any, attend: Attend, cache: Any):
    """One layer. `p` holds whole stacks and `layer` the index into them (None: `p` is one layer already)."""

    def rope(u: Array, positions: Array) -> Array:
        return ops.rope(u, positions, c.rope_theta, scaling=c.rope_scaling)

    h = ops.rms_norm(x, p["attn_norm"], layer, c.norm_eps)
    q, k, v = ops.linear(h, (p["attn.q"], p["attn.k"], p["attn.v"]), layer)
    q, k, v = (ops.split_heads(u, c.head_dim) for u in (q, k, v))
    a, cache = attend(q, k, v, cache, layer, rope=rope, scale=c.head_dim**-0.5)
    x = x + ops.linear(ops.join_heads(a), p["attn.o"], layer)

    h = ops.rms_norm(x, p["mlp_norm"], layer, c.norm_eps)
    gate, up = ops.linear(h, (p["mlp.gate"], p["mlp.up"]), layer)
    return x + ops.linear(jax.nn.silu(gate) * up, p["mlp.down"], layer), cache


def final(c: LlamaConfig, params: dict[str, Any], x: Array) -> Array:
    return ops.rms_norm(x, params["final_norm"], None, c.norm_eps)


LLAMA = define("llama", LlamaConfig, init=init, embed=embed, block=block, final=final)


def llama(
    *,
    layers: int = 2,
    dim: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    vocab: int = 256,
    context: int = 512,
    mlp: int | None = None,
    **options: Any,
) -> Model:
    """A Llama of any size, for `model.init(key)`.

    Args:
      layers, dim, heads, kv_heads, vocab, context: as in `Config`.
      head_dim: dim / heads by default.
      mlp: 3 * dim by default.
      options: the other fields of `LlamaConfig`.

    >>> llama(layers=2).spec.config.head_dim
    16
    """
    return Model.of(
        LLAMA,
        LlamaConfig(
            layers=layers,
            dim=dim,
            heads=heads,
            kv_heads=kv_heads,
            vocab=vocab,
            context=context,
            head_dim=head_dim or dim // heads,
            mlp=mlp or 3 * dim,
            **options,
        ),
    )
