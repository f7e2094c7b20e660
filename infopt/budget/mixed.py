"""Mixed: formats matrix by matrix, chosen by their sensitivity, within a budget and few runs of layers."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np

from infopt.ablation.table import grid, markdown
from infopt.budget.allocation import allocate
from infopt.budget.alone import divergences, layer_of, plain
from infopt.budget.rules import rules_of
from infopt.budget.sensitivity import TOKENS, Sensitivity, measured, outlined, windows_of
from infopt.errors import EvaluationError, InfoptError
from infopt.evaluate import Scores, check_apart, measure
from infopt.methods import Method
from infopt.model import Model, params_digest, segments
from infopt.transforms import Transform, dequantize, quantize
from infopt.transforms.quantize import Quantize
from infopt.typing import Params

FORMATS = ("int3", "int4", "int5", "int8")
"""Chosen from by default."""
SEGMENTS = 8
"""Runs of layers of equal formats, at most, by default; each is compiled apart."""
COUNTS = ("stored", "codes")


@dataclasses.dataclass(frozen=True, repr=False)
class Mixed:
    """A choice of formats, and what it costs. `transform` makes it of a model.

    Args:
      sensitivity: what it was chosen by.
      choice: for each of the sensitivity's names a format.
      budget: bits a weight, of those that were chosen for.
      count: whether "stored" bits count, scales included, or "codes" alone.
      actual: KL(base || the base with all of them rounded), on the sensitivity's text; None if not measured.
    """

    sensitivity: Sensitivity
    choice: tuple[str, ...]
    budget: float
    count: str
    actual: float | None = None

    @functools.cached_property
    def formats(self) -> dict[str, str]:
        """Each matrix's format."""
        s = self.sensitivity
        return {m: form for own, form in zip(s.matrices, self.choice, strict=True) for m in own}

    @functools.cached_property
    def where(self) -> dict[str, str]:
        """The same as patterns, for `quantize(where=...)`."""
        return rules_of(self.sensitivity.spec, self.formats)

    @property
    def transform(self) -> Quantize:
        """What rounds a model so, to nearest."""
        return self.quantize()

    def quantize(self, method: Method | str | None = None) -> Quantize:
        """What rounds a model so, by a method."""
        s = self.sensitivity
        return quantize(where=self.where, group=s.group, clip=s.clip, pad=s.pad, method=method)

    def _of_choice(self, table: tuple[tuple[Any, ...], ...]) -> list[Any]:
        at = map(self.sensitivity.formats.index, self.choice)
        return [row[i] for row, i in zip(table, at, strict=True)]

    @property
    def predicted(self) -> float:
        """KL if what each rounding costs alone adds up, nats a token."""
        return math.fsum(self._of_choice(self.sensitivity.kl))

    @property
    def error(self) -> float:
        """How far the prediction was from the truth, actual / predicted - 1; NaN if there is none."""
        return self.actual / self.predicted - 1 if self.actual is not None and self.predicted else math.nan

    @property
    def bytes(self) -> int:
        """Of these matrices, scales included."""
        return sum(self._of_choice(self.sensitivity.bytes))

    @property
    def bits(self) -> float:
        """A weight, counted as the budget is."""
        return sum(self._of_choice(_bits(self.sensitivity, self.count))) / sum(self.sensitivity.weights)

    @property
    def segments(self) -> int:
        """Runs of layers that the model has afterwards."""
        spec = self.sensitivity.spec
        return len(segments(self.transform.edit(spec)))

    def measure(
        self, model: Model, params: Params, text: Any = None, *, tokens: int = TOKENS, method: Method | None = None
    ) -> Scores:
        """Score a text by the model so rounded, against itself, as `ip.measure` does; without a program of its own.

        Args:
          model, params: what the sensitivity was measured of.
          text: as for `sensitivity`, but for the default: the held-out split of CPython's topics.
          tokens: about how many are scored.
          method: what rounds.
        """
        return scores_of(self.quantize(method), model, params, text, tokens)

    def random(self, seed: int) -> Mixed:
        """Another choice of no more bits: formats widened at random until none fits. Bound to no number of runs.

        What a choice by sensitivity is worth is how much better it is than these.
        """
        rng, s = np.random.default_rng(seed), self.sensitivity
        bits = np.array(_bits(s, self.count))
        own, most = bits.argmin(1), sum(self._of_choice(_bits(s, self.count)))
        names = np.arange(len(own))
        open_ = True
        while open_:
            open_ = False
            for i in rng.permutation(names):
                room = most - int(bits[names, own].sum())
                wider = np.flatnonzero((bits[i] > bits[i, own[i]]) & (bits[i] - bits[i, own[i]] <= room))
                if len(wider):
                    own[i], open_ = rng.choice(wider), True
        return dataclasses.replace(self, choice=tuple(s.formats[f] for f in own), actual=None)

    @property
    def title(self) -> str:
        s, of = self.sensitivity, "bits a weight" if self.count == "stored" else "code bits a weight"
        found = f"predicted KL {self.predicted:.3g}"
        if self.actual is not None:
            found += f", measured {self.actual:.3g} ({self.error:+.0%})"
        return (
            f"{s.spec.family}, {self.bits:.4g} {of} of {self.budget:g} in {self.bytes:,} bytes, segments: "
            f"{self.segments}; {found} nats a token, on {s.tokens:,} tokens (digest {s.windows[:8]})"
        )

    def _cells(self) -> list[dict[str, str]]:
        return [{"where": pattern, "format": form} for pattern, form in self.where.items()]

    def __str__(self) -> str:
        return "\n".join([self.title, *grid(self._cells())])

    __repr__ = __str__

    def _repr_markdown_(self) -> str:
        return "\n\n".join([self.title, "\n".join(markdown(self._cells()))]) + "\n"


