"""Rows of an ablation, and how they are shown: text, Markdown, CSV, a picture."""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infopt.errors import CheckpointError, EvaluationError, human, nearest
from infopt.evaluate import ENOUGH, Agreement, Estimate, Scores, difference
from infopt.evaluate import METRICS as QUALITY
from infopt.io import disk

if TYPE_CHECKING:
    from infopt.ablation.picture import Picture

LOSSLESS = 1e-6
"""Relative error below which rounding is said to have lost nothing: float32's own."""


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured of one stack; all figures follow from it.

    Args:
      name: what the table calls it.
      key: a digest of what it depends on: Spec, Recipe, base params, text, versions; and whether speed was measured.
      stack: its transforms, as text.
      spec, recipe: of the stack, JSON-able.
      exact: whether it is.
      weight_bytes: of the live params.
      weights: how many values those stand for.
      error: the greatest relative error that rounding has made in a packed matrix; 0 where none was rounded, NaN where
        one was loaded packed.
      token_bytes: of the cache, a token, by its codec.
      state_bytes: of the live keys and values of one text as long as a window; 0 without a cache.
      scores: of each window.
      greedy: how far greedy texts agree with the base's; None where it was not asked for.
      speed: tokens decoded a second in each turn, and the base's in the same turn; empty where not asked for.
      about: what it was measured with: model, text, seed, versions, device, commit.
    """

    name: str
    key: str
    stack: str
    spec: Mapping[str, Any]
    recipe: Sequence[Any]
    exact: bool
    weight_bytes: int
    weights: int
    error: float
    token_bytes: int
    state_bytes: int
    scores: Scores
    greedy: Agreement | None
    speed: tuple[tuple[float, float], ...]
    about: Mapping[str, Any]

    @property
    def decode(self) -> float:
        """Tokens decoded a second, the median of the turns; NaN where it was not asked for."""
        return statistics.median(own for own, _ in self.speed) if self.speed else math.nan

    @property
    def faster(self) -> float:
        """How many times as fast as the base: the median of the turns' ratios."""
        return statistics.median(own / base for own, base in self.speed) if self.speed else math.nan

    @property
    def bytes_per_weight(self) -> float:
        """Scales included, and all that stays dense."""
        return self.weight_bytes / self.weights

    def estimate(self, metric: str, seed: int = 0, resamples: int = 2000) -> Estimate:
        """One of the metrics of quality, with its interval.

        Raises:
          EvaluationError: it was not measured.
        """
        if metric != "greedy":
            return self.scores.estimate(metric, seed=seed, resamples=resamples)
        if self.greedy is None:
            raise EvaluationError(
                f"no greedy texts of {self.name} were compared.",
                why="they were not asked for.",
                fix="metrics=['greedy']",
            )
        return self.greedy.estimate(seed=seed, resamples=resamples)

    def to_json(self) -> str:
        """One line."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("scores", "greedy"):
            own[name] = own[name] and json.loads(own[name].to_json())
        own["error"] = self.error if math.isfinite(self.error) else None
        return json.dumps(own, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Row:
        """What `to_json` wrote.

        Raises:
          EvaluationError: it is something else.
        """
        try:
            found = json.loads(text)
            speed = tuple((float(own), float(base)) for own, base in found["speed"])
            parts = {
                "scores": Scores.from_json(found["scores"]),
                "greedy": found["greedy"] and Agreement.from_json(found["greedy"]),
                "error": math.nan if found["error"] is None else float(found["error"]),
            }
            return Row(**found | parts | {"speed": speed})
        except (KeyError, TypeError, ValueError) as error:
            raise EvaluationError(
                "this is no row of an ablation.", why=f"{type(error).__name__}: {error}.", fix="what Row.to_json wrote"
            ) from error


@dataclasses.dataclass(frozen=True)
class Column:
    """A metric's place in a table: its head, and the format of its value."""

    head: str
    form: str = ""


