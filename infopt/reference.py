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


NORMAL_QUANTILES = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
)  # fmt: skip


def e2m1(code: Float64) -> Float64:
    """A 4-bit float: a sign, two bits of exponent, one of mantissa; without a leading 1 where the exponent is 0."""
    exponent, mantissa = code // 2 % 4, code % 2
    size = np.where(exponent == 0, mantissa / 2, (1 + mantissa / 2) * 2.0 ** (exponent - 1))
    return np.where(code >= 8, -size, size)


LEVELS: dict[str, tuple[int, Callable[[Float64], Float64]]] = {
    **{name: (8, lambda code: code) for name in ("int8", "q8_0", "fp8_e4m3", "fp8_e5m2")},
    **{name: (16, lambda code: code) for name in ("fp16", "bf16")},
    **{name: (4, lambda code: code - 8) for name in ("int4", "int4_absmax", "q4_0")},
    **{name: (4, lambda code: code) for name in ("int4_min", "int4_zero", "q4_1")},
    "int8_zero": (8, lambda code: code),
    "int2_min": (2, lambda code: code),
    "int2_zero": (2, lambda code: code),
    **dict.fromkeys(("mxfp4", "nvfp4"), (4, e2m1)),
    "nf4": (4, lambda code: NORMAL_QUANTILES[code.astype(int)]),
    "int6": (6, lambda code: code - 32),
    "int5": (5, lambda code: code - 16),
    "int3": (3, lambda code: code - 4),
    "int2": (2, lambda code: code - 2),
    "q4_k": (4, lambda code: code),
    "q5_k": (5, lambda code: code),
    "q6_k": (6, lambda code: code - 32),
}
"""Of each format, the bits of a code and what a code stands for. Add your own format's here."""


SUBGROUPS = {"q4_k": (8, 6), "q5_k": (8, 6), "q6_k": (16, 8)}
"""Of a format with sub-groups: how many a group has, and the bits of a number of theirs."""


