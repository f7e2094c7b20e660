"""Sampling: from logits to a token, as a function of (seed, position, logits) and nothing else.

The order is that of `transformers`: repetition penalty, mask, temperature, top-k, top-p, min-p, then a draw.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from infopt.errors import SamplingError
from infopt.typing import Array, Float, Int


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["seed", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "logprobs", "mask"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How each row of a batch is sampled: a pytree of `[B]` arrays, so that a batch mixes requests.

    Args:
      seed: uint32; with a token's absolute position it fixes the noise of the draw.
      temperature: 0 is greedy; logits are divided by it.
      top_k: keep the k likeliest; 0 keeps all. Words tied with the k-th stay too.
      top_p: keep the fewest likeliest words whose probabilities reach it; 1 keeps all.
      min_p: keep words at least this share as likely as the likeliest; 0 keeps all.
      repetition_penalty: logits of words in the row's text are divided by it where positive, else multiplied.
      logprobs: bool; whether the row wants them (they cost a pass over the vocabulary).
      mask: optional bool `[B, V]`, words that may come. Such rows emit one token a round.
    """

    seed: Any
    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    repetition_penalty: Any
    logprobs: Any
    mask: Any = None

    @staticmethod
    def of(
        batch: int,
        *,
        seed: Any = 0,
        temperature: Any = 0.0,
        top_k: Any = 0,
        top_p: Any = 1.0,
        min_p: Any = 0.0,
        repetition_penalty: Any = 1.0,
        logprobs: Any = False,
        mask: Any = None,
    ) -> Sampling:
        """Options for `batch` rows, each one value for all or a sequence of one a row.

        A single seed s gives row r the seed s + r, so that equal prompts differ; a sequence is taken as it is.

        Raises:
          SamplingError: a value outside its range, or not one a row.

        >>> Sampling.of(2, temperature=0.7).seed
        Array([0, 1], dtype=uint32)
        """

        reasons = {
            "seed": "it is the 32-bit key of the noise.",
            "temperature": "logits are divided by it, and a negative one would prefer the unlikeliest words.",
            "top_k": "it counts words.",
            "top_p": "it is a share of the probability, and a draw needs one word at least.",
            "min_p": "it is a share of the likeliest word's probability.",
            "repetition_penalty": "logits are divided by it.",
            "logprobs": "it says whether a row wants them.",
        }

        def rows(name: str, value: Any, dtype: Any, ok: Any, range_: str, given: Any = None) -> Array:
            x = np.asarray(value)
            given = value if given is None else given
            if x.ndim > 1 or (x.ndim == 1 and len(x) != batch):
                raise SamplingError(
                    f"{name} has shape {x.shape} for {batch} rows.",
                    why="each row of the batch has its own value, or all have one.",
                    fix=f"one value, or {batch} of them",
                )
            fits = x.dtype.kind in "biuf" and x.size > 0 and np.all(np.isfinite(x.astype(float)) & ok(x))
            if fits:
                with np.errstate(all="ignore"):  # a value may leave its range where it is rounded: the least top_p is 0
                    fits = np.all(np.isfinite(x.astype(dtype)) & ok(x.astype(dtype)))
            if not fits:
                raise SamplingError(
                    f"{name}={given!r} is out of range.",
                    why=reasons[name],
                    fix=f"{name} {range_}",
                )
            return jnp.asarray(np.broadcast_to(x, (batch,)).astype(dtype))

        whole = lambda x: np.equal(np.mod(x, 1), 0)  # noqa: E731
        seeds = np.asarray(seed)
        if seeds.ndim == 0 and seeds.dtype.kind in "iuf":
            seeds = seeds + np.arange(batch)
        mask = None if mask is None else jnp.asarray(mask)
        if mask is not None and (mask.ndim != 2 or mask.shape[0] != batch or mask.dtype != bool):
            raise SamplingError(
                f"mask is {mask.dtype}{list(np.shape(mask))}.",
                why="it says of each word whether a row may emit it.",
                fix=f"bool [{batch}, words]",
            )
        return Sampling(
            seed=rows("seed", seeds, np.uint32, lambda x: whole(x) & (x >= 0) & (x < 2**32), "in 0 .. 2**32 - 1", seed),
            temperature=rows("temperature", temperature, np.float32, lambda x: x >= 0, ">= 0 (0 is greedy)"),
            top_k=rows("top_k", top_k, np.int32, lambda x: whole(x) & (x >= 0) & (x < 2**31), ">= 0, whole (0: off)"),
            top_p=rows("top_p", top_p, np.float32, lambda x: (x > 0) & (x <= 1), "in (0, 1] (1: off)"),
            min_p=rows("min_p", min_p, np.float32, lambda x: (x >= 0) & (x <= 1), "in [0, 1] (0: off)"),
            repetition_penalty=rows("repetition_penalty", repetition_penalty, np.float32, lambda x: x > 0, "> 0"),
            logprobs=rows("logprobs", logprobs, np.bool_, lambda x: True, "true or false"),
            mask=mask,
        )


def _bits(x: Float[Array, "*N"]) -> Int[Array, "*N"]:
    """Floats as integers of the same order."""
    i = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(i < 0, i ^ jnp.int32(0x7FFFFFFF), i)