COLUMNS = {
    "ppl": Column("ppl"),
    "kl": Column("KL"),
    "kl99": Column("KL, 99%"),
    "top1": Column("same top-1", ".2%"),
    "bits_per_byte": Column("bits/byte"),
    "greedy": Column("same greedy text"),
}
METRICS = (*COLUMNS, "decode")
"""What a table can show."""
USUAL = ("ppl", "kl", "kl99", "top1", "decode")


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows, the base first; prints as text, shows as a table in a notebook.

    Args:
      rows: what was measured.
      metrics: what is shown, of `METRICS`.
      seed: of the bootstrap.
    """

    rows: tuple[Row, ...]
    metrics: tuple[str, ...] = USUAL
    seed: int = 0

    def __getitem__(self, name: str) -> Row:
        found = {row.name: row for row in self.rows}
        if name not in found:
            raise EvaluationError(
                f"no row {name!r} is in the table.", why="rows go by name.", fix=nearest(name, list(found))
            )
        return found[name]

    def difference(self, a: str, b: str, metric: str = "ppl", *, relative: bool = False) -> Estimate:
        """A metric of row `a` less that of row `b`, paired window by window, with its interval."""
        one, two = self[a], self[b]
        if metric != "greedy":
            return difference(one.scores, two.scores, metric, relative=relative, seed=self.seed)
        for row in (one, two):
            row.estimate(metric)  # raises where it was not measured
        assert one.greedy is not None and two.greedy is not None
        return difference(one.greedy, two.greedy, metric, relative=relative, seed=self.seed)

    @property
    def title(self) -> str:
        """Of which model, on which text, on what machine."""
        about = self.rows[0].about
        text, versions = about["text"], about["versions"]
        return (
            f"{about['model']['what']}, on {text['what']}: {text['scored']:,} tokens in {text['windows']} windows of "
            f"{text['length']} (digest {text['digest'][:8]}); {about['device']}, jax {versions['jax']}"
        )

    @functools.cached_property
    def cells(self) -> tuple[dict[str, str], ...]:
        """Each row's cells, by the head of their column."""
        return tuple(self._cells(row) for row in self.rows)

    def _cells(self, row: Row) -> dict[str, str]:
        base = self.rows[0]
        found = {
            "stack": row.name,
            "bytes/weight": f"{row.bytes_per_weight:.3f}",
            "weights": human(row.weight_bytes),
            "kv/token": f"{row.token_bytes:,} B" if row.token_bytes else "-",
        }
        for metric in self.metrics:
            if metric == "decode":
                speed = f"{row.decode:,.0f}" if row.decode >= 100 else f"{row.decode:.3g}"
                found["decoded/s"] = speed + ("" if row is base else f" ({row.faster:.2f}x)")
                continue
            column = COLUMNS[metric]
            found[column.head] = shown(row.estimate(metric, self.seed), column.form)
            if metric == "ppl":
                found[f"ppl to {base.name}"] = "-" if row is base else shown(self._change(row), "+.2%")
        return found

    def _change(self, row: Row) -> Estimate:
        return difference(row.scores, self.rows[0].scores, "ppl", relative=True, seed=self.seed)

    @functools.cached_property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know of the figures."""
        base, found = self.rows[0], list[str]()
        units = len(set(base.scores.units))
        found.append(
            f"After ±: half of the 95% interval, a bootstrap over {units} windows or documents; "
            f"`ppl to {base.name}` is of the paired difference."
            + ("" if units >= ENOUGH else f" {units} are few: the intervals are too narrow." if units > 1 else "")
        )
        if (floor := base.scores.kl.value) > 0:
            found.append(f"{base.name} against itself, run twice: KL {floor:.2g}, this device's noise floor.")
        if "decode" in self.metrics:
            found.append(f"decoded/s: {base.about['decoding']}.")
        for row in self.rows:
            values = [row.estimate(m, self.seed, resamples=100).value for m in self.metrics if m in QUALITY]
            if not all(map(math.isfinite, values)):
                found.append(f"{row.name}: its logits are not finite, so a figure is none.")
        rounded = [row for row in self.rows[1:] if row.spec["weights"]]
        same = [row.name for row in rounded if row.error < LOSSLESS]
        if same:
            found.append(f"{', '.join(same)}: the weights lie on this grid as they are, so that nothing is rounded.")
        if any(row.faster < 1 for row in rounded) and "cpu" in base.about["device"].lower():
            found.append("Slower than dense: on a CPU XLA unpacks weights anew for each step; there is no kernel yet.")
        return tuple(found)

    def __str__(self) -> str:
        return "\n".join([self.title, *grid(self.cells), *self.notes])

    __repr__ = __str__

    def to_markdown(self) -> str:
        """A table in Markdown, with its title and its notes."""
        return "\n\n".join([self.title, "\n".join(markdown(self.cells)), *self.notes]) + "\n"

    def _repr_markdown_(self) -> str:
        return self.to_markdown()

    def to_csv(self) -> str:
        """Numbers, not cells: each metric with its standard error and interval."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        quality = [metric for metric in self.metrics if metric in QUALITY]
        own = ("name", "stack", "exact", "weight_bytes", "weights", "token_bytes", "state_bytes", "decode", "faster")
        parts = ("", "_stderr", "_low", "_high")
        changes = ("ppl_change", "ppl_change_low", "ppl_change_high")
        writer.writerow([*own, *(metric + part for metric in quality for part in parts), *changes])
        for row in self.rows:
            found = [getattr(row, name) for name in own]
            for metric in quality:
                e = row.estimate(metric, self.seed)
                found += [e.value, e.stderr, e.low, e.high]
            change = self._change(row)
            writer.writerow([*found, change.value, change.low, change.high])
        return out.getvalue()

    def to_json(self) -> str:
        """All rows, a line each: what a run writes."""
        return "".join(row.to_json() + "\n" for row in self.rows)

    @staticmethod
    def from_json(text: str, metrics: Sequence[str] = USUAL, seed: int = 0) -> Table:
        """What `to_json` wrote.

        Raises:
          EvaluationError: it is something else.
        """
        rows = tuple(Row.from_json(line) for line in text.splitlines() if line.strip())
        if not rows:
            raise EvaluationError("there is no row.", why="the text is empty.", fix="what Table.to_json wrote")
        return Table(rows, tuple(metrics), seed)

    def plot(self, metric: str = "kl") -> Picture:
        """A picture: quality against bytes with intervals, and speed beside it where it was measured.

        Args:
          metric: of quality.

        Raises:
          EvaluationError: there is no such metric.
        """
        from infopt.ablation.picture import draw  # half a second, and only wanted here

        if metric not in COLUMNS:
            raise EvaluationError(
                f"no metric {metric!r} can be drawn.",
                why="quality stands against bytes.",
                fix=nearest(metric, list(COLUMNS)),
            )
        return draw(self, metric)

    def save(self, folder: str | Path) -> None:
        """Write table.csv, table.md and table.png, each whole or not at all.

        Raises:
          CheckpointError: the folder cannot be written.
        """
        folder = Path(folder).expanduser().resolve()
        write(folder / "table.csv", self.to_csv().encode())
        write(folder / "table.md", self.to_markdown().encode())
        self.save_picture(folder / "table.png")

    def save_picture(self, path: str | Path) -> None:
        """Write `plot`, as a PNG."""
        write(Path(path), self.plot("kl" if "kl" in self.metrics else "ppl").png())


