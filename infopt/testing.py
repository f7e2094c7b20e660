"""The composition contract, generated: every order of transforms is refused with a reason, or equals its oracle.

The oracle is the numpy model of `infopt.reference`, which shares no code with the stacks; a family without one is
measured against its own uncached stack, and the table says so.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import functools
import hashlib
import itertools
import multiprocessing
import os
import random
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from infopt import models, texts
from infopt.cache import rollback
from infopt.errors import InfoptError, nearest
from infopt.evaluate import measure, windows
from infopt.generation import _compiled, generate
from infopt.kernels.decode_attention import xla
from infopt.kernels.flash_attention import blockwise, portable
from infopt.methods import autoround, awq, distilled, gptq, smoothquant
from infopt.methods import nearest as nearest_method
from infopt.model import Model, Weights, build, params_digest
from infopt.nnx import from_nnx
from infopt.nnx.example import Transformer
from infopt.reference import REFERENCES, reference
from infopt.sampling import Sampling, noise
from infopt.spec import Spec, YarnRope, oracle
from infopt.transforms import (
    Transform,
    cache_kv,
    dequantize,
    flash_attention,
    gqa,
    paged,
    parse_stack,
    quantize,
    rotate,
    self_draft,
    sliding_window,
    speculative,
)
from infopt.typing import Params

EXAMPLES: tuple[Transform, ...] = (
    quantize(bits=8),
    quantize(bits=4, group=16),
    quantize(bits=8, where="layers.0.*"),
    dequantize(),
    gqa(1),
    sliding_window(6),
    sliding_window(5, sinks=2, layers=[0, 1]),
    cache_kv(),
    cache_kv(bits=8),
    paged(4),
    rotate(),
    speculative(self_draft(quantize(bits=4, group=16)), k=2),
)
"""What the contract stacks. A transform joins by one line."""

_READ = tuple(i * i * i % 61 for i in range(128))

PACKINGS: tuple[Transform, ...] = (
    quantize(format="bf16"),
    quantize(format="fp8_e4m3"),
    quantize(format="int4_min", group=16),
    quantize(format="int4_zero", group=16),
    quantize(format="nvfp4"),
    quantize(bits=3, group=16),
    quantize(bits=2, group=16),
    quantize(bits=4, group=16, activations=8),
    cache_kv(bits=4),
    cache_kv(bits=2, rotate=True),
    cache_kv(bits=4, split=4, tail=3),
    flash_attention("blockwise"),
    rotate(seed=1, online=True),
    quantize(bits=8, activations=8),
    quantize(bits=8, activations=8, static=True, method=nearest_method(_READ, tokens=64, length=32)),
    quantize(bits=4, group=16, method=gptq(_READ, tokens=64, length=32)),
    quantize(bits=4, group=16, method=awq(_READ, tokens=64, length=32, grid=4)),
    quantize(bits=8, activations=8, method=smoothquant(_READ, tokens=64, length=32)),
    quantize(bits=4, group=16, method=autoround(_READ, tokens=64, length=32, steps=2)),
    quantize(bits=4, group=16, method=distilled(_READ, tokens=64, length=32, steps=2, rates=0.01)),
)
"""One of each other packing: floats, minima, zero points, scales of scales, words of three bytes, four to a byte;
inputs rounded against groups; keys rotated, and by channel; attention by block; inputs turned as they come; rounded by
methods that read, of which some scale channels and some learn. Stacked in full pairs with the examples over the first
family."""

_SIZES = dict(layers=3, dim=32, heads=4, kv_heads=2, head_dim=16, mlp=48, vocab=61, context=64, tied=False)
_YARN = YarnRope(factor=4.0, original_context=16, beta_fast=2.0, attention_factor=1.1)
_YARN_APART: dict[str, Any] = dict(rope_theta=40.0, rope_scaling=dataclasses.replace(_YARN, truncate=False))
"""By this base some pairs lie between the two bounds, so that rounding these would show."""


def _flax() -> Model:
    sizes = {name: n for name, n in _SIZES.items() if name not in ("context", "tied")}
    return from_nnx(Transformer(**sizes, rngs=nnx.Rngs(0)), context=64, name="nnx")[0]


FAMILIES: dict[str, Callable[[], Model]] = {
    "llama": lambda: models.llama(**_SIZES),
    "gemma3": lambda: models.gemma3(**_SIZES | dict(layers=5, pattern=(True, False), window=7)),
    "mistral": lambda: models.mistral(**_SIZES, window=9),
    "smollm3": lambda: models.smollm3(**_SIZES, rotated=(True, False)),
    "qwen2": lambda: models.qwen2(**_SIZES, window=9, local=(False, True, True), rope_scaling=_YARN),
    "qwen3": lambda: models.qwen3(**_SIZES),
    "phi3": lambda: models.phi3(**_SIZES, rotated=10),
    "gemma2": lambda: models.gemma2(**_SIZES, window=7, score_cap=2.0, logit_cap=3.0),
    "gpt2": lambda: models.gpt2(**_SIZES | dict(kv_heads=4)),
    "mixtral": lambda: models.mixtral(**_SIZES, experts=4),
    "qwen3_moe": lambda: models.qwen3_moe(**_SIZES, experts=4, experts_used=3),
    "gpt_oss": lambda: models.gpt_oss(**_SIZES, experts=4, window=7, swiglu_limit=0.8, **_YARN_APART),
    "nnx": _flax,
}
"""Small models that the contract stacks them on. A family joins by one line."""

FULL = ("llama", "gemma3")
"""Families whose every pair is tested; of the others, each transform alone and a handful of pairs."""
_HANDFUL = 8

TOLERANCE = 1e-4
"""Of the standard deviation of the oracle's logits."""
ROUNDED = {8: 3e-2, 4: 0.5, 2: 2.0}
ROUNDED_INPUTS = 0.1
TRIES = 8
"""Where keys and values, or inputs, are rounded, and a value or a scale lay on the edge, it may round the other way.
Such a stack is tried on so many texts at most, must stay within ROUNDED on each, by its bits (within ROUNDED_INPUTS),
and within TOLERANCE on one."""

