"""Every family once more, in plain float64 numpy: what the composition contract measures every stack against.

It shares no code with the stacks: masks, sinks, rope, codec and unpacking are written here a second time, because an
oracle that shares them cannot see a mistake in them. One row of tokens, no cache, no batch, nothing compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from infopt.spec import Spec, Window

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


def rotary(theta: float, width: int, scaling: Any = None) -> Rope:
    """The rotation of heads `[T, H, D]` at positions `[T]`; a pair is elements j and j + width/2, the rest stays."""
    frequency, size = theta ** (-np.arange(0, width, 2) / width), 1.0
    kind = getattr(scaling, "kind", None)
    if kind == "linear":
        frequency = frequency / scaling.factor
    if kind == "table":
        frequency, size = frequency / np.array(scaling.divisors), scaling.attention_factor
    if kind == "llama3":
        turns = scaling.original_context * frequency / (2 * np.pi)  # within the context of the first training
        stay = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        stay = np.clip(stay, 0, 1)
        frequency = stay * frequency + (1 - stay) * frequency / scaling.factor
    if kind == "yarn":
        size = scaling.attention_factor
        # Where theta ** (-2j / width) * context / (2 pi) is beta: j of the pair that turns beta times.
        fast, slow = (
            width / 2 * np.log(scaling.original_context / (2 * np.pi * beta)) / np.log(theta)
            for beta in (scaling.beta_fast, scaling.beta_slow)
        )
        if scaling.truncate:
            fast, slow = np.floor(fast), np.ceil(slow)
        fast, slow = max(fast, 0), min(slow, width - 1)
        stay = 1 - np.clip((np.arange(width // 2) - fast) / (slow - fast if slow > fast else 1e-3), 0, 1)
        frequency = stay * frequency + (1 - stay) * frequency / scaling.factor

    def rope(x: Float64, positions: NDArray[np.int64]) -> Float64:
        turn = size * np.exp(1j * positions[:, None, None] * frequency)
        pairs = (x[..., : width // 2] + 1j * x[..., width // 2 : width]) * turn
        return np.concatenate([pairs.real, pairs.imag, x[..., width:]], -1)

    return rope


def unrotated(x: Float64, positions: NDArray[np.int64]) -> Float64:
    return x


def attention(
    q: Float64,
    k: Float64,
    v: Float64,
    rope: Rope,
    scale: float,
    window: Window | None,
    kv: Any,
    cap: float | None = None,
) -> Float64:
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
    scores = scores * scale
    if cap is not None:
        scores = cap * np.tanh(scores / cap)
    scores = np.where(visible, scores, -np.inf)
    weight = np.exp(scores - scores.max(-1, keepdims=True))
    weight = weight / weight.sum(-1, keepdims=True)
    return np.einsum("hqp,phd->qhd", weight, v).reshape(length, -1)


class Layer:
    """One layer's weights in float64, each read once."""

    def __init__(self, weights: Mapping[str, Any], i: int) -> None:
        start = f"layers.{i}."
        self.values = {n.removeprefix(start): dequantize(w) for n, w in weights.items() if n.startswith(start)}

    def __getitem__(self, name: str) -> Float64:
        return self.values[name]

    def linear(self, x: Float64, name: str) -> Float64:
        y = x @ self[name].T
        return y + self[f"{name}_bias"] if f"{name}_bias" in self.values else y

    def heads(self, x: Float64, name: str, width: int) -> Float64:
        return self.linear(x, name).reshape(len(x), -1, width)


def silu(x: Float64) -> Float64:
    return x / (1 + np.exp(-x))


def gelu(x: Float64) -> Float64:
    """The tanh approximation (Hendrycks & Gimpel 2016)."""
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def mixture(p: Layer, h: Float64, k: int, normalise: bool) -> Float64:
    """Each token through the k experts that its router likes best."""
    score = h @ p["mlp.router"].T
    share = np.exp(score - score.max(-1, keepdims=True))
    share = share / share.sum(-1, keepdims=True)
    out = np.zeros_like(h)
    for t, token in enumerate(h):
        best = np.argsort(-share[t])[:k]
        total = share[t, best].sum() if normalise else 1.0
        for e in best:
            gate, up = p["mlp.experts.gate"][e] @ token, p["mlp.experts.up"][e] @ token
            out[t] += share[t, e] / total * (p["mlp.experts.down"][e] @ (silu(gate) * up))
    return out


