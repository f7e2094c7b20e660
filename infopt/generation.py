"""Prompts in, text out, for every stack alike. It knows `hidden`, `decode`, `Emitted`, and no transform."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from infopt.cache import State, rollback
from infopt.errors import InfoptError, PromptError
from infopt.model import Functions, Model, build, check_length, check_params, context_limit
from infopt.sampling import Sampling
from infopt.spec import Spec
from infopt.typing import Array, Params

BUCKETS = (8, 16, 32, 64, 128)
"""Tokens in one call of prefill. A prompt is read 128 at a time, and the rest in the least bucket that holds it."""
_SHORTEST = 64  # the least length of a state; lengths double from there
_ROUNDS = 32  # rounds of decoding in one compiled call, at most
_ROUNDS_STREAMED = 4

Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A piece of one row's text, as it becomes certain.

    Args:
      row: which prompt.
      text: never half a character; "" without a tokenizer.
      tokens: the tokens since the last chunk of this row (text may lag behind them).
    """

    row: int
    text: str
    tokens: list[int]


@dataclasses.dataclass(frozen=True)
class Generation:
    """What was generated. `text`, `tokens`, `logprobs`, `finish` are lists, one entry a prompt, for a list of prompts.

    Args:
      text: without the prompt, the stop token and the stop string; None without a tokenizer.
      tokens: token ids, a stop token included.
      logprobs: of each token under the model as it is; None unless asked for.
      finish: `"length"` or `"stop"`.
      rows: prompts.
      prompt_tokens, new_tokens: of all rows together.
      compile_seconds, prefill_seconds, decode_seconds: apart from each other; a second call does not compile.
      rounds: rounds of decoding, of all rows together.
      emitted: tokens that they gave, those behind a stop string included.
      acceptance: share of the draft's guesses that were right; None unless speculative.
    """

    text: Any
    tokens: Any
    logprobs: Any
    finish: Any
    rows: int
    prompt_tokens: int
    new_tokens: int
    compile_seconds: float
    prefill_seconds: float
    decode_seconds: float
    rounds: int
    emitted: int
    acceptance: float | None

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second of decoding, of all rows together."""
        return self.new_tokens / max(self.decode_seconds, 1e-9)

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens a second, all but each row's last: that one is the first step of decoding."""
        return (self.prompt_tokens - self.rows) / max(self.prefill_seconds, 1e-9)

    @property
    def tokens_per_round(self) -> float:
        """1 for plain decoding, up to k + 1 under speculation."""
        return self.emitted / max(self.rounds, 1)


@dataclasses.dataclass
class Held:
    """One row's state from one call to the next: what it has read is not read again.

    Args:
      state: None before the first call, and after one that was cut off within a step.
      tokens: those whose keys and values the state holds.
      prefilled: tokens that the last call read in before it decoded.
    """

    state: State | None = None
    tokens: list[int] = dataclasses.field(default_factory=list)
    prefilled: int = 0

    def take(self, row: list[int], length: int) -> State | None:
        """The state, rolled back to what it has in common with a row; None where that cannot be, or none is held."""
        state, self.state = self.state, None
        if state is None or state.max_len != length:
            return None
        common = 0
        while common < min(len(self.tokens), len(row) - 1) and self.tokens[common] == row[common]:
            common += 1
        try:
            return rollback(state, len(self.tokens) - common)
        except InfoptError:  # a ring has forgotten what came before
            return None


class Compiled:
    """A jitted function that says how often and how long it compiled."""

    def __init__(self, fn: Callable[..., Any], donate: int) -> None:
        self._jitted = jax.jit(fn, donate_argnums=donate)
        self._executables: dict[Any, Any] = {}
        self.seconds = 0.0

    @property
    def compilations(self) -> int:
        return len(self._executables)

    def __call__(self, *args: Any) -> Any:
        leaves, tree = jax.tree.flatten(args)
        key = (tree, tuple((x.shape, x.dtype, getattr(x, "sharding", None)) for x in leaves))
        if key not in self._executables:
            start = time.perf_counter()
            self._executables[key] = self._jitted.lower(*args).compile()
            self.seconds += time.perf_counter() - start
        return self._executables[key](*args)


def compiled(spec: Spec) -> tuple[Compiled, Compiled]:
    """Prefill and several rounds of decoding, for all models of a Spec.

    For one batch size and one length of the state (lengths double), prefill compiles at most `len(BUCKETS)` times and
    decoding once, whatever the prompts and options (and once more for each doubling beyond 8 stop tokens).
    """
    return _compiled(build(spec))


