"""Evaluation: what a stack costs in quality, window by window, against its base, with intervals.

`measure` runs a model over `Windows` and gives `Scores`: numbers a window, JSON-able. Estimates and paired differences
are made of those alone, later, without a model. Nothing here holds more than `_BYTES` of logits at once, or writes any.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from infopt.errors import EvaluationError, nearest
from infopt.generation import BUCKETS, _read_prompts, generate
from infopt.model import Functions, Model, build, check_length, check_params, context_limit
from infopt.typing import Array, Params

METRICS = {
    "ppl": "perplexity",
    "kl": "mean KL divergence from the base, nats a token",
    "kl99": "99th percentile of the tokens' KL divergence from the base, nats",
    "top1": "share of tokens at which the likeliest word is the base's",
    "bits_per_byte": "bits a byte of text",
    "greedy": "greedy tokens in common with the base before the first that differs",
}
"""What `estimate` and `difference` know; the last is `greedy_agreement`'s."""
ENOUGH = 20
"""Windows, documents or prompts from which on a 95% interval covers the truth 93 to 97 times in 100, in simulations."""

_BYTES = 200e6  # of log-probabilities at once, two models' together
_ARRAYS = 4  # as many arrays over the vocabulary are alive at once, at most
_TOKENS = 4096  # in one batch, where the caller does not say
_TAIL = 0.1  # the share of tokens whose KL is kept one by one: ten times what the 99th percentile needs

Ids = Sequence[int] | np.ndarray


# ------------------------------------------------------------------------------------------------------------- windows


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """Texts, cut to what a model reads at once. Made by `windows`.

    Args:
      rows: token ids, `[n]` a window, context first.
      starts: of each window, the place of its first scored token; all that follow are scored too.
      units: what an interval resamples: of each window the number of its document, or its own.
      bytes: of each window, UTF-8 bytes of its scored tokens' text; None without a tokenizer.
      tokenizer: the digest of the tokenizer; "" without one.
    """

    rows: tuple[np.ndarray, ...]
    starts: tuple[int, ...]
    units: tuple[int, ...]
    bytes: tuple[int, ...] | None = None
    tokenizer: str = ""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def length(self) -> int:
        """Tokens of the longest window."""
        return max(map(len, self.rows))

    @property
    def scored(self) -> int:
        """Tokens scored, of all windows together."""
        return sum(len(row) - start for row, start in zip(self.rows, self.starts))

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of all tokens and of which are scored. Only scores of equal windows are compared."""
        h = hashlib.sha256()
        for row, start, unit in zip(self.rows, self.starts, self.units):
            h.update(np.array([len(row), start, unit], "<i8").tobytes() + row.astype("<i4").tobytes())
        return h.hexdigest()

    def sample(self, n: int, seed: int = 0) -> Windows:
        """`n` of the windows, drawn without replacement, in their order; all of them where there are no more.

        >>> len(windows(range(1000), 100).sample(4, seed=1))
        4
        """
        n = min(_whole("n", n), len(self))
        return self._only(sorted(np.random.default_rng(seed).permutation(len(self))[:n].tolist()))

    def spread(self, tokens: int) -> Windows:
        """Windows evenly out of all, that score about so many tokens; all of them where there are no more.

        >>> len(windows(range(1000), 100).spread(300))
        3
        """
        n = max(round(_whole("tokens", tokens) * len(self) / self.scored), 1)
        if n >= len(self):
            return self
        return self._only(np.unique(np.linspace(0, len(self) - 1, n).round().astype(int)).tolist())

    def _only(self, chosen: Iterable[int]) -> Windows:
        chosen = list(chosen)
        sizes = None if self.bytes is None else tuple(self.bytes[i] for i in chosen)
        rows = tuple(self.rows[i] for i in chosen)
        starts, units = (tuple(x[i] for i in chosen) for x in (self.starts, self.units))
        return Windows(rows, starts, units, sizes, self.tokenizer)

    def __repr__(self) -> str:
        return f"Windows({len(self)} of at most {self.length} tokens, {self.scored} scored, digest={self.digest[:8]})"


def windows(
    text: str | Ids | Sequence[str] | Sequence[Ids], length: int, stride: int | None = None, *, tokenizer: Any = None
) -> Windows:
    """Cut a text, or documents one by one, into windows in which each token is scored once.

    Window k holds tokens `k * stride` to `k * stride + length`; it scores those that no window before it held, `stride`
    of them, with `length - stride` tokens of context or more; the first window has less. A tokenizer that puts a token
    before every text (BOS) puts it before every window, within `length`. Without one, a text's first token follows
    from nothing, and is not scored. Perplexity is `exp(-sum(log p(token | window's tokens before it)) / tokens)`, over
    the scored tokens of all windows.

    Source: Jelinek et al. 1977, "Perplexity, a measure of the difficulty of speech recognition tasks"; the strided
    windows are those of "Perplexity of fixed-length models" in the documentation of `transformers`.

    Args:
      text: a text or its token ids, or a list of either, one a document; ids without BOS or with it.
      length: tokens of a window.
      stride: tokens from one window to the next: fewer give more context and take longer. As many as can be by default.
      tokenizer: the model's; needed for texts, and for bits a byte.

    Raises:
      EvaluationError: too little text, or a stride that leaves a token without context.

    >>> cut = windows([5, 6, 7, 8, 9, 10, 11], length=4, stride=2)
    >>> [(row.tolist(), start) for row, start in zip(cut.rows, cut.starts)]
    [([5, 6, 7, 8], 1), ([7, 8, 9, 10], 2), ([9, 10, 11], 2)]
    """
    prefix = () if tokenizer is None else _prefix(tokenizer)
    length = _whole("length", length, 2)
    room = length - len(prefix)
    most = room if prefix else room - 1
    stride = max(most, 1) if stride is None else _whole("stride", stride)
    if stride > most:
        raise EvaluationError(
            f"windows of {length} tokens cannot be {stride} apart.",
            why="their first tokens would follow from nothing, or be left out.",
            fix=f"stride <= {most}" if most > 0 else f"length >= {len(prefix) + 2}",
        )
    single, documents = _documents(text, tokenizer, prefix)
    rows, starts, units, sizes = [], [], [], []
    for number, ids in enumerate(documents):
        least = room if single else 1 if prefix else 2
        if len(ids) < least:
            raise EvaluationError(
                f"{'the text' if single else f'document {number}'} has {len(ids)} tokens: too short for a window.",
                why=f"a window holds {length} tokens." if single else "no token of it follows from another.",
                fix="a longer text, or shorter windows" if single else "leave it out, or join it to another",
            )
        spell = None if tokenizer is None else tokenizer.stream()
        scored = 0 if prefix else 1
        if spell is not None and scored:
            spell.push(ids[:1].tolist())
        for begin in range(0, len(ids), stride):
            end = min(begin + room, len(ids))
            rows.append(np.concatenate([np.array(prefix, np.int32), ids[begin:end]]))
            starts.append(len(prefix) + scored - begin)
            units.append(len(rows) - 1 if single else number)
            if spell is not None:
                text_ = spell.push(ids[scored:end].tolist()) + (spell.flush() if end == len(ids) else "")
                sizes.append(len(text_.encode("utf-8")))
            scored = end
            if end == len(ids):
                break
    digest = "" if tokenizer is None else tokenizer.digest
    return Windows(tuple(rows), tuple(starts), tuple(units), None if tokenizer is None else tuple(sizes), digest)


def _prefix(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that a tokenizer puts before every text."""
    full, plain = tokenizer.encode("a"), tokenizer.encode("a", special=False)
    at = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
    return tuple(full[:at])


