"""Fit: formats of weights, and what is done to the cache, within the same bytes at a context."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from infopt.ablation.table import grid, markdown
from infopt.budget.alone import plain
from infopt.budget.mixed import FORMATS, SEGMENTS, Mixed, check_reach, chosen, least_bytes, scores_of
from infopt.budget.sensitivity import TOKENS, Sensitivity, measured, outlined, windows_of
from infopt.errors import InfoptError, human
from infopt.evaluate import Scores, check_apart, measure
from infopt.generation import BUCKETS
from infopt.methods import Method
from infopt.model import Model, Weights, check_length, params_digest
from infopt.planner import abstract_state, nbytes
from infopt.spec import Spec
from infopt.transforms import Transform, parse_stack
from infopt.transforms.base import whole
from infopt.typing import Params

BESIDE = ("cache_kv()", "cache_kv(bits=8)", "cache_kv(bits=4, split=32)", "cache_kv(bits=4)")
"""What is tried beside formats of weights by default."""


@dataclasses.dataclass(frozen=True)
class Way:
    """What may be done beside the weights, and how they are then rounded.

    Args:
      beside: a stack with a cache.
      cache: bytes of its keys and values at the context, for one text.
      rest: bytes of the weights that keep their values.
      least: bytes of all of it with the narrowest formats.
      kl: KL(base || this alone), nats a token.
      weights: the formats that fit into what it leaves; None where the narrowest do not.
    """

    beside: Transform
    cache: int
    rest: int
    least: int
    kl: float
    weights: Mixed | None

    @property
    def bytes(self) -> int:
        """Of all of it, with those formats, or at least."""
        return self.least if self.weights is None else self.cache + self.rest + self.weights.bytes

    @property
    def predicted(self) -> float:
        """KL if what it costs alone, and each rounding alone, add up; infinite where it does not fit."""
        return math.inf if self.weights is None else self.kl + self.weights.predicted

    def quantize(self, method: Method | str | None = None) -> Transform:
        """All of it, weights rounded by a method."""
        assert self.weights is not None
        return self.beside | self.weights.quantize(method)

    def measure(
        self, model: Model, params: Params, text: Any = None, *, tokens: int = TOKENS, method: Method | None = None
    ) -> Scores:
        """Score a text by it, against the base, as `ip.measure` does.

        Args:
          model, params: what it was chosen for.
          text: as for `sensitivity`, but for the default: the held-out split of CPython's topics.
          tokens: about how many are scored.
          method: what rounds weights.
        """
        return scores_of(self.quantize(method), model, params, text, tokens)


@dataclasses.dataclass(frozen=True, repr=False)
class Fitted:
    """The ways that were tried. `transform` is the best of them.

    Args:
      ways: in the order they were given.
      memory: bytes that there are.
      context: tokens of the one text whose keys and values count.
      actual: KL(base || the best way), measured on the same text.
    """

    ways: tuple[Way, ...]
    memory: float
    context: int
    actual: float = math.nan

    @property
    def best(self) -> Way:
        """The one whose predicted KL is least."""
        return min(self.ways, key=lambda way: way.predicted)

    @property
    def weights(self) -> Mixed:
        """Its formats, matrix by matrix."""
        found = self.best.weights
        assert found is not None  # one fits, or there was an error
        return found

    @property
    def transform(self) -> Transform:
        """The best way, weights rounded to nearest."""
        return self.quantize()

    def quantize(self, method: Method | str | None = None) -> Transform:
        """The best way, weights rounded by a method."""
        return self.best.quantize(method)

    @property
    def error(self) -> float:
        """How far the prediction was from the truth, actual / predicted - 1; NaN where nothing was to be lost."""
        return self.actual / self.best.predicted - 1 if self.best.predicted else math.nan

    def measure(
        self, model: Model, params: Params, text: Any = None, *, tokens: int = TOKENS, method: Method | None = None
    ) -> Scores:
        """Score a text by the best way, as `Way.measure` does."""
        return self.best.measure(model, params, text, tokens=tokens, method=method)

    @property
    def title(self) -> str:
        s, best = self.weights.sensitivity, self.best
        return (
            f"{s.spec.family}, {human(best.bytes)} of {human(self.memory)} at {self.context:,} tokens: {best.beside!r}"
            f", weights of {self.weights.bits:.4g} stored bits; predicted KL {best.predicted:.3g}, measured "
            f"{self.actual:.3g} ({self.error:+.0%}) nats a token, on {s.tokens:,} tokens (digest {s.windows[:8]})"
        )

    def _cells(self) -> list[dict[str, str]]:
        return [
            {
                "beside": repr(way.beside),
                "cache": human(way.cache),
                "KL alone": f"{way.kl:.3g}",
                "bits a weight": "-" if way.weights is None else f"{way.weights.bits:.4g}",
                "together": human(way.bytes) + ("" if way.weights else " at least"),
                "predicted": f"{way.predicted:.3g}" if way.weights else "-",
            }
            for way in self.ways
        ]

    def __str__(self) -> str:
        return "\n".join([self.title, *grid(self._cells())])

    __repr__ = __str__

    def _repr_markdown_(self) -> str:
        return "\n\n".join([self.title, "\n".join(markdown(self._cells()))]) + "\n"


_Kind = tuple[Spec, str]
"""What ways share whose weights are the same: what they compute but for rounded keys and values, and their digest."""


class _Parts(NamedTuple):
    """What is known of a way before anything is measured: as in `Way`, and the bits a weight that are left."""

    beside: Transform
    stack: Model
    kind: _Kind
    cache: int
    rest: int
    least: int
    bits: float


def fit_memory(
    model: Model,
    params: Params,
    memory: float,
    context: int,
    beside: Sequence[Transform | str] = BESIDE,
    *,
    formats: Any = FORMATS,
    group: int | None = None,
    segments: int = SEGMENTS,
    text: Any = None,
    tokens: int = TOKENS,
    progress: bool = True,
) -> Fitted:
    """Formats of weights, and one of several things done to the cache, so that both fit and the KL is least.

    What counts: all weights, and keys and values of one text of `context` tokens. Each of `beside` is measured alone,
    weights have what bytes it leaves (as in `mixed`), and what the two cost is taken to add up. How far it does is
    measured: `error`. Rounded keys and values share one sensitivity; fewer heads and windows have their own.

    Args:
      model, params: as for `sensitivity`; without a cache, if those beside it make one.
      memory: bytes.
      context: tokens.
      beside: stacks with a cache, or their texts; "gqa(kv_heads=1) | cache_kv()" and "sliding_window(256, sinks=4) |
        cache_kv(bits=8)" may be among them.
      formats, group, segments, text, tokens, progress: as for `mixed`.

    Raises:
      InfoptError: no way fits, one has no cache, or there are too few segments.
      EvaluationError: a way has a method, which reads of the text.
      TransformOrderError: a way packs weights already.
      PromptError: a context beyond the model's.

    >>> import infopt as ip, jax
    >>> model = ip.models.llama(vocab=32, context=64)
    >>> params, text = model.init(jax.random.key(0)), [n * n % 31 for n in range(400)]
    >>> found = ip.fit_memory(model, params, 100_000, 64, ["cache_kv()", "cache_kv(bits=8)"], text=text)
    >>> found.best.bytes <= 100_000, found.transform(model).spec.cache
    (True, True)
    """
    if isinstance(memory, bool) or not isinstance(memory, int | float) or not 0 < memory < math.inf:
        raise InfoptError(f"fit_memory(memory={memory!r}).", why="it is a number of bytes.", fix="memory=150e6, say")
    context = whole("context", context, 1)
    check_length(model.spec, context, f"a context of {context} tokens")
    stacks = [_stack(model, each) for each in ([beside] if isinstance(beside, str | Transform) else beside)]
    if not stacks:
        raise InfoptError("nothing was given beside weights.", why="one way is chosen.", fix=f"beside={BESIDE[:1]!r}")
    cut, kinds, parts = windows_of(model, text, tokens), dict[_Kind, tuple[Model, Sensitivity]](), list[_Parts]()
    for transform, stack in stacks:
        check_apart(stack, model, cut)
        own = stack.convert(params, model)
        kind = plain(stack).replace(kv=None), params_digest(own)
        _, s = kinds.setdefault(kind, (stack, outlined(stack, formats, group)))
        weights = Weights.of(stack.spec, own)
        cache = nbytes(abstract_state(stack.spec, 1, context, max(BUCKETS)).kv)
        rest = nbytes(own) - sum(nbytes(weights[name]) for names in s.matrices for name in names)
        bits = math.nextafter(8 * (memory - cache - rest) / sum(s.weights), math.inf)  # its product is not less
        parts.append(_Parts(transform, stack, kind, cache, rest, cache + rest + least_bytes(s), bits))
    fitting = [part for part in parts if part.least <= memory]
    if not fitting:
        part = min(parts, key=lambda part: part.least)
        raise InfoptError(
            f"{human(memory)} hold no such model at {context:,} tokens.",
            why=f"the least, with {part.beside!r}, takes {human(part.least)}: {human(part.cache)} of them keys and "
            f"values, {human(part.rest)} weights that keep their values.",
            fix="more memory, a shorter context, narrower formats, or other things beside",
        )
    for part in fitting:
        try:
            check_reach(kinds[part.kind][1], part.bits, "stored", segments)
        except InfoptError as error:
            raise InfoptError(f"beside {part.beside!r}, {error.what}", why=error.why, fix=error.fix) from error
    found = dict[_Kind, Sensitivity]()
    for kind in dict.fromkeys(part.kind for part in fitting):
        stack, outline = kinds[kind]
        found[kind] = measured(outline, stack, stack.convert(params, model), cut, progress)
    ways = list[Way]()
    for part in parts:
        rounded = None
        if part.least <= memory:
            s = found[part.kind]
            rounded = Mixed(s, chosen(s, part.bits, "stored", segments), part.bits, "stored")
        kl = measure(part.stack, part.stack.convert(params, model), cut, (model, params)).kl.value
        ways.append(Way(part.beside, part.cache, part.rest, part.least, kl, rounded))
    best = Fitted(tuple(ways), memory, context)
    return dataclasses.replace(best, actual=best.measure(model, params, cut).kl.value)


def _stack(model: Model, beside: Transform | str) -> tuple[Transform, Model]:
    transform = parse_stack(beside) if isinstance(beside, str) else beside
    if not isinstance(transform, Transform):
        raise InfoptError(
            f"beside weights was given a {type(transform).__name__}.",
            why="what is tried is a transform.",
            fix=f"{BESIDE[1]!r}, say, a text or what it makes",
        )
    stack = transform(model)
    plain(stack)
    if not stack.spec.cache:
        raise InfoptError(
            f"{transform!r} has no cache.",
            why="it keeps no keys and values, and would compute all of them anew for each token.",
            fix="end it in cache_kv()",
        )
    return transform, stack
