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
from infopt.models import base
from infopt.spec import Window
from infopt.typing import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma3Config(base.DecoderConfig):
    """Gemma 3's config.

    Args:
      window: positions that a local layer sees, itself included.
      pattern: a period of layers, True where a layer is local.
      query_scale: queries are multiplied by query_scale ** -0.5.
      rope_theta, local_rope_theta: base of the rotary wavelengths in global and in local layers.
      rope_scaling: of the global layers.
    """

    window: int
    pattern: tuple[bool, ...] = (True, True, True, True, True, False)
    query_scale: float = 256.0
    norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    local_rope_theta: float = 10_000.0

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
    norms = dict.fromkeys(("attn_norm", "attn_out_norm", "mlp_norm", "mlp_out_norm"), (c.dim,))
    norms |= {"attn.q_norm": (c.head_dim,), "attn.k_norm": (c.head_dim,)}
    return base.random_weights(c, key, norms | base.attention_shapes(c) | base.swiglu_shapes(c), norm=0.0)


def embed(c: Gemma3Config, params: dict[str, Any], tokens: Array, positions: Array) -> Array:
    x = ops.embed(params["embed"], tokens)
    return x * jnp.asarray(c.dim**0.5, x.dtype)


def block(c: Gemma3Config, phase: int, p: dict[str, Any], x: Array, layer: Any, attend: Attend, cache: Any):
    """One layer. `phase` is its place in the period: it decides which rope it turns by."""

    def local_rope(u: Array, positions: Array) -> Array:
        return ops.rope(u, positions, c.local_rope_theta)

    def norm(u: Array, name: str) -> Array:
        return ops.rms_norm(u, p[name], layer, c.norm_eps, offset=1.0)

    q, k, v = base.queries_keys_values(c, p, norm(x, "attn_norm"), layer)
    rope = local_rope if c.pattern[phase] else base.rope(c)
    q, k = norm(q, "attn.q_norm"), norm(k, "attn.k_norm")
    a, cache = attend(q, k, v, cache, layer, rope=rope, scale=c.query_scale**-0.5)
    x = x + norm(ops.linear(ops.join_heads(a), p["attn.o"], layer), "attn_out_norm")

    gate, up = ops.linear(norm(x, "mlp_norm"), (p["mlp.gate"], p["mlp.up"]), layer)
    h = ops.linear(jax.nn.gelu(gate, approximate=True) * up, p["mlp.down"], layer)
    return x + norm(h, "mlp_out_norm"), cache


def final(c: Gemma3Config, params: dict[str, Any], x: Array) -> Array:
    return ops.rms_norm(x, params["final_norm"], None, c.norm_eps, offset=1.0)


GEMMA3 = define("gemma3", Gemma3Config, init=init, embed=embed, block=block, final=final, stream=base.SANDWICH_STREAM)


def gemma3(**options: Any) -> Model:
    """A Gemma 3 of any size, for `model.init(key)`.

    Args:
      options: fields of `Gemma3Config`; small ones by default, head_dim = dim / heads, mlp = 3 * dim, and
        query_scale = head_dim.

    >>> gemma3(layers=7).spec.window[4:]
    (Window(size=8, sinks=0), None, Window(size=8, sinks=0))
    """
    width = options.get("head_dim") or options.get("dim", 64) // options.get("heads", 4)
    return base.sized(GEMMA3, Gemma3Config, {"layers": 8, "window": 8, "query_scale": float(width)}, options)
