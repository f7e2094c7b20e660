"""Qwen3: a Llama with norms on queries and keys; its upper layers may see a window only.

Source: Yang et al. 2025, "Qwen3 Technical Report".
"""

from __future__ import annotations

import dataclasses
from typing import Any

from infopt import ops
from infopt.model import Attend, Model, define
from infopt.models import base
from infopt.typing import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3Config(base.LocalConfig):
    """Qwen3's config: its upper layers may be local."""


def init(c: Qwen3Config, key: Array) -> dict[str, Array]:
    """Random weights, by logical name."""
    norms = {"attn_norm": (c.dim,), "mlp_norm": (c.dim,), "attn.q_norm": (c.head_dim,), "attn.k_norm": (c.head_dim,)}
    return base.random_weights(c, key, norms | base.attention_shapes(c) | base.swiglu_shapes(c))


def block(c: Qwen3Config, phase: int, p: dict[str, Any], x: Array, layer: Any, attend: Attend, cache: Any):
    """One layer; the window is bound in `attend`."""
    x, cache = base.attention(c, p, x, layer, attend, cache, base.rope(c))
    h = ops.rms_norm(x, p["mlp_norm"], layer, c.norm_eps)
    return x + base.swiglu(p, h, layer), cache


QWEN3 = define(
    "qwen3", Qwen3Config, init=init, embed=base.embed, block=block, final=base.final, stream=base.SWIGLU_STREAM
)


def qwen3(**options: Any) -> Model:
    """A Qwen3 of any size, for `model.init(key)`.

    Args:
      options: fields of `Qwen3Config`; small ones by default, head_dim = dim / heads and mlp = 3 * dim.

    >>> qwen3(head_dim=32).spec.config.head_dim
    32
    """
    return base.sized(QWEN3, Qwen3Config, {"norm_eps": 1e-6}, options)
