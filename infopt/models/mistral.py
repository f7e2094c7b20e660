"""Mistral: a Llama whose every layer may see a window only.

Source: Jiang et al. 2023, "Mistral 7B".
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
class MistralConfig(base.DecoderConfig):
    """Mistral's config.

    Args:
      window: positions that a layer sees, itself included; None is all.
    """

    window: int | None = None

    def windows(self) -> tuple[Window | None, ...]:
        return (None if self.window is None else Window(self.window),) * self.layers


def init(c: MistralConfig, key: Array) -> dict[str, Array]:
    """Random weights, by logical name."""
    norms = {"attn_norm": (c.dim,), "mlp_norm": (c.dim,)}
    return base.random_weights(c, key, norms | base.attention_shapes(c) | base.swiglu_shapes(c))


def block(c: MistralConfig, phase: int, p: dict[str, Any], x: Array, layer: Any, attend: Attend, cache: Any):
    """One layer; the window is bound in `attend`."""
    x, cache = base.attention(c, p, x, layer, attend, cache, base.rope(c))
    h = ops.rms_norm(x, p["mlp_norm"], layer, c.norm_eps)
    return x + base.swiglu(p, h, layer), cache


MISTRAL = define(
    "mistral", MistralConfig, init=init, embed=base.embed, block=block, final=base.final, stream=base.SWIGLU_STREAM
)


def mistral(**options: Any) -> Model:
    """A Mistral of any size, for `model.init(key)`.

    Args:
      options: fields of `MistralConfig`; small ones by default, head_dim = dim / heads and mlp = 3 * dim.

    >>> mistral(window=8).spec.window
    (Window(size=8, sinks=0), Window(size=8, sinks=0))
    """
    return base.sized(MISTRAL, MistralConfig, {"tied": False}, options)