def shown(e: Estimate, form: str = "") -> str:
    """A figure and half its interval, to two digits of that.

    >>> shown(Estimate(31.23456, 0.1, 31.0, 31.4)), shown(Estimate(0.0123, 0.001, 0.01, 0.015), "+.2%")
    ('31.23 ± 0.20', '+1.23% ± 0.25%')
    >>> shown(Estimate(4.84e-7, 2e-8, 4.4e-7, 5.3e-7))
    '4.84e-07 ± 4.5e-08'
    """
    if not math.isfinite(e.value):
        return "nan"
    half = (e.high - e.low) / 2
    if "%" in form:
        return f"{e.value:{form}}" + (f" ± {half:.2%}" if half > 0 else "")
    if not half > 0:
        return f"{e.value:.4g}"
    if abs(e.value) < 1e-4:
        return f"{e.value:.2e} ± {half:.1e}"
    digits = max(1 - math.floor(math.log10(half)), 0)
    return f"{e.value:.{digits}f} ± {half:.{digits}f}"


def grid(cells: Sequence[Mapping[str, str]]) -> list[str]:
    """Lines of text, the first column to the left, the others to the right."""
    heads = list(cells[0])
    lines = [heads, *([row[head] for head in heads] for row in cells)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    return [
        "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths)))
        for line in lines
    ]


def markdown(cells: Sequence[Mapping[str, str]]) -> list[str]:
    """Lines of a Markdown table."""
    heads = list(cells[0])
    rows = [heads, ["---", *["---:"] * (len(heads) - 1)], *([row[head] for head in heads] for row in cells)]
    return ["| " + " | ".join(cell.replace("|", "\\|").replace("*", "\\*") for cell in row) + " |" for row in rows]


def write(path: Path, data: bytes) -> None:
    """A file, by one rename.

    Raises:
      CheckpointError: it cannot be written; what was there before is left.
    """
    path = path.expanduser()
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            fresh.write_bytes(data)
            disk.sync_entries(fresh)
            os.replace(fresh, path)
        finally:
            fresh.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written.", **disk.refused(error, "another folder")) from error
