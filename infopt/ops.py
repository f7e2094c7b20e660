"""The only dispatch: `linear`, `embed` and `attend` ask how a weight or a cache is stored; families never do."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np

from infopt import cache as kv
from infopt import hadamard
from infopt.errors import InfoptError
from infopt.kernels.decode_attention import decode_attention
from infopt.kernels.flash_attention import flash_attention
from infopt.kernels.flash_attention.sums import joined, with_sink_logits
from infopt.kernels.int_matmul import int_matmul
from infopt.masks import Late, sink_query_position
from infopt.qtensor import dequantize_array, is_qtensor, no_gradient, of_layer, planes, round_trip, split_planes, take
from infopt.spec import Codec, LinearRope, Llama3Rope, RopeScaling, TableRope, Window, YarnRope
from infopt.typing import Array, Float, Int

Rope = Callable[[Array, Array], Array]


LOOPS_IN_PLACE = jaxlib.version.__version_info__ < (0, 11)
"""Whether XLA's CPU code makes of a one-row `x @ w.T` a vector loop that reads a layer where it lies in the stack.

Measured, a step of SmolLM2-135M: 0.75 of the time that a copied slice and its library product take with jaxlib 0.10.2;
from 0.11.2 on the loop is no longer vectorised, and takes 2.3 times as long as they do.
"""


def _product(x: Array, w: Array, in_place: bool) -> Array:
    """x @ w.T, in the form that is fastest for one row: see `LOOPS_IN_PLACE`."""
    if in_place:
        return x @ w.T
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["weight", "gram", "peak"], meta_fields=["routed"])
@dataclasses.dataclass(frozen=True)
class Tapped:
    """A weight that tells what goes in, by the gradients of a sum over what `linear` gives.

    The gradient for `gram` (zeros `[I, I]`, one an expert where the weight is) is sum(x x^T), that for `peak` (zeros
    `[I]`) is max|x|, infinite where an x is not finite. So statistics of inputs leave any program that calls `linear`,
    through scans too. Each weight is multiplied by once. Of an expert only the tokens count whose result is used
    (`routed`).
    """

    weight: Any
    gram: Any
    peak: Any
    routed: bool = False


@functools.partial(jax.tree_util.register_dataclass, data_fields=["weight"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Turned:
    """A weight whose input is multiplied by the Hadamard matrix of its width first."""

    weight: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tap(routed: bool, x: Array, y: Array, gram: Array, peak: Array) -> Array:
    return y


def _tap_forward(routed: bool, x: Array, y: Array, gram: Array, peak: Array) -> tuple[Array, Array]:
    return y, x


def _tap_backward(routed: bool, x: Array, dy: Array) -> tuple[Array, Array, Array, Array]:
    seen = jnp.where(jnp.any(dy != 0, -1, keepdims=True), x, jnp.zeros_like(x)) if routed else x
    seen = seen.astype(jnp.float32)
    gram = jnp.matmul(seen.T, seen, precision=jax.lax.Precision.HIGHEST)
    finite = jnp.all(jnp.isfinite(seen), 0)  # XLA's maximum over many values may pass NaN by
    return jnp.zeros_like(x), dy, gram, jnp.where(finite, jnp.max(jnp.abs(seen), 0), jnp.inf)


_tap.defvjp(_tap_forward, _tap_backward)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["weight"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Straight:
    """A packed weight whose inputs are rounded, through which gradients go as if nothing were: statistics need them."""

    weight: Any


@jax.custom_vjp
def _straight(x: Array, w: Array, y: Array) -> Array:
    return y


_straight.defvjp(lambda x, w, y: (y, w), lambda w, dy: (dy @ w, jnp.zeros_like(w), jnp.zeros_like(dy)))


def linear(x: Float[Array, "*B I"], weights: Any, layer: Any = None, bias: Any = None) -> Any:
    """x @ w.T, for a weight `[O, I]` dense or packed, or for a tuple of weights that share their input.

    Where a packed weight's format says so (`Format.activations`), x is rounded too: `kernels.int_matmul`.

    Args:
      x: `[..., I]`.
      weights: an array or QTensor, or a tuple of them; with `layer`, stacks `[L, O, I]`.
      layer: which layer of the stacks, or (layer, expert) of `[L, E, O, I]`; None where `weights` is one layer.
      bias: added to it, `[O]` or stacks `[L, O]`; a tuple where `weights` is one.

    Returns:
      `[..., O]`, or a tuple of them.
    """
    if isinstance(weights, tuple):
        biases = (None,) * len(weights) if bias is None else bias
        return tuple(linear(x, w, layer, b) for w, b in zip(weights, biases, strict=True))
    if isinstance(weights, Turned):
        return linear(hadamard.turned(x), weights.weight, layer, bias)
    rows = x.reshape(-1, x.shape[-1])
    y: Any
    if is_qtensor(weights) and weights.format.activations is not None:
        y = int_matmul(no_gradient(rows), no_gradient(weights), layer)
        return _biased(y, bias, layer).reshape(*x.shape[:-1], -1)
    w = of_layer(weights, layer)
    if isinstance(w, Straight):
        y = _straight(rows, dequantize_array(w.weight, x.dtype), linear(jax.lax.stop_gradient(rows), w.weight))
        return _biased(y, bias, layer).reshape(*x.shape[:-1], -1)
    if isinstance(w, Tapped):
        own: Any = linear(rows, w.weight, None, None if bias is None else of_layer(bias, layer))
        y = _tap(w.routed, rows, own, w.gram, w.peak)
        return y.reshape(*x.shape[:-1], -1)
    if is_qtensor(w):
        w = no_gradient(w)
        parts = list(zip(split_planes(rows, w), planes(w), strict=True))
        in_place = LOOPS_IN_PLACE and len(parts) == 1  # unpacking nibbles inside the loop costs more than a copy
        y = functools.reduce(jnp.add, (_product(a, b.astype(x.dtype), in_place) for a, b in parts))
    else:
        y = _product(rows, w.astype(x.dtype), LOOPS_IN_PLACE)
    return _biased(y, bias, layer).reshape(*x.shape[:-1], -1)


def _biased(y: Array, bias: Any, layer: Any) -> Array:
    return y if bias is None else y + jnp.broadcast_to(of_layer(bias, layer).astype(y.dtype), y.shape)


def vector(stack: Any, layer: Any) -> Array:
    """One layer of vectors `[L, ...]`; itself where `layer` is None."""
    return of_layer(stack, layer)


def embed(table: Any, tokens: Int[Array, "*B"]) -> Float[Array, "*B D"]:
    """Rows of a table `[V, D]`, dense or packed."""
    if not is_qtensor(table):
        return table[tokens]
    if table.format.activations is not None:
        raise InfoptError(
            f"a table in {table.format} was looked up.",
            why="nothing multiplies by it, so that its inputs cannot be rounded.",
            fix="activations=None for it",
        )
    return dequantize_array(take(no_gradient(table), tokens))


def rms_norm(x: Float[Array, "*B D"], weight: Any, layer: Any, eps: float, offset: float = 0.0) -> Float[Array, "*B D"]:
    """x / sqrt(mean(x^2) + eps) * (weight + offset), in float32 (Zhang & Sennrich 2019)."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
    w = of_layer(weight, layer).astype(jnp.float32) + offset
    return (y * jnp.broadcast_to(w, y.shape)).astype(x.dtype)


