"""Sensitivity: the KL that rounding each matrix, or each layer, costs alone."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from infopt import texts
from infopt.ablation.table import grid, markdown
from infopt.budget.alone import divergences, layer_of, plain
from infopt.errors import EvaluationError, InfoptError, human, nearest
from infopt.evaluate import Windows, check_windows, windows
from infopt.model import Model, params_digest, shapes, spec_from_json
from infopt.qtensor import Format
from infopt.spec import Spec
from infopt.transforms import quantize
from infopt.transforms.quantize import BITS
from infopt.typing import Params

if TYPE_CHECKING:
    from infopt.ablation.picture import Picture

TOKENS = 2048
"""About how many are scored by default, in windows of at most 512."""
SHOWN = 20
"""Rows that a table has, the worst first."""
BY = ("matrix", "layer")


@dataclasses.dataclass(frozen=True, repr=False)
class Sensitivity:
    """What rounding each matrix or layer alone costs. Prints as a table, the worst first.

    Args:
      spec: of the base, without a cache.
      by: "matrix" or "layer".
      names: of matrices, or of layers ("layers.0").
      matrices: for each name the matrices that it stands for.
      formats: names of formats.
      kl: for each name and format KL(base || the base with that alone rounded), nats a token.
      group, clip, pad: as `quantize` was given them.
      params: the digest of the weights.
      windows: the digest of the text's windows.
      tokens: scored tokens.
    """

    spec: Spec
    by: str
    names: tuple[str, ...]
    matrices: tuple[tuple[str, ...], ...]
    formats: tuple[str, ...]
    kl: tuple[tuple[float, ...], ...]
    group: int | None
    clip: str | None
    pad: bool
    params: str
    windows: str
    tokens: int

    @functools.cached_property
    def bytes(self) -> tuple[tuple[int, ...], ...]:
        """For each name and format the bytes that it takes, scales included."""
        return self._counted(lambda form, shape: form.bytes(shape))

    @functools.cached_property
    def codes(self) -> tuple[tuple[int, ...], ...]:
        """For each name and format the bits of its codes alone, padding included."""
        return self._counted(lambda form, shape: math.prod(shape[:-1]) * form.padded(shape[-1]) * form.row.bits)

    @functools.cached_property
    def weights(self) -> tuple[int, ...]:
        """For each name how many values it stands for."""
        of = shapes(self.spec)
        return tuple(sum(math.prod(of[m]) for m in own) for own in self.matrices)

    def _counted(self, count: Callable[[Format, tuple[int, ...]], int]) -> tuple[tuple[int, ...], ...]:
        of, forms = shapes(self.spec), self.rounded_to()
        return tuple(tuple(sum(count(form, of[m]) for m in own) for form in forms) for own in self.matrices)

    def rounded_to(self) -> list[Format]:
        """The formats, in groups as they were rounded in."""
        found = [quantize(format=n, group=self.group, clip=self.clip, pad=self.pad).rules[0] for n in self.formats]
        return [rule.format for rule in found if rule.format is not None]

    def __getitem__(self, name: str) -> dict[str, float]:
        """A name's KL, by format."""
        if name not in self.names:
            raise EvaluationError(
                f"{name!r} was not measured.", why=nearest(name, list(self.names)), fix="one of .names"
            )
        return dict(zip(self.formats, self.kl[self.names.index(name)], strict=True))

    def worst(self, n: int = 5, form: str | None = None) -> tuple[str, ...]:
        """The names whose KL in a format is greatest; in the first format by default."""
        at = 0 if form is None else self._index(form)
        return tuple(self.names[i] for i in sorted(range(len(self.names)), key=lambda i: -self.kl[i][at])[:n])

    def _index(self, form: str) -> int:
        if form not in self.formats:
            raise EvaluationError(
                f"the format {form!r} was not measured.",
                why=nearest(form, list(self.formats)),
                fix=", ".join(self.formats),
            )
        return self.formats.index(form)

    def sums(self) -> dict[str, float]:
        """By format, all names' KL together: what is predicted if all of them are rounded to it."""
        return {form: math.fsum(row[i] for row in self.kl) for i, form in enumerate(self.formats)}

    @property
    def title(self) -> str:
        groups = "" if self.group is None else f", in groups of {self.group}"
        return (
            f"{self.spec.family}, {len(self.names)} {'matrices' if self.by == 'matrix' else 'layers'} rounded one at a "
            f"time{groups}: KL to the base, nats a token, on {self.tokens:,} tokens (digest {self.windows[:8]})"
        )

    def _cells(self) -> list[dict[str, str]]:
        found = []
        for name in self.worst(SHOWN):
            i, row = self.names.index(name), {self.by: name}
            for form, kl, size in zip(self.formats, self.kl[i], self.bytes[i], strict=True):
                row |= {form: f"{kl:.3g}", f"bytes, {form}": human(size)}
            found.append(row)
        total = {self.by: f"the sum of all {len(self.names)}"}
        for i, (form, kl) in enumerate(self.sums().items()):
            total |= {form: f"{kl:.3g}", f"bytes, {form}": human(sum(row[i] for row in self.bytes))}
        return [*found, total]

    def __str__(self) -> str:
        return "\n".join([self.title, *grid(self._cells())])

    __repr__ = __str__

    def _repr_markdown_(self) -> str:
        return "\n\n".join([self.title, "\n".join(markdown(self._cells()))]) + "\n"

    def to_json(self) -> str:
        """The same as text, with the bytes of each name and format beside its KL."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return json.dumps(own | {"spec": json.loads(self.spec.to_json()), "bytes": self.bytes}, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Sensitivity:
        """What `to_json` wrote; the model's family must be defined.

        Raises:
          EvaluationError: it is something else.
        """
        try:
            found = json.loads(text)
            spec = spec_from_json(json.dumps(found.pop("spec")))
            found.pop("bytes")
            lists = {name: tuple(found[name]) for name in ("names", "formats")}
            nested = {name: tuple(map(tuple, found[name])) for name in ("matrices", "kl")}
            return Sensitivity(**found | lists | nested, spec=spec)
        except InfoptError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise EvaluationError(
                "the text is no sensitivity.",
                why=f"{type(error).__name__}: {error}.",
                fix="what Sensitivity.to_json wrote",
            ) from error

    def plot(self) -> Picture:
        """A picture: KL by layer and kind of matrix, a panel a format, all in the same colours."""
        from infopt.budget.picture import draw  # half a second, and only wanted here

        return draw(self)


def sensitivity(
    model: Model,
    params: Params,
    bits: int | None = None,
    *,
    format: str | None = None,
    formats: int | str | Sequence[int | str] | None = None,
    group: int | None = None,
    clip: str | None = None,
    pad: bool = False,
    where: str | Sequence[str] | None = None,
    by: str = "matrix",
    text: Any = None,
    tokens: int = TOKENS,
    progress: bool = True,
) -> Sensitivity:
    """The KL of a model to itself with one matrix rounded, or one layer, for each of them.

    Values are rounded to nearest, and what they then stand for takes the dense ones' place: one program a kind of
    layer serves all. What memory it takes beside the params does not grow with the text: 256 MB of log-probabilities
    of the base, or one window's, some 200 MB of the rounded model's, and one layer's weights and inputs.

    Args:
      model, params: any stack that `quantize` could follow, but for speculative ones; its cache is not used.
      bits, format: as for `quantize`; 4 bits by default.
      formats: several bits or formats in their place; each takes as long.
      group, clip, pad: as for `quantize`, for all formats.
      where: patterns of matrices; by default the blocks' linear layers.
      by: "matrix", or "layer": all of a layer's at once (a matrix outside the layers alone).
      text: as for `ablate`; by default the calibration split of CPython's topics, so that what is chosen by it can be
        measured on the held-out split.
      tokens: about how many are scored, evenly out of the text; all of `Windows`.
      progress: whether to show a bar, on a terminal.

    Raises:
      InfoptError: no such format, a pattern that matches nothing, a group that does not divide.
      TransformOrderError: a matrix is packed already.
      EvaluationError: text that cannot be scored, or logits that are not finite.

    >>> import infopt as ip, jax
    >>> model = ip.models.llama(vocab=32, context=64)
    >>> params, text = model.init(jax.random.key(0)), [n * n % 31 for n in range(400)]
    >>> found = ip.sensitivity(model, params, formats=[8, "int4"], where="layers.0.mlp.*", text=text)
    >>> found.names
    ('layers.0.mlp.down', 'layers.0.mlp.gate', 'layers.0.mlp.up')
    >>> all(0 < row["int8"] < row["int4"] for row in map(found.__getitem__, found.names))
    True
    """
    found = outlined(model, _formats(bits, format, formats), group, clip, pad, where, by)
    return measured(found, model, params, windows_of(model, text, tokens), progress)


def outlined(
    model: Model,
    formats: Sequence[int | str] | int | str,
    group: int | None = None,
    clip: str | None = None,
    pad: bool = False,
    where: str | Sequence[str] | None = None,
    by: str = "matrix",
) -> Sensitivity:
    """What a sensitivity says before anything is measured: what there is to round, to what, and in how many bytes.

    Raises:
      InfoptError, TransformOrderError: as `sensitivity`.
    """
    if by not in BY:
        raise InfoptError(
            f"sensitivity(by={by!r}).", why="one thing is rounded at a time.", fix='by="matrix" or "layer"'
        )
    spec, names, own = plain(model), _formats(formats=formats), list[str]()
    for name in names:
        rounding = quantize(format=name, group=group, where=where, clip=clip, pad=pad)
        rounding.check(model.spec)
        own = list(rounding.formats(spec))
    units = _units(own, by)
    return Sensitivity(
        spec, by, tuple(units), tuple(units.values()), names, (), group, clip, pad, params="", windows="", tokens=0
    )


def measured(outline: Sensitivity, model: Model, params: Params, cut: Windows, progress: bool = False) -> Sensitivity:
    """An outline of this model, with KL.

    Raises:
      EvaluationError: as `sensitivity`.
    """
    forms, step = outline.rounded_to(), len(outline.formats)
    choices = [dict.fromkeys(own, form) for own in outline.matrices for form in forms]
    found = divergences(model, params, choices, cut, outline.clip, progress)
    return dataclasses.replace(
        outline,
        kl=tuple(tuple(found[i : i + step]) for i in range(0, len(found), step)),
        params=params_digest(params),
        windows=cut.digest,
        tokens=cut.scored,
    )


def _formats(bits: Any = None, format: Any = None, formats: Any = None) -> tuple[str, ...]:
    """The names of the formats that were asked for, each once."""
    given = [x for x in (bits, format, formats) if x is not None]
    if len(given) > 1:
        raise InfoptError(
            f"bits={bits!r}, format={format!r} and formats={formats!r} were given.",
            why="each says the formats.",
            fix='one of them, as formats=["int4", "int8"]',
        )
    several = given[0] if given else 4
    several = [several] if isinstance(several, int | str) else list(several)
    rounding = [quantize(format=x) if isinstance(x, str) else quantize(bits=x) for x in several]
    found = tuple(r.format or BITS[r.bits or 8] for r in rounding)
    if not found or len(set(found)) < len(found):
        raise InfoptError(
            f"formats={formats!r} are {'none' if not found else 'not all different'}.",
            why="each is measured once.",
            fix='formats=["int4", "int8"], say',
        )
    return found


def _units(names: list[str], by: str) -> dict[str, tuple[str, ...]]:
    """What is rounded at a time, in the order of the layers."""
    found: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda n: (layer_of(n), n)):
        layer = layer_of(name)
        found.setdefault(f"layers.{layer}" if by == "layer" and layer >= 0 else name, []).append(name)
    return {unit: tuple(own) for unit, own in found.items()}


def windows_of(model: Model, text: Any, tokens: int, split: str = "calibration") -> Windows:
    """The windows to measure on: those of a text, or the ones given; by default a split of CPython's topics.

    Raises:
      EvaluationError: there is no text or too little, or the model cannot read it.
    """
    if isinstance(text, Windows):
        cut = text
    else:
        if text is None and model.tokenizer is None:
            raise EvaluationError(
                "the model has no tokenizer, and no text was given.",
                why="the default text is English, and becomes token ids by the model's own tokenizer.",
                fix="text=[...], token ids",
            )
        text = texts.topics(split) if text is None else text
        cut = windows(text, min(512, model.spec.config.context), tokenizer=model.tokenizer).spread(tokens)
    check_windows(cut, model)
    return cut
