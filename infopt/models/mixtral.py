"""Mixtral: a Llama whose feed-forward layer is a few of several experts, chosen for each token.

Source: Jiang et al. 2024, "Mixtral of Experts".
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
class MixtralConfig(base.DecoderConfig):
    """Mixtral's config.

    Args:
      experts: how many there are.
      experts_used: how many of them each token goes through.
      window: positions that a layer sees, itself included; None is all.
    """

    experts: int = 8
    experts_used: int = 2
    window: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        base.check_experts(self, self.experts, self.experts_used)

    def windows(self) -> tuple[Window | None, ...]:
        return (None if self.window is None else Window(self.window),) * self.layers


def init(c: MixtralConfig, key: Array) -> dict[str, Array]:
    """Random weights, by logical name."""
    norms = {"attn_norm": (c.dim,), "mlp_norm": (c.dim,)}
    return base.random_weights(c, key, norms | base.attention_shapes(c) | base.expert_shapes(c, c.experts))


def block(c: MixtralConfig, phase: int, p: dict[str, Any], x: Array, layer: Any, attend: Attend, cache: Any):
    """One layer; the shares of the chosen experts add up to one."""
    x, cache = base.attention(c, p, x, layer, attend, cache, base.rope(c))
    h = ops.rms_norm(x, p["mlp_norm"], layer, c.norm_eps)
    share = ops.route(h, p["mlp.router"], layer, c.experts_used, normalise=True)
    return x + base.experts(p, h, layer, share), cache


MIXTRAL = define(
    "mixtral", MixtralConfig, init=init, embed=base.embed, block=block, final=base.final, stream=base.EXPERTS_STREAM
)


def mixtral(**options: Any) -> Model:
    """A Mixtral of any size, for `model.init(key)`.

    Args:
      options: fields of `MixtralConfig`; small ones by default, head_dim = dim / heads and mlp = 3 * dim.

    >>> from infopt.model import shapes
    >>> shapes(mixtral(experts=4).spec)["layers.0.mlp.experts.up"]
    (4, 192, 64)
    """
    return base.sized(MIXTRAL, MixtralConfig, {"tied": False}, options)