_CHUNK, _MAX_LEN, _LENGTHS = 5, 40, (26, 19, 11)


class Mismatch(AssertionError):
    """A stack and its oracle differ."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one order of transforms.

    Args:
      base: `"<family>"` or `"<family> | cache_kv()"`: what the order was applied to.
      order: the transforms' texts.
      status: `"refused"`, `"equal"` or `"failed"`.
      detail: the reason of a refusal, or what differed.
      stack: a key of the stack's Spec and params; orders that give equal ones share it. "" where refused.
    """

    base: str
    order: tuple[str, ...]
    status: str
    detail: str = ""
    stack: str = ""


# --------------------------------------------------------------------------------------------------------- one stack


def expected_logits(spec: Spec, weights: Any, params: Params, tokens: Sequence[int]) -> np.ndarray:
    """The oracle's logits `[T, V]` of one row."""
    if spec.family in REFERENCES:
        return reference(oracle(spec), weights, np.asarray(tokens))
    target = params["target"] if spec.program else params
    return np.asarray(
        jax.jit(build(oracle(spec)).apply)(target, jnp.asarray(tokens, jnp.int32)[None])[0][0], np.float64
    )


def verify(model: Model, params: Params, *, generation: bool = True) -> float:
    """Hold a stack against its oracle: ragged rows, in chunks, with rollbacks; and the tokens that it generates.

    Args:
      model, params: the stack. Its context must hold 40 tokens, its vocabulary 10 words.
      generation: whether to decode too (always done for speculative stacks).

    Returns:
      The greatest difference of a logit, as a share of the oracle's standard deviation.

    Raises:
      Mismatch: a difference beyond the tolerance, or a token that the oracle would not draw.
    """
    worst = np.inf
    for text in range(TRIES if _edge(model.spec) > TOLERANCE else 1):
        worst = _verify_text(model, params, generation or model.spec.program is not None, text)
        if worst <= TOLERANCE:
            return worst
        if worst > _edge(model.spec):
            break
    raise Mismatch(f"{model.recipe}: logits differ from the oracle's by {worst:.2g} of their spread.")


def _edge(spec: Spec) -> float:
    """What one rounding that goes the other way may change."""
    kv = TOLERANCE if spec.kv is None else ROUNDED[spec.kv.format.row.bits]
    return max(kv, ROUNDED_INPUTS) if any(f.activations is not None for _, f in spec.weights) else kv