@functools.lru_cache(maxsize=64)
def _compiled(f: Functions) -> tuple[Compiled, Compiled]:
    width = f.lookahead

    def prefill(params: Params, tokens: Array, state: State, count: Array) -> State:
        return f.hidden(params, tokens, state, count)[1]

    def rounds(
        params: Params, last: Array, state: State, sampling: Sampling, budget: Array, stops: Array, limit: Array
    ):
        """Decode until the limit of rounds, or until no row may emit more.

        Args:
          budget: `[B]` tokens that a row may still emit; a row with 0 is not active.
          stops: tokens that end a row.
        """
        rows = jnp.arange(last.shape[0], dtype=jnp.int32)[:, None]
        column = jnp.arange(width, dtype=jnp.int32)[None]

        def body(c: Any) -> Any:
            step, last, state, budget, filled, tokens, logprobs, took, offered = c
            active = budget > 0
            e, state = f.decode(params, last, state, sampling, active)
            stop = (e.tokens[..., None] == stops[None, None]).any(-1)
            keep = column < jnp.minimum(e.count, budget)[:, None]
            ended = jnp.cumsum((stop & keep).astype(jnp.int32), 1)
            keep &= (ended - stop.astype(jnp.int32)) <= 0
            kept = keep.sum(1, dtype=jnp.int32)
            state = state.replace(lengths=state.lengths - (e.count - kept))
            place = jnp.where(keep, filled[:, None] + column, 2**30)
            tokens = tokens.at[rows, place].set(e.tokens, mode="drop")
            logprobs = logprobs.at[rows, place].set(e.logprobs, mode="drop")
            newest = jnp.take_along_axis(e.tokens, jnp.maximum(kept - 1, 0)[:, None], 1)[:, 0]
            last = jnp.where(kept > 0, newest, last)
            done = (stop & keep).any(1)
            return (
                step + 1,
                last,
                state,
                jnp.where(done, 0, budget - kept),
                filled + kept,
                tokens,
                logprobs,
                took + active.astype(jnp.int32),
                offered + e.count,
            )

        batch = last.shape[0]
        zero = jnp.zeros(batch, jnp.int32)
        start = (
            jnp.int32(0),
            last,
            state,
            budget,
            zero,
            jnp.zeros((batch, _ROUNDS * width), jnp.int32),
            jnp.zeros((batch, _ROUNDS * width), jnp.float32),
            zero,
            zero,
        )
        out = jax.lax.while_loop(lambda c: (c[0] < limit) & (c[3] > 0).any(), body, start)
        return out[1:]

    return Compiled(prefill, 2), Compiled(rounds, 2)


def _read_prompts(model: Model, prompts: Prompts) -> tuple[list[list[int]], bool]:
    """Token ids of each prompt, and whether it was a single one."""
    if isinstance(prompts, np.ndarray | jax.Array):
        prompts = np.asarray(prompts).tolist()
    if not isinstance(prompts, str | list | tuple):
        raise PromptError(
            f"prompts are a {type(prompts).__name__}.",
            why="nothing else is read as a text or as token ids.",
            fix="a text, token ids, or a list of either",
        )
    single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int | np.integer))
    several: Any = [prompts] if single else list(prompts)
    if not several:
        raise PromptError(
            "there is no prompt.",
            why="a batch of no rows generates nothing.",
            fix="a text, token ids, or a list of either",
        )
    rows = []
    for i, prompt in enumerate(several):
        if isinstance(prompt, str):
            if model.tokenizer is None:
                raise PromptError(
                    "a text was given to a model without a tokenizer.",
                    why="a text becomes token ids by the tokenizer that the model was trained with.",
                    fix="token ids, or a model loaded with its tokenizer",
                )
            ids = model.tokenizer.encode(prompt)
        elif isinstance(prompt, Sequence | np.ndarray) and all(isinstance(t, int | np.integer) for t in prompt):
            ids = [int(t) for t in prompt]
        else:
            raise PromptError(
                f"prompt {i} is neither a text nor a list of token ids.",
                why="nothing else is read as a text or as token ids.",
                fix="str, or list of int",
            )
        if not ids:
            raise PromptError(
                f"prompt {i} is empty.",
                why="the first token follows from something.",
                fix="at least one token; a model's begin-of-text token if there is nothing to say",
            )
        vocab = model.spec.config.vocab
        if bad := [t for t in ids if not 0 <= t < vocab]:
            raise PromptError(
                f"token {bad[0]} of prompt {i} is outside the vocabulary of {vocab} words.",
                why="it has no embedding.",
                fix="ids made by this model's own tokenizer",
            )
        rows.append(ids)
    return rows, single