def layer_norm(x: Float[Array, "*B D"], weight: Any, bias: Any, layer: Any, eps: float) -> Float[Array, "*B D"]:
    """(x - mean) / sqrt(variance + eps) * weight + bias, in float32 (Ba et al. 2016)."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, -1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
    w, b = (jnp.broadcast_to(of_layer(u, layer).astype(jnp.float32), y.shape) for u in (weight, bias))
    return (y * w + b).astype(x.dtype)


def route(
    x: Float[Array, "*B D"], router: Any, layer: Any, k: int, normalise: bool, bias: Any = None
) -> Float[Array, "*B E"]:
    """The share of each expert in each token: a softmax over all, of which the k likeliest stay (Jiang et al. 2024).

    Args:
      x: `[..., D]`.
      router: `[E, D]`, or with `layer` stacks of it.
      k: experts a token.
      normalise: whether the shares that stay are divided by their sum: then they are a softmax over the k alone.
      bias: added to the scores, `[E]`, or with `layer` stacks of it.
    """
    shares = jax.nn.softmax(linear(x, router, layer, bias).astype(jnp.float32), -1)
    top, chosen = jax.lax.top_k(shares, k)
    if normalise:
        top = top / jnp.sum(top, -1, keepdims=True)
    return jnp.sum(jax.nn.one_hot(chosen, shares.shape[-1], dtype=jnp.float32) * top[..., None], -2)


def split_heads(x: Float[Array, "B T HD"], width: int) -> Float[Array, "B T H D"]:
    return x.reshape(*x.shape[:-1], -1, width)


def join_heads(x: Float[Array, "B T H D"]) -> Float[Array, "B T HD"]:
    return x.reshape(*x.shape[:-2], -1)


def rope_frequencies(width: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Radians a position for each pair of a head's values, `[D / 2]`, float32."""
    f = theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    match scaling:
        case LinearRope():
            f = f / scaling.factor
        case TableRope():
            f = f / np.asarray(scaling.divisors)
        case Llama3Rope():
            turns = scaling.original_context * f / (2 * math.pi)
            blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
            blend = np.clip(blend, 0.0, 1.0)
            f = f * blend + f / scaling.factor * (1 - blend)
        case YarnRope():
            # the pair, as a real number, that turns so often within the original context
            first, last = (
                width * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))
                for turns in (scaling.beta_fast, scaling.beta_slow)
            )
            if scaling.truncate:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, width - 1)
            slowed = np.clip((np.arange(width // 2) - first) / max(last - first, 1e-3), 0.0, 1.0)
            f = f * (1 - slowed) + f / scaling.factor * slowed
        case None:
            pass
    return f.astype(np.float32)


def rope(
    x: Float[Array, "B T H D"],
    positions: Int[Array, "B T"],
    theta: float,
    *,
    scaling: RopeScaling | None = None,
    width: int | None = None,
) -> Float[Array, "B T H D"]:
    """Turn each pair (x[i], x[i + D/2]) by position * theta ** (-2i / D) (Su et al. 2021, "RoFormer", eq. 34).

    Args:
      x: queries or keys.
      positions: absolute positions.
      theta: base of the wavelengths.
      scaling: how wavelengths are stretched.
      width: the first so many values of a head are turned, the others stay; all of them by default.
    """
    width = x.shape[-1] if width is None else width
    f = jnp.asarray(rope_frequencies(width, theta, scaling))
    angle = positions.astype(jnp.float32)[:, :, None, None] * f.reshape(1, 1, 1, -1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if (size := getattr(scaling, "attention_factor", 1.0)) != 1.0:
        cos, sin = cos * jnp.float32(size), sin * jnp.float32(size)
    turned, rest = x[..., :width].astype(jnp.float32), x[..., width:]
    a, b = jnp.split(turned, 2, -1)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
    return turned if width == x.shape[-1] else jnp.concatenate([turned, rest], -1)


FLASH = "flash"
"""A Spec's attention where the platform and the shape choose the implementation."""
CACHED: dict[str, str | None] = {
    "reference": "xla",
    "blockwise": "blockwise",
    "pallas_tpu": "pallas_tpu",
    "pallas_gpu": "pallas_gpu",
    FLASH: None,
}
"""For a Spec's attention, what reads a cache."""


@dataclasses.dataclass(frozen=True)
class Context:
    """What is already bound when a family calls `attend`.

    Args:
      positions: `[B, T]` of the tokens given.
      keep: `[B, T]` which of them are real; the others are padding.
      lengths: `[B]` after them.
      window: the layer's.
      codec: of keys and values; None keeps them as they are.
      layout: of the layer's cache; None where there is no cache.
      table: `[B, pages]`, where the layout is paged.
      attention: which implementation computes it: a key of `CACHED`.
      straight: whether gradients go through the codec as if nothing were rounded, where there is no cache.
    """

    positions: Any
    keep: Any
    lengths: Any
    window: Window | None
    codec: Codec | None
    layout: kv.Layout | None = None
    table: Any = None
    attention: str = "reference"
    straight: bool = False


def attend(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    cache: Any,
    layer: Any,
    *,
    rope: Rope,
    scale: float,
    softcap: float | None = None,
    sink_logits: Float[Array, " H"] | None = None,
    context: Context,
) -> tuple[Array, Any]:
    """Causal attention of the tokens given over all that the row has seen; keys and values are stored on the way.

    Keys and values go through the codec before they are used, so that prefill in chunks, decoding and recomputation
    see the same numbers.

    Args:
      q: queries, not rotated yet.
      k, v: keys (not rotated yet) and values.
      cache: the whole stack's `(keys, values)`, or None.
      layer: index into the stack.
      rope: rotates queries and keys to positions.
      scale: multiplies scores.
      softcap: scores become softcap * tanh(score / softcap).
      sink_logits: one more score a head, neither scaled nor capped, that takes its share and has no value (OpenAI 2025,
        "gpt-oss-120b & gpt-oss-20b Model Card"). The sinks of a window are positions, and apart from it.
      context: bound by `build`.

    Returns:
      `[B, T, H, D]` and the cache.
    """
    c = context
    k = rope(k, c.positions)
    window, sunk = c.window, None
    if window is not None and window.sinks:
        sunk = rope(q, sink_query_position(c.positions, window))
    q = rope(q, c.positions)
    if c.codec is not None and c.codec.rotate:
        q, k, sunk = rotated(q), rotated(k), None if sunk is None else rotated(sunk)
    how: dict[str, Any] = dict(scale=scale, softcap=softcap, sink_queries=sunk)
    if c.codec is not None and c.codec.split:
        out, lse, cache = _attend_late(q, k, v, cache, layer, c, c.codec, how)
        return (out if sink_logits is None else with_sink_logits(out, lse, sink_logits)), cache
    how["sink_logits"] = sink_logits
    form = None if c.codec is None else c.codec.format
    if c.layout is None:
        k, v = _rounded(c, lambda *x: tuple(round_trip(each, form) for each in x), k, v)
        return _recomputed(q, k, v, window, c, how), cache
    keys, values = (
        kv.write(old, kv.encode(new, form), layer, c.layout, c.table, c.positions, c.keep)
        for old, new in zip(cache, (k, v), strict=True)
    )
    return _cached(q, keys, values, layer, c.layout, k.shape[2], c, how), (keys, values)


def _rounded(c: Context, rounds: Callable[..., Any], *x: Array) -> Any:
    if not c.straight:
        return rounds(*x)
    still = [jax.lax.stop_gradient(each) for each in x]
    return tuple(each + (new - old) for each, old, new in zip(x, still, rounds(*still), strict=True))


def _recomputed(q: Array, k: Array, v: Array, window: Window | None, c: Context, how: dict[str, Any]) -> Any:
    return flash_attention(
        q, k, v, window=window.size if window else None, sinks=window.sinks if window else 0,
        positions=(c.positions, jnp.where(c.keep, c.positions, -1)),
        implementation=None if c.attention == FLASH else c.attention, **how,
    )  # fmt: skip


def _cached(
    q: Array, keys: Any, values: Any, layer: Any, layout: kv.Layout, heads: int, c: Context, how: dict[str, Any]
) -> Any:
    return decode_attention(
        q, keys, values, jnp.asarray(layer, jnp.int32), layout=layout, heads=heads, positions=c.positions,
        lengths=c.lengths, table=c.table if layout.page is not None else None, implementation=CACHED[c.attention],
        **how,
    )  # fmt: skip


def _attend_late(
    q: Array, k: Array, v: Array, cache: Any, layer: Any, c: Context, codec: Codec, how: dict[str, Any]
) -> tuple[Array, Array, Any]:
    """Over the groups that a query sees rounded, and over the tokens that it sees as they were computed.

    Which are which depends on positions alone (`masks.Late`), so that chunks, decoding and recomputation agree.
    """
    heads, found = k.shape[2], []
    if c.layout is not None:
        assert c.layout.recent is not None
        recent = tuple(
            kv.write(old, kv.encode(new, None), layer, c.layout.recent, None, c.positions, c.keep)
            for old, new in zip(cache[2:], (k, v), strict=True)
        )
        groups, number, whole = kv.completed(recent, layer, c.layout, heads, c.positions, c.lengths)
        rounded = tuple(
            kv.write(old, new, layer, c.layout, c.table, number, whole)
            for old, new in zip(cache[:2], kv.encode_groups(*groups, codec), strict=True)
        )
        cache = rounded + recent
    for share in (Late(codec.split, codec.tail, rounded=True), Late(codec.split, codec.tail, rounded=False)):
        part = how | dict(late=share, return_lse=True)
        if c.layout is None:
            keys, values = _rounded(c, lambda k, v: kv.round_groups(k, v, codec), k, v) if share.rounded else (k, v)
            found.append(_recomputed(q, keys, values, share.window(c.window), c, part))
        else:
            keys, values = cache[:2] if share.rounded else cache[2:]
            layout = None if share.rounded else c.layout.recent
            found.append(_cached(q, keys, values, layer, layout or c.layout, heads, c, part))
    outs, sums = zip(*found, strict=True)
    out, lse = joined(jnp.stack(outs), jnp.stack(sums), 0)
    return out.astype(q.dtype), lse, cache


def rotated(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """x times the orthonormal Hadamard matrix, which spreads an outlier over all channels and keeps products.

    As QuaRot turns keys after their rope (Ashkboos et al. 2024, "QuaRot", section 4). D is a power of two.
    """
    return hadamard.turned(x)


def random_weights(key: Array, shapes: dict[str, tuple[int, ...]], norm: float = 1.0) -> dict[str, Array]:
    """Normal weights: matrices by 1 / sqrt(fan-in), norms near `norm`, biases near 0."""
    keys = jax.random.split(key, len(shapes))
    return {
        name: jax.random.normal(k, shape, jnp.float32) * shape[-1] ** -0.5
        if len(shape) > 1
        else (0.0 if name.endswith("bias") else norm) + 0.1 * jax.random.normal(k, shape, jnp.float32)
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