def scores_of(rounded: Transform, model: Model, params: Params, text: Any, tokens: int) -> Scores:
    """A text's scores by a model that is rounded so, with its values dense, against itself; by default held out."""
    cut = windows_of(model, text, tokens, "heldout")
    stack = (rounded | dequantize())(model)
    check_apart(stack, model, cut)
    return measure(stack, stack.convert(params, model), cut, (model, params))


def mixed(
    model: Model,
    params: Params,
    budget: float = 4.25,
    *,
    formats: Any = None,
    group: int | None = None,
    segments: int = SEGMENTS,
    count: str = "stored",
    sensitivity: Sensitivity | None = None,
    text: Any = None,
    tokens: int = TOKENS,
    progress: bool = True,
) -> Mixed:
    """Formats matrix by matrix, so that the KL to the base is least under a budget, if single KLs add up.

    How far they do is measured too: `predicted`, `actual`, `error`.

    Args:
      model, params: as for `sensitivity`.
      budget: bits a weight, the mean over the matrices chosen for; the rest of the model does not count.
      formats: bits or formats to choose from, all of them in groups of `group`; 3, 4, 5 and 8 bits by default. How
        narrow they are decides which budgets can be met: 4 bits in groups of 64 take a hair more than 4.25 stored bits,
        with a minimum 4.5.
      group: inputs that share a scale; by default each format's own.
      segments: runs of layers of equal formats, at most; each is compiled apart. More serve the budget better.
      count: "stored": all bits, those of scales and of the rounding's error (4 bytes a matrix) included; "codes": codes
        alone.
      sensitivity: of this model and text, measured before; its formats and matrices are then chosen from and for.
      text, tokens, progress: as for `sensitivity`.

    Raises:
      InfoptError: a budget below what the formats can reach, or too few segments.
      EvaluationError: a sensitivity of another model or text.

    >>> import infopt as ip, jax
    >>> model = ip.models.llama(vocab=32, context=64)
    >>> params, text = model.init(jax.random.key(0)), [n * n % 31 for n in range(400)]
    >>> found = ip.mixed(model, params, budget=6, text=text)
    >>> found.bits <= 6, found.predicted > 0, found.segments <= 8
    (True, True, True)
    >>> stack = found.quantize(method="gptq")(model)
    """
    if count not in COUNTS:
        raise InfoptError(f"mixed(count={count!r}).", why="bits are counted one way.", fix='count="stored" or "codes"')
    if isinstance(segments, bool) or not isinstance(segments, int) or segments < 1:
        raise InfoptError(f"mixed(segments={segments!r}).", why="it counts runs of layers.", fix=f"segments={SEGMENTS}")
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget < math.inf:
        raise InfoptError(f"mixed(budget={budget!r}).", why="it is a number of bits a weight.", fix="budget=4.25, say")
    cut = windows_of(model, text, tokens)
    if sensitivity is None:
        outline = outlined(model, FORMATS if formats is None else formats, group)
        check_reach(outline, budget, count, segments)
        sensitivity = measured(outline, model, params, cut, progress)
    elif formats is not None or group is not None:
        raise InfoptError(
            "mixed was given formats or a group, and a sensitivity.",
            why="the sensitivity says them.",
            fix="one or the other",
        )
    elif sensitivity.windows != cut.digest or (sensitivity.spec, sensitivity.params) != (
        plain(model),
        params_digest(params),
    ):
        other = "text" if sensitivity.windows != cut.digest else "model"
        raise EvaluationError(
            f"the sensitivity was measured on another {other}.",
            why="what it says is compared with the truth of this one.",
            fix="the same model, text= and tokens= as it was measured with",
        )
    found = Mixed(sensitivity, chosen(sensitivity, budget, count, segments), float(budget), count)
    forms = found.transform.formats(sensitivity.spec)
    (actual,) = divergences(model, params, [forms], cut, sensitivity.clip)
    return dataclasses.replace(found, actual=actual)


