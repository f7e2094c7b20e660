"""Qwen2 and 2.5: a Llama with biases on queries, keys and values; its upper layers may see a window only.

Source: Yang et al. 2024, "Qwen2 Technical Report".
"""

from __future__ import annotations

import dataclasses
from typing import Any

from infopt import ops
from infopt.model import Attend, Model, define
from infopt.models import base
from infopt.typing import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2Config(base.LocalConfig):
    """Qwen2's config: its upper layers may be local."""


def init(c: Qwen2Config, key: Array) -> dict[str, Array]:
    """Random weights, by logical name."""
    vectors = {"attn_norm": (c.dim,), "mlp_norm": (c.dim,)} | base.attention_bias_shapes(c)
    return base.random_weights(c, key, vectors | base.attention_shapes(c) | base.swiglu_shapes(c))


def block(c: Qwen2Config, phase: int, p: dict[str, Any], x: Array, layer: Any, attend: Attend, cache: Any):
    """One layer; the window is bound in `attend`."""
    x, cache = base.attention(c, p, x, layer, attend, cache, base.rope(c))
    h = ops.rms_norm(x, p["mlp_norm"], layer, c.norm_eps)
    return x + base.swiglu(p, h, layer), cache


QWEN2 = define(
    "qwen2", Qwen2Config, init=init, embed=base.embed, block=block, final=base.final, stream=base.SWIGLU_STREAM
)


def qwen2(**options: Any) -> Model:
    """A Qwen2 of any size, for `model.init(key)`.

    Args:
      options: fields of `Qwen2Config`; small ones by default, head_dim = dim / heads and mlp = 3 * dim.

    >>> qwen2(layers=3, window=8, local=(False, True, True)).spec.window
    (None, Window(size=8, sinks=0), Window(size=8, sinks=0))
    """
    return base.sized(QWEN2, Qwen2Config, {}, options)
