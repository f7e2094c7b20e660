"""Llama: SmolLM2, Llama 2 and 3. RMSNorm before each half, rotary positions, grouped queries, SwiGLU.

Source: Touvron et al. 2023, "LLaMA"; Llama 3's rope scaling as published in its config.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from infopt import ops
from infopt.model import Attend, Model, define
from infopt.models import base
from infopt.typing import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(base.DecoderConfig):
    """Llama's config: that of every decoder."""


def init(c: LlamaConfig, key: Array) -> dict[str, Array]:
    """Random weights, by logical name."""
    norms = {"attn_norm": (c.dim,), "mlp_norm": (c.dim,)}
    return base.random_weights(c, key, norms | base.attention_shapes(c) | base.swiglu_shapes(c))


def block(c: LlamaConfig, phase: int, p: dict[str, Any], x: Array, layer: Any, attend: Attend, cache: Any):
    """One layer. `p` holds whole stacks and `layer` the index into them (None: `p` is one layer already)."""
    x, cache = base.attention(c, p, x, layer, attend, cache, base.rope(c))
    h = ops.rms_norm(x, p["mlp_norm"], layer, c.norm_eps)
    return x + base.swiglu(p, h, layer), cache


LLAMA = define(
    "llama", LlamaConfig, init=init, embed=base.embed, block=block, final=base.final, stream=base.SWIGLU_STREAM
)


def llama(**options: Any) -> Model:
    """A Llama of any size, for `model.init(key)`.

    Args:
      options: fields of `LlamaConfig`; small ones by default, head_dim = dim / heads and mlp = 3 * dim.

    >>> llama(layers=2).spec.config.head_dim
    16
    """
    return base.sized(LLAMA, LlamaConfig, {}, options)
