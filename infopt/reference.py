"""Both families once more, in plain float64 numpy: what the composition contract measures every stack against.

It shares no code with the stacks: masks, sinks, rope, codec and unpacking are written here a second time, because an
oracle that shares them cannot see a mistake in them. One row of tokens, no cache, no batch, nothing compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from infopt.spec import Llama3Rope, Spec, Window

Float64 = NDArray[np.float64]
Rope = Callable[[Float64, NDArray[np.int64]], Float64]


def dequantize(weight: Any) -> Float64:
    """The values that a weight stands for.

    Args:
      weight: a dense array, or anything with a QTensor's fields: `codes`, `scale`, `minimum`, `format`, `shape`.
    """
    codes = getattr(weight, "codes", None)
    if codes is None:
        return np.asarray(weight).astype(np.float64)
    codes, width, name = np.asarray(codes), weight.shape[-1], weight.format.name
    group = weight.format.group or width
    scale = np.asarray(weight.scale).astype(np.float64)
    values = np.empty((*codes.shape[:-1], width))
    for g in range(width // group):
        where = slice(g * group, (g + 1) * group)
        if name == "int8":
            level = codes[..., where].astype(np.float64)
        elif name in ("int4", "int4_min"):
            packed = codes[..., g * group // 2 : (g + 1) * group // 2].astype(np.int64)
            level = np.concatenate([packed % 16, packed // 16], -1) - (8.0 if name == "int4" else 0.0)
        else:
            raise NotImplementedError(f"the numpy reference cannot read weights in the format {name!r}.")
        values[..., where] = level * scale[..., g, None]
        if name == "int4_min":
            values[..., where] += np.asarray(weight.minimum).astype(np.float64)[..., g, None]
    return values


def round_kv(x: Float64, format: Any) -> Float64:
    """Keys or values `[T, K, D]` as a cache with this codec gives them back; `x` itself where `format` is None."""
    if format is None:
        return x
    if format.name != "int8":
        raise NotImplementedError(f"the numpy reference has no {format.name!r} codec for keys and values.")
    # Rounded as float32 numbers: a float32 stack must meet the same ties, or a code differs by one for no reason.
    groups = x.astype(np.float32).reshape(*x.shape[:-1], -1, format.group or x.shape[-1])
    scale = (np.abs(groups).max(-1, keepdims=True) / np.float32(127)).astype(format.scale).astype(np.float32)
    codes = np.clip(np.rint(groups / np.where(scale == 0, np.float32(1), scale)), -127, 127)
    return (codes.astype(np.float64) * scale.astype(np.float64)).reshape(x.shape)


def rms_norm(x: Float64, weight: Float64, eps: float) -> Float64:
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * weight


def rotary(theta: float, width: int, scaling: Llama3Rope | None = None, factor: float = 1.0) -> Rope:
    """The rotation of heads `[T, H, width]` at positions `[T]`; a pair is elements j and j + width/2."""
    frequency = theta ** (-np.arange(0, width, 2) / width) / factor
    if scaling is not None:
        turns = scaling.original_context * frequency / (2 * np.pi)  # within the context of the first training
        stay = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        stay = np.clip(stay, 0, 1)
        frequency = stay * frequency + (1 - stay) * frequency / scaling.factor

    def rope(x: Float64, positions: NDArray[np.int64]) -> Float64:
        turn = np.exp(1j * positions[:, None, None] * frequency)
        pairs = (x[..., : width // 2] + 1j * x[..., width // 2 :]) * turn
        return np.concatenate([pairs.real, pairs.imag], -1)

    return rope


def attention(q: Float64, k: Float64, v: Float64, rope: Rope, scale: float, window: Window | None, kv: Any) -> Float64:
    """Causal attention of q `[T, H, D]` over k and v `[T, K, D]`, as `[T, H * D]`."""
    length, heads, _ = q.shape
    at = np.arange(length)
    query, key = at[:, None], at[None, :]
    k, v = round_kv(rope(k, at), kv), round_kv(v, kv)
    k, v = (np.repeat(u, heads // u.shape[1], axis=1) for u in (k, v))
    scores = np.einsum("qhd,phd->hqp", rope(q, at), k)
    visible = key <= query
    if window is not None:
        # To a sink, a query is never further away than the window is long.
        near = np.einsum("qhd,phd->hqp", rope(q, np.minimum(at, window.size - 1)), k)
        scores = np.where(key < window.sinks, near, scores)
        visible = visible & ((key > query - window.size) | (key < window.sinks))
    scores = np.where(visible, scores * scale, -np.inf)
    weight = np.exp(scores - scores.max(-1, keepdims=True))
    weight = weight / weight.sum(-1, keepdims=True)
    return np.einsum("hqp,phd->qhd", weight, v).reshape(length, -1)


def llama(spec: Spec, weights: Mapping[str, Any], tokens: NDArray[np.int64]) -> Float64:
    c: Any = spec.config
    rope = rotary(c.rope_theta, c.head_dim, scaling=c.rope_scaling)
    embed = dequantize(weights["embed"])
    x = embed[tokens]
    for i in range(c.layers):
        p = {
            name: dequantize(weights[f"layers.{i}.{name}"])
            for name in (
                "attn_norm",
                "attn.q",
                "attn.k",
                "attn.v",
                "attn.o",
                "mlp_norm",
                "mlp.gate",
                "mlp.up",
                "mlp.down",
            )
        }
        h = rms_norm(x, p["attn_norm"], c.norm_eps)
        q, k, v = ((h @ p[name].T).reshape(len(x), -1, c.head_dim) for name in ("attn.q", "attn.k", "attn.v"))
        x = x + attention(q, k, v, rope, c.head_dim**-0.5, spec.window[i], spec.kv) @ p["attn.o"].T
        h = rms_norm(x, p["mlp_norm"], c.norm_eps)
        gate, up = h @ p["mlp.gate"].T, h @ p["mlp.up"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ p["mlp.down"].T
    x = rms_norm(x, dequantize(weights["final_norm"]), c.norm_eps)
    return x @ (dequantize(weights["head"]) if "head" in weights else embed).T


def gemma3(spec: Spec, weights: Mapping[str, Any], tokens: NDArray[np.int64]) -> Float64:
    c: Any = spec.config
    ropes = {
        True: rotary(c.local_rope_theta, c.head_dim),
        False: rotary(c.rope_theta, c.head_dim, factor=c.rope_factor),
    }

    def norm(u: Float64, weight: Float64) -> Float64:
        return rms_norm(u, 1 + weight, c.norm_eps)

    embed = dequantize(weights["embed"])
    x = embed[tokens] * np.sqrt(c.dim)
    for i in range(c.layers):
        p = {
            name: dequantize(weights[f"layers.{i}.{name}"])
            for name in (
                "attn_norm",
                "attn.q",
                "attn.k",
                "attn.v",
                "attn.o",
                "attn.q_norm",
                "attn.k_norm",
                "attn_out_norm",
                "mlp_norm",
                "mlp.gate",
                "mlp.up",
                "mlp.down",
                "mlp_out_norm",
            )
        }
        local = c.pattern[i % len(c.pattern)]  # says which rope; the window is the Spec's
        h = norm(x, p["attn_norm"])
        q, k, v = ((h @ p[name].T).reshape(len(x), -1, c.head_dim) for name in ("attn.q", "attn.k", "attn.v"))
        q, k = norm(q, p["attn.q_norm"]), norm(k, p["attn.k_norm"])
        h = attention(q, k, v, ropes[local], c.query_scale**-0.5, spec.window[i], spec.kv) @ p["attn.o"].T
        x = x + norm(h, p["attn_out_norm"])
        h = norm(x, p["mlp_norm"])
        gate, up = h @ p["mlp.gate"].T, h @ p["mlp.up"].T
        gate = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        x = x + norm((gate * up) @ p["mlp.down"].T, p["mlp_out_norm"])
    x = norm(x, dequantize(weights["final_norm"]))
    return x @ (dequantize(weights["head"]) if "head" in weights else embed).T


REFERENCES: dict[str, Callable[[Spec, Mapping[str, Any], NDArray[np.int64]], Float64]] = {
    "llama": llama,
    "gemma3": gemma3,
}
"""The reference of each family, by name: `(spec, weights, tokens[T]) -> logits[T, V]`. Add your own family's here."""


def reference(spec: Spec, weights: Mapping[str, Any], tokens: ArrayLike) -> Float64:
    """Logits `[T, V]` in float64 for one row of token ids.

    Args:
      spec: the stack; of it count family, config, window and kv, as cache, pages, kernels and program change no logit.
      weights: logical name -> array or QTensor, unstacked.
      tokens: `[T]` token ids.

    Raises:
      NotImplementedError: the family, or a format in it, has no reference.
    """
    if spec.family not in REFERENCES:
        raise NotImplementedError(
            f"the family {spec.family!r} has no numpy reference.\n"
            f"  fix: infopt.reference.REFERENCES[{spec.family!r}] = your function (spec, weights, tokens) -> logits"
        )
    return REFERENCES[spec.family](spec, weights, np.asarray(tokens, np.int64))
