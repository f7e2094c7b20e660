"""Qwen3-MoE: a Qwen3 whose feed-forward layer is a few of many experts, chosen for each token.

Source: Yang et al. 2025, "Qwen3 Technical Report".
"""

from __future__ import annotations

import dataclasses
from typing import Any

from infopt import ops
from infopt.model import Attend, Model, define
from infopt.models import base
from infopt.spec import Window
from infopt.typing import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3MoeConfig(base.DecoderConfig):
    """Qwen3-MoE's config.

    Args:
      experts: how many there are.
      experts_used: how many of them each token goes through.
      normalise: whether the shares of those are divided by their sum.
      window: positions that a layer sees, itself included; None is all.
    """

    experts: int = 8
    experts_used: int = 2
    normalise: bool = True
    window: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        base.check_experts(self, self.experts, self.experts_used)

    def windows(self) -> tuple[Window | None, ...]:
        return (None if self.window is None else Window(self.window),) * self.layers


def init(c: Qwen3MoeConfig, key: Array) -> dict[str, Array]:
    """Random weights, by logical name."""
    norms = {"attn_norm": (c.dim,), "mlp_norm": (c.dim,), "attn.q_norm": (c.head_dim,), "attn.k_norm": (c.head_dim,)}
    return base.random_weights(c, key, norms | base.attention_shapes(c) | base.expert_shapes(c, c.experts))


def block(c: Qwen3MoeConfig, phase: int, p: dict[str, Any], x: Array, layer: Any, attend: Attend, cache: Any):
    """One layer."""
    x, cache = base.attention(c, p, x, layer, attend, cache, base.rope(c))
    h = ops.rms_norm(x, p["mlp_norm"], layer, c.norm_eps)
    share = ops.route(h, p["mlp.router"], layer, c.experts_used, c.normalise)
    return x + base.experts(p, h, layer, share), cache


QWEN3_MOE = define(
    "qwen3_moe", Qwen3MoeConfig, init=init, embed=base.embed, block=block, final=base.final, stream=base.EXPERTS_STREAM
)


def qwen3_moe(**options: Any) -> Model:
    """A Qwen3-MoE of any size, for `model.init(key)`.

    Args:
      options: fields of `Qwen3MoeConfig`; small ones by default, head_dim = dim / heads and mlp = 3 * dim.

    >>> qwen3_moe(experts=16).spec.config.experts_used
    2
    """
    return base.sized(QWEN3_MOE, Qwen3MoeConfig, {"norm_eps": 1e-6, "tied": False}, options)