def _documents(text: Any, tokenizer: Any, prefix: tuple[int, ...]) -> tuple[bool, list[np.ndarray]]:
    """Each document's token ids, without BOS; and whether it was one text."""
    if isinstance(text, Iterable) and not isinstance(text, str | np.ndarray | list | tuple):
        text = list(text)
    single = isinstance(text, str) or (len(text) > 0 and np.ndim(text[0]) == 0 and not isinstance(text[0], str))
    documents = []
    for number, document in enumerate([text] if single else text):
        if isinstance(document, str):
            if tokenizer is None:
                raise EvaluationError(
                    "a text was given without a tokenizer.",
                    why="perplexity is by tokens, and the model's tokenizer makes them.",
                    fix="windows(text, length, tokenizer=model.tokenizer)",
                )
            ids = np.array(tokenizer.encode(document, special=False), np.int64)
        else:
            ids = np.asarray(document)
            if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
                raise EvaluationError(
                    f"document {number} is neither a text nor token ids.",
                    why="nothing else is cut into windows.",
                    fix="str, or a list of int",
                )
            if prefix and tuple(ids[: len(prefix)].tolist()) == prefix:
                ids = ids[len(prefix) :]
        if ids.size and not 0 <= ids.min() <= ids.max() < 2**31:
            raise EvaluationError(
                f"document {number} has a token {ids.min() if ids.min() < 0 else ids.max()}.",
                why="token ids count from 0, in 32 bits.",
                fix="ids made by the model's tokenizer",
            )
        documents.append(ids.astype(np.int32))
    if not documents:
        raise EvaluationError("there is no text.", why="nothing can be scored.", fix="a text, or a list of them")
    return single, documents


def _whole(name: str, value: Any, least: int = 1) -> int:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
        raise EvaluationError(
            f"{name}={value!r} is not a whole number >= {least}.", why="it counts things.", fix=f"{name} >= {least}"
        )
    return int(value)


def check_disjoint(calibration: Any, evaluation: Any, n: int = 32) -> None:
    """Raise where two texts have any `n` tokens in a row in common (a document of fewer tokens counts as a whole).

    Args:
      calibration, evaluation: token ids, a list of documents of them, or `Windows`.
      n: the length of a run; shorter ones find stock phrases too.

    Raises:
      EvaluationError: the texts overlap.

    >>> check_disjoint(range(100), range(200, 300))
    >>> check_disjoint(range(100), range(60, 160))
    Traceback (most recent call last):
    infopt.errors.EvaluationError: calibration and evaluation overlap: 9 runs of 32 tokens of the evaluation ...
    """
    n = _whole("n", n)
    if shared := _shared(calibration, evaluation, n):
        raise EvaluationError(
            f"calibration and evaluation overlap: {shared} runs of {n} tokens of the evaluation stand in both.",
            why="what was fitted to a text scores too well on it.",
            fix="another split of the text, or a greater n where it is boilerplate, as a licence is",
        )


def _shared(calibration: Any, evaluation: Any, n: int) -> int:
    """How many runs of n tokens of the evaluation stand in the calibration text."""
    seen: dict[int, set[bytes]] = {}
    for row in _rows(calibration):
        for hashed, run in zip(*_runs(row, n)):
            seen.setdefault(int(hashed), set()).add(run.tobytes())
    shared = 0
    known = np.fromiter(seen, np.uint64, len(seen))
    for row in _rows(evaluation):
        hashes, runs = _runs(row, n)
        for i in np.flatnonzero(np.isin(hashes, known)):
            shared += runs[i].tobytes() in seen[int(hashes[i])]
    return shared


