"""Whether a module can be cached: each token must depend on itself, its position, and what attention gives it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from infopt import ops
from infopt.errors import InfoptError
from infopt.masks import allowed
from infopt.model import Model, Weights
from infopt.models.base import unrotated
from infopt.nnx.module import Call, Opened, Run, is_users, line
from infopt.spec import Window
from infopt.typing import Array, Params

_SHORT, _LONG, _PART = 13, 256, 5
"""Tokens of texts that are tried, and of the end of one: what a step computes must be what the whole gives there."""
_QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Compiler options for what runs once; a module that is run step by step compiles each of its operations."""
_TOLERANCE, _COARSE = 1e-3, 0.1
"""Of the spread; where some of it is computed in 16 bits, the other."""
WIDEST = 4096
"""Windows up to this width are seen in a mask."""
_WIDE = 1024
"""Tokens over which an `attention_fn` is compared."""


def definition(cls: type[Any]) -> str:
    """Where a module's `__call__` begins."""
    code = inspect.unwrap(cls.__call__).__code__
    return line(code.co_filename, code.co_firstlineno, code)


def positions_argument(cls: type[Any]) -> str | None:
    """The name of the argument that takes positions, or None.

    Raises:
      InfoptError: `__call__` takes no tokens, or asks for more than tokens and positions.
    """
    tokens, *rest = list(inspect.signature(cls.__call__).parameters.values())[1:] or [None]
    name = next((p.name for p in rest if p and p.name in ("positions", "position_ids", "segment_pos", "pos")), None)
    needed = [p.name for p in rest if p and p.name != name and p.default is p.empty and p.kind in (1, 3)]
    if tokens is None or tokens.kind not in (0, 1) or needed:
        raise InfoptError(
            f"{definition(cls)} {'needs ' + ', '.join(needed) if needed else 'takes no tokens'}.",
            why="it is called with tokens [B, T] and their positions [B, T], and nothing else.",
            fix="def __call__(self, tokens, positions), with defaults for what follows",
        )
    return name


