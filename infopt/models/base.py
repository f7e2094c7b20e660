"""What the families share: the config of a decoder, its weights' shapes, and the parts of a block that recur."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from infopt import ops
from infopt.errors import InfoptError
from infopt.model import Attend, Family, Model, Stream
from infopt.spec import Config, RopeScaling, Window
from infopt.typing import Array, Params

Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(Config):
    """What the config of every decoder with rotary positions and a gated feed-forward layer has.

    Args:
      mlp: width of the feed-forward layer (of one expert, where there are several).
      norm_eps: added to the mean square.
      rope_theta: base of the rotary wavelengths.
      rope_scaling: how they are stretched, or None.
      tied: the head is the embedding.
    """

    mlp: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tied: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalConfig(DecoderConfig):
    """The config of a decoder some of whose layers see a window only.

    Args:
      window: positions that a local layer sees, itself included.
      local: a period of layers (or all of them), True where a layer is local.
    """

    window: int | None = None
    local: tuple[bool, ...] = (False,)

    @property
    def period(self) -> int:
        return cheapest_period(self.windows())

    def windows(self) -> tuple[Window | None, ...]:
        return local_windows(self.layers, self.window, self.local)


def attention_shapes(c: Config) -> Shapes:
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    return {"attn.q": (q, c.dim), "attn.k": (kv, c.dim), "attn.v": (kv, c.dim), "attn.o": (c.dim, q)}


def attention_bias_shapes(c: Config) -> Shapes:
    kv = (c.kv_heads * c.head_dim,)
    return {"attn.q_bias": (c.heads * c.head_dim,), "attn.k_bias": kv, "attn.v_bias": kv}


def swiglu_shapes(c: DecoderConfig) -> Shapes:
    return {"mlp.gate": (c.mlp, c.dim), "mlp.up": (c.mlp, c.dim), "mlp.down": (c.dim, c.mlp)}


def expert_shapes(c: DecoderConfig, experts: int) -> Shapes:
    return {
        "mlp.router": (experts, c.dim),
        "mlp.experts.gate": (experts, c.mlp, c.dim),
        "mlp.experts.up": (experts, c.mlp, c.dim),
        "mlp.experts.down": (experts, c.dim, c.mlp),
    }


SWIGLU_STREAM = Stream(
    reads={
        "attn_norm": ("attn.q", "attn.k", "attn.v"),
        "mlp_norm": ("mlp.gate", "mlp.up"),
        "final_norm": ("head",),
    },
    writes=("attn.o", "mlp.down"),
    feeds={"attn.v": "attn.o", "mlp.up": "mlp.down"},
)
"""A norm before each half, SwiGLU."""
EXPERTS_STREAM = dataclasses.replace(
    SWIGLU_STREAM,
    reads={**SWIGLU_STREAM.reads, "mlp_norm": ("mlp.router", "mlp.experts.gate", "mlp.experts.up")},
    writes=("attn.o", "mlp.experts.down"),
    feeds={"attn.v": "attn.o", "mlp.experts.up": "mlp.experts.down"},
)
"""The same with experts."""
SANDWICH_STREAM = dataclasses.replace(
    SWIGLU_STREAM,
    writes=(),
    offset=1.0,
    unrotatable="a norm scales what each half gives, channel by channel, before it is added to the stream: its weights "
    "can be folded into nothing.",
)
"""A norm on both sides of each half, GeGLU, norms stored minus one."""


def random_weights(c: Any, key: Array, layer: Shapes, norm: float = 1.0) -> dict[str, Array]:
    """Random weights by logical name, for layers that are all alike."""
    top = {"embed": (c.vocab, c.dim), "final_norm": (c.dim,)} | ({} if c.tied else {"head": (c.vocab, c.dim)})
    layers = {f"layers.{i}.{name}": shape for i in range(c.layers) for name, shape in layer.items()}
    return ops.random_weights(key, top | layers, norm=norm)


def embed(c: Config, params: Params, tokens: Array, positions: Array) -> Array:
    return ops.embed(params["embed"], tokens)


def final(c: DecoderConfig, params: Params, x: Array) -> Array:
    return ops.rms_norm(x, params["final_norm"], None, c.norm_eps)


def rope(c: DecoderConfig) -> ops.Rope:
    return lambda x, positions: ops.rope(x, positions, c.rope_theta, scaling=c.rope_scaling)


def unrotated(x: Array, positions: Array) -> Array:
    return x


def queries_keys_values(c: Config, p: dict[str, Any], h: Array, layer: Any) -> tuple[Array, Array, Array]:
    """`[B, T, H or K, D]` of each, with biases where the layer has them."""
    bias = tuple(p.get(f"attn.{n}_bias") for n in "qkv")
    q, k, v = ops.linear(h, (p["attn.q"], p["attn.k"], p["attn.v"]), layer, bias)
    return ops.split_heads(q, c.head_dim), ops.split_heads(k, c.head_dim), ops.split_heads(v, c.head_dim)


def attention(
    c: DecoderConfig, p: dict[str, Any], x: Array, layer: Any, attend: Attend, cache: Any, rope: ops.Rope
) -> tuple[Array, Any]:
    """The first half of a layer, its norm before it; norms of queries and keys, biases and sinks where it has them."""
    h = ops.rms_norm(x, p["attn_norm"], layer, c.norm_eps)
    q, k, v = queries_keys_values(c, p, h, layer)
    if "attn.q_norm" in p:
        q = ops.rms_norm(q, p["attn.q_norm"], layer, c.norm_eps)
        k = ops.rms_norm(k, p["attn.k_norm"], layer, c.norm_eps)
    sinks = ops.vector(p["attn.sinks"], layer) if "attn.sinks" in p else None
    a, cache = attend(q, k, v, cache, layer, rope=rope, scale=c.head_dim**-0.5, sink_logits=sinks)
    return x + ops.linear(ops.join_heads(a), p["attn.o"], layer, p.get("attn.o_bias")), cache


def swiglu(p: dict[str, Any], h: Array, layer: Any) -> Array:
    """down(silu(gate h) * up h) (Shazeer 2020)."""
    gate, up = ops.linear(h, (p["mlp.gate"], p["mlp.up"]), layer)
    return ops.linear(silu_gated(gate, up), p["mlp.down"], layer)


def silu_gated(gate: Array, up: Array) -> Array:
    return jax.nn.silu(gate) * up


def experts(
    p: dict[str, Any],
    h: Array,
    layer: Any,
    share: Array,
    gated: Callable[[Array, Array], Array] = silu_gated,
) -> Array:
    """down(gated(gate h, up h)) of all experts, with biases where the layer has them, weighted by each token's shares
    `[B, T, E]`: dense, so that nothing is dropped."""
    pair = p["mlp.experts.gate"], p["mlp.experts.up"]
    bias = p.get("mlp.experts.gate_bias"), p.get("mlp.experts.up_bias")

    def add(total: Array, e: Array) -> tuple[Array, None]:
        gate, up = ops.linear(h, pair, (layer, e), bias)
        y = ops.linear(gated(gate, up), p["mlp.experts.down"], (layer, e), p.get("mlp.experts.down_bias"))
        weight = jax.lax.dynamic_index_in_dim(share, e, -1)
        return total + y * jnp.broadcast_to(weight, y.shape).astype(y.dtype), None

    return jax.lax.scan(add, jnp.zeros_like(h), jnp.arange(share.shape[-1], dtype=jnp.int32))[0]


def check_experts(c: Config, experts: int, used: int) -> None:
    if not 1 <= used <= experts:
        raise InfoptError(
            f"{type(c).__name__}: experts_used={used} of experts={experts}.",
            why="each token goes through some of those there are.",
            fix=f"experts_used from 1 to {experts}",
        )


def local_windows(layers: int, window: int | None, local: Sequence[bool]) -> tuple[Window | None, ...]:
    """Each layer's window, by a period of layers that says which are local."""
    return tuple(Window(window) if window and local[i % len(local)] else None for i in range(layers))