def _verify_text(model: Model, params: Params, generation: bool, text: int) -> float:
    rng = np.random.default_rng(text)
    rows = [rng.integers(0, model.spec.config.vocab, n).tolist() for n in _LENGTHS]
    weights = Weights.of(model.spec, params)
    weights = {name: weights[name] for name in weights if not name.startswith("draft.")}
    want = [expected_logits(model.spec, weights, params, row) for row in rows]
    spread = max(float(np.std(np.concatenate(want))), 1e-3)
    step: Any = jax.jit(lambda *args: model.apply(*args))  # its own, since an oracle may compile the same apply
    state = model.init_state(len(rows), _MAX_LEN, chunk=_CHUNK)
    at, worst, calls = np.zeros(len(rows), int), 0.0, 0

    def feed(count: np.ndarray) -> None:
        nonlocal state, at, worst
        tokens = np.zeros((len(rows), _CHUNK), np.int32)
        for b, row in enumerate(rows):
            tokens[b, : count[b]] = row[at[b] : at[b] + count[b]]
        logits, state = step(params, jnp.asarray(tokens), state, jnp.asarray(count, jnp.int32))
        for b in range(len(rows)):
            got = np.asarray(logits[b, : count[b]], np.float64)
            worst = max(worst, float(np.abs(got - want[b][at[b] : at[b] + count[b]]).max(initial=0.0)) / spread)
        at += count
        if step._cache_size() > 1:
            raise Mismatch(f"{model.recipe}: calls of one shape were compiled {step._cache_size()} times.")
        if not np.array_equal(np.asarray(state.lengths), at):
            raise Mismatch(f"{model.recipe}: lengths are {state.lengths}, {at} were appended.")

    while (at < _LENGTHS).any():
        calls += 1
        count = rng.integers(0, _CHUNK + 1, len(rows)) if calls % 3 else np.full(len(rows), _CHUNK)
        feed(np.minimum(count, np.array(_LENGTHS) - at))
        if calls % 4 == 2:  # take back all that a ring allows, and read it again in one call
            behind = np.asarray(state.peak) - at
            n = np.minimum(at, (state.lookahead or _CHUNK) - behind)
            n = np.where(rng.random(len(rows)) < 0.7, n, n // 2)
            state, at = rollback(state, n), at - n
            feed(np.minimum(_CHUNK, np.array(_LENGTHS) - at))
    return (
        worst
        if not generation or worst > _edge(model.spec)
        else max(worst, _verify_tokens(model, params, weights, rows, step))
    )


def _verify_tokens(model: Model, params: Params, weights: Any, rows: list[list[int]], step: Any) -> float:
    """Decode, then feed what came out to the oracle once: each token must be the one it draws there."""
    prompts = [row[: 4 + 3 * b] for b, row in enumerate(rows)]
    temperature = np.array([0.0, 0.8, 1.3])[: len(rows)]
    sampling = Sampling.of(len(rows), temperature=temperature.tolist(), seed=11)
    state = model.init_state(len(rows), _MAX_LEN, chunk=_CHUNK)
    for start in range(0, max(map(len, prompts)) - 1, _CHUNK):
        pieces = [p[start : min(start + _CHUNK, len(p) - 1)] for p in prompts]
        tokens = np.zeros((len(rows), _CHUNK), np.int32)
        for b, piece in enumerate(pieces):
            tokens[b, : len(piece)] = piece
        _, state = step(params, jnp.asarray(tokens), state, jnp.asarray([len(p) for p in pieces], jnp.int32))
    decode, last, out = jax.jit(model.decode), [p[-1] for p in prompts], [list(p) for p in prompts]
    for turn in range(6):
        active = np.array([True, turn != 0, turn != 2])[: len(rows)]
        lengths = np.asarray(state.lengths)
        e, state = decode(params, jnp.asarray(last, jnp.int32), state, sampling, jnp.asarray(active))
        for b in range(len(rows)):
            new = np.asarray(e.tokens[b, : int(e.count[b])]).tolist()
            if bool(active[b]) != bool(new) or int(state.lengths[b]) != lengths[b] + len(new):
                raise Mismatch(
                    f"{model.recipe}: row {b} emitted {new}, its length went {lengths[b]} -> {int(state.lengths[b])}."
                )
            out[b] += new
            last[b] = out[b][-1]
    worst = 0.0
    for b, row in enumerate(out):
        want = expected_logits(model.spec, weights, params, row)
        for position in range(len(prompts[b]), len(row)):
            scores = want[position - 1]
            if temperature[b]:
                drawn = np.asarray(noise(sampling.seed[b], jnp.int32(position), len(scores)), np.float64)
                scores = scores / temperature[b] + drawn
            short = float(scores.max() - scores[row[position]]) / max(float(np.std(want)), 1e-3)
            worst = max(worst, short)
            if short > _edge(model.spec):
                raise Mismatch(
                    f"{model.recipe}: row {b} drew token {row[position]} at position {position}, the oracle "
                    f"draws {int(scores.argmax())} (ahead by {short:.2g} of the spread)."
                )
    return worst


# ---------------------------------------------------------------------------------------------------------- one claim


METRICS = ("logits", "tokens", "ppl", "kl", "top1")
"""What `reproduces` compares."""


def reproduces(
    model: Model,
    params: Params,
    stack: Transform | str,
    *,
    metric: str,
    tolerance: float,
    oracle: str | float = "base",
    seed: int = 0,
    text: Any = None,
    tokens: int = 2048,
) -> float:
    """Hold one claim about a stack, for a suite of one's own: it raises unless the claim is reproduced.

    Args:
      model, params: what the stack is made of; the oracle "base" is this model without a cache.
      stack: transforms, or their text.
      metric: "logits": the greatest difference on random tokens, as a share of the oracle's spread; "tokens": of 64
        sampled tokens the share that are not the oracle's; "ppl": the relative change; "kl": nats a token; "top1": the
        share of tokens whose likeliest word is another.
      tolerance: the most that it may be.
      oracle: "base"; "numpy", the float64 model of the stack's own Spec (of "logits"); or a number, the perplexity.
      seed: of the tokens that are drawn, sampled ones too.
      text: as for `ip.windows`; `ip.texts.topics()` by default.
      tokens: about how many of it are scored.

    Returns:
      What was found.

    Raises:
      Mismatch: it is beyond the tolerance, or not a number.
      InfoptError: there is no such metric, or no such oracle of it.

    >>> import infopt as ip, jax
    >>> model = ip.models.llama(vocab=32, context=64)
    >>> reproduces(model, model.init(jax.random.key(0)), "cache_kv()", metric="tokens", tolerance=0)
    0.0
    """
    if metric not in METRICS:
        raise InfoptError(f"reproduces(metric={metric!r})", why=nearest(metric, METRICS), fix=", ".join(METRICS))
    known = ("base", "numpy") if metric == "logits" else ("base",)
    if oracle not in known and not (metric == "ppl" and isinstance(oracle, int | float)):
        raise InfoptError(
            f"reproduces(metric={metric!r}, oracle={oracle!r})",
            why="a claim compares with what is known otherwise.",
            fix=f"oracle={' or '.join(map(repr, known))}" + (", or a perplexity" if metric == "ppl" else ""),
        )
    transform = parse_stack(stack) if isinstance(stack, str) else stack
    made = transform(model)
    own = made.convert(params)
    if metric == "logits":
        found = _logits_off(model, params, made, own, str(oracle), seed)
    elif metric == "tokens":
        found = _tokens_off(model, params, made, own, seed)
    else:
        length = min(512, model.spec.config.context)
        cut = windows(texts.topics() if text is None else text, length, tokenizer=model.tokenizer).spread(tokens)
        scores = measure(made, own, cut, (model, params))
        if metric == "ppl":
            known_ppl = measure(model, params, cut).ppl.value if oracle == "base" else float(oracle)
            found = abs(scores.ppl.value / known_ppl - 1)
        else:
            found = scores.kl.value if metric == "kl" else 1 - scores.top1.value
    if not found <= tolerance:
        raise Mismatch(f"{made.recipe}: {metric} is off from {oracle!r} by {found:.3g}, beyond {tolerance:g}.")
    return found


def _logits_off(model: Model, params: Params, made: Model, own: Params, oracle: str, seed: int) -> float:
    rng = np.random.default_rng(seed)
    length = min(48, model.spec.config.context)
    row = rng.integers(0, model.spec.config.vocab, length)
    state = made.init_state(1, length)
    logits = np.asarray(made.apply(own, jnp.asarray(row, jnp.int32)[None], state)[0][0], np.float64)
    of, ps = (made, own) if oracle == "numpy" else (model, params)
    want = expected_logits(of.spec, Weights.of(of.spec, ps), ps, row.tolist())
    return float(np.abs(logits - want).max() / np.std(want))


def _tokens_off(model: Model, params: Params, made: Model, own: Params, seed: int) -> float:
    prompts = np.random.default_rng(seed).integers(0, model.spec.config.vocab, (4, 8)).tolist()
    options: dict[str, Any] = dict(max_new=16, temperature=[0.0, 0.7, 1.0, 1.3], seed=seed, stop_tokens=())
    ours, theirs = (generate(m, p, prompts, **options).tokens for m, p in ((made, own), (model, params)))
    return float(np.mean(np.array(ours) != np.array(theirs)))


# -------------------------------------------------------------------------------------------------------- all orders


def orders(examples: Sequence[Transform], depth: int) -> Iterator[tuple[Transform, ...]]:
    """Every ordered choice of 1 to `depth` examples."""
    for n in range(1, depth + 1):
        yield from itertools.permutations(examples, n)


def apply_order(base: Model, order: Sequence[Transform]) -> Model:
    """The stack; raises the refusal, which must give a reason and a fix."""
    try:
        return functools.reduce(lambda model, t: t(model), order, base)
    except InfoptError as e:
        if not (e.why and e.fix):
            raise Mismatch(f"{' | '.join(map(repr, order))} is refused without a reason or a fix: {e}") from e
        raise


@functools.lru_cache(maxsize=8)
def base_of(family: str) -> tuple[Model, Params]:
    """A family's small model and its params: always the same."""
    model = FAMILIES[family]()
    return model, model.init(jax.random.key(3))


def drop_programs() -> None:
    """Drop all compiled programs: a process that compiles hundreds of stacks runs out of memory, or of maps of it."""
    jax.clear_caches()
    build.cache_clear()
    _compiled.cache_clear()


@contextlib.contextmanager
def small_blocks(plain: int = 16) -> Iterator[None]:
    """Attention in blocks of 8, so that the contract's short texts have several; up to `plain` scores at once."""
    kept = blockwise.QUERIES, blockwise.KEYS, xla.FEWEST, portable.PLAIN
    blockwise.QUERIES, blockwise.KEYS, xla.FEWEST, portable.PLAIN = 8, 8, 8, plain
    build.cache_clear()
    try:
        yield
    finally:
        blockwise.QUERIES, blockwise.KEYS, xla.FEWEST, portable.PLAIN = kept
        build.cache_clear()


def wants_generation(spec: Spec) -> bool:
    """Logits are checked in every stack; tokens in speculative ones and in a third of the others."""
    return spec.program is not None or zlib.crc32(spec.to_json().encode()) % 3 == 0


def check_orders(
    family: str,
    todo: Sequence[tuple[str, Sequence[Transform]]],
    shard: tuple[int, int] = (0, 1),
    report: Callable[[Outcome], None] | None = None,
    generation: bool = True,
) -> list[Outcome]:
    """Apply orders to a family's model and verify what is accepted; equal Specs with equal params run once.

    Args:
      family: a key of `FAMILIES`.
      todo: (`"bare"` or `"cached"`, order).
      shard: (i, n): take the i-th of n shares. Equal Specs fall into the same share; refusals into the first.
      report: called with each outcome.
      generation: whether some stacks' tokens are checked too, not logits alone.
    """
    bare, params = base_of(family)
    bases = {"bare": bare, "cached": cache_kv()(bare)}
    seen: dict[tuple[Spec, str], Outcome] = {}
    found: list[Outcome] = []
    since = 0
    for on, order in todo:
        base = f"{family} | cache_kv()" if on == "cached" else family
        texts = tuple(map(repr, order))
        try:
            model = apply_order(bases[on], order)
        except InfoptError as e:
            if shard[0] == 0:
                found.append(Outcome(base, texts, "refused", e.one_line))
            continue
        if zlib.crc32(model.spec.to_json().encode()) % shard[1] != shard[0]:
            continue
        converted = model.convert(params)
        key = (model.spec, params_digest(converted))
        if key not in seen:
            if (since := since + 1) % 40 == 0:  # compiled programs are not freed by themselves: 110 ran out of memory
                drop_programs()
            name = hashlib.sha256((model.spec.to_json() + key[1]).encode()).hexdigest()[:10]
            try:
                verify(model, converted, generation=generation and wants_generation(model.spec))
                if model.exact:
                    check_exact(bare, params, model, converted)
                seen[key] = Outcome(base, texts, "equal", "", name)
            except Mismatch as e:
                seen[key] = Outcome(base, texts, "failed", str(e), name)
        found.append(dataclasses.replace(seen[key], base=base, order=texts))
        if report is not None:
            report(found[-1])
    return found


def check_exact(base: Model, base_params: Params, model: Model, params: Params) -> None:
    """Raise Mismatch unless a stack that says it is exact computes what its base computes."""
    row = np.random.default_rng(5).integers(0, base.spec.config.vocab, 24).tolist()
    before = expected_logits(base.spec, Weights.of(base.spec, base_params), base_params, row)
    after = expected_logits(model.spec, Weights.of(model.spec, params), params, row)
    if np.abs(after - before).max() > TOLERANCE * np.std(before):
        raise Mismatch(f"{model.recipe} says that it is exact, and its logits differ from the base's.")


def check_transform(transform: Transform, *, families: Sequence[str] = FULL, partners: bool = True) -> None:
    """The contract for a transform of your own: alone, and in every pair with the library's, before and after.

    Args:
      transform: an example of it, with arguments that suit the small models (3 and 5 layers of width 32, 4 heads,
        2 key/value heads of 16, a feed-forward width of 48, 61 words).
      families: the small models.
      partners: whether to stack it with the library's transforms too (about a minute a family).

    Raises:
      AssertionError: a stack differs from its oracle, or a refusal has no fix.
    """
    for family in families:
        order: list[tuple[Transform, ...]] = [(transform,)]
        if partners:
            order += [pair for t in EXAMPLES if t != transform for pair in ((transform, t), (t, transform))]
        found = check_orders(family, [(on, o) for o in order for on in ("bare", "cached")])
        failed = [o for o in found if o.status == "failed"]
        if failed:
            raise Mismatch("\n".join(f"{o.base}: {' | '.join(o.order)}: {o.detail}" for o in failed))
        if all(o.status == "refused" for o in found):
            raise Mismatch(f"{transform!r} is refused by every stack of {family}: {found[0].detail}")


PRODUCT: dict[str, dict[str, tuple[Transform, ...]]] = {
    "attention": {"plain": (), "flash": (flash_attention("blockwise"),)},
    "key/value heads": {"2": (), "1": (gqa(1),)},
    "window": {"none": (), "ring": (sliding_window(6),), "ring and sinks": (sliding_window(5, sinks=2),)},
    "weights": {"32 bits": (), "8 bits": (quantize(bits=8),), "4 bits": (quantize(bits=4, group=16),)},
    "keys and values": {"32 bits": (cache_kv(),), "8 bits": (cache_kv(bits=8),), "4 bits": (cache_kv(bits=4),)},
    "layout": {"linear": (), "pages": (paged(4),)},
}
"""What attention may be set to, one choice a row; every combination is a stack."""


def product() -> list[tuple[str, ...]]:
    """Every combination of the choices in `PRODUCT`."""
    return list(itertools.product(*PRODUCT.values()))


def covering() -> list[tuple[str, ...]]:
    """Few combinations that hold every pair of choices: each is the one with the most pairs that are still missing.

    >>> len(covering()) < 15 < len(product())
    True
    """
    axes = range(len(PRODUCT))
    pairs = {each: {(i, j, each[i], each[j]) for i, j in itertools.combinations(axes, 2)} for each in product()}
    missing, chosen = set().union(*pairs.values()), list[tuple[str, ...]]()
    while missing:
        chosen.append(max(pairs, key=lambda each: len(pairs[each] & missing)))
        missing -= pairs[chosen[-1]]
    return chosen


def check_combination(choices: Sequence[str], family: str = "llama") -> Outcome:
    """Hold one combination of `PRODUCT` to its oracle: ragged rows, chunks, rollbacks and generated tokens."""
    model, params = base_of(family)
    order = [t for axis, choice in zip(PRODUCT.values(), choices, strict=True) for t in axis[choice]]
    made = apply_order(model, order)
    try:
        verify(made, made.convert(params))
    except Mismatch as e:
        return Outcome(family, tuple(choices), "failed", str(e))
    return Outcome(family, tuple(choices), "equal")


def _combinations(shard: tuple[int, int]) -> list[Outcome]:
    jax.config.update("jax_platforms", "cpu")
    found, mine = [], product()[shard[0] :: shard[1]]
    with small_blocks(portable.PLAIN):  # "plain" computes all scores at once, "flash" by block
        for i, choices in enumerate(mine):
            found.append(check_combination(choices))
            if i % 20 == 19:
                drop_programs()
                print(f"  product, share {shard[0] + 1} of {shard[1]}: {i + 1} of {len(mine)}", file=sys.stderr)
    return found


def source_hash() -> str:
    """A hash of the modules that stacks are made of: what was run on other sources says nothing of these."""
    root, h = Path(__file__).parent, hashlib.sha256()
    rooms = "cache formats hadamard kernels masks model models ops qtensor sampling spec transforms"
    for room in rooms.split():
        for path in sorted(root.glob(f"{room}.py")) + sorted(root.glob(f"{room}/**/*.py")):
            h.update(path.read_bytes())
    return h.hexdigest()[:12]


# --------------------------------------------------------------------------------------------------------- the table


def everything(depth: int, family: str = "llama") -> list[tuple[str, tuple[Transform, ...]]]:
    """Every order of up to `depth` examples; for depth 1, a handful of pairs too, drawn by the family's name.

    For depth 3, each of `PACKINGS` too, alone and with each example, before and after it.
    """
    chosen = list(orders(EXAMPLES, depth))
    if depth == 3:
        for packing in PACKINGS:
            chosen += [(packing,), *((packing, t) for t in EXAMPLES), *((t, packing) for t in EXAMPLES)]
    if depth == 1:
        chosen += random.Random(family).sample(list(itertools.permutations(EXAMPLES, 2)), _HANDFUL)
    return [(on, order) for order in chosen for on in ("bare", "cached")]


DOCUMENTED = (("llama", 3), ("gemma3", 2), *((family, 1) for family in FAMILIES if family not in FULL))
"""What `docs/composition.md` holds: a family, and how many transforms are stacked; 1 is a handful of pairs besides."""


def cheap_compilation() -> str:
    """XLA_FLAGS under which small stacks compile in a fifth of the time. To be set before JAX is first used.

    Nothing that is tested for its numbers needs the compiler's effort; never measure speed under these.
    """
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_max_isa=AVX2"
    flags += " --xla_cpu_parallel_codegen_split_count=1"
    jaxlib = tuple(map(int, metadata.version("jaxlib").split(".")[:2]))
    # an unknown flag ends the process, and later releases have this one no more
    return flags + " --xla_cpu_use_fusion_emitters=false" * (jaxlib < (0, 11))


def _share(family: str, depth: int, shard: tuple[int, int]) -> list[Outcome]:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    start, stacks = time.perf_counter(), set[str]()

    def report(outcome: Outcome) -> None:
        if outcome.stack not in stacks:
            stacks.add(outcome.stack)
            if len(stacks) % 20 == 0:
                seconds = time.perf_counter() - start
                print(
                    f"  {family}, share {shard[0] + 1} of {shard[1]}: {len(stacks)} stacks, {seconds:.0f} s",
                    file=sys.stderr,
                )

    with small_blocks():
        return check_orders(family, everything(depth, family), shard, report, generation=depth > 1)


def matrix(family: str, depth: int, processes: int = 2) -> list[Outcome]:
    """The outcomes of every order of up to `depth` examples, over the bare model and over a cached one.

    Args:
      family: a key of `FAMILIES`.
      depth: 2 for pairs, 3 for triples; 1 for each alone and a handful of pairs, logits only.
      processes: how many share the work; each compiles for itself.
    """
    return _shared(functools.partial(_share, family, depth), processes)


def _shared(share: Callable[[tuple[int, int]], list[Outcome]], processes: int) -> list[Outcome]:
    """What `share((i, n))` gives in each of n processes, which compile cheaply."""
    flags = os.environ.get("XLA_FLAGS")
    os.environ["XLA_FLAGS"] = f"{flags or ''} {cheap_compilation()}"  # read by the processes when they start
    try:
        # Ctrl-C is the parent's to hear: it ends the others
        ignore = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"), **ignore) as pool:
            try:
                shares = [pool.submit(share, (i, processes)) for i in range(processes)]
                return [outcome for share in shares for outcome in share.result()]
            except BaseException:
                for child in multiprocessing.active_children():
                    child.terminate()
                raise
    finally:
        os.environ.pop("XLA_FLAGS")
        if flags is not None:
            os.environ["XLA_FLAGS"] = flags


def matrix_main(args: argparse.Namespace) -> int:
    """`infopt matrix`."""
    for family in args.family or ():
        if family not in FAMILIES:
            raise InfoptError(
                f"no family is called {family!r}.",
                why="the contract has a small model of each.",
                fix=nearest(family, list(FAMILIES)),
            )
    chosen = tuple((f, args.depth or 2) for f in args.family or FULL)
    if args.write or args.check:
        some = args.family if args.check and args.family else FAMILIES
        most = args.depth if args.check and args.depth else 3
        chosen = tuple((family, min(depth, most)) for family, depth in DOCUMENTED if family in some)
    start = time.perf_counter()
    results = {key: matrix(*key, processes=args.processes) for key in chosen}
    text = markdown(results)
    if (args.write or args.check) and chosen == DOCUMENTED:
        combined = _shared(_combinations, args.processes)
        results["product", 0] = combined
        text += product_markdown(combined)
    if args.write:
        Path(args.write).write_text(text, encoding="utf-8")
    elif not args.check:
        print(text)
    for (family, depth), found in results.items():
        print(f"{family}, up to {depth}: {totals(found)}", file=sys.stderr)
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)
    if args.check:
        said = Path(args.check).read_text(encoding="utf-8")
        if source_hash() not in said:
            print(f"{args.check} was written on other sources than these ({source_hash()}).", file=sys.stderr)
        families = None if chosen == DOCUMENTED else [family for family, _ in chosen]
        counts = all(key in DOCUMENTED for key in chosen)
        said, text = (_of_families(each, families, counts) for each in (said, text))
        if said != text:
            print(
                f"{args.check} says otherwise than what was seen; infopt matrix --write {args.check}", file=sys.stderr
            )
            sys.stderr.writelines(difflib.unified_diff(said.splitlines(True), text.splitlines(True)))
            return 1
    return 1 if any(o.status == "failed" for found in results.values() for o in found) else 0


