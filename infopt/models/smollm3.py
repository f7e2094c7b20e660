"""SmolLM3: a Llama of which each fourth layer has no positions.

Source: Yang et al. 2025, "Rope to Nope and Back Again"; the sizes as published in its config.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from infopt import ops
from infopt.model import Attend, Model, define
from infopt.models import base
from infopt.typing import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmolLM3Config(base.DecoderConfig):
    """SmolLM3's config.

    Args:
      rotated: a period of layers (or all of them), True where queries and keys are turned by their positions.
    """

    rotated: tuple[bool, ...] = (True, True, True, False)

    @property
    def layers_rotated(self) -> tuple[bool, ...]:
        return tuple(self.rotated[i % len(self.rotated)] for i in range(self.layers))

    @property
    def period(self) -> int:
        # the rope differs in code, not in weights or windows, so neighbours that merge must agree in it
        return len(base.shortest_period(self.layers_rotated))


def init(c: SmolLM3Config, key: Array) -> dict[str, Array]:
    """Random weights, by logical name."""
    norms = {"attn_norm": (c.dim,), "mlp_norm": (c.dim,)}
    return base.random_weights(c, key, norms | base.attention_shapes(c) | base.swiglu_shapes(c))


def block(c: SmolLM3Config, phase: int, p: dict[str, Any], x: Array, layer: Any, attend: Attend, cache: Any):
    """One layer. `phase` is its place in the period: it decides whether it turns at all."""
    rope = base.rope(c) if c.layers_rotated[phase] else base.unrotated
    x, cache = base.attention(c, p, x, layer, attend, cache, rope)
    h = ops.rms_norm(x, p["mlp_norm"], layer, c.norm_eps)
    return x + base.swiglu(p, h, layer), cache


SMOLLM3 = define(
    "smollm3", SmolLM3Config, init=init, embed=base.embed, block=block, final=base.final, stream=base.SWIGLU_STREAM
)


def smollm3(**options: Any) -> Model:
    """A SmolLM3 of any size, for `model.init(key)`.

    Args:
      options: fields of `SmolLM3Config`; small ones by default, head_dim = dim / heads and mlp = 3 * dim.

    >>> smollm3(layers=6).spec.config.layers_rotated
    (True, True, True, False, True, True)
    """
    return base.sized(SMOLLM3, SmolLM3Config, {"layers": 4}, options)