def shortest_period(layers: Sequence[bool]) -> tuple[bool, ...]:
    """The shortest run that, repeated, gives the list.

    >>> shortest_period([True, True, False, True, True])
    (True, True, False)
    """
    return next(
        tuple(layers[:n]) for n in range(1, len(layers) + 1) if all(x == layers[i % n] for i, x in enumerate(layers))
    )


def cheapest_period(layers: Sequence[Any]) -> int:
    """Layers in a period, so that the fewest different layers are compiled: runs of equal periods share one body.

    >>> cheapest_period([True, False] * 8), cheapest_period([False] * 7 + [True] * 3)
    (2, 1)
    """

    def bodies(period: int) -> int:
        blocks = [tuple(layers[i : i + period]) for i in range(0, len(layers), period)]
        return sum(len(b) for i, b in enumerate(blocks) if i == 0 or b != blocks[i - 1])

    return min(range(1, len(layers) + 1), key=lambda period: (bodies(period), period))


def sized(family: Family, config: type[Any], defaults: dict[str, Any], options: dict[str, Any]) -> Model:
    """A model of any size: `options` over `defaults` over small sizes that suit tests and notebooks."""
    given = {"layers": 2, "dim": 64, "heads": 4, "kv_heads": 2, "vocab": 256, "context": 512, "mlp": None, **defaults}
    given |= options
    given["head_dim"] = given.get("head_dim") or given["dim"] // given["heads"]
    given["mlp"] = given["mlp"] or 3 * given["dim"]
    return Model.of(family, config(**given))
