"""Gemma 2: each other layer sees a window, scores and logits are soft-capped, a norm on both sides of each half,
GeGLU, an embedding scaled by sqrt(dim).

Source: Gemma Team 2024, "Gemma 2".
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from infopt import ops
from infopt.model import Attend, Model, define
from infopt.models import base
from infopt.spec import Window
from infopt.typing import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma2Config(base.DecoderConfig):
    """Gemma 2's config.

    Args:
      window: positions that a local layer sees, itself included.
      local: a period of layers (or all of them), True where a layer is local.
      query_scale: queries are multiplied by query_scale ** -0.5.
      score_cap, logit_cap: scores and logits become cap * tanh(x / cap); None leaves them.
    """

    window: int
    local: tuple[bool, ...] = (True, False)
    query_scale: float = 256.0
    norm_eps: float = 1e-6
    score_cap: float | None = 50.0
    logit_cap: float | None = 30.0

    @property
    def period(self) -> int:
        return base.cheapest_period(self.windows())

    def windows(self) -> tuple[Window | None, ...]:
        return base.local_windows(self.layers, self.window, self.local)


def init(c: Gemma2Config, key: Array) -> dict[str, Array]:
    """Random weights, by logical name. Norms are stored as published: a weight w multiplies by 1 + w."""
    norms = dict.fromkeys(("attn_norm", "attn_out_norm", "mlp_norm", "mlp_out_norm"), (c.dim,))
    return base.random_weights(c, key, norms | base.attention_shapes(c) | base.swiglu_shapes(c), norm=0.0)


def embed(c: Gemma2Config, params: dict[str, Any], tokens: Array, positions: Array) -> Array:
    x = ops.embed(params["embed"], tokens)
    return x * jnp.asarray(c.dim**0.5, x.dtype)


def block(c: Gemma2Config, phase: int, p: dict[str, Any], x: Array, layer: Any, attend: Attend, cache: Any):
    """One layer; the window is bound in `attend`."""

    def norm(u: Array, name: str) -> Array:
        return ops.rms_norm(u, p[name], layer, c.norm_eps, offset=1.0)

    q, k, v = base.queries_keys_values(c, p, norm(x, "attn_norm"), layer)
    a, cache = attend(q, k, v, cache, layer, rope=base.rope(c), scale=c.query_scale**-0.5, softcap=c.score_cap)
    x = x + norm(ops.linear(ops.join_heads(a), p["attn.o"], layer), "attn_out_norm")

    gate, up = ops.linear(norm(x, "mlp_norm"), (p["mlp.gate"], p["mlp.up"]), layer)
    h = ops.linear(jax.nn.gelu(gate, approximate=True) * up, p["mlp.down"], layer)
    return x + norm(h, "mlp_out_norm"), cache


def final(c: Gemma2Config, params: dict[str, Any], x: Array) -> Array:
    return ops.rms_norm(x, params["final_norm"], None, c.norm_eps, offset=1.0)


def logits(c: Gemma2Config, y: Array) -> Array:
    return y if c.logit_cap is None else jnp.tanh(y / jnp.float32(c.logit_cap)) * jnp.float32(c.logit_cap)


GEMMA2 = define(
    "gemma2", Gemma2Config, init=init, embed=embed, block=block, final=final, logits=logits, stream=base.SANDWICH_STREAM
)


def gemma2(**options: Any) -> Model:
    """A Gemma 2 of any size, for `model.init(key)`.

    Args:
      options: fields of `Gemma2Config`; small ones by default, head_dim = dim / heads, mlp = 3 * dim, and
        query_scale = head_dim.

    >>> gemma2(layers=3).spec.window
    (Window(size=8, sinks=0), None, Window(size=8, sinks=0))
    """
    width = options.get("head_dim") or options.get("dim", 64) // options.get("heads", 4)
    return base.sized(GEMMA2, Gemma2Config, {"window": 8, "query_scale": float(width)}, options)
