"""Many rows asked for at once: a study out of a TOML file, and the trade-offs of each transform alone."""

from __future__ import annotations

import dataclasses
import itertools
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from infopt import texts
from infopt.ablation.run import ablate
from infopt.ablation.table import METRICS, USUAL, Row, Table, grid, markdown, shown
from infopt.errors import EvaluationError, InfoptError, human, nearest
from infopt.model import Model
from infopt.typing import Params

KEYS = ("models", "texts", "metrics", "tokens", "length", "seed", "stacks", "grid")


@dataclasses.dataclass(frozen=True)
class Study:
    """What a TOML file asks for: every model, on every text, with every stack.

    Args:
      models: names or paths.
      texts: "topics", or paths of UTF-8 files.
      stacks: by name, their text.
      metrics, tokens, length, seed: as for `ablate`.
    """

    models: tuple[str, ...]
    texts: tuple[str, ...]
    stacks: Mapping[str, str]
    metrics: tuple[str, ...] = USUAL
    tokens: int | None = None
    length: int | None = None
    seed: int = 0


def read_study(path: str | Path) -> Study:
    """A study out of a TOML file.

        models = ["tiny", "smollm2-135m"]
        texts = ["topics", "corpus.txt"]       # by default topics alone
        metrics = ["ppl", "kl", "decode"]
        tokens = 8192                          # length and seed too, as for `ablate`

        [stacks]
        "8-bit kv" = "cache_kv(bits=8)"

        [grid]                                 # every combination of what the braces name
        stack = "quantize(bits={bits}, group={group}) | cache_kv(bits={kv})"
        bits = [8, 4]
        group = [32, 64]
        kv = ["None", 8]

    Raises:
      EvaluationError: it cannot be read, or asks for what is unknown.
    """
    path = Path(path).expanduser()
    try:
        found = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path} cannot be read.", why=str(error), fix="a TOML file: models, stacks") from error

    def wrong(what: str, why: str, fix: str) -> EvaluationError:
        return EvaluationError(f"{path}: {what}", why=why, fix=fix)

    for key in found:
        if key not in KEYS:
            raise wrong(f"nothing is called {key!r}.", nearest(key, KEYS), ", ".join(KEYS))

    def names(key: str, usual: Sequence[str]) -> tuple[str, ...]:
        value = found.get(key, list(usual))
        if not isinstance(value, list) or not value or not all(isinstance(each, str) for each in value):
            raise wrong(f"{key} = {value!r} is no list of texts.", "each is done in turn.", f'{key} = ["...", "..."]')
        return tuple(value)

    def count(key: str) -> int | None:
        value = found.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise wrong(f"{key} = {value!r} is no count.", "it counts things.", f"{key} = 512")
        return value

    stacks = found.get("stacks", {})
    if not isinstance(stacks, dict) or not all(isinstance(text, str) for text in stacks.values()):
        raise wrong(
            "[stacks] does not hold texts.", "a row's name stands for its transforms.", 'int8 = "quantize(bits=8)"'
        )
    stacks = stacks | _combinations(found.get("grid"), wrong)
    if not stacks:
        raise wrong("there are no stacks.", "a table has a row for each.", "[stacks], or [grid], or both")
    return Study(
        names("models", ()),
        names("texts", ("topics",)),
        stacks,
        names("metrics", USUAL),
        count("tokens"),
        count("length"),
        count("seed") or 0,
    )


def _combinations(found: Any, wrong: Callable[[str, str, str], EvaluationError]) -> dict[str, str]:
    if found is None:
        return {}
    fix = 'stack = "quantize(bits={bits})", bits = [8, 4]'
    if not isinstance(found, dict) or not isinstance(text := found.get("stack"), str):
        raise wrong("[grid] has no stack.", "its text holds the names of what is combined.", fix)
    values = {key: value for key, value in found.items() if key != "stack"}
    holes = set(re.findall(r"\{(\w+)\}", text))
    if holes != set(values) or not all(isinstance(value, list) and value for value in values.values()):
        named = ", ".join(sorted(holes)) or "nothing"
        raise wrong(
            f"[grid] names {named} in its stack, and lists {', '.join(values) or 'none'}.",
            "each name in braces stands for the values of its list.",
            fix,
        )
    rows = [dict(zip(values, chosen)) for chosen in itertools.product(*values.values())]
    filled = [re.sub(r"\{(\w+)\}", lambda hole, row=row: str(row[hole[1]]), text) for row in rows]
    return {each: each for each in filled}


def study(path: str | Path, out: str | Path, *, progress: bool = True) -> dict[tuple[str, str], Table]:
    """Run a study; what is done already is not done again.

    Args:
      path: of the TOML file: see `read_study`.
      out: a folder; a table goes to MODEL/TEXT in it.
      progress: whether to show a bar, on a terminal.

    Returns:
      A table for each model and text.

    Raises:
      EvaluationError: the file asks for what cannot be measured.
    """
    from infopt.io import load

    asked, tables = read_study(path), dict[tuple[str, str], Table]()
    read = {name: _text(Path(path).expanduser().parent, name) for name in asked.texts}
    for name in asked.models:
        model, params = load(name)
        for text in asked.texts:
            folder = Path(out).expanduser() / _folder(name) / _folder(text)
            options = {"metrics": asked.metrics, "tokens": asked.tokens, "length": asked.length, "seed": asked.seed}
            table = ablate(
                model, params, asked.stacks, text=read[text], out=folder, progress=progress, name=name, **options
            )
            table.save(folder)
            tables[name, text] = table
    return tables