def unpack(codes: NDArray[Any], bits: int, group: int) -> Float64:
    """Codes `[..., groups, group]` out of the bytes of words, bit by bit."""
    if bits >= 8:
        return codes.astype(np.float64).reshape(*codes.shape[:-1], -1, group)
    each = {2: 4, 3: 8, 4: 2, 5: 8, 6: 4}[bits]  # codes in a word
    words = codes.reshape(*codes.shape[:-1], -1, each * bits // 8, group // each)
    stream = np.unpackbits(np.moveaxis(words, -2, -1), axis=-1, bitorder="little")
    values = stream.reshape(*stream.shape[:-1], each, bits) @ 2.0 ** np.arange(bits)
    return np.moveaxis(values, -1, -2).reshape(*codes.shape[:-1], -1, group)


def dequantize(weight: Any) -> Float64:
    """The values that a weight stands for.

    Args:
      weight: a dense array, or anything with a QTensor's fields: `codes`, `scale`, `minimum`, `zero`, `outer`,
        `inner`, `format`, `shape`.
    """
    if getattr(weight, "codes", None) is None:
        return np.asarray(weight).astype(np.float64)
    codes, width, name = np.asarray(weight.codes), weight.shape[-1], weight.format.name
    if name not in LEVELS:
        raise NotImplementedError(f"the numpy reference cannot read weights in the format {name!r}.")
    bits, level = LEVELS[name]
    values = level(unpack(codes, bits, weight.format.group or codes.shape[-1] * 8 // (bits if bits < 8 else 8)))

    def part(name: str) -> Float64 | None:
        x = getattr(weight, name, None)
        return None if x is None else np.asarray(x).astype(np.float64)[..., None]

    scale, minimum, zero, outer = map(part, ("scale", "minimum", "zero", "outer"))
    if name in SUBGROUPS:
        count, bits = SUBGROUPS[name]
        numbers = unpack(np.asarray(weight.inner), bits, 16)
        assert scale is not None
        scale = np.repeat(scale * numbers[..., :count], values.shape[-1] // count, -1)
        if minimum is not None:
            minimum = np.repeat(minimum * numbers[..., count:], values.shape[-1] // count, -1)
    values = values if zero is None else values - zero
    values = values if scale is None else values * (scale if outer is None else scale * outer)
    values = values if minimum is None else values + minimum
    return values.reshape(*codes.shape[:-1], -1)[..., :width]


def round_kv(x: Float64, format: Any) -> Float64:
    """Keys or values `[..., D]` rounded to a format by groups of the last axis; `x` itself where there is none."""
    if format is None:
        return x
    if format.name not in ("int8", "int4_min", "int2_min"):
        raise NotImplementedError(f"the numpy reference has no {format.name!r} codec for keys and values.")
    # Rounded as float32 numbers: a float32 stack must meet the same ties, or a code differs by one for no reason.
    groups = x.astype(np.float32).reshape(*x.shape[:-1], -1, format.group or x.shape[-1])
    low, levels = np.float32(0), np.float32(127)
    reach = np.abs(groups).max(-1, keepdims=True)
    if format.name != "int8":
        low, levels = groups.min(-1, keepdims=True).astype(format.scale).astype(np.float32), np.float32(15)
        levels = np.float32(3) if format.name == "int2_min" else levels
        reach = groups.max(-1, keepdims=True) - low
    scale = (reach * (1 / levels)).astype(format.scale).astype(np.float32)
    codes = np.rint((groups - low) * (1 / np.where(scale == 0, np.float32(1), scale)))
    codes = np.clip(codes, -levels if format.name == "int8" else 0, levels)
    return (codes.astype(np.float64) * scale.astype(np.float64) + low.astype(np.float64)).reshape(x.shape)


def round_keys(k: Float64, codec: Any) -> Float64:
    """Keys `[T, K, D]` as a cache gives them back: each channel by groups of tokens, of which the last may stay."""
    if not codec.split:
        return round_kv(k, codec.format)
    k = k.copy()
    for first in range(0, len(k) - codec.split + 1, codec.split):
        group = k[first : first + codec.split]
        k[first : first + codec.split] = round_kv(group.transpose(1, 2, 0), codec.keys).transpose(2, 0, 1)
    return k


def hadamard(width: int) -> Float64:
    """The orthonormal Hadamard matrix, by doubling; where 3 divides the width, of Paley's matrix of order 12."""
    h = np.ones((1, 1))
    if width % 3 == 0:
        i, j = np.indices((11, 11))
        q = np.where(i == j, 0.0, np.where(pow(i - j, 5) % 11 == 1, 1, -1))  # Euler: the squares modulo 11
        h = np.eye(12) + np.block([[np.zeros((1, 1)), np.ones((1, 11))], [-np.ones((11, 1)), q]])
    while len(h) < width:
        h = np.kron(h, [[1, 1], [1, -1]])
    if len(h) != width:
        raise NotImplementedError(f"the numpy reference has no Hadamard matrix of order {width}.")
    return h / np.sqrt(width)


def rounded_inputs(x: Float64, weight: Any, expert: int = 0) -> Float64:
    """`x` `[..., I]` as a weight is multiplied by it: rounded to 8 bits a row, where its format says so."""
    if getattr(getattr(weight, "format", None), "activations", None) is None:
        return x
    # As float32 numbers, for round_kv's reason.
    rows = x.astype(np.float32)
    most = np.abs(rows).max(-1, keepdims=True)
    if weight.format.static:
        most = np.full_like(most, np.asarray(weight.input).reshape(-1)[expert])
    some = most >= np.float32(2.0**-119)
    codes = np.rint(rows * (np.float32(127) / np.where(some, most, np.float32(1))))
    scale = np.where(some, most * np.float32(1 / 127), np.float32(0))
    return np.clip(codes, -127, 127).astype(np.float64) * scale.astype(np.float64)


def product(x: Float64, weight: Any) -> Float64:
    """x @ w.T, for a weight as it is stored."""
    return rounded_inputs(x, weight) @ dequantize(weight).T


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
    sinks: Float64 | None = None,
) -> Float64:
    """Causal attention of q `[T, H, D]` over k and v `[T, K, D]`, as `[T, H * D]`.

    `sinks` `[H]` are one more score of each query, whose value is 0.
    """
    length, heads, width = q.shape
    at = np.arange(length)
    query, key = at[:, None], at[None, :]
    turn = hadamard(width) if kv is not None and kv.rotate else np.eye(width)
    k = rope(k, at) @ turn
    kept = [(k, v)] if kv is None else [(round_keys(k, kv), round_kv(v, kv.format)), (k, v)]
    kept = [[np.repeat(u, heads // u.shape[1], axis=1) for u in pair] for pair in kept]
    is_rounded = np.full((length, length), True)
    if kv is not None and kv.split:
        for p in range(length):
            for j in range(p + 1):
                after = p + 1 - (j - j % kv.split + kv.split)  # tokens that have followed the group
                is_rounded[p, j] = after >= kv.tail

    def products(queries: Float64) -> Float64:
        of = [np.einsum("qhd,phd->hqp", queries @ turn, keys) for keys, _ in kept]
        return np.where(is_rounded, of[0], of[-1])

    scores = products(rope(q, at))
    visible = key <= query
    if window is not None:
        # To a sink, a query is never further away than the window is long.
        scores = np.where(key < window.sinks, products(rope(q, np.minimum(at, window.size - 1))), scores)
        visible = visible & ((key > query - window.size) | (key < window.sinks))
    scores = scores * scale
    if cap is not None:
        scores = cap * np.tanh(scores / cap)
    scores = np.where(visible, scores, -np.inf)
    if sinks is not None:
        scores = np.append(scores, np.tile(sinks[:, None, None], (1, length, 1)), -1)
    weight = np.exp(scores - scores.max(-1, keepdims=True))
    weight = weight / weight.sum(-1, keepdims=True)
    weight = weight[..., :length]
    out = np.einsum("hqp,phd->qhd", np.where(is_rounded, weight, 0), kept[0][1])
    out = out + np.einsum("hqp,phd->qhd", np.where(is_rounded, 0, weight), kept[-1][1])
    return out.reshape(length, -1)


class Layer:
    """One layer's weights in float64, each read once."""

    def __init__(self, weights: Mapping[str, Any], i: int) -> None:
        start = f"layers.{i}."
        self.stored = {n.removeprefix(start): w for n, w in weights.items() if n.startswith(start)}
        self.values = {n: dequantize(w) for n, w in self.stored.items()}

    def __getitem__(self, name: str) -> Float64:
        return self.values[name]

    def product(self, x: Float64, name: str) -> Float64:
        return rounded_inputs(x, self.stored[name]) @ self[name].T

    def expert(self, x: Float64, name: str, e: int) -> Float64:
        name = f"mlp.experts.{name}"
        return self[name][e] @ rounded_inputs(x, self.stored[name], e)

    def linear(self, x: Float64, name: str) -> Float64:
        y = self.product(x, name)
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
    score = p.product(h, "mlp.router")
    share = np.exp(score - score.max(-1, keepdims=True))
    share = share / share.sum(-1, keepdims=True)
    out = np.zeros_like(h)
    for t, token in enumerate(h):
        best = np.argsort(-share[t])[:k]
        total = share[t, best].sum() if normalise else 1.0
        for e in best:
            gate, up = p.expert(token, "gate", e), p.expert(token, "up", e)
            out[t] += share[t, e] / total * p.expert(silu(gate) * up, "down", e)
    return out


def clamped_mixture(p: Layer, h: Float64, c: Any) -> Float64:
    """Each token through the best-scored experts, whose shares are a softmax over these alone."""
    scores, out = p.linear(h, "mlp.router"), np.zeros_like(h)

    def expert(name: str, e: int, x: Float64) -> Float64:
        return p.expert(x, name, e) + p[f"mlp.experts.{name}_bias"][e]

    for t, token in enumerate(h):
        best = np.argsort(-scores[t])[: c.experts_used]
        shares = np.exp(scores[t, best] - scores[t, best].max())
        for share, e in zip(shares / shares.sum(), best):
            gate = np.minimum(expert("gate", e, token), c.swiglu_limit)
            up = np.maximum(np.minimum(expert("up", e, token), c.swiglu_limit), -c.swiglu_limit)
            out[t] += share * expert("down", e, (up + 1) * gate / (1 + np.exp(-c.swiglu_alpha * gate)))
    return out


def decoder(
    spec: Spec, weights: Mapping[str, Any], tokens: NDArray[np.int64], rope_of: Callable[[int], Rope]
) -> Float64:
    """Llama and its relatives, by each layer's rope: biases, norms on queries and keys, sinks, experts."""
    c: Any = spec.config
    embed = dequantize(weights["embed"])
    x = embed[tokens]
    for i in range(c.layers):
        p = Layer(weights, i)
        for name in spec.online:
            p.values[name] = p[name] @ hadamard(p[name].shape[-1]).T
        h = rms_norm(x, p["attn_norm"], c.norm_eps)
        q, k, v = (p.heads(h, f"attn.{n}", c.head_dim) for n in "qkv")
        if "attn.q_norm" in p.values:
            q, k = rms_norm(q, p["attn.q_norm"], c.norm_eps), rms_norm(k, p["attn.k_norm"], c.norm_eps)
        sinks = p["attn.sinks"] if "attn.sinks" in p.values else None
        h = attention(q, k, v, rope_of(i), c.head_dim**-0.5, spec.window[i], spec.kv, sinks=sinks)
        x = x + p.linear(h, "attn.o")
        h = rms_norm(x, p["mlp_norm"], c.norm_eps)
        if "mlp.experts.gate_bias" in p.values:
            x = x + clamped_mixture(p, h, c)
        elif "mlp.router" in p.values:
            x = x + mixture(p, h, c.experts_used, getattr(c, "normalise", True))
        else:
            x = x + p.linear(silu(p.linear(h, "mlp.gate")) * p.linear(h, "mlp.up"), "mlp.down")
    x = rms_norm(x, dequantize(weights["final_norm"]), c.norm_eps)
    return product(x, weights.get("head", embed))


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
    y = product(x, weights.get("head", embed))
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
    return product(x, weights.get("head", embed))


REFERENCES: dict[str, Callable[[Spec, Mapping[str, Any], NDArray[np.int64]], Float64]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3", "mixtral", "qwen3_moe", "gpt_oss"), llama),
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
