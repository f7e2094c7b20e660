"""`flash_attention`: one signature for all implementations, what each can serve, and the gradient that they share."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from infopt.errors import InfoptError
from infopt.kernels.flash_attention import blockwise, pallas_gpu, pallas_tpu, portable, reference
from infopt.kernels.flash_attention.options import Options, Places
from infopt.kernels.flash_attention.sums import with_sink_logits
from infopt.kernels.platforms import Implementation, check_served, run, runs_on
from infopt.masks import Late
from infopt.typing import Array

IMPLEMENTATIONS: dict[str, Implementation] = {
    "reference": Implementation(reference.forward),
    "blockwise": Implementation(blockwise.forward),
    "pallas_tpu": Implementation(pallas_tpu.forward, ("tpu",), pallas_tpu.refuses),
    "pallas_gpu": Implementation(pallas_gpu.forward, ("gpu",), pallas_gpu.refuses),
}
"""By name: `forward(q, sink_q, k, v, places, o) -> (out, lse)`, `refuses(q, k, v, o)`."""


def available(platform: str | None = None) -> list[str]:
    """The names of the implementations that run compiled on a platform, the default backend's by default."""
    return runs_on(IMPLEMENTATIONS, platform)


def flash_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
    sink_queries: Array | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    lengths: Array | None = None,
    offsets: Array | None = None,
    segments: tuple[Array, Array] | None = None,
    positions: tuple[Array, Array] | None = None,
    sink_logits: Array | None = None,
    late: Late | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    interpret: bool = False,
) -> Any:
    """softmax(scale * q k^T, masked) v, without keeping the scores (Dao et al. 2022, "FlashAttention").

        lse = log sum_s exp(score_s);  out = sum_s exp(score_s - lse) v_s

    A query that sees no key gives zeros, and a log-sum-exp of -inf. Differentiable in q, k, v, `sink_queries` and
    `sink_logits`: the backward pass computes the scores again by block, whatever the implementation.

    Args:
      q: queries `[B, T, H, D]`.
      k, v: keys `[B, S, K, D]` and values `[B, S, K, E]`; K divides H, and no key is repeated for it.
      causal: whether a query sees no key after it.
      window: positions back that a query sees, itself included; None: all.
      sinks: first positions that every query sees beside its window.
      sink_queries: `[B, T, H, D]`, the queries as they look at sinks (rotated to another position, say); q by default.
      softcap: scores become softcap * tanh(score / softcap).
      scale: multiplies scores; 1 / sqrt(D) by default.
      lengths: `[B]` keys of each row that are real; all by default.
      offsets: `[B]` position of each row's first query, that of its first key being 0; 0 by default.
      segments: ids `[B, T]` and `[B, S]`: a query sees only keys of its own id.
      positions: `[B, T]` and `[B, S]` in place of `offsets` and `lengths`; -1 is an empty key, seen by nobody. A
        position below `sinks` must stand in the place of that number.
      sink_logits: `[H]`: one more score a head that has no value (as gpt-oss learns it).
      late: of keys that are rounded late, which ones these are (`infopt.masks.Late`); `sums.joined` joins the two.
      return_lse: whether to return the log-sum-exp `[B, T, H]` too (without the sink logits).
      implementation: a name in `IMPLEMENTATIONS`; None takes what suits the platform and the shape.
      interpret: run a Pallas kernel in Pallas' interpreter, on any platform.

    Returns:
      `[B, T, H, E]` in the dtype of q; with `return_lse` a pair, the second float32.

    Raises:
      InfoptError: shapes that do not fit, an implementation that is not there, or that cannot serve this platform or
        shape (it names one that can).

    >>> import jax, jax.numpy as jnp
    >>> q, k = jnp.ones((1, 3, 4, 8)), jnp.ones((1, 3, 2, 8))
    >>> flash_attention(q, k, k, window=2).shape
    (1, 3, 4, 8)
    """
    _check_shapes(q, k, v, sink_queries, segments, positions, lengths, offsets, sink_logits)
    if (window is not None and (window != int(window) or window < 1 or sinks > window)) or sinks < 0:
        raise InfoptError(
            f"flash_attention(window={window}, sinks={sinks})",
            why="a query sees at least itself, and a window holds its sinks.",
            fix="window >= max(1, sinks), sinks >= 0",
        )
    if (sinks and window is None) or (sink_queries is not None and not sinks):
        raise InfoptError(
            f"flash_attention(sinks={sinks}, window={window})" + ", sink_queries" * (sink_queries is not None),
            why="sinks are what a query sees beside its window, and their queries look at nothing else.",
            fix="a window, or neither sinks nor sink_queries",
        )
    if softcap is not None and not softcap > 0:
        raise InfoptError(
            f"flash_attention(softcap={softcap}).", why="scores are divided by it.", fix="softcap > 0, or None"
        )
    if interpret and implementation is None:
        raise InfoptError(
            "flash_attention(interpret=True) names no kernel.",
            why="what suits this platform is no kernel of Pallas.",
            fix="implementation='pallas_tpu' or 'pallas_gpu'",
        )
    o = Options(
        scale=float(q.shape[-1] ** -0.5 if scale is None else scale), causal=causal, window=window,
        sinks=sinks, softcap=None if softcap is None else float(softcap), late=late,
    )  # fmt: skip
    if positions is None:
        positions = _positions(q, k, lengths, offsets)
    query, key = (x.astype(jnp.int32) for x in positions)
    places = Places(query, key, segments and segments[0], segments and segments[1])
    if implementation is not None:
        what = f"q {tuple(q.shape)}, k {tuple(k.shape)}"
        check_served(IMPLEMENTATIONS, implementation, "flash attention", (q, k, v, o), what, "blockwise")
    if q.size == 0 or k.size == 0:  # nobody asks, or nothing is seen
        out = jnp.zeros((*q.shape[:3], v.shape[3]), q.dtype)
        lse = jnp.full(q.shape[:3], -jnp.inf, jnp.float32)
    elif implementation == "reference":  # which JAX differentiates by itself, forwards too
        out, lse = reference.forward(q, sink_queries, k, v, places, o)
    else:
        out, lse = _core(q, sink_queries, k, v, places, o, implementation, interpret)
    if sink_logits is not None:
        out = with_sink_logits(out, lse, sink_logits)
    return (out, lse) if return_lse else out