def _length(spec: Spec, longest: int, max_new: int, max_len: int | None) -> int:
    """Slots of a state that holds the longest prompt, what is generated, and a round's guesses."""
    k = spec.program.k if spec.program else 0
    need = longest + max_new + k
    what = f"a prompt of {longest} tokens and {max_new} new ones" + f" and {k} guesses" * bool(k)
    if max_len is not None:
        if need > max_len:
            raise PromptError(
                f"{what} do not fit max_len={max_len}.",
                why="every token of a row needs a slot of the state, or its writes are lost.",
                fix=f"max_len={need}" + f", or max_new={max_len - longest - k}" * (max_len > longest + k),
            )
        check_length(spec, max_len)
        return max_len
    left = (context_limit(spec) or need) - longest - k
    check_length(spec, need, what, f"max_new={left}" if left > 0 else "a shorter prompt")
    length = _SHORTEST
    while length < need:
        length *= 2
    limit = context_limit(spec)
    return length if limit is None else min(length, limit)


class _Row:
    """One prompt's text as it grows, and what may be shown of it."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...], prompt: Sequence[int]) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.finish = ""
        self._stop, self._stream = stop, None if tokenizer is None else tokenizer.stream(prompt)
        self._words = 0 if tokenizer is None else tokenizer.vocab_size
        self.text, self.shown = "", 0

    def push(self, tokens: list[int], logprobs: list[float], ended: str) -> str:
        """Take new tokens, return what may be shown; `ended` is "", "stop" (the last is a stop token) or "length"."""
        taken = 0
        body = tokens[:-1] if ended == "stop" else tokens
        for token in body:
            taken += 1
            if self._stream is not None and token < self._words:  # a padded vocabulary has ids that mean nothing
                self.text += self._stream.push([token])
                if self._cut():
                    ended = "stop"
                    break
        else:
            taken = len(tokens)
        self.tokens += tokens[:taken]
        self.logprobs += logprobs[:taken]
        self.finish = ended
        if self._stream is not None and ended and not self._at_stop:
            self.text += self._stream.flush()
            if self._cut():
                self.finish = ended = "stop"
        end = len(self.text) if ended else len(self.text) - self._held()
        shown, self.shown = self.text[self.shown : end], max(end, self.shown)
        return shown

    _at_stop = False

    def _cut(self) -> bool:
        found = [i for i in (self.text.find(s) for s in self._stop) if i >= 0]
        if found:
            self.text, self._at_stop = self.text[: min(found)], True
        return bool(found)

    def _held(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        return max((n for s in self._stop for n in range(1, len(s)) if self.text.endswith(s[:n])), default=0)


def stream(
    model: Model,
    params: Params,
    prompts: Prompts,
    *,
    max_new: int = 64,
    temperature: Any = 0.0,
    top_k: Any = 0,
    top_p: Any = 1.0,
    min_p: Any = 0.0,
    repetition_penalty: Any = 1.0,
    seed: Any = 0,
    stop: str | Sequence[str] = (),
    stop_tokens: Sequence[int] | None = None,
    logprobs: bool = False,
    max_len: int | None = None,
) -> Generator[Chunk, None, Generation]:
    """Generate, giving pieces of text as they become certain. Arguments and errors as `generate`'s.

    Returns:
      An iterator of `Chunk`; as a generator's value, the `Generation`.

    >>> import infopt as ip, jax
    >>> model = ip.cache_kv()(ip.models.llama())
    >>> sum(len(c.tokens) for c in ip.stream(model, model.init(jax.random.key(0)), [5, 6, 7], max_new=4))
    4
    """
    return _start(
        model,
        params,
        prompts,
        max_new,
        stop,
        stop_tokens,
        max_len,
        _ROUNDS_STREAMED,
        dict(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            logprobs=logprobs,
        ),
    )


def generate(
    model: Model,
    params: Params,
    prompts: Prompts,
    *,
    max_new: int = 64,
    temperature: Any = 0.0,
    top_k: Any = 0,
    top_p: Any = 1.0,
    min_p: Any = 0.0,
    repetition_penalty: Any = 1.0,
    seed: Any = 0,
    stop: str | Sequence[str] = (),
    stop_tokens: Sequence[int] | None = None,
    logprobs: bool = False,
    max_len: int | None = None,
    callback: Callable[[Chunk], None] | None = None,
) -> Generation:
    """Continue prompts by a stack; rows of a batch give what each prompt gives alone.

    Args:
      model, params: a stack and its params.
      prompts: a text, token ids, or a list of either (of any lengths).
      max_new: tokens to generate a prompt, at most.
      temperature, top_k, top_p, min_p, repetition_penalty: as in `Sampling`, one value or one a prompt.
      seed: row r draws with seed + r; or one a prompt.
      stop: a string, or several, before which a text ends.
      stop_tokens: tokens that end a row; the tokenizer's by default.
      logprobs: whether to return them.
      max_len: slots of the state; as many as needed by default.
      callback: called with each `Chunk` as it becomes certain.

    Raises:
      PromptError: an empty prompt, a token outside the vocabulary, or more than context or state hold.
      SamplingError: an option out of range.
      ParamsError: params of another stack.

    >>> import infopt as ip, jax
    >>> model = ip.cache_kv()(ip.models.llama())
    >>> out = ip.generate(model, model.init(jax.random.key(0)), [5, 6, 7], max_new=4)
    >>> len(out.tokens), out.finish
    (4, 'length')
    """
    run = _start(
        model,
        params,
        prompts,
        max_new,
        stop,
        stop_tokens,
        max_len,
        _ROUNDS if callback is None else _ROUNDS_STREAMED,
        dict(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            logprobs=logprobs,
        ),
    )
    while True:
        try:
            chunk = next(run)
        except StopIteration as end:
            return end.value
        if callback is not None:
            callback(chunk)


def answer(
    model: Model,
    params: Params,
    prompt: list[int],
    held: Held,
    *,
    max_new: int,
    max_len: int,
    stop: str | Sequence[str] = (),
    stop_tokens: Sequence[int] | None = None,
    **sampling: Any,
) -> Generator[Chunk, None, Generation]:
    """`stream` for one prompt of token ids, by a state that is held from one call to the next.

    Args:
      held: what it has in common with the prompt is not read again; changed as the answer grows.
      max_len: slots of the state; a held one of another length is given up.
    """
    return _start(model, params, prompt, max_new, stop, stop_tokens, max_len, _ROUNDS_STREAMED, sampling, held)


def _start(
    model: Model,
    params: Params,
    prompts: Prompts,
    max_new: int,
    stop: str | Sequence[str],
    stop_tokens: Sequence[int] | None,
    max_len: int | None,
    rounds_a_call: int,
    options: dict[str, Any],
    held: Held | None = None,
) -> Generator[Chunk, None, Generation]:
    """Check everything that the caller gave; the generator that is returned does the work."""
    spec, tokenizer = model.spec, model.tokenizer
    for name, value in (("max_new", max_new), ("max_len", max_new if max_len is None else max_len)):
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
            raise PromptError(
                f"{name}={value!r} is not a whole number >= 1.", why="it counts tokens.", fix=f"{name}=64, say"
            )
    stop = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if any(not isinstance(s, str) or not s for s in stop):
        raise PromptError(
            f"stop={stop!r} holds what is no text.",
            why="stop strings are looked for in the text, and the empty one is everywhere.",
            fix="non-empty strings; ids go to stop_tokens",
        )
    if stop and tokenizer is None:
        raise PromptError(
            "stop strings were given to a model without a tokenizer.",
            why="without one there is no text to look for them in.",
            fix="stop_tokens=[...]",
        )
    eos = () if tokenizer is None else tokenizer.eos_ids
    enders: list[int] = list(eos if stop_tokens is None else np.atleast_1d(stop_tokens).tolist())
    if any(not isinstance(t, int) or not 0 <= t < spec.config.vocab for t in enders):
        raise PromptError(
            f"stop_tokens={enders} are not all in the vocabulary of {spec.config.vocab}.",
            why="a word that the model cannot emit ends nothing.",
            fix="token ids of this model",
        )
    rows, single = _read_prompts(model, prompts)
    check_params(spec, params)
    longest = max(map(len, rows))
    sampling = Sampling.of(len(rows), **options)
    length = _length(spec, longest, max_new, max_len)
    return _run(model, params, rows, single, sampling, length, max_new, stop, enders, rounds_a_call, held)


def _run(
    model: Model,
    params: Params,
    rows: list[list[int]],
    single: bool,
    sampling: Sampling,
    length: int,
    max_new: int,
    stop: tuple[str, ...],
    enders: list[int],
    rounds_a_call: int,
    held: Held | None,
) -> Generator[Chunk, None, Generation]:
    spec, tokenizer = model.spec, model.tokenizer
    batch, longest = len(rows), max(map(len, rows))
    prefill, rounds = compiled(spec)
    compiling = prefill.seconds + rounds.seconds

    began = time.perf_counter()
    state = held.take(rows[0], length) if held is not None else None
    if state is None:
        state = build(spec).init_state(batch, length, chunk=min(max(BUCKETS), length))
    sizes = np.array([len(r) - 1 for r in rows])
    done = int(state.lengths[0])
    if held is not None:
        held.prefilled = longest - 1 - done
    while done < longest - 1:
        size = next(b for b in BUCKETS if b >= min(longest - 1 - done, max(BUCKETS)))
        size = min(size, length)
        tokens = np.zeros((batch, size), np.int32)
        for b, row in enumerate(rows):
            piece = row[done : min(done + size, len(row) - 1)]
            tokens[b, : len(piece)] = piece
        count = np.clip(sizes - done, 0, size).astype(np.int32)
        state = prefill(params, jnp.asarray(tokens), state, jnp.asarray(count))
        done += size
    jax.block_until_ready(state.lengths)
    read = list(rows[0])
    if held is not None:
        held.state, held.tokens = state, read[:-1]
    prefilled = time.perf_counter()
    compiled_prefill = prefill.seconds + rounds.seconds - compiling

    texts = [_Row(tokenizer, stop, row) for row in rows]
    last = jnp.asarray([r[-1] for r in rows], jnp.int32)
    unique = sorted(set(enders))
    stops = jnp.asarray(unique + [-2] * (max(8, 1 << (len(unique) - 1).bit_length()) - len(unique)), jnp.int32)
    budget = np.full(batch, max_new, np.int32)
    limit, took, offered, emitted, decoding = 1 if rounds_a_call != _ROUNDS else _ROUNDS, 0, 0, 0, 0.0
    if stop:
        limit = min(limit, _ROUNDS_STREAMED)
    while budget.any():
        start = time.perf_counter()
        compiled_before = rounds.seconds
        if held is not None:
            held.state = None  # donated
        last, state, left, filled, tokens, logps, t, o = rounds(
            params, last, state, sampling, jnp.asarray(budget), stops, jnp.int32(limit)
        )
        left, filled, tokens, logps = (np.array(x) for x in (left, filled, tokens, logps))
        took, offered, emitted = took + int(t.sum()), offered + int(o.sum()), emitted + int(filled.sum())
        decoding += time.perf_counter() - start - (rounds.seconds - compiled_before)
        if held is not None:
            read += tokens[0, : filled[0]].tolist()
            held.state, held.tokens = state, read[: int(state.lengths[0])]
        for b, text in enumerate(texts):
            if not budget[b]:
                continue
            new = tokens[b, : filled[b]].tolist()
            ended = "" if left[b] else ("stop" if new[-1] in enders else "length")
            before = len(text.tokens)
            piece = text.push(new, logps[b, : filled[b]].tolist(), ended)
            if text.finish:
                left[b] = 0
            yield Chunk(b, piece, text.tokens[before:])
        budget = left
        limit = rounds_a_call if not stop else _ROUNDS_STREAMED

    def each(values: list[Any]) -> Any:
        return values[0] if single else values

    k = spec.program.k if spec.program else 0
    return Generation(
        text=None if tokenizer is None else each([t.text for t in texts]),
        tokens=each([t.tokens for t in texts]),
        logprobs=each([t.logprobs for t in texts]) if bool(sampling.logprobs.any()) else None,
        finish=each([t.finish for t in texts]),
        rows=batch,
        prompt_tokens=sum(map(len, rows)),
        new_tokens=sum(len(t.tokens) for t in texts),
        compile_seconds=prefill.seconds + rounds.seconds - compiling,
        prefill_seconds=prefilled - began - compiled_prefill,
        decode_seconds=decoding,
        rounds=took,
        emitted=emitted,
        acceptance=(offered - took) / (k * took) if k and took else None,
    )
