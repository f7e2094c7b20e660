"""gpt-oss: each other layer sees a window, each head has a learned sink, and a few of many experts, whose SwiGLU is
clamped, are chosen for each token; biases everywhere.

Source: OpenAI 2025, "gpt-oss-120b & gpt-oss-20b Model Card".
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from infopt import ops
from infopt.model import Attend, Model, define
from infopt.models import base
from infopt.typing import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class GptOssConfig(base.LocalConfig):
    """gpt-oss's config.

    Args:
      experts: how many there are.
      experts_used: how many of them each token goes through.
      swiglu_alpha: the gate g becomes g * sigmoid(swiglu_alpha * g).
      swiglu_limit: gates are cut above it, what they multiply on both sides.
      local: a period of layers (or all of them), True where a layer is local.
    """

    experts: int = 32
    experts_used: int = 4
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    local: tuple[bool, ...] = (True, False)

    def __post_init__(self) -> None:
        super().__post_init__()
        base.check_experts(self, self.experts, self.experts_used)


def init(c: GptOssConfig, key: Array) -> dict[str, Array]:
    """Random weights, by logical name."""
    norms = {"attn_norm": (c.dim,), "mlp_norm": (c.dim,)}
    attention = base.attention_shapes(c) | base.attention_bias_shapes(c) | {"attn.o_bias": (c.dim,)}
    experts = base.expert_shapes(c, c.experts)
    biases = {f"{name}_bias": shape[:-1] for name, shape in experts.items()}
    sinks = {"attn.sinks": (c.heads,)}
    return base.random_weights(c, key, norms | attention | sinks | experts | biases)


def block(c: GptOssConfig, phase: int, p: dict[str, Any], x: Array, layer: Any, attend: Attend, cache: Any):
    """One layer; the window is bound in `attend`, and the shares of the chosen experts add up to one."""

    def gated(gate: Array, up: Array) -> Array:
        gate = jnp.minimum(gate, c.swiglu_limit)
        up = jnp.clip(up, -c.swiglu_limit, c.swiglu_limit)
        return (up + 1) * gate * jax.nn.sigmoid(c.swiglu_alpha * gate)

    x, cache = base.attention(c, p, x, layer, attend, cache, base.rope(c))
    h = ops.rms_norm(x, p["mlp_norm"], layer, c.norm_eps)
    share = ops.route(h, p["mlp.router"], layer, c.experts_used, normalise=True, bias=p["mlp.router_bias"])
    return x + base.experts(p, h, layer, share, gated), cache


STREAM = dataclasses.replace(base.EXPERTS_STREAM, feeds={"attn.v": "attn.o"})  # what the up projection gives is clamped
GPT_OSS = define("gpt_oss", GptOssConfig, init=init, embed=base.embed, block=block, final=base.final, stream=STREAM)


def gpt_oss(**options: Any) -> Model:
    """A gpt-oss of any size, for `model.init(key)`.

    Args:
      options: fields of `GptOssConfig`; small ones by default, head_dim = dim / heads, mlp = 3 * dim, and 8 experts.

    >>> gpt_oss(layers=3).spec.window
    (Window(size=8, sinks=0), None, Window(size=8, sinks=0))
    """
    defaults = {"window": 8, "experts": 8, "experts_used": 2, "rope_theta": 150_000.0, "tied": False}
    return base.sized(GPT_OSS, GptOssConfig, defaults, options)