def _text(beside: Path, name: str) -> str:
    if name == "topics":
        return texts.topics()
    try:
        return (beside / name).expanduser().read_text("utf-8")
    except (OSError, ValueError) as error:
        raise EvaluationError(
            f"the text {name} cannot be read.", why=str(error), fix='"topics", or a file of UTF-8 text'
        ) from error


def _folder(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "_"


# ---------------------------------------------------------------------------------------------------------- trade-offs


@dataclasses.dataclass(frozen=True)
class Tradeoffs:
    """The field's table: each technique alone, what it gains in speed, costs in quality and takes in memory.

    Args:
      table: the rows, the base first; one of it is the base without a cache.
    """

    table: Table

    @property
    def cells(self) -> tuple[dict[str, str], ...]:
        base, bare = self.table.rows[0], self.table[BARE]
        rows = [_tradeoff("KV cache", "cache_kv()", base, bare, self.table, speed=1 / bare.faster)]
        for row in self.table.rows[1:]:
            if row is not bare:
                rows.append(_tradeoff(row.name, row.stack, row, base, self.table, speed=row.faster))
        return tuple(rows)

    def __str__(self) -> str:
        return "\n".join([self.table.title, *grid(self.cells), *self.notes])

    __repr__ = __str__

    @property
    def notes(self) -> tuple[str, ...]:
        return (
            "Each technique alone, beside float32 with a KV cache; the KV cache beside none. Keys and values: live "
            f"bytes of a text of {self.table.rows[0].about['text']['length']} tokens.",
            *self.table.notes,
        )

    def to_markdown(self) -> str:
        """A table in Markdown, with its title and its notes."""
        return "\n\n".join([self.table.title, "\n".join(markdown(self.cells)), *self.notes]) + "\n"

    _repr_markdown_ = to_markdown


def _tradeoff(name: str, stack: str, row: Row, base: Row, table: Table, speed: float) -> dict[str, str]:
    fp32 = table.rows[0]
    change = "-" if row is fp32 else shown(table.difference(row.name, fp32.name, "ppl", relative=True), "+.2%")
    kv = "none before" if not base.state_bytes else f"{row.state_bytes / base.state_bytes:.2f}x"
    return {
        "technique": name,
        "stack": stack,
        "decoding speed": f"{speed:.2f}x",
        "perplexity": change,
        "KL": "-" if row is fp32 else shown(row.estimate("kl")),
        "exact": "yes" if row.exact else "no",
        "weights": f"{human(row.weight_bytes)} ({row.weight_bytes / base.weight_bytes:.2f}x)",
        "keys and values": f"{human(row.state_bytes)} ({kv})",
    }


BARE = "no cache"


def tradeoffs(model: Model, params: Params, **options: Any) -> Tradeoffs:
    """Measure each transform alone.

    Args:
      model, params: the base, bare.
      options: as for `ablate`.

    Raises:
      EvaluationError, InfoptError: as `ablate`.
    """
    if model.spec.cache or model.spec.weights:
        raise InfoptError(
            f"the trade-offs of {model.recipe} were asked for.",
            why="each technique is measured alone, over the bare dense model.",
            fix="the model as ip.load gives it",
        )
    c = model.spec.config
    length = min(512, c.context)
    window = max(length // 4, 8)
    heads = next(n for n in range(c.kv_heads // 2, 0, -1) if c.kv_heads % n == 0) if c.kv_heads > 1 else 0
    draft = "self_draft(quantize(bits=4, group=32))"
    stacks: dict[str, Any] = {
        BARE: model,
        "FP16 weights": "quantize(format='fp16')",
        "INT8 weights": "quantize(bits=8)",
        "INT4 weights": "quantize(bits=4, group=32)",
        "8-bit KV": "cache_kv(bits=8)",
        "4-bit KV": "cache_kv(bits=4)",
        "sliding window": f"sliding_window({window}, sinks=4) | cache_kv()",
        **({"fewer KV heads": f"gqa({heads}) | cache_kv()"} if heads else {}),
        "paged KV": "cache_kv() | paged(16)",
        "speculative": f"cache_kv() | speculative(draft={draft}, k=4)",
    }
    options = {"metrics": ("ppl", "kl", "decode"), "slots": length} | options
    if not {"ppl", "kl", "decode"} <= set(options["metrics"]):
        raise EvaluationError(
            f"trade-offs were asked for by {', '.join(options['metrics'])} alone.",
            why="they stand for quality, speed and memory.",
            fix="leave the metrics out, of " + ", ".join(METRICS),
        )
    return Tradeoffs(ablate(model, params, stacks, **options))