def _bits(s: Sensitivity, count: str) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(8 * x for x in row) for row in s.bytes) if count == "stored" else s.codes


def least_bytes(s: Sensitivity) -> int:
    """With each matrix in its narrowest format."""
    return sum(map(min, s.bytes))


def chosen(s: Sensitivity, budget: float, count: str, most: int) -> tuple[str, ...]:
    """For each name a format.

    Raises:
      InfoptError: as `check_reach`.
    """
    check_reach(s, budget, count, most)
    places, groups = _places(s)
    keys = sorted({key for _, key in places})
    at = [(block, keys.index(key)) for block, key in places]
    kl, bits = (np.zeros((len(groups), len(keys), len(s.formats))) for _ in range(2))
    for (block, key), one, other in zip(at, s.kl, _bits(s, count), strict=True):
        kl[block, key], bits[block, key] = one, other
    choice = allocate(kl, bits, groups, budget * sum(s.weights), most + _outside(s))
    return tuple(s.formats[choice[place]] for place in at)


def check_reach(s: Sensitivity, budget: float, count: str, most: int) -> None:
    """Raise unless some choice is within the budget and the number of segments. No KL is needed for that.

    Raises:
      InfoptError: a budget below what the formats can reach, or too few segments.
    """
    weights, least = sum(s.weights), sum(map(min, _bits(s, count)))
    if least > budget * weights:
        raise InfoptError(
            f"a budget of {budget:g} bits a weight cannot be met.",
            why=f"the narrowest of {', '.join(s.formats)} takes {math.ceil(least / weights * 1e4) / 1e4:g}"
            + (", its scales included." if count == "stored" else "."),
            fix='a greater budget, narrower formats or a wider group; or count="codes", to leave scales out',
        )
    _, groups = _places(s)
    least_runs = 1 + int((groups[1:] != groups[:-1]).sum()) - _outside(s)
    if most < least_runs:
        raise InfoptError(
            f"segments={most}: the layers are {least_runs} runs already.",
            why="they differ in their windows, or in which of their matrices are chosen for.",
            fix=f"segments >= {least_runs}",
        )


def _outside(s: Sensitivity) -> int:
    """How many names are outside the layers."""
    return sum(layer_of(own[0]) < 0 for own in s.matrices)


def _places(s: Sensitivity) -> tuple[list[tuple[int, str]], np.ndarray]:
    """For each name its block and what it is there; for each block a number, equal where blocks can be one run.

    What lies outside the layers comes after them, each a block of its own.
    """
    blocks = [(n, repeat, seg) for n, seg in enumerate(segments(s.spec)) for repeat in range(seg.repeats)]
    of_layer = {
        seg.layer(repeat, phase): (block, f"{phase}")
        for block, (_, repeat, seg) in enumerate(blocks)
        for phase in range(seg.period)
    }
    places, kinds = list[tuple[int, str]](), [(n, set[str]()) for n, _, _ in blocks]
    for own in s.matrices:
        if (layer := layer_of(own[0])) < 0:
            places.append((len(kinds), own[0]))
            kinds.append((-len(kinds), {own[0]}))
            continue
        block, phase = of_layer[layer]
        kind = phase if s.by == "layer" else f"{phase}.{own[0].split('.', 2)[2]}"
        places.append((block, kind))
        kinds[block][1].add(kind)
    numbers: dict[tuple[int, frozenset[str]], int] = {}
    return places, np.array([numbers.setdefault((n, frozenset(of)), len(numbers)) for n, of in kinds])