def decoder(
    spec: Spec, weights: Mapping[str, Any], tokens: NDArray[np.int64], rope_of: Callable[[int], Rope]
) -> Float64:
    """Llama and its relatives, by each layer's rope: biases, norms on queries and keys, experts where there are any."""
    c: Any = spec.config
    embed = dequantize(weights["embed"])
    x = embed[tokens]
    for i in range(c.layers):
        p = Layer(weights, i)
        h = rms_norm(x, p["attn_norm"], c.norm_eps)
        q, k, v = (p.heads(h, f"attn.{n}", c.head_dim) for n in "qkv")
        if "attn.q_norm" in p.values:
            q, k = rms_norm(q, p["attn.q_norm"], c.norm_eps), rms_norm(k, p["attn.k_norm"], c.norm_eps)
        x = x + p.linear(attention(q, k, v, rope_of(i), c.head_dim**-0.5, spec.window[i], spec.kv), "attn.o")
        h = rms_norm(x, p["mlp_norm"], c.norm_eps)
        if "mlp.router" in p.values:
            x = x + mixture(p, h, c.experts_used, getattr(c, "normalise", True))
        else:
            x = x + p.linear(silu(p.linear(h, "mlp.gate")) * p.linear(h, "mlp.up"), "mlp.down")
    x = rms_norm(x, dequantize(weights["final_norm"]), c.norm_eps)
    return x @ (dequantize(weights["head"]) if "head" in weights else embed).T


def llama(spec: Spec, weights: Mapping[str, Any], tokens: NDArray[np.int64]) -> Float64:
    c: Any = spec.config
    rope = rotary(c.rope_theta, getattr(c, "rotated", None) or c.head_dim, c.rope_scaling)
    return decoder(spec, weights, tokens, lambda i: rope)


def smollm3(spec: Spec, weights: Mapping[str, Any], tokens: NDArray[np.int64]) -> Float64:
    """Some layers do not turn."""
    c: Any = spec.config
    rope = rotary(c.rope_theta, c.head_dim, c.rope_scaling)
    return decoder(spec, weights, tokens, lambda i: rope if c.rotated[i % len(c.rotated)] else unrotated)


def gemma(spec: Spec, weights: Mapping[str, Any], tokens: NDArray[np.int64]) -> Float64:
    """Gemma 2 and 3: the former caps scores and logits, the latter norms queries and keys and has two ropes."""
    c: Any = spec.config
    everywhere = rotary(c.rope_theta, c.head_dim, c.rope_scaling)

    def norm(u: Float64, weight: Float64) -> Float64:
        return rms_norm(u, 1 + weight, c.norm_eps)

    embed = dequantize(weights["embed"])
    x = embed[tokens] * np.sqrt(c.dim)
    for i in range(c.layers):
        p, rope, cap = Layer(weights, i), everywhere, None
        q, k, v = (p.heads(norm(x, p["attn_norm"]), f"attn.{n}", c.head_dim) for n in "qkv")
        if spec.family == "gemma3":
            q, k = norm(q, p["attn.q_norm"]), norm(k, p["attn.k_norm"])
            if c.pattern[i % len(c.pattern)]:  # says which rope; the window is the Spec's
                rope = rotary(c.local_rope_theta, c.head_dim)
        else:
            cap = c.score_cap
        h = attention(q, k, v, rope, c.query_scale**-0.5, spec.window[i], spec.kv, cap)
        x = x + norm(p.linear(h, "attn.o"), p["attn_out_norm"])
        h = norm(x, p["mlp_norm"])
        h = p.linear(gelu(p.linear(h, "mlp.gate")) * p.linear(h, "mlp.up"), "mlp.down")
        x = x + norm(h, p["mlp_out_norm"])
    x = norm(x, dequantize(weights["final_norm"]))
    y = x @ (dequantize(weights["head"]) if "head" in weights else embed).T
    cap = getattr(c, "logit_cap", None)
    return y if cap is None else cap * np.tanh(y / cap)


def gpt2(spec: Spec, weights: Mapping[str, Any], tokens: NDArray[np.int64]) -> Float64:
    c: Any = spec.config

    def norm(u: Float64, weight: Float64, bias: Float64) -> Float64:
        u = u - u.mean(-1, keepdims=True)
        return u / np.sqrt(u.var(-1, keepdims=True) + c.norm_eps) * weight + bias

    embed = dequantize(weights["embed"])
    x = embed[tokens] + dequantize(weights["positions"])[: len(tokens)]
    for i in range(c.layers):
        p = Layer(weights, i)
        h = norm(x, p["attn_norm"], p["attn_norm_bias"])
        q, k, v = (p.heads(h, f"attn.{n}", c.head_dim) for n in "qkv")
        x = x + p.linear(attention(q, k, v, unrotated, c.head_dim**-0.5, spec.window[i], spec.kv), "attn.o")
        h = norm(x, p["mlp_norm"], p["mlp_norm_bias"])
        x = x + p.linear(gelu(p.linear(h, "mlp.up")), "mlp.down")
    x = norm(x, dequantize(weights["final_norm"]), dequantize(weights["final_norm_bias"]))
    return x @ (dequantize(weights["head"]) if "head" in weights else embed).T


REFERENCES: dict[str, Callable[[Spec, Mapping[str, Any], NDArray[np.int64]], Float64]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3", "mixtral", "qwen3_moe"), llama),
    "smollm3": smollm3,
    "gemma2": gemma,
    "gemma3": gemma,
    "gpt2": gpt2,
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
