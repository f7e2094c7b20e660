"""What each matrix of a stack is: which rule it fell under, its format, bits, bytes, and the error of its rounding.

Rules come from the Recipe's text and the Spec, figures from the live buffers; so a stack that was saved and loaded
gives the very same lines.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from infopt.errors import AuditError, InfoptError, ParamsError
from infopt.io import load
from infopt.model import FAMILIES, Model, Weights, check_names, check_params, check_weight, is_matrix, segments, shapes
from infopt.qtensor import Format, is_qtensor, quantize_array
from infopt.spec import Spec
from infopt.transforms.base import Transform
from infopt.transforms.parse import parse_stack, stack_option
from infopt.transforms.quantize import Quantize
from infopt.transforms.speculative import Speculative
from infopt.typing import Params, is_traced

MOST_TEXT = 20_000
"""Characters of one transform's text that are read: a rule for each matrix of a large model is that long."""
HEADINGS = ("matrix", "rule", "format", "group", "bits", "bytes", "error", "changed")


@dataclasses.dataclass(frozen=True)
class Line:
    """One matrix.

    Args:
      name: its logical name; a draft's behind "draft.".
      rule: what decided its format: the transform's number in `Audit.rules` and the pattern, as "1: *.mlp.*"; "-" where
        nothing did, "as loaded" where it came packed, "?" where a transform is not known here.
      format: a packed one's format, or a dense one's dtype; "= embed" of a head that is the embedding.
      group: neighbours that share a scale; "row" is a whole row, "-" none.
      bits: a weight takes, with its share of scales and all that is stored beside.
      bytes: of the live buffers.
      error: |x - what is stored| / |x| when it was rounded, of several experts the root of the mean square; None where
        it was not, or where it is not known.
      changed: "yes", "no", "as loaded", or "?" where that is not known.
      problem: what is wrong with it, "" where nothing is.
    """

    name: str
    rule: str
    format: str
    group: str
    bits: float
    bytes: int
    error: float | None
    changed: str
    problem: str = ""

    @property
    def cells(self) -> tuple[str, ...]:
        error = "-" if self.error is None else f"{self.error:.6f}"
        sizes = (f"{self.bits:.4g}", f"{self.bytes:,}") if self.bytes else ("-", "-")
        return (self.name, self.rule, self.format, self.group, *sizes, error, self.changed)


