"""GPT-2: learned positions, LayerNorm before each half, biases everywhere, GELU.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from infopt import ops
from infopt.model import Attend, Model, Stream, define
from infopt.models import base
from infopt.spec import Config
from infopt.typing import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config(Config):
    """GPT-2's config.

    Args:
      mlp: width of the feed-forward layer.
      norm_eps: added to the variance.
      tied: the head is the embedding.
    """

    mlp: int
    norm_eps: float = 1e-5
    tied: bool = True

    @property
    def learned_positions(self) -> bool:
        return True


def init(c: GPT2Config, key: Array) -> dict[str, Array]:
    """Random weights, by logical name."""
    layer = {"mlp.up": (c.mlp, c.dim), "mlp.down": (c.dim, c.mlp), "mlp.up_bias": (c.mlp,), "mlp.down_bias": (c.dim,)}
    layer |= dict.fromkeys(("attn_norm", "attn_norm_bias", "mlp_norm", "mlp_norm_bias", "attn.o_bias"), (c.dim,))
    layer |= base.attention_shapes(c) | base.attention_bias_shapes(c)
    k1, k2 = jax.random.split(key)
    top = ops.random_weights(k2, {"positions": (c.context, c.dim), "final_norm_bias": (c.dim,)})
    return base.random_weights(c, k1, layer) | top


def embed(c: GPT2Config, params: dict[str, Any], tokens: Array, positions: Array) -> Array:
    at = jnp.minimum(positions, c.context - 1)  # padding may lie beyond; the host checks what is real
    return ops.embed(params["embed"], tokens) + ops.embed(params["positions"], at)


def block(c: GPT2Config, phase: int, p: dict[str, Any], x: Array, layer: Any, attend: Attend, cache: Any):
    """One layer."""
    h = ops.layer_norm(x, p["attn_norm"], p["attn_norm_bias"], layer, c.norm_eps)
    q, k, v = base.queries_keys_values(c, p, h, layer)
    a, cache = attend(q, k, v, cache, layer, rope=base.unrotated, scale=c.head_dim**-0.5)
    x = x + ops.linear(ops.join_heads(a), p["attn.o"], layer, p["attn.o_bias"])

    h = ops.layer_norm(x, p["mlp_norm"], p["mlp_norm_bias"], layer, c.norm_eps)
    h = jax.nn.gelu(ops.linear(h, p["mlp.up"], layer, p["mlp.up_bias"]), approximate=True)
    return x + ops.linear(h, p["mlp.down"], layer, p["mlp.down_bias"]), cache


def final(c: GPT2Config, params: dict[str, Any], x: Array) -> Array:
    return ops.layer_norm(x, params["final_norm"], params["final_norm_bias"], None, c.norm_eps)


STREAM = Stream(
    reads={"attn_norm": ("attn.q", "attn.k", "attn.v"), "mlp_norm": ("mlp.up",), "final_norm": ("head",)},
    writes=("attn.o", "mlp.down"),
    feeds={"attn.v": "attn.o"},
    tables=("embed", "positions"),
    unrotatable="LayerNorm takes the mean over channels off, which a rotation mixes with the others.",
)
GPT2 = define("gpt2", GPT2Config, init=init, embed=embed, block=block, final=final, stream=STREAM)


def gpt2(**options: Any) -> Model:
    """A GPT-2 of any size, for `model.init(key)`.

    Args:
      options: fields of `GPT2Config`; small ones by default, head_dim = dim / heads and mlp = 4 * dim.

    >>> gpt2(context=128).spec.config.learned_positions
    True
    """
    dim, heads = options.get("dim", 64), options.get("heads", 4)
    return base.sized(GPT2, GPT2Config, {"kv_heads": heads, "mlp": 4 * dim}, options)