def check_apart(stack: Model, before: Model, evaluation: Windows) -> None:
    """Raise where a stack's transforms read of the text that it is measured on.

    Args:
      stack: what is measured.
      before: the model whose params it is made from.
      evaluation: the windows that it is measured on.

    Raises:
      EvaluationError: they share a run of 32 tokens, or of as many as the windows of one of them have.
    """
    for transform, model in stack.transforms(before):
        if read := transform.reads(model):
            n = min(32, evaluation.length, *map(len, read))
            if shared := _shared(read, evaluation, n):
                raise EvaluationError(
                    f"calibration and evaluation overlap: {shared} runs of {n} tokens of the evaluation stand in what "
                    f"{transform!r} reads.",
                    why="what was fitted to a text scores too well on it.",
                    fix="another text for one of them"
                    + (", or length=32 and more for both, where short phrases are all they share" if n < 32 else ""),
                )


def _rows(text: Any) -> list[np.ndarray]:
    return list(text.rows) if isinstance(text, Windows) else _documents(text, None, ())[1]


def _runs(row: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """All runs of n tokens, `[N, n]`, and a hash of each."""
    if not len(row):
        return np.zeros(0, np.uint64), np.zeros((0, n), np.int32)
    runs = np.lib.stride_tricks.sliding_window_view(row, min(n, len(row)))
    hashes = np.zeros(len(runs), np.uint64)
    for column in runs.T:
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + column.astype(np.uint64) + np.uint64(1)
    return hashes, runs


# ----------------------------------------------------------------------------------------------------- running a model


class _Runner(NamedTuple):
    """A model as scoring sees it.

    Args:
      read: tokens `[B, T]` to what `words` takes, one row for each of `width * B` places.
      words: of that, and places `[P]`, log-probabilities `[P, V]` in float32.
      vocab: words, where they are known beforehand.
      model: what was asked for.
    """

    read: Callable[[np.ndarray], tuple[Any, int]]
    words: Callable[[Any, np.ndarray], Array]
    vocab: int | None
    model: Any = None


@functools.lru_cache(maxsize=64)
def _programs(f: Functions) -> tuple[Any, Any]:
    """Compiled once for each Spec and shape, whichever params: a model against itself runs the same program twice."""

    def read(params: Params, tokens: Array, state: Any) -> Any:
        return f.hidden(params, tokens, state)

    def words(params: Params, hidden: Array, at: Array) -> Array:
        return jax.nn.log_softmax(f.head(params, hidden.reshape(-1, hidden.shape[-1])[at]))

    return jax.jit(read, donate_argnums=2), jax.jit(words)


_log_softmax = jax.jit(jax.nn.log_softmax)


def _runner(model: Any, params: Any) -> _Runner:
    if isinstance(model, Model):
        return _stack(model, params)
    if not callable(model) or params is not None:
        raise EvaluationError(
            f"a {type(model).__name__} with {'params' if params is not None else 'no params'} was to be measured.",
            why="that is neither a model with its params nor a function of tokens alone.",
            fix="measure(model, params, ...), or measure(f, None, ...) with f: tokens[B, T] -> logits[B, T, V]",
        )

    def read(tokens: np.ndarray) -> tuple[Any, int]:
        logits = model(tokens)
        logits = logits if isinstance(logits, jax.Array) else np.asarray(logits)
        if logits.ndim != 3 or logits.shape[:2] != tokens.shape or not jnp.issubdtype(logits.dtype, jnp.floating):
            raise EvaluationError(
                f"the function gave {logits.dtype}{list(logits.shape)} for tokens {list(tokens.shape)}.",
                why="each token gives the logits of the one that follows it.",
                fix="floating-point logits [B, T, V]",
            )
        return logits.reshape(-1, logits.shape[-1]), tokens.shape[1]

    def words(logits: Any, at: np.ndarray) -> Array:
        return _log_softmax(jnp.asarray(logits[at]).astype(jnp.float32))

    return _Runner(read, words, None)


def kept(model: Any, params: Any) -> _Runner:
    """A base for `measure` that reads each text once, for many stacks: what it made of it stays in memory.

    Args:
      model, params: as for `measure`.

    >>> import infopt as ip, jax
    >>> model = ip.models.llama()
    >>> params, text = model.init(jax.random.key(0)), ip.windows(range(60), length=32)
    >>> base = kept(model, params)
    >>> [ip.measure(model, params, text, base=base).kl.value for _ in range(2)]
    [0.0, 0.0]
    """
    runner, seen = _runner(model, params), dict[bytes, Any]()

    def read(tokens: np.ndarray) -> tuple[Any, int]:
        key = hashlib.sha256(np.array(tokens.shape, "<i8").tobytes() + tokens.tobytes()).digest()
        if key not in seen:
            seen[key] = runner.read(tokens)
        return seen[key]

    return runner._replace(read=read, model=model)


def _stack(model: Model, params: Params) -> _Runner:
    """The stack on its own path: through its cache, in chunks as `generate` reads a prompt, if it has one.

    A draft changes no logit, and does not run.
    """
    check_params(model.spec, params)
    spec = model.spec
    if spec.program is not None:
        spec, params = spec.replace(program=None), params["target"]
    f = build(spec)
    read_one, words = _programs(f)

    def read(tokens: np.ndarray) -> tuple[Any, int]:
        batch, length = tokens.shape
        chunk = min(max(BUCKETS), length) if spec.cache else length
        state = f.init_state(batch, length, chunk=chunk)
        parts = []
        for begin in range(0, length, chunk):
            piece = np.zeros((batch, chunk), np.int32)  # of the last one, what is too much is dropped
            piece[:, : min(chunk, length - begin)] = tokens[:, begin : begin + chunk]
            hidden, state = read_one(params, jnp.asarray(piece), state)
            parts.append(hidden)
        hidden = jnp.concatenate(parts, 1)
        return hidden, hidden.shape[1]

    return _Runner(read, lambda hidden, at: words(params, hidden, jnp.asarray(at)), spec.config.vocab)


def _target(logp: Array, target: Array) -> tuple[Array, Array]:
    """-log p of each target, and whether it is the likeliest word."""
    chosen = jnp.take_along_axis(logp, target[:, None], 1)[:, 0]
    return -chosen, jnp.argmax(logp, 1) == target


@jax.jit
def _alone(logp: Array, target: Array) -> tuple[Array, ...]:
    return _target(logp, target)


def divergence(logp: Array, base: Array) -> Array:
    """KL(base || model) `[P]` of log-probabilities `[P, V]`.

    Summed as p (exp(d) - 1 - d), d = log q - log p: the same, as q sums to 1, but no term is negative, and the
    rounding of the two normalisers hardly counts.
    """
    p, q, d = jnp.exp(base), jnp.exp(logp), logp - base
    near = p * jnp.where(jnp.abs(d) < 0.01, d * d * (0.5 + d / 6), jnp.expm1(d) - d)
    kl = jnp.where(d == 0, 0.0, jnp.where(d < 1, near, q - p - p * d))
    return jnp.sum(jnp.where(p == 0, q, kl), 1)


@jax.jit
def _against(logp: Array, target: Array, base: Array) -> tuple[Array, ...]:
    """The same, KL(base || model), and whether both have the same likeliest word."""
    top = jnp.max(logp, 1) + jnp.max(base, 1)
    agree = (jnp.argmax(logp, 1) == jnp.argmax(base, 1)).astype(jnp.float32)
    agree = jnp.where(jnp.isnan(top), jnp.nan, agree)
    return (*_target(logp, target), divergence(logp, base), agree)


def _batch(batch: int | None, length: int) -> int:
    return max(1, _TOKENS // length) if batch is None else _whole("batch", batch)


def _score(
    one: _Runner,
    base: _Runner | None,
    rows: Sequence[np.ndarray],
    starts: Sequence[int],
    length: int,
    batch: int,
    progress: Callable[[int, int], Any] | None = None,
) -> list[list[np.ndarray]]:
    """For each row `[nll, best]`, against a base also `[kl, agree]`: arrays over its scored tokens."""
    batch = min(batch, len(rows))
    scored = max(len(row) - start for row, start in zip(rows, starts))
    out: list[list[np.ndarray]] = []
    for first in range(0, len(rows), batch):
        part = range(first, min(first + batch, len(rows)))
        tokens = np.zeros((batch, length), np.int32)
        for b, r in enumerate(part):
            tokens[b, : len(rows[r])] = rows[r]
        seen, width = one.read(tokens)
        base_seen, base_width = (None, 0) if base is None else base.read(tokens)
        row = np.concatenate([np.full(len(rows[r]) - starts[r], b) for b, r in enumerate(part)])
        before = np.concatenate([np.arange(starts[r], len(rows[r])) - 1 for r in part])
        target = np.concatenate([rows[r][starts[r] :] for r in part])
        vocab = one.vocab or seen.shape[-1]
        step = min(max(1, int(_BYTES / (4 * _ARRAYS * vocab))), batch * scored)
        pieces: list[list[np.ndarray]] = []
        for i in range(0, len(row), step):
            fill = np.minimum(np.arange(i, i + step), len(row) - 1)
            logp = one.words(seen, row[fill] * width + before[fill])
            _check_words(logp, target)
            aim = jnp.asarray(target[fill])
            if base is None:
                found = _alone(logp, aim)
            else:
                base_logp = base.words(base_seen, row[fill] * base_width + before[fill])
                if base_logp.shape != logp.shape:
                    raise EvaluationError(
                        f"the model has {logp.shape[1]} words, its base {base_logp.shape[1]}.",
                        why="KL compares the probabilities of each word.",
                        fix="two models of one vocabulary",
                    )
                found = _against(logp, aim, base_logp)
            pieces.append([np.asarray(x)[: len(row) - i] for x in found])
        whole = [np.concatenate(column) for column in zip(*pieces)]
        out += [[column[row == b] for column in whole] for b in range(len(part))]
        if progress is not None:
            progress(len(out), len(rows))
    return out


def _check_words(logp: Array, target: np.ndarray) -> None:
    if target.max() >= logp.shape[1]:
        raise _foreign_token(int(target.max()), logp.shape[1])


def _foreign_token(token: int, vocab: int) -> EvaluationError:
    return EvaluationError(
        f"token {token} is outside the vocabulary of {vocab} words.",
        why="the text was cut into tokens by another model's tokenizer.",
        fix="windows(text, length, tokenizer=model.tokenizer), with the tokenizer of the model that is measured",
    )


def check_windows(cut: Windows, model: Any) -> None:
    """Raise unless a model can read the windows: its tokenizer made them, and they fit its context."""
    if not isinstance(model, Model):
        return
    own = "" if model.tokenizer is None else model.tokenizer.digest
    if own and cut.tokenizer and own != cut.tokenizer:
        raise EvaluationError(
            "the windows were made by another tokenizer than the model's.",
            why=f"their vocabularies differ: {cut.tokenizer[:8]}, {own[:8]}.",
            fix="windows(text, length, tokenizer=model.tokenizer)",
        )
    highest = max(int(row.max()) for row in cut.rows)
    if highest >= model.spec.config.vocab:
        raise _foreign_token(highest, model.spec.config.vocab)
    limit = context_limit(model.spec)
    check_length(model.spec, cut.length, f"windows of {cut.length} tokens", f"windows(text, {limit})")


# -------------------------------------------------------------------------------------------------------------- scores


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number, its standard error, and the ends of its interval (95% unless said otherwise).

    Args:
      note: what is wrong with it; "" if nothing.
    """

    value: float
    stderr: float
    low: float
    high: float
    note: str = ""

    def __str__(self) -> str:
        shown = f"{self.value:.5g} ± {self.stderr:.2g} [{self.low:.5g}, {self.high:.5g}]"
        return f"{shown} ({self.note})" if self.note else shown


Statistic = Callable[[np.ndarray], np.ndarray]
"""A metric as a function of how often each unit was drawn, `[R, units] -> [R]`."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """What `measure` found, window by window: all that estimates and paired differences need.

    Args:
      windows: the digest of the windows.
      units: what an interval resamples: each window's document, or its own number.
      tokens: scored tokens.
      nll: the sum of their -log p, in nats.
      bytes: of their text, or None.
      kl_sums: the sum of their KL(base || model), in nats; None without a base, as what follows.
      agree: tokens at which both have the same likeliest word.
      kl_above: the KL of single tokens beyond `kl_floor`, largest first, in four digits.
      kl_floor: about the 90th percentile of all tokens' KL.
    """

    windows: str
    units: tuple[int, ...]
    tokens: tuple[int, ...]
    nll: tuple[float, ...]
    bytes: tuple[int, ...] | None = None
    kl_sums: tuple[float, ...] | None = None
    agree: tuple[float, ...] | None = None
    kl_above: tuple[tuple[float, ...], ...] | None = None
    kl_floor: float = math.nan

    @property
    def ppl(self) -> Estimate:
        return self.estimate("ppl")

    @property
    def kl(self) -> Estimate:
        return self.estimate("kl")

    @property
    def kl99(self) -> Estimate:
        return self.estimate("kl99")

    @property
    def top1(self) -> Estimate:
        return self.estimate("top1")

    @property
    def bits_per_byte(self) -> Estimate:
        return self.estimate("bits_per_byte")

    def estimate(self, metric: str, *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Estimate:
        """One of `METRICS`, with an interval as `difference` makes it.

        Raises:
          EvaluationError: no such metric, or nothing was measured for it.
        """
        return _estimate(self._statistic(metric), self._units, level, resamples, seed)

    def to_json(self) -> str:
        """The same as one line of JSON; numbers that are not finite as text."""
        return json.dumps(_finite(dataclasses.asdict(self)), allow_nan=False)

    @staticmethod
    def from_json(text: str | Mapping[str, Any]) -> Scores:
        """What `to_json` wrote, or what `json.loads` made of it.

        >>> scores = Scores("", (0, 1), (3, 4), (2.5, float("nan")))
        >>> Scores.from_json(scores.to_json()).nll
        (2.5, nan)
        """
        try:
            return Scores(**_tuples(json.loads(text) if isinstance(text, str) else text))
        except (TypeError, ValueError) as error:
            raise EvaluationError(
                "the text is not a row of scores.", why=f"{error}.", fix="what Scores.to_json wrote"
            ) from error

    @functools.cached_property
    def _drawn(self) -> np.ndarray:
        """Each window's unit, counted from 0."""
        return np.unique(np.array(self.units), return_inverse=True)[1]

    @property
    def _units(self) -> int:
        return int(self._drawn.max()) + 1

    def _sums(self, values: Sequence[float]) -> np.ndarray:
        return np.bincount(self._drawn, np.asarray(values, np.float64))

    def _statistic(self, metric: str) -> Statistic:
        known = [name for name in METRICS if name != "greedy"]
        if metric not in known:
            raise _no_metric(metric, known)
        if metric in ("kl", "kl99", "top1") and self.kl_sums is None:
            raise EvaluationError(
                f"{metric} was not measured.",
                why="it compares a model with its base, and none was given.",
                fix="measure(model, params, windows, base=(base, base_params))",
            )
        if metric == "bits_per_byte" and self.bytes is None:
            raise EvaluationError(
                "bits a byte were not measured.",
                why="windows of token ids alone do not say how many bytes of text they stand for.",
                fix="windows(text, length, tokenizer=model.tokenizer)",
            )
        tokens, nll = self._sums(self.tokens), self._sums(self.nll)
        if metric == "ppl":
            return lambda drawn: np.exp((drawn @ nll) / (drawn @ tokens))
        if metric == "bits_per_byte":
            assert self.bytes is not None
            size = self._sums(self.bytes)
            return lambda drawn: (drawn @ nll) / (drawn @ size) / math.log(2)
        assert self.kl_sums is not None and self.agree is not None
        if metric != "kl99":
            sums = self._sums(self.kl_sums if metric == "kl" else self.agree)
            return lambda drawn: (drawn @ sums) / (drawn @ tokens)
        assert self.kl_above is not None
        bad = not np.all(np.isfinite(self.kl_sums))
        values = np.concatenate([*map(np.array, self.kl_above), [self.kl_floor]])
        unit = np.repeat(self._drawn, list(map(len, self.kl_above)))
        order = np.argsort(-values[:-1], kind="stable")
        unit, values = unit[order], np.append(values[:-1][order], self.kl_floor)

        def percentile(drawn: np.ndarray) -> np.ndarray:
            """The least KL that at most a hundredth of the tokens exceed."""
            if bad:
                return np.full(len(drawn), np.nan)
            allowed = (drawn @ tokens) / 100
            return values[(np.cumsum(drawn[:, unit], 1) <= allowed[:, None]).sum(1)]

        return percentile


def _no_metric(metric: str, known: list[str]) -> EvaluationError:
    return EvaluationError(f"no metric {metric!r} is measured here.", why=nearest(metric, known), fix=", ".join(known))


def _finite(x: Any) -> Any:
    if isinstance(x, dict):
        return {name: _finite(value) for name, value in x.items()}
    if isinstance(x, tuple | list):
        return [_finite(value) for value in x]
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x


def _tuples(row: Mapping[str, Any]) -> dict[str, Any]:
    def value(x: Any) -> Any:
        return tuple(map(value, x)) if isinstance(x, list) else float(x) if isinstance(x, str) else x

    return {name: x if name == "windows" else value(x) for name, x in row.items()}


def measure(
    model: Any,
    params: Any,
    windows: Windows,
    base: tuple[Any, Any] | _Runner | None = None,
    *,
    batch: int | None = None,
    progress: Callable[[int, int], Any] | None = None,
) -> Scores:
    """Score a text by a stack, and against a base.

    A stack is run on its own path: one with a cache reads each window through it, in chunks as `generate` reads a
    prompt, and so sees its codec, ring and pages; one without recomputes, and sees the codec too if its Spec has one.
    Both give the same numbers, to float rounding. Log-softmax is in float32, sums in float64.

    Args:
      model, params: a stack and its params; or a function `tokens[B, T] -> logits[B, T, V]`, and None.
      windows: what `windows` gave.
      base: `(model, params)` to compare with, either kind; or `kept(model, params)`, for many stacks.
      batch: windows at once; 4,096 tokens by default.
      progress: called after each batch with the number of windows done, and of all.

    Raises:
      EvaluationError: tokens of another tokenizer, logits of another shape or vocabulary.
      PromptError: windows longer than the model's context.
      ParamsError: params of another stack.

    >>> import infopt as ip, jax
    >>> model = ip.models.llama()
    >>> params, stack = model.init(jax.random.key(0)), ip.quantize(bits=8)(model)
    >>> text = ip.windows([n * n % 61 for n in range(400)], length=32)
    >>> scores = ip.measure(stack, stack.convert(params), text, base=(model, params))
    >>> 0 < scores.kl.value < 0.01
    True
    """
    if not isinstance(windows, Windows) or not len(windows):
        raise EvaluationError(
            f"measure was given {type(windows).__name__} as its windows.",
            why="they say which tokens are scored.",
            fix="windows(tokens, length), of which at least one is left",
        )
    other = base if base is None or isinstance(base, _Runner) else _runner(*base)._replace(model=base[0])
    for m in (model, *([] if other is None else [other.model])):
        check_windows(windows, m)
    one = _runner(model, params)
    length = windows.length
    found = _score(one, other, windows.rows, windows.starts, length, _batch(batch, length), progress)
    nll, _, *rest = ([row[i] for row in found] for i in range(2 if base is None else 4))
    scores = Scores(
        windows.digest,
        windows.units,
        tuple(map(len, nll)),
        tuple(float(x.sum(dtype=np.float64)) for x in nll),
        windows.bytes,
    )
    if base is None:
        return scores
    kl, agree = rest
    every = np.sort(np.concatenate(kl))
    floor = float(f"{every[int(len(every) * (1 - _TAIL))]:.4g}")
    above = tuple(tuple(float(f"{x:.4g}") for x in np.sort(row)[::-1] if x > floor) for row in kl)
    return dataclasses.replace(
        scores,
        kl_sums=tuple(float(x.sum(dtype=np.float64)) for x in kl),
        agree=tuple(float(x.sum(dtype=np.float64)) for x in agree),
        kl_above=above,
        kl_floor=floor,
    )


def noise_floor(model: Model, params: Params, windows: Windows, *, batch: int | None = None) -> float:
    """The mean KL of a model against itself, nats a token: 0 where the device computes the same thing twice.

    >>> import infopt as ip, jax
    >>> model = ip.models.llama()
    >>> noise_floor(model, model.init(jax.random.key(0)), ip.windows(range(60), length=32))
    0.0
    """
    some = windows._only(range(min(len(windows), _batch(batch, windows.length))))
    scores = measure(model, params, some, (model, params), batch=batch)
    assert scores.kl_sums is not None
    return sum(scores.kl_sums) / some.scored


# ----------------------------------------------------------------------------------------------------------- intervals


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far greedy texts agree with the base's. Made by `greedy_agreement`; JSON-able.

    Args:
      lengths: of each prompt, new tokens in common before the first that differs.
      max_new: tokens generated for each.
      prompts: a digest of the prompts.
    """

    lengths: tuple[int, ...]
    max_new: int
    prompts: str

    def estimate(
        self, metric: str = "greedy", *, level: float = 0.95, resamples: int = 2000, seed: int = 0
    ) -> Estimate:
        """The mean length, with an interval over prompts."""
        return _estimate(self._statistic(metric), self._units, level, resamples, seed)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str | Mapping[str, Any]) -> Agreement:
        """What `to_json` wrote, or what `json.loads` made of it."""
        row = json.loads(text) if isinstance(text, str) else text
        return Agreement(tuple(row["lengths"]), row["max_new"], row["prompts"])

    @property
    def _units(self) -> int:
        return len(self.lengths)

    def _statistic(self, metric: str) -> Statistic:
        if metric != "greedy":
            raise _no_metric(metric, ["greedy"])
        lengths = np.array(self.lengths, np.float64)
        return lambda drawn: (drawn @ lengths) / drawn.sum(1)


def difference(
    a: Scores | Agreement,
    b: Scores | Agreement,
    metric: str,
    *,
    relative: bool = False,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """A metric of `a` less that of `b`, measured on the same windows, with the interval of the paired difference.

    The interval is a bootstrap's over units (documents where there were documents, else windows; never tokens, which
    depend on each other): a drawn window brings both models' numbers and its tokens, and each draw's metric is computed
    anew, ratios as ratios of sums. The percentiles are widened for few units as a t interval is. In simulations that
    covers the truth 93 to 97 times in 100 from 20 units on; of ten about 92, of five about 89: the estimate says so.
    (Intervals of a difference of "kl99" are wider than need be, some 98 in 100.)

    Source: Efron & Tibshirani 1993, "An introduction to the bootstrap"; the widening is that of Hesterberg 2015, "What
    teachers should know about the bootstrap", section 5.3.

    Args:
      a, b: what `measure` (or `greedy_agreement`) gave on equal windows (or prompts).
      metric: of `METRICS`.
      relative: `a / b - 1` in place of `a - b`.
      level: how often the interval should cover the truth.
      resamples, seed: of the bootstrap.

    Returns:
      An estimate; NaN, with a note, where a metric is not finite or there is one unit only.

    Raises:
      EvaluationError: other windows, no such metric, or nothing was measured for it.

    >>> a = Scores("w", (0, 1, 2), (9, 9, 8), (21.0, 25.0, 20.0))
    >>> b = Scores("w", (0, 1, 2), (9, 9, 8), (20.0, 24.0, 19.5))
    >>> round(difference(a, b, "ppl").value, 3)
    1.161
    """
    same = (
        (a.windows, a.units, a.tokens) == (b.windows, b.units, b.tokens)
        if isinstance(a, Scores) and isinstance(b, Scores)
        else isinstance(a, Agreement) and isinstance(b, Agreement) and (a.prompts, a.max_new) == (b.prompts, b.max_new)
    )
    if not same:
        raise EvaluationError(
            "the two were not measured on the same text.",
            why="a paired difference compares window with window.",
            fix="measure both on the same windows (their digests then agree)",
        )
    first, second = a._statistic(metric), b._statistic(metric)
    if relative:
        return _estimate(lambda drawn: first(drawn) / second(drawn) - 1, a._units, level, resamples, seed)
    return _estimate(lambda drawn: first(drawn) - second(drawn), a._units, level, resamples, seed)


def _estimate(statistic: Statistic, units: int, level: float, resamples: int, seed: int) -> Estimate:
    if not 0 < level < 1:
        raise EvaluationError(
            f"level={level!r} is no probability.", why="it says how often the truth is inside.", fix="0.95"
        )
    resamples = _whole("resamples", resamples, 100)
    with np.errstate(all="ignore"):
        value = float(statistic(np.ones((1, units)))[0])
        if not math.isfinite(value):
            return Estimate(value, math.nan, math.nan, math.nan, "not finite")
        if units < 2:
            return Estimate(value, math.nan, math.nan, math.nan, "one unit, so no interval")
        stderr, low, high = _interval(statistic, units, level, resamples, seed)
    return Estimate(value, stderr, low, high, "" if units >= ENOUGH else f"{units} units: intervals too narrow")


def _interval(statistic: Statistic, units: int, level: float, resamples: int, seed: int) -> tuple[float, float, float]:
    from scipy import stats  # half a second, and only wanted here

    def over(index: np.ndarray, axis: int = -1) -> np.ndarray:
        """The statistic of draws, each a row of units' numbers."""
        index = np.moveaxis(index, axis, -1)
        flat = index.reshape(-1, units).astype(np.int64)
        place = flat + units * np.arange(len(flat))[:, None]
        drawn = np.bincount(place.ravel(), minlength=len(flat) * units).reshape(len(flat), units)
        return statistic(drawn.astype(np.float64)).reshape(index.shape[:-1])

    # A bootstrap's spread is that of a population of n: sqrt(n / (n - 1)) too narrow, and its tails are a normal's.
    few = math.sqrt(units / (units - 1))
    wider = 1 - 2 * stats.norm.sf(few * stats.t.ppf((1 + level) / 2, units - 1))
    found = stats.bootstrap(
        (np.arange(units),),
        over,
        n_resamples=resamples,
        batch=100,  # bounds memory: the 99th percentile holds a number for each kept token of each draw
        vectorized=True,
        method="percentile",
        confidence_level=float(wider),
        rng=np.random.default_rng(seed),
    )
    low, high = found.confidence_interval
    return float(found.standard_error * few), float(low), float(high)


# ---------------------------------------------------------------------------------------------- texts and continuations


def greedy_agreement(
    model: Model, params: Params, base: tuple[Model, Params], prompts: Any, max_new: int = 64
) -> Agreement:
    """How many greedy tokens a stack has in common with its base, prompt by prompt, before the first that differs.

    Args:
      model, params: a stack and its params.
      base: `(model, params)`.
      prompts: texts or token ids, as for `generate`.
      max_new: tokens to generate; stop tokens do not end a text here.

    >>> import infopt as ip, jax
    >>> model = ip.cache_kv()(ip.models.llama())
    >>> params = model.init(jax.random.key(0))
    >>> greedy_agreement(model, params, (model, params), [[5, 6, 7], [8]], max_new=4).lengths
    (4, 4)
    """
    rows, _ = _read_prompts(model, prompts)
    ours, theirs = (generate(m, p, rows, max_new=max_new, stop_tokens=()).tokens for m, p in ((model, params), base))
    lengths = tuple(
        next((i for i, (x, y) in enumerate(zip(one, two)) if x != y), max_new) for one, two in zip(ours, theirs)
    )
    return Agreement(lengths, max_new, hashlib.sha256(json.dumps(rows).encode()).hexdigest())


class Likelihood(NamedTuple):
    """How likely a continuation is.

    Args:
      logprob: the sum of its tokens' log-probabilities, in nats.
      greedy: whether each of them is the likeliest.
    """

    logprob: float
    greedy: bool


def loglikelihood(model: Model, params: Params, context: Any, continuation: Any, *, batch: int | None = None) -> Any:
    """How likely a continuation is after a context; lists of both are batched, by length.

    Texts are cut into tokens together, as lm-evaluation-harness does: blanks at the end of a context count to the
    continuation, whose tokens are those that the joint text has beyond the context's.

    Args:
      model, params: a stack and its params.
      context, continuation: texts or token ids, one each or as many; a context holds a token at least (a tokenizer with
        BOS gives it one).
      batch: rows at once; 4,096 tokens by default.

    Returns:
      `Likelihood(logprob, greedy)`, or a list of them.

    Raises:
      EvaluationError: an empty context or continuation, or lists of different lengths.
      PromptError: more tokens than the context holds, or one outside the vocabulary.

    >>> import infopt as ip, jax
    >>> model = ip.models.llama()
    >>> len(ip.loglikelihood(model, model.init(jax.random.key(0)), [[5, 6], [7]], [[8], [9, 10]]))
    2
    """
    single = isinstance(context, str) or (len(context) > 0 and isinstance(context[0], int | np.integer))
    contexts, continuations = ([context], [continuation]) if single else (list(context), list(continuation))
    if len(contexts) != len(continuations) or not contexts:
        raise EvaluationError(
            f"{len(contexts)} contexts were given with {len(continuations)} continuations.",
            why="each continuation follows its own context.",
            fix="as many of the one as of the other, at least one",
        )
    pairs = [_pair(model, *pair) for pair in zip(contexts, continuations)]
    _read_prompts(model, [row for row, _ in pairs])  # refuses tokens outside the vocabulary
    limit, longest = context_limit(model.spec), max(len(row) for row, _ in pairs)
    check_length(model.spec, longest, f"a context and continuation of {longest} tokens")
    runner = _runner(model, params)
    groups: dict[int, list[int]] = {}  # by length, doubling: few shapes to compile
    for i, (row, _) in enumerate(pairs):
        size = min(max(32, 1 << (len(row) - 1).bit_length()), limit or 2**30)
        groups.setdefault(size, []).append(i)
    out: dict[int, Likelihood] = {}
    for size, chosen in groups.items():
        rows, starts = [np.array(pairs[i][0], np.int32) for i in chosen], [pairs[i][1] for i in chosen]
        found = _score(runner, None, rows, starts, size, _batch(batch, size))
        for i, (nll, best) in zip(chosen, found):
            out[i] = Likelihood(-float(nll.sum(dtype=np.float64)), bool(best.all()))
    return out[0] if single else [out[i] for i in range(len(pairs))]


def _pair(model: Model, context: Any, continuation: Any) -> tuple[list[int], int]:
    """The tokens of both, and where the continuation's begin."""
    if isinstance(context, str) != isinstance(continuation, str):
        raise EvaluationError(
            "one of context and continuation is a text, the other is not.",
            why="a text's tokens depend on what stands beside it.",
            fix="two texts, or two lists of token ids",
        )
    if isinstance(context, str):
        if model.tokenizer is None:
            raise EvaluationError(
                "a text was given to a model without a tokenizer.",
                why="a text becomes token ids by the tokenizer that the model was trained with.",
                fix="token ids, or a model loaded with its tokenizer",
            )
        bare = context.rstrip()
        continuation = context[len(bare) :] + continuation
        head, prefix = model.tokenizer.encode(bare, special=False), list(_prefix(model.tokenizer))
        tail = model.tokenizer.encode(bare + continuation, special=False)[len(head) :]
        # A merge across the border can leave nothing.
        tail = tail or model.tokenizer.encode(continuation, special=False)
        head = prefix + head
    else:
        head, tail = list(map(int, context)), list(map(int, continuation))
    if not head or not tail:
        raise EvaluationError(
            f"the {'continuation' if head else 'context'} is empty.",
            why="a probability is that of a token after others.",
            fix="at least one token; as a context where there is none, a token that ends a text, say",
        )
    return head + tail, len(head)