@dataclasses.dataclass(frozen=True, repr=False)
class Audit:
    """What `Model.audit` found. Its text is a table, and so is its repr.

    Args:
      title: the model and its stack.
      rules: the stack's transforms that changed weights, in order; `Line.rule` has their numbers.
      lines: a line a matrix, in the model's order.
      totals: of "packed matrices", "dense matrices" and "vectors" how many, their bytes and their values.
    """

    title: str
    rules: tuple[str, ...]
    lines: tuple[Line, ...]
    totals: tuple[tuple[str, int, int, int], ...]

    @property
    def problems(self) -> tuple[Line, ...]:
        return tuple(line for line in self.lines if line.problem)

    @property
    def bytes(self) -> int:
        """Of the whole model."""
        return sum(size for _, _, size, _ in self.totals)

    def check(self) -> None:
        """Raise AuditError where a matrix is not what the stack says of it."""
        if not self.problems:
            return
        by_problem: dict[str, list[str]] = {}
        for line in self.problems:
            by_problem.setdefault(line.problem, []).append(line.name)
        count = len(self.problems)
        error = AuditError(
            f"{count} {'matrix is' if count == 1 else 'matrices are'} not what the stack says: "
            + ", ".join(n for names in by_problem.values() for n in ranges(names))
            + ".",
            why="; ".join(f"{', '.join(ranges(names))}: {problem}" for problem, names in by_problem.items()) + ".",
            fix="params = model.convert(base_params) with this very model, and save them again (a stack that was saved "
            "before errors of rounding were kept has none)",
        )
        error.audit = self
        raise error

    def _summary(self) -> list[tuple[str, ...]]:
        values = sum(n for *_, n in self.totals)
        rows = [(f"{count} {what}", f"{size:,} bytes", f"{size / max(n, 1):.4g} bytes a weight")
                for what, count, size, n in self.totals if count]  # fmt: skip
        return [*rows, ("whole model", f"{self.bytes:,} bytes", f"{self.bytes / max(values, 1):.4g} bytes a weight")]

    def __str__(self) -> str:
        rows = [HEADINGS, *(line.cells for line in self.lines)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(HEADINGS))]
        left = (True, True, True, False, False, False, False, True)
        out = [self.title, *(f"  {i}  {rule}" for i, rule in enumerate(self.rules, 1)), ""]
        for row, line in zip(rows, (None, *self.lines), strict=True):
            text = "  ".join(c.ljust(w) if le else c.rjust(w) for c, w, le in zip(row, widths, left))
            out.append((text + (f"  <- {line.problem}" if line and line.problem else "")).rstrip())
        summary = self._summary()
        a, b, c = (max(len(row[i]) for row in summary) for i in range(3))
        return "\n".join([*out, "", *(f"{x:<{a}}  {y:>{b}}  {z:>{c}}" for x, y, z in summary)])

    __repr__ = __str__

    def _repr_markdown_(self) -> str:
        def row(cells: Any) -> str:
            return "| " + " | ".join(str(c).replace("|", "\\|").replace("*", "\\*") for c in cells) + " |"

        problem = ("problem",) if self.problems else ()
        rules = [f"{i}. `{rule}`" for i, rule in enumerate(self.rules, 1)]
        table = [row((*HEADINGS, *problem)), "|" + "---|" * (len(HEADINGS) + len(problem))]
        table += [row((*line.cells, *([line.problem] if problem else []))) for line in self.lines]
        return "\n".join([*rules, "", *table, "", *("- " + ", ".join(s) for s in self._summary())])

    def to_json(self) -> str:
        """As JSON: `title`, `rules`, `lines`, `totals`, `bytes`."""
        totals = [dict(zip(("what", "count", "bytes", "weights"), t)) for t in self.totals]
        lines = [dataclasses.asdict(line) for line in self.lines]
        for line in lines:  # JSON has no infinity
            if line["error"] is not None and not math.isfinite(line["error"]):
                line["error"] = str(line["error"])
        return json.dumps(
            {"title": self.title, "rules": self.rules, "lines": lines, "totals": totals, "bytes": self.bytes}
        )