@jax.jit
def infopt_attend(q: Array, k: Array, v: Array) -> Array:
    """Stands for attention where none may look at other tokens."""
    return q + jnp.repeat(k + v, q.shape[2] // k.shape[2], axis=2)


def _alone(opened: Opened, calls: list[Call] | None = None) -> Callable[..., Any]:
    """The module as a function of weights, tokens and positions, each token left to itself."""

    def function(weights: Mapping[str, Any], tokens: Array, positions: Array) -> Any:
        run = Run(lambda _, q, k, v: infopt_attend(q, k, v), None if calls is None else calls.append)
        out = opened(weights, tokens, positions, run)
        if not isinstance(out, jax.Array) or out.ndim != 3 or out.shape[:2] != tokens.shape:
            raise InfoptError(
                f"{definition(opened.cls)} returns {jax.tree.map(jnp.shape, out)} for tokens {list(tokens.shape)}.",
                why="it must return logits [B, T, V], and nothing else.",
                fix="return the logits alone",
            )
        return out

    return function


def compiled(opened: Opened) -> Callable[..., Any]:
    """The same, compiled once for each length of text that is tried."""
    return jax.jit(_alone(opened), compiler_options=_QUICKLY)


def example(vocab: int, n: int = _SHORT) -> tuple[Array, Array]:
    """Tokens and positions `[1, n]`."""
    tokens = np.random.default_rng(0).integers(0, vocab, (1, n))
    return jnp.asarray(tokens, jnp.int32), jnp.arange(n, dtype=jnp.int32)[None]


def attention_calls(opened: Opened, weights: Mapping[str, Any]) -> tuple[list[Call], int, bool]:
    """The calls of attention, how many words there are, and whether some of it is computed in 16 bits.

    Raises:
      InfoptError: attention in a loop or a transformation, or something else than logits is returned.
    """
    calls: list[Call] = []
    jaxpr = jax.make_jaxpr(_alone(opened, calls))(weights, *example(2)).jaxpr
    outside = sum(eqn.params.get("name") == "infopt_attend" for eqn in jaxpr.eqns)
    if calls and outside != len(calls):
        raise InfoptError(
            f"the attention at {calls[0].where} cannot be cached.",
            why="it is called within a transformation (scan, remat, jit, vmap); each layer needs a cache of its own.",
            fix="a Python loop over the layers; drop nnx.scan, nnx.remat and nnx.jit for inference",
        )
    made: list[Any] = [v.aval for eqn in jaxpr.eqns for v in eqn.outvars]
    coarse = any(jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4 for x in made)
    return calls, jaxpr.outvars[0].aval.shape[2], coarse  # type: ignore[attr-defined]


def check_local(
    opened: Opened, alone: Callable[..., Any], weights: Mapping[str, Any], vocab: int, length: int, coarse: bool
) -> None:
    """Raise, naming the line, where a token depends on more than itself, its position and its attention."""
    args = example(vocab, min(_LONG, length))
    whole, last = (np.asarray(alone(weights, *x), np.float32) for x in (args, [x[:, -1:] for x in args]))
    if _close(whole[:, -1:], last, coarse):
        return
    where = _culprit(functools.partial(_alone(opened), weights), args) or definition(opened.cls)
    if opened.positions is None:
        raise InfoptError(
            f"{definition(opened.cls)} takes no positions, and {where} makes its own.",
            why="a cached step sees a few tokens at a time, and must be told where they stand.",
            fix="def __call__(self, tokens, positions), and use them there",
        )
    raise InfoptError(
        f"{opened.cls.__name__} cannot be cached: at {where} a token depends on more than itself.",
        why="a cached step sees a few tokens at a time: positions must come from the argument, and tokens look at each "
        "other in `attention_fn` alone.",
        fix="use the positions that are given; let an attribute `attention_fn` (as nnx.MultiHeadAttention has) attend",
    )


def _close(a: np.ndarray, b: np.ndarray, coarse: bool = False) -> bool:
    finite = a[np.isfinite(a)]
    spread = float(np.std(finite, dtype=np.float64)) if finite.size else 0.0
    most = _COARSE if coarse else _TOLERANCE
    return bool(np.allclose(a, b, rtol=most, atol=most * max(spread, 1e-6), equal_nan=True))


def _culprit(function: Callable[..., Any], args: Sequence[Array]) -> str | None:
    """The line whose value, for the end of a text alone, is not the end of its value for the whole text."""
    whole, part = (jax.make_jaxpr(function)(*x) for x in (args, [x[:, -_PART:] for x in args]))
    return _first_difference(whole, list(args), part, [x[:, -_PART:] for x in args])


def _first_difference(one: Any, ones: list[Any], two: Any, twos: list[Any]) -> str | None:
    """Run two traces of one program side by side; the user's line of the first step that tells them apart."""
    values: list[dict[Any, Any]] = []
    for closed, inputs in ((one, ones), (two, twos)):
        values.append(dict(zip([*closed.jaxpr.constvars, *closed.jaxpr.invars], [*closed.consts, *inputs])))
    needed = [_needed(one.jaxpr), _needed(two.jaxpr)]
    steps = [[e for i, e in enumerate(c.jaxpr.eqns) if i in used] for c, used in zip((one, two), needed)]
    for first, second in zip(*steps):
        if first.primitive is not second.primitive:
            return _line_of(first)
        got = []
        for eqn, known in zip((first, second), values):
            inputs = [v.val if isinstance(v, Literal) else known[v] for v in eqn.invars]
            got.append((inputs, _run(eqn, inputs)))
            known.update(zip(eqn.outvars, got[-1][1]))
        if any(not _is_part(a, b) for a, b in zip(got[0][1], got[1][1])):
            inner = [next((v for v in e.params.values() if isinstance(v, ClosedJaxpr)), None) for e in (first, second)]
            if first.primitive.name in ("jit", "pjit") and inner[0] is not None:
                return _first_difference(inner[0], got[0][0], inner[1], got[1][0]) or _line_of(first)
            return _line_of(first)
    return None


def _needed(jaxpr: Any) -> set[int]:
    """The steps that the result depends on."""
    wanted, used = {v for v in jaxpr.outvars if not isinstance(v, Literal)}, set[int]()
    for i, eqn in reversed(list(enumerate(jaxpr.eqns))):
        if wanted & set(eqn.outvars):
            used.add(i)
            wanted |= {v for v in eqn.invars if not isinstance(v, Literal)}
    return used


def _run(eqn: Any, inputs: list[Any]) -> list[Any]:
    out = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


def _is_part(whole: Any, part: Any) -> bool:
    """Whether `part` is the end of `whole` along each axis in which they differ."""
    if whole.ndim != part.ndim or not (jnp.issubdtype(whole.dtype, jnp.number) or whole.dtype == bool):
        return whole.shape == part.shape
    ends = tuple(slice(n - m, None) for n, m in zip(whole.shape, part.shape))
    return _close(np.asarray(whole[ends], np.float32), np.asarray(part, np.float32))


def _line_of(eqn: Any) -> str | None:
    traceback = eqn.source_info.traceback
    for f in traceback.frames if traceback else ():
        if is_users(f.file_name):
            return line(f.file_name, f.line_num, f.function_name)
    return None


# -------------------------------------------------------------------------------------------------------------- masks


def windows(opened: Opened, weights: Mapping[str, Any], vocab: int, length: int) -> tuple[Window | None, ...]:
    """What each call's mask lets a token see: all before it (None), or a window.

    Raises:
      InfoptError: a mask is not causal, or looks at the tokens; names the line.
    """
    n = min(WIDEST + 1, length)
    places: list[str] = []

    def bands(weights: Mapping[str, Any], tokens: Array, positions: Array) -> list[Any]:
        calls: list[Call] = []
        _alone(opened, calls)(weights, tokens, positions)
        places[:] = [c.where for c in calls]
        return [_band(c, tokens.shape[1]) for c in calls]

    args = (weights, *example(vocab, n))
    traced = jax.jit(bands, compiler_options=_QUICKLY).trace(*args)
    depends = _depends(traced.jaxpr.jaxpr, traced.jaxpr.jaxpr.invars[-2])  # the tokens
    found = traced.lower().compile()(*args)
    answers: list[Window | None] = []
    for where, (band, width), on_tokens in zip(places, found, depends[::2], strict=True):
        if on_tokens or not bool(band):
            raise InfoptError(
                f"the attention at {where} cannot be cached.",
                why="its mask depends on which tokens there are." if on_tokens else "its mask is not causal.",
                fix="a mask by which each token sees itself and those before, or the last so many of them "
                "(nnx.make_causal_mask, is_causal=True); rows of different lengths need none here",
            )
        answers.append(None if int(width) == n else Window(int(width)))
    return tuple(answers)


def _band(call: Call, n: int) -> tuple[Array, Array]:
    """Whether a mask is causal and, but for a window, whole; and the window's width."""
    q, k = jnp.arange(n)[:, None], jnp.arange(n)[None]
    if call.mask is None:  # causal by its flag, or by itself: `check_attention` looks
        return jnp.asarray(True), jnp.asarray(n)
    mask = call.mask.astype(bool)
    mask = mask.reshape(-1, *mask.shape[-2:])
    mask = jnp.logical_and(mask, (k <= q)[None]) if call.causal else jnp.broadcast_to(mask, (mask.shape[0], n, n))
    width = jnp.sum(mask[0, -1])
    band = jnp.logical_and(k <= q, q - k < width)
    return jnp.all(mask == band[None]), width


def _depends(jaxpr: Any, source: Any) -> list[bool]:
    """Which results are computed from the values of `source`, not from its shape alone."""
    tainted = {source}
    for eqn in jaxpr.eqns:
        if any(not isinstance(v, Literal) and v in tainted for v in eqn.invars):
            tainted.update(eqn.outvars)
    return [not isinstance(v, Literal) and v in tainted for v in jaxpr.outvars]


# ------------------------------------------------------------------------------------------------------ the context


def table_length(opened: Opened, alone: Callable[..., Any], weights: Mapping[str, Any], vocab: int) -> int | None:
    """How many positions a table of the module has, where positions are rows of one: beyond, nothing new is found."""
    tokens, _ = example(vocab, 1)

    def at(position: int) -> np.ndarray:
        return np.asarray(alone(weights, tokens, jnp.full((1, 1), position, jnp.int32)), np.float32)

    for n in sorted(n for n in opened.sizes if n > 1):
        last, beyond = at(n - 1), at(n)
        if np.isnan(beyond).any() and not np.isnan(last).any():
            return n
        if np.array_equal(last, beyond) and not np.array_equal(last, at(n - 2)):
            return n
    return None


def check_attention(calls: Sequence[Call], windows: Sequence[Window | None], length: int) -> None:
    """Raise, naming the line, where a module attends in another way than `attend` does."""
    n, tried = min(_WIDE, length), set[Any]()
    for call, window in zip(calls, windows, strict=True):
        heads, kv_heads, width = call.shape
        kind = (call.path, call.shape, window)
        if kind in tried:
            continue
        tried.add(kind)
        q, k, v = (
            jax.random.normal(jax.random.key(i), (1, n, h, width)) for i, h in enumerate((heads, kv_heads, kv_heads))
        )
        at = jnp.arange(n, dtype=jnp.int32)[None]
        mask = allowed(at, at, window)[:, None]
        context = ops.Context(at, jnp.ones_like(at, bool), jnp.asarray([n]), window, None)

        def both(q: Array, k: Array, v: Array, c: Call = call, x: ops.Context = context, m: Array = mask) -> Any:
            ours, _ = ops.attend(q, k, v, None, None, rope=unrotated, scale=q.shape[3] ** -0.5, context=x)
            return c.written(q, k, v, m), ours

        run = jax.jit(both)
        for size in (1.0, 8.0):  # a soft-cap shows in large scores only
            want, got = (np.asarray(x, np.float32) for x in run(size * q, k, v))
            if not _close(want, got):
                raise InfoptError(
                    f"the attention at {call.where} cannot be cached.",
                    why="its `attention_fn` is not causal softmax(q k / sqrt(width)) v over what its mask lets "
                    "through: not causal, another scale, a soft-cap, a decay, a window of its own.",
                    fix="is_causal=True or a causal mask; fold a scale into the queries; other attention needs "
                    "ip.define, whose `attend` takes a soft-cap",
                )


def check_logits(opened: Opened, model: Model, params: Params, length: int, coarse: bool) -> None:
    """Raise where the module, as it was written, computes something else than the model made of it."""
    tokens, positions = example(model.spec.config.vocab, min(_SHORT, length))

    def both(params: Params, tokens: Array, positions: Array) -> tuple[Array, Array]:
        return opened.alone(Weights.of(model.spec, params), tokens, positions), model.apply(params, tokens)[0]

    found = jax.jit(both, compiler_options=_QUICKLY)(params, tokens, positions)
    want, got = (np.asarray(x, np.float32) for x in found)
    if not _close(want, got, coarse):
        raise InfoptError(
            f"{opened.cls.__name__}, {definition(opened.cls)}, gives other logits by itself than through the library.",
            why="some of its layers compute by more than their arrays and their inputs.",
            fix="plain layers; or a family of your own by ip.define",
        )