def _of_families(text: str, families: Sequence[str] | None, counts: bool = True) -> str:
    r"""What a page says of some families: their totals, and the tables of their pairs; all of it where there are none.

    Without `counts`, for a page of less depth, the tables of pairs alone.

    >>> print(_of_families("# X\n| a | 1 |\n| b | 2 |\n## a: pairs\nyes\n## b: pairs\nno\n## Why\n", ["b"]))
    | b | 2 |
    ## b: pairs
    no
    """
    if families is None:
        return text
    kept, inside = [], False
    for line in text.splitlines():
        if line.startswith("## "):
            inside = any(line.startswith(f"## {family}: {'' if counts else 'pairs'}") for family in families)
        if inside or (counts and any(line.startswith(f"| {family} |") for family in families)):
            kept.append(line)
    return "\n".join(kept)


def product_markdown(found: Sequence[Outcome]) -> str:
    """The part of `docs/composition.md` that tells of `PRODUCT`."""
    lines = [
        "",
        "## Every setting of attention with every other",
        "",
        "All combinations of one choice a row, over Llama's small model and in blocks of 8, each held to the float64",
        "oracle: ragged rows, in chunks, after rollbacks, generated tokens, one compilation a shape.",
        "",
        "| setting | choices |",
        "|---|---|",
        *(f"| {axis} | {', '.join(choices)} |" for axis, choices in PRODUCT.items()),
        "",
        f"{len(found)} stacks, {sum(o.status == 'equal' for o in found)} equal to their oracle; every pair of choices",
        f"is tried in CI ({len(covering())} stacks). Run on sources of hash `{source_hash()}`",
        "(`infopt.testing.source_hash()` says that of the sources here).",
    ]
    failed = [o for o in found if o.status != "equal"]
    return "\n".join(lines + [f"- {' | '.join(o.order)}: {o.detail}" for o in failed]) + "\n"