def _positions(q: Array, k: Array, lengths: Any, offsets: Any) -> tuple[Array, Array]:
    batch, t, s = q.shape[0], q.shape[1], k.shape[1]
    at, query = jnp.arange(s, dtype=jnp.int32)[None], jnp.arange(t, dtype=jnp.int32)[None]
    key = jnp.broadcast_to(at, (batch, s))
    if lengths is not None:
        key = jnp.where(at < lengths.astype(jnp.int32)[:, None], key, -1)
    query = jnp.broadcast_to(query, (batch, t))
    return (query if offsets is None else query + offsets.astype(jnp.int32)[:, None]), key


def _check_shapes(q: Array, k: Array, v: Array, sink_q: Any, segments: Any, positions: Any, *small: Any) -> None:
    def refuse(what: str, why: str, fix: str) -> InfoptError:
        return InfoptError(f"flash_attention: {what}.", why=why, fix=fix)

    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise refuse(f"{name} has shape {tuple(x.shape)}", "there are four axes.", "[batch, tokens, heads, width]")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise refuse(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit",
            "rows, keys and widths must agree.",
            "q [B, T, H, D], k [B, S, K, D], v [B, S, K, E]",
        )
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise refuse(
            f"{k.shape[2]} key/value heads do not divide {q.shape[2]} query heads",
            "each serves an equal share of them.",
            "a number of key/value heads that divides",
        )
    if sink_q is not None and sink_q.shape != q.shape:
        raise refuse(f"sink_queries are {tuple(sink_q.shape)}", "they are q, elsewhere.", f"{tuple(q.shape)}")
    for name, pair in (("segments", segments), ("positions", positions)):
        if pair is not None and (pair[0].shape != q.shape[:2] or pair[1].shape != k.shape[:2]):
            raise refuse(
                f"{name} are {tuple(pair[0].shape)} and {tuple(pair[1].shape)}",
                "each query and each key has one.",
                f"{tuple(q.shape[:2])} and {tuple(k.shape[:2])}",
            )
    lengths, offsets, logits = small
    for name, x, want in (
        ("lengths", lengths, q.shape[:1]),
        ("offsets", offsets, q.shape[:1]),
        ("sink_logits", logits, q.shape[2:3]),
    ):
        if x is not None and x.shape != want:
            raise refuse(f"{name} have shape {tuple(x.shape)}", "one for each.", f"{tuple(want)}")
    if positions is not None and (lengths is not None or offsets is not None):
        raise refuse("positions beside lengths or offsets", "they say the same.", "one of the two")


def _forward(
    q: Array, sink_q: Any, k: Array, v: Array, places: Places, o: Options, name: str | None, interpret: bool
) -> tuple[Array, Array]:
    args = q, sink_q, k, v, places
    if name is not None:
        return run(IMPLEMENTATIONS, name, args, interpret, "blockwise", o=o)
    default = functools.partial(portable.forward, o=o)
    if pallas_tpu.refuses(q, k, v, o):
        return default(*args)
    return jax.lax.platform_dependent(*args, tpu=functools.partial(pallas_tpu.forward, o=o), default=default)


def _kept(
    q: Array, sink_q: Any, k: Array, v: Array, places: Places, o: Options, name: str | None, interpret: bool
) -> Any:
    out, lse = _core(q, sink_q, k, v, places, o, name, interpret)
    return (out, lse), (q, sink_q, k, v, places, out, lse)


def _of_kept(o: Options, name: str | None, interpret: bool, kept: Any, d: tuple[Array, Array]) -> Any:
    return blockwise.of_kept(o, kept, d)


_core: Any = jax.custom_vjp(_forward, nondiff_argnums=(5, 6, 7))
_core.defvjp(_kept, _of_kept)