def _highest(reaches: Any, rows: tuple[int, ...], low: int, high: int) -> Array:
    """The greatest integer in [low, high) for which `reaches` holds, by bisection; it holds at `low`.

    Thirty-two passes over the vocabulary, where a sort costs about its length's logarithm in cache misses.
    """

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        lo, hi = bounds
        mid = (lo >> 1) + (hi >> 1) + (lo & hi & 1)
        ok = reaches(mid)
        return jnp.where(ok, mid, lo), jnp.where(ok, hi, mid)

    bounds = (jnp.full(rows, low, jnp.int32), jnp.full(rows, high, jnp.int32))
    return jax.lax.fori_loop(0, 32, halve, bounds)[0]


def _cut_top_k(x: Float[Array, "B E V"], k: Int[Array, " B"]) -> Float[Array, "B E V"]:
    bits, wanted = _bits(x), jnp.where(k > 0, k, x.shape[-1])[:, None]
    least = _highest(lambda t: jnp.sum(bits >= t[..., None], -1) >= wanted, x.shape[:-1], -(2**31), 2**31 - 1)
    return jnp.where(bits >= least[..., None], x, -jnp.inf)


def _cut_top_p(x: Float[Array, "B E V"], p: Float[Array, " B"]) -> Float[Array, "B E V"]:
    probs = jax.nn.softmax(x, -1)
    bits = _bits(probs)
    mass = lambda t: jnp.sum(jnp.where(bits >= t[..., None], probs, 0.0), -1)  # noqa: E731
    least = _highest(lambda t: mass(t) >= p[:, None], x.shape[:-1], 0, 0x3F800001)
    return jnp.where((bits >= least[..., None]) | (p >= 1)[:, None, None], x, -jnp.inf)


def _cut_min_p(x: Float[Array, "B E V"], p: Float[Array, " B"]) -> Float[Array, "B E V"]:
    share = jnp.exp(x - jnp.max(x, -1, keepdims=True))
    return jnp.where(share >= p[:, None, None], x, -jnp.inf)


def _penalize(
    x: Float[Array, "B E V"], penalty: Float[Array, " B"], tokens: Int[Array, "B S"], lengths: Int[Array, "B E"]
) -> Float[Array, "B E V"]:
    rows = jnp.arange(tokens.shape[0], dtype=jnp.int32)[:, None]
    place = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    never = jnp.full((tokens.shape[0], x.shape[-1]), 2**30, jnp.int32)
    first = never.at[rows, tokens].min(place, mode="drop")
    seen = first[:, None, :] < lengths[:, :, None]
    factor = penalty[:, None, None]
    return jnp.where(seen, jnp.where(x > 0, x / factor, x * factor), x)


def noise(seed: Array, position: Array, words: int) -> Float[Array, " V"]:
    """The Gumbel noise of the token at an absolute position of a row: never of a slot, a step or a batch."""
    return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), (words,), jnp.float32)


def sample(
    logits: Float[Array, "B E V"], sampling: Sampling, tokens: Int[Array, "B S"], lengths: Int[Array, "B E"]
) -> tuple[Int[Array, "B E"], Float[Array, "B E"]]:
    """Draw a token for each of E positions of each row (Gumbel-max: argmax of logits plus noise).

    Args:
      logits: the model's.
      sampling: each row's options.
      tokens: each row's text, for the penalty.
      lengths: how much of the text stands before each drawn token: also that token's position.

    Returns:
      The tokens, and their log-probability under the model as it is (before penalty, temperature and cuts);
      NaN unless some row of the batch wants them.
    """
    raw = logits.astype(jnp.float32)
    s, any_, cond = sampling, jnp.any, jax.lax.cond
    x = cond(
        any_(s.repetition_penalty != 1), lambda x: _penalize(x, s.repetition_penalty, tokens, lengths), lambda x: x, raw
    )
    if s.mask is not None:
        x = jnp.where(s.mask[:, None, :], x, -jnp.inf)

    def draw(x: Array) -> Array:
        warm = s.temperature > 0
        # less the greatest, which changes no choice: a tiny temperature would divide it to infinity
        y = (x - jnp.max(x, -1, keepdims=True)) / jnp.where(warm, s.temperature, 1)[:, None, None]
        y = cond(any_(s.top_k > 0), lambda y: _cut_top_k(y, s.top_k), lambda y: y, y)
        y = cond(any_(s.top_p < 1), lambda y: _cut_top_p(y, s.top_p), lambda y: y, y)
        y = cond(any_(s.min_p > 0), lambda y: _cut_min_p(y, s.min_p), lambda y: y, y)
        over = jax.vmap(jax.vmap(noise, (None, 0, None)), (0, 0, None))
        y = y + over(s.seed, lengths, x.shape[-1])
        return jnp.argmax(jnp.where(warm[:, None, None], y, x), -1).astype(jnp.int32)

    token = cond(any_(s.temperature > 0), draw, lambda x: jnp.argmax(x, -1).astype(jnp.int32), x)

    def logprob(raw: Array) -> Array:
        chosen = jnp.take_along_axis(raw, token[..., None], -1)[..., 0]
        return chosen - jax.nn.logsumexp(raw, -1)

    return token, cond(any_(s.logprobs), logprob, lambda raw: jnp.full(raw.shape[:-1], jnp.nan, jnp.float32), raw)