def totals(found: Sequence[Outcome]) -> dict[str, int]:
    """Orders, and among them refused, equal and failed; and the distinct stacks that were run."""
    count = {s: sum(o.status == s for o in found) for s in ("refused", "equal", "failed")}
    return {"orders": len(found), **count, "stacks": len({o.stack for o in found if o.stack})}


def markdown(results: dict[tuple[str, int], list[Outcome]]) -> str:
    """`docs/composition.md`: totals, a table of pairs a family, and why orders are refused."""
    names = [repr(t) for t in EXAMPLES]
    lines = [
        "# What stacks with what",
        "",
        "Printed by `infopt matrix --write docs/composition.md` from what it ran; `--check` runs it and compares.",
        "",
        "Every order of up to two or three of these transforms, over a bare and over a cached small model, and of the",
        "other packings with each of them, is",
        "refused with a reason, or runs and equals its oracle: a float64 numpy model that shares no code with the",
        f"stacks. Logits agree within {TOLERANCE:g} of their standard deviation, for ragged rows, in chunks, after",
        "rollbacks; tokens drawn by every speculative stack and a third of the others are checked one by one (logits",
        "alone in families of which a handful of pairs is tried). With",
        f"rounded keys and values a value on the edge may round the other way: such a stack is tried on up to {TRIES}",
        f"texts, and must agree within {ROUNDED[8]:g} on each ({ROUNDED[4]:g} with 4 bits, {ROUNDED[2]:g} with 2;",
        f"{ROUNDED_INPUTS:g} where inputs are rounded) and {TOLERANCE:g} on one.",
        "Orders that give equal Specs and params run once. "
        + (
            "All of these families have such a model."
            if all(f in REFERENCES for f, _ in results)
            else "Families without one are measured against their own uncached stack: "
            + ", ".join(sorted({f for f, _ in results} - set(REFERENCES)))
            + "."
        ),
        "",
        "| family | transforms | orders | refused | equal | failed | distinct stacks |",
        "|---|---|---|---|---|---|---|",
    ]
    for (family, depth), found in results.items():
        t = totals(found)
        tried = f"up to {depth}" if depth > 1 else f"1, and {_HANDFUL} pairs"
        counts = " | ".join(str(t[name]) for name in ("orders", "refused", "equal", "failed", "stacks"))
        lines.append(f"| {family} | {tried} | {counts} |")
    for (family, depth), found in results.items():
        if depth == 1:
            continue
        by_order = {(o.base == family, o.order): o for o in found if len(o.order) <= 2}

        def marks(order: tuple[str, ...], by_order: dict[Any, Outcome] = by_order) -> str:
            both = [by_order.get((bare, order)) for bare in (True, False)]
            return " ".join({"equal": "=", "refused": "-", "failed": "!"}[o.status] if o else "" for o in both)

        columns = "".join(f" {i + 1} |" for i in range(len(names)))
        lines += [
            "",
            f"## {family}: pairs",
            "",
            "Row first, then column; the left mark over the bare model, the right one over a cached one.",
            "`=` equal to its oracle, `-` refused, `!` failed. The first column is the row's transform alone.",
            "",
            f"| | alone |{columns}",
            "|---" * (len(names) + 2) + "|",
        ]
        for i, first in enumerate(names):
            cells = [marks((first,)), *(marks((first, second)) for second in names)]
            lines.append(f"| {i + 1} `{first}` | " + " | ".join(cells) + " |")
        if depth < 3:
            continue
        lines += [
            "",
            f"## {family}: other packings",
            "",
            "The same; the second line of each has the column first.",
            "",
            f"| | alone |{columns}",
            "|---" * (len(names) + 2) + "|",
        ]
        for packing in map(repr, PACKINGS):
            lines.append(
                f"| `{packing}` | " + " | ".join([marks((packing,)), *(marks((packing, t)) for t in names)]) + " |"
            )
            lines.append("| after | | " + " | ".join(marks((t, packing)) for t in names) + " |")
    reasons: dict[str, int] = {}
    for found in results.values():
        for o in found:
            if o.status == "refused":
                why = o.detail.split("why: ")[-1].split("; fix")[0]
                reasons[why] = reasons.get(why, 0) + 1
    lines += ["", "## Why orders are refused", "", "| reason | orders |", "|---|---|"]
    lines += [f"| {why} | {n} |" for why, n in sorted(reasons.items(), key=lambda r: (-r[1], r[0]))]
    failed = [o for found in results.values() for o in found if o.status == "failed"]
    if failed:
        lines += ["", "## Failed", ""] + [f"- {o.base}: {' | '.join(o.order)}: {o.detail}" for o in failed]
    return "\n".join(lines) + "\n"