def ranges(names: list[str]) -> list[str]:
    """Names, those of neighbouring layers in one.

    >>> ranges(["layers.0.mlp.up", "embed", "layers.1.mlp.up", "layers.4.mlp.up"])
    ['layers.0-1.mlp.up', 'layers.4.mlp.up', 'embed']
    """
    runs: dict[tuple[str, str], list[list[int]]] = {}
    for name in names:
        match = re.fullmatch(r"(.*\blayers\.)(\d+)(\..*)", name)
        if match is None:
            runs.setdefault((name, ""), [])
            continue
        before, index, after = match[1], int(match[2]), match[3]
        found = runs.setdefault((before, after), [])
        if found and found[-1][1] == index - 1:
            found[-1][1] = index
        else:
            found.append([index, index])
    return [
        text
        for (before, after), spans in runs.items()
        for text in [
            f"{before}{a}{after}" if a == b else f"{before}{a}-{b}{after}" for a, b in spans
        ] or [before]
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------ what the stack says


@dataclasses.dataclass(frozen=True)
class _Claim:
    """What a stack says of a matrix: the rule's text, its format (None: dense), and whether its values were changed
    by a transform that keeps no error."""

    rule: str
    format: Format | None
    changed: bool = False


class _Replay:
    """The transforms of a Recipe, applied again to names: whom each of them claimed, and for what format."""

    def __init__(self, rules: list[str]) -> None:
        self.rules, self.claims, self.foreign = rules, dict[str, _Claim](), False

    def step(self, transform: Transform | None, text: str, spec: Spec) -> None:
        """Apply a transform (None: not known here) to a stack of the final one's names."""
        if transform is None:
            self.foreign = True
            return
        plain = spec.replace(weights=tuple(sorted((n, c.format) for n, c in self.claims.items() if c.format)))
        try:
            after = transform.edit(plain)
            before = Weights.named(shapes(plain))
            changed = transform.params(before, Model(plain), after).changed_from(before)
            rules = transform.matched(plain) if isinstance(transform, Quantize) else {}
        except InfoptError:  # written by hand, or for other names: it says nothing here
            self.foreign = True
            return
        packs, had = dict(after.weights), dict(self.claims)
        names = [n for n in shapes(spec) if n in changed or n in rules]
        if not names:
            return
        self.rules.append(text)
        for name in names:
            if name in changed or name not in had or had[name].format is None:
                pattern = rules[name].pattern or "the layers' matrices" if name in rules else transform.name
                lossy = (name in changed and name not in packs) or (name in had and had[name].changed)
                self.claims[name] = _Claim(f"{len(self.rules)}: {pattern}", packs.get(name), lossy)


def _parsed(text: str) -> Transform | None:
    try:
        return parse_stack(text, MOST_TEXT)
    except InfoptError:
        return None


def _replayed(model: Model) -> tuple[list[str], list[tuple[str, Spec, _Replay]]]:
    """The rules' texts; and for each model in a stack (itself, and its draft) a prefix, its Spec and its claims."""
    rules: list[str] = []
    spec = model.spec.replace(program=None)
    target, found = _Replay(rules), list[tuple[str, Spec, _Replay]]()
    found.append(("", spec, target))
    for text, _ in model.recipe.steps:
        if not text.startswith(f"{Speculative.name}("):
            target.step(_parsed(text), text, spec)
    if model.spec.program is None:
        return rules, found
    draft, own = _Replay(rules), model.spec.program.draft
    text = next((t for t, _ in reversed(model.recipe.steps) if t.startswith(f"{Speculative.name}(")), "")
    if (told := re.fullmatch(r"speculative\(draft=<\w+: (.*)>, k=\d+\)", text, re.DOTALL)) is not None:
        if told[1] != "(bare)":
            _steps(draft, _parsed(told[1]), own)
    else:
        transform = _parsed(text)
        inner = transform.draft if isinstance(transform, Speculative) else None
        if inner is None or isinstance(inner, Model):
            draft.foreign = True
        elif inner.transform is None:  # the target itself
            draft.claims, draft.foreign = dict(target.claims), target.foreign
        else:  # what was packed is taken dense first
            draft.foreign = target.foreign
            for name, claim in target.claims.items():
                taken = f"{claim.rule}, taken dense" if claim.format else claim.rule
                draft.claims[name] = _Claim(taken, None, claim.changed or claim.format is not None)
            _steps(draft, inner.transform, own)
    found.append(("draft.", own, draft))
    return rules, found


def _steps(draft: _Replay, transform: Transform | None, spec: Spec) -> None:
    for step in (None,) if transform is None else transform.steps:
        draft.step(step, f"{step!r}, of the draft", spec)


# ------------------------------------------------------------------------------------------------ what the params hold


def _stacks(spec: Spec, params: Params) -> Iterator[tuple[list[str], Any, bool]]:
    """Each array or QTensor of params, with the logical names that it holds, and whether they are stacked in it."""
    for name, x in params.items():
        if name != "segments":
            yield [name], x, False
    for segment, blocks in zip(segments(spec), params["segments"], strict=True):
        for phase, stacks in enumerate(blocks):
            for name, stack in stacks.items():
                yield [f"layers.{segment.layer(r, phase)}.{name}" for r in range(segment.repeats)], stack, True


@jax.jit
def _finite(x: Any) -> Any:
    """Whether each of the first axis is finite."""
    return jnp.isfinite(x.astype(jnp.float32)).reshape(len(x), -1).all(-1)


def _not_finite(x: Any, count: int, stacked: bool) -> list[str]:
    """For each matrix of a stack, which of its arrays holds NaN or infinite values; "" for none."""
    out = [""] * count
    parts = {"": x} if not is_qtensor(x) else {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
    for part, leaf in parts.items():
        if part in ("error", "format", "shape") or leaf is None or not jnp.issubdtype(leaf.dtype, jnp.floating):
            continue
        if leaf.ndim == 0 or (stacked and leaf.shape[0] != count):
            continue  # of another shape, which is told as such
        good = np.asarray(_finite(leaf if stacked else leaf[None]))
        for i in np.flatnonzero(~good):
            out[i] = out[i] or f"its {part or 'array'} holds NaN or infinite values"
    return out


def _wrong(name: str, x: Any, shape: tuple[int, ...], spec: Spec, lead: tuple[int, ...], rounded: bool) -> str:
    """What is wrong with the format and shapes of a stack; "" where nothing is."""
    fmt = spec.format_of(name)
    try:
        check_weight(name, x, shape, fmt, lead)
    except ParamsError as error:
        return error.what.removeprefix(f"{name} ").removesuffix(".")
    if fmt is not None and rounded:
        want = jax.eval_shape(
            lambda w: quantize_array(w, fmt, trailing=2), jax.ShapeDtypeStruct((*lead, *shape), jnp.float32)
        )
        for part in ("codes", "scale", "minimum", "zero", "outer", "input"):
            leaf, whole = getattr(x, part), getattr(want, part)
            if (leaf is None) != (whole is None) or (leaf is not None and leaf.shape != whole.shape):
                found = "none" if leaf is None else str(tuple(leaf.shape))
                return f"has {part} {found}, and {fmt.name} needs {None if whole is None else tuple(whole.shape)}"
    return ""


def _nbytes(x: Any) -> int:
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(x))


def _errors(x: Any, count: int) -> list[float | None]:
    """The error of each matrix of a stack, NaN where it is not known, None where it is dense."""
    if not is_qtensor(x):
        return [None] * count
    if x.error is None or x.error.size == 0 or x.error.size % count:
        return [math.nan] * count
    each = np.asarray(x.error, np.float64).reshape(count, -1)
    return [float(e) for e in np.sqrt(np.mean(each**2, 1))]


def _unread(x: Any, count: int) -> list[str]:
    """For each matrix of a stack, what to say of experts, or inputs, that nothing went into while a method read."""
    if not is_qtensor(x) or x.error is None or not x.error.size or x.error.size % count:
        return [""] * count
    each = np.signbit(np.asarray(x.error)).reshape(count, -1)
    if each.shape[1] == 1:
        return [", some inputs always 0" * bool(row[0]) for row in each]
    return [f", {row.sum()} of {row.size} experts unread" if row.any() else "" for row in each]


def _line(name: str, x: Any, claim: _Claim | None, fmt: Format | None, error: float | None, foreign: bool) -> Line:
    """What is known of a matrix, its size and what is wrong with its arrays aside.

    Args:
      name: its logical name.
      x: its array or QTensor, or the stack of it.
      claim: what the stack says of it, if anything.
      fmt: what the Spec says.
      error: as `_errors` gives it.
      foreign: whether the stack holds transforms that are not known here.
    """
    packed, problem, known = is_qtensor(x), "", error is not None and not math.isnan(error)
    if claim is not None and not foreign:
        left = claim.format is None and not claim.changed  # "the rest as it is", which may have been loaded packed
        if claim.format != fmt and not left:
            problem = f"{_words(claim.format)} by its rule, and the Spec says {_words(fmt)}"
        elif claim.format is not None and packed and not known:
            problem = "the error of its rounding is not known"
    if known and error == math.inf:
        problem = "the error of its rounding is no size"
    rule = claim.rule if claim else "?" if foreign else "as loaded" if fmt else "-"
    if claim is not None and claim.changed:
        changed = "yes"
    elif rule == "?":
        changed = "?"
    elif packed and known:
        changed = "yes" if error else "no"
    else:
        changed = ("?" if claim and claim.format else "as loaded") if packed else "no"
    group = "-" if not packed or x.scale is None else str(x.format.group or "row")
    kind = x.format.label if packed else str(x.dtype)
    return Line(name, rule, kind, group, 0.0, 0, error if known else None, changed, problem)


def _lines(prefix: str, spec: Spec, replay: _Replay, params: Params, totals: dict[str, list[int]]) -> dict[str, Line]:
    """A line a matrix, by its name; counts, bytes and values are added to the totals."""
    known, formats, found = shapes(spec), dict(spec.weights), dict[str, Line]()
    for names, x, stacked in _stacks(spec, params):
        each, shape, count = _nbytes(x) // len(names), known[names[0]], len(names)
        kind = "vectors" if not is_matrix(names[0], shape) else "packed matrices" if is_qtensor(x) else "dense matrices"
        totals[kind] = [a + count * b for a, b in zip(totals[kind], (1, each, math.prod(shape)))]
        if kind == "vectors":
            continue
        claims = [replay.claims.get(name) for name in names]
        rounded = any(c is not None and c.format is not None for c in claims)
        wrong = _wrong(names[0], x, shape, spec, (count,) if stacked else (), rounded)
        told = zip(names, claims, _errors(x, count), _not_finite(x, count, stacked), _unread(x, count))
        for name, claim, error, bad, unread in told:
            line = _line(prefix + name, x, claim, formats.get(name), error, replay.foreign)
            problem, bits = wrong or bad or line.problem, 8 * each / math.prod(shape)
            found[name] = dataclasses.replace(
                line, bits=bits, bytes=each, changed=line.changed + unread, problem=problem
            )
    return found


def _words(fmt: Format | None) -> str:
    return "dense" if fmt is None else fmt.label if fmt.group is None else f"{fmt.label} in groups of {fmt.group}"


def _place(name: str) -> tuple[int, int, str]:
    """What names are sorted by: the embedding, the layers, the head."""
    if name.startswith("layers."):
        return 1, int(name.split(".")[1]), name
    return (2 if name == "head" else 0), 0, name


def inspect(model: Model, params: Params) -> Audit:
    """What `Model.audit` returns, without raising for a matrix that is not what the stack says: it marks its line.

    Args:
      model, params: a stack and its params.

    Raises:
      ParamsError: the params are another model's altogether, or are traced.
    """
    if any(is_traced(leaf) for leaf in jax.tree.leaves(params)):
        raise ParamsError(
            "an audit was asked inside a transformation of JAX.",
            why="it reads the values, and there are none yet.",
            fix="model.audit(params) outside jit",
        )
    rules, models = _replayed(model)
    if len(models) == 2 and not (isinstance(params, Mapping) and set(params) == {"target", "draft"}):
        check_params(model.spec, params)  # raises
    lines, totals = list[Line](), {what: [0, 0, 0] for what in ("packed matrices", "dense matrices", "vectors")}
    for prefix, spec, replay in models:
        one = params if len(models) == 1 else params["draft" if prefix else "target"]
        check_names(spec, one)
        found = _lines(prefix, spec, replay, one, totals)
        lines += [found[name] for name in sorted(found, key=_place)]
        if "embed" in found and "head" not in found and FAMILIES[spec.family].whole is None:
            tied = dict(name=f"{prefix}head", format="= embed", group="-", bits=0.0, bytes=0, problem="")
            lines.append(dataclasses.replace(found["embed"], **tied))  # type: ignore[arg-type]
    title = repr(model).splitlines()[0]
    return Audit(title, tuple(rules), tuple(lines), tuple((what, *total) for what, total in totals.items()))  # type: ignore[misc]


def main(args: argparse.Namespace) -> int:
    """`infopt audit`: the table, also where it then fails."""
    stack = stack_option(args.stack or "none")
    base, params = load(args.model, dtype=args.dtype)
    if (model := stack(base)) is not base:
        params = model.convert(params)
    found = inspect(model, params)
    print(found.to_json() if args.json else found)
    found.check()
    return 0
