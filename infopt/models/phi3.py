"""Phi-3 and 3.5, Phi-4-mini: a Llama whose heads may be turned in part, whose layers may see a window only.

Its checkpoints fuse queries, keys and values, and gate and up: the reader takes them apart.

Source: Abdin et al. 2024, "Phi-3 Technical Report"; LongRoPE as in Ding et al. 2024.
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
class Phi3Config(base.DecoderConfig):
    """Phi-3's config.

    Args:
      window: positions that a layer sees, itself included; None is all.
      rotated: values of a head that are turned; None is all.
    """

    window: int | None = None
    rotated: int | None = None

    def windows(self) -> tuple[Window | None, ...]:
        return (None if self.window is None else Window(self.window),) * self.layers


def init(c: Phi3Config, key: Array) -> dict[str, Array]:
    """Random weights, by logical name."""
    norms = {"attn_norm": (c.dim,), "mlp_norm": (c.dim,)}
    return base.random_weights(c, key, norms | base.attention_shapes(c) | base.swiglu_shapes(c))


def block(c: Phi3Config, phase: int, p: dict[str, Any], x: Array, layer: Any, attend: Attend, cache: Any):
    """One layer; the window is bound in `attend`."""

    def rope(u: Array, positions: Array) -> Array:
        return ops.rope(u, positions, c.rope_theta, scaling=c.rope_scaling, width=c.rotated)

    x, cache = base.attention(c, p, x, layer, attend, cache, rope)
    h = ops.rms_norm(x, p["mlp_norm"], layer, c.norm_eps)
    return x + base.swiglu(p, h, layer), cache


PHI3 = define("phi3", Phi3Config, init=init, embed=base.embed, block=block, final=base.final, stream=base.SWIGLU_STREAM)


def phi3(**options: Any) -> Model:
    """A Phi-3 of any size, for `model.init(key)`.

    Args:
      options: fields of `Phi3Config`; small ones by default, head_dim = dim / heads and mlp = 3 * dim.

    >>> phi3(rotated=12).spec.config.rotated
    12
    """
    return base.sized(PHI3, Phi3Config, {"tied": False}, options)
