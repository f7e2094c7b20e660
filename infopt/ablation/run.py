"""Measuring an ablation: one row a stack, quality and speed from the same params on the same path, its cache included.

Quality is compared with the base's window by window, speed turn by turn, so that what differs is the stack. A row is
one line of JSON, written when it is done: a run that is killed goes on where it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from infopt import texts
from infopt.ablation.table import METRICS, USUAL, Row, Table, write
from infopt.errors import CheckpointError, EvaluationError, InfoptError, nearest
from infopt.evaluate import Windows, check_apart, check_windows, greedy_agreement, kept, measure, windows
from infopt.formats import FORMATS
from infopt.generation import BUCKETS
from infopt.io import disk
from infopt.methods.kept import source
from infopt.model import Model, check_params, shapes
from infopt.progress import bar
from infopt.qtensor import QTensor, is_qtensor
from infopt.timing import decoding, turns
from infopt.transforms import Transform, cache_kv, parse_stack
from infopt.typing import Params

LARGE = 10_000_000
"""Weights from which on a model reads less of a text, and decodes less, by default."""
TOKENS, TOKENS_LARGE = 12_288, 10_240
"""About how many are scored by default: in windows of 512, of which intervals want 20."""
SLOTS, TURNS = 128, 5
"""Of a speed: slots of the cache, turns that a median is over."""
DECODED, DECODED_FEW = 64, 16
"""Tokens decoded in a turn, after the first one; of a large model, or in many slots, fewer."""
PROMPTS, PROMPT, MOST_GREEDY = 8, 32, 64
"""Of greedy texts: how many, their prompts' tokens, their new ones."""
STANDARD = {
    "fp16": "quantize(format='fp16')",
    "bf16": "quantize(format='bf16')",
    "int8": "quantize(bits=8)",
    "int8, groups of 64": "quantize(bits=8, group=64)",
    "int4": "quantize(bits=4, group=32)",
    "int4, minimum": "quantize(format='int4_min', group=32)",
    "int4, minimum, 64": "quantize(format='int4_min', group=64)",
    "nf4": "quantize(format='nf4')",
    "8-bit kv": "cache_kv(bits=8)",
    "4-bit kv": "cache_kv(bits=4)",
}
"""The standard table: 4 bits in groups of 32 unless it says otherwise, `int4` with scale = extreme value / -8."""
MORE = {
    "int8, embedding too": "quantize(bits=8, where='*')",
    "int4, scale max/7": "quantize(format='int4_absmax', group=32)",
    "fp8": "quantize(format='fp8_e4m3')",
    "int4, zero point": "quantize(format='int4_zero', group=32)",
    "int4, clipped": "quantize(bits=4, group=32, clip='mse')",
    "mxfp4": "quantize(format='mxfp4')",
    "nvfp4": "quantize(format='nvfp4')",
    "int3": "quantize(bits=3, group=32)",
    "int4, 8-bit kv": "quantize(bits=4, group=32) | cache_kv(bits=8)",
}
"""What `infopt ablate --all` measures too."""
ROWS = "rows.jsonl"


def ablate(
    model: Model,
    params: Params,
    stacks: Mapping[str, Transform | str | Model] | Iterable[Transform | str] | None = None,
    *,
    text: Any = None,
    metrics: Sequence[str] = USUAL,
    length: int | None = None,
    tokens: int | None = None,
    slots: int | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = True,
    name: str = "",
    **extra: Any,
) -> Table:
    """Measure stacks beside the model they are made of.

    Args:
      model, params: the base; its row is called "fp32" where all params are float32, else "base".
      stacks: by name, or a list; transforms or their text. A stack without a cache is given `cache_kv()`, as the base
        is: quality and speed come from the same path. A Model, made of this one, is taken as it is. By default the
        standard table's.
      text: what quality is measured on: a text, a list of documents, token ids, or `Windows`; `ip.texts.topics()` by
        default, which no weights trained here have seen.
      metrics: of "ppl", "kl", "kl99", "top1", "bits_per_byte", "greedy", "decode".
      length: tokens of a window; the model's context by default, at most 512.
      tokens: about how many are scored, evenly out of the text; 12,288 by default, 10,240 of a model of 10 million
        weights or more; 0 for all.
      slots: of the cache in which decoding is timed; 128 by default, at most the context.
      seed: of the bootstrap.
      out: a folder for the rows. Rows that are there already, of the same versions, are not measured again.
      progress: whether to show a bar, on a terminal.
      name: of the model, for the title.
      extra: for `convert`, as `draft=` params.

    Returns:
      A table, the base first, then the stacks in their order.

    Raises:
      EvaluationError: no such metric, text that cannot be scored or that a stack's method read, or a folder with
        another model's rows, or one that another process is measuring into.
      CheckpointError: the folder cannot be written.
      TransformOrderError, InfoptError: a stack cannot be made; before anything is measured.

    >>> import infopt as ip, jax
    >>> model = ip.models.llama(vocab=32, context=64)
    >>> params, text = model.init(jax.random.key(0)), [n * n % 31 for n in range(400)]
    >>> table = ip.ablate(model, params, {"int8": ip.quantize(bits=8)}, text=text, metrics=["ppl", "kl"])
    >>> [row.name for row in table.rows], table["fp32"].scores.kl.value
    (['fp32', 'int8'], 0.0)
    """
    metrics = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    for metric in metrics:
        if metric not in METRICS:
            raise EvaluationError(
                f"no metric {metric!r} is measured here.", why=nearest(str(metric), METRICS), fix=", ".join(METRICS)
            )
    check_params(model.spec, params)
    made = _made(model, params, stacks)
    wants = {row: _extras(stack, model) for row, stack in made.items()}
    if set(extra) != set().union(*wants.values()):
        raise EvaluationError(
            f"ablate was given {sorted(extra) or 'no extra params'}.",
            why="its stacks need " + (", ".join(sorted(set().union(*wants.values()))) or "none"),
            fix="as for convert: draft=..., the params of speculative(draft=model)",
        )
    what, cut = _cut(model, text, length, tokens)
    if "bits_per_byte" in metrics and cut.bytes is None:
        raise EvaluationError(
            "bits a byte cannot be measured.",
            why="windows of token ids alone do not say how many bytes of text they stand for.",
            fix="a text, and a model with its tokenizer; or leave the metric out",
        )
    check_windows(cut, model)
    for row, stack in made.items():
        try:
            check_apart(stack, model, cut)
        except EvaluationError as error:
            raise EvaluationError(f"{row}: {error.what}", why=error.why, fix=error.fix) from error
    slots = min(SLOTS if slots is None else slots, model.spec.config.context)
    new = min(DECODED if slots <= SLOTS and _values(model) < LARGE else DECODED_FEW, slots // 2)
    about = _about(model, params, name, what, cut, seed, extra)
    about["decoding"] = f"greedily, one text, {new} tokens after the first, in a cache of {slots} slots"
    keys = {row: _key(stack, about, metrics) for row, stack in made.items()}
    first = next(iter(made))
    with _rows(out, about) as (done, keep), bar("rows", len(made), progress) as show:
        base = _Base(made[first], made[first].convert(params, model), (slots, new))
        for number, (row, stack) in enumerate(made.items(), 1):
            if (key := keys[row]) not in done:
                own = base.params
                if row != first:
                    own = stack.convert(params, model, **{name: extra[name] for name in wants[row]})
                done[key] = _measure(row, key, stack, own, base, cut, metrics, about)
                keep(done.values())
            show(number, row)
    return Table(tuple(dataclasses.replace(done[key], name=row) for row, key in keys.items()), metrics, seed)


def _made(model: Model, params: Params, stacks: Any) -> dict[str, Model]:
    """Each row's stack, the base first; all are made before anything is measured."""
    stacks = STANDARD if stacks is None else stacks
    if isinstance(stacks, str | Transform):
        stacks = [stacks]
    named = stacks if isinstance(stacks, Mapping) else {str(stack): stack for stack in stacks}
    dense = not model.spec.weights and all(x.dtype == np.float32 for x in jax.tree.leaves(params))
    base = "fp32" if dense else "base"
    made = {base: _cached(model)}
    for name, stack in named.items():
        if name == base:
            raise EvaluationError(
                f"a stack is named {base!r}.",
                why="so the base is called, which is always measured.",
                fix="another name",
            )
        if isinstance(stack, Model):
            if model not in (stack, *(before for _, before in stack.transforms())):
                raise EvaluationError(
                    f"{name!r} is a stack of another model.",
                    why="a table compares stacks of one model with one set of params.",
                    fix="transforms, or a Model that transforms made of this one",
                )
            made[name] = stack
            continue
        transform = parse_stack(stack) if isinstance(stack, str) else stack
        if not isinstance(transform, Transform):
            raise EvaluationError(
                f"{name!r} is a {type(stack).__name__}.",
                why="a row is a stack of transforms.",
                fix="ip.quantize(bits=8), its text, or a Model",
            )
        try:
            made[name] = _cached(transform(model))
        except InfoptError as error:
            raise type(error)(f"{name}: {error.what}", why=error.why, fix=error.fix) from error
    return made


def _extras(stack: Model, model: Model) -> set[str]:
    """What `convert` wants besides params."""
    return {name for transform, _ in stack.transforms(model) for name in transform.extras}


def _cached(stack: Model) -> Model:
    return stack if stack.spec.cache else cache_kv()(stack)


def _cut(model: Model, text: Any, length: int | None, tokens: int | None) -> tuple[str, Windows]:
    """What the text is called, and its windows."""
    if isinstance(text, Windows):
        return "windows of one's own", text
    what = "a text of one's own"
    if text is None:
        if model.tokenizer is None:
            raise EvaluationError(
                "the model has no tokenizer, and no text was given.",
                why="the default text is English, and becomes token ids by the model's own tokenizer.",
                fix="text=[...], token ids",
            )
        text = texts.topics()
    if isinstance(text, str):
        with contextlib.suppress(InfoptError):  # a Python without topics measures texts of one's own
            held_out = text == texts.topics()
            version = platform.python_version()
            what = f"held-out topics of CPython {version} (text {texts.digest(text)})" if held_out else what
    cut = windows(text, min(512, model.spec.config.context) if length is None else length, tokenizer=model.tokenizer)
    if tokens is None:
        tokens = TOKENS if _values(model) < LARGE else TOKENS_LARGE
    return what, cut.spread(tokens) if tokens else cut


def _values(model: Model) -> int:
    return sum(math.prod(shape) for shape in shapes(model.spec).values())


def _about(model: Model, params: Params, name: str, what: str, cut: Windows, seed: int, extra: Any) -> dict[str, Any]:
    h = hashlib.sha256(model.spec.to_json().encode())
    for leaf in jax.tree.leaves((params, extra)):
        h.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
    c = model.spec.config
    size = f"{model.spec.family} {c.layers} x {c.dim}, {_values(model) / 1e6:.3g} million weights"
    return {
        "model": {"what": f"{name} ({size})" if name else size, "digest": h.hexdigest()[:16]},
        "text": {
            "what": what,
            "digest": cut.digest,
            "scored": cut.scored,
            "windows": len(cut),
            "length": cut.length,
        },
        "seed": seed,
        "versions": {package: _version(package) for package in ("infopt", "jax", "jaxlib", "numpy")},
        "python": platform.python_version(),
        "device": f"{jax.devices()[0].device_kind} ({platform.machine()}, {os.cpu_count()} cores)",
        "commit": _commit(),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # out of a checkout that is not installed
        return ""


@functools.cache
def _commit() -> str:
    """Of the checkout that this file is in; "" where it is installed, or there is no git."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        found = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def _key(stack: Model, about: Mapping[str, Any], metrics: Sequence[str]) -> str:
    """What a row depends on: equal keys, equal quality."""
    named = {fmt.name for fmt in dict(stack.spec.weights).values()}
    if stack.spec.kv is not None:
        named.add(stack.spec.kv.format.name)
    parts = [
        stack.spec.to_json(),
        stack.recipe.steps,
        {name: dataclasses.asdict(FORMATS[name]) for name in sorted(named)},
        about["device"],
        about["model"]["digest"],
        about["text"]["digest"],
        about["versions"],
        [about["decoding"] if metric == "decode" else metric for metric in metrics if metric in ("decode", "greedy")],
    ]
    if any(digest for _, digest in stack.recipe.steps):  # a method's result depends on its code, and on those before it
        parts.append(source("transforms"))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


class _Base:
    """The base, read once for all rows; and in how many slots how many tokens are decoded for a speed."""

    def __init__(self, model: Model, params: Params, decoding: tuple[int, int]) -> None:
        self.model, self.params, self.decoding, self.read = model, params, decoding, kept(model, params)


def _measure(
    name: str,
    key: str,
    stack: Model,
    params: Params,
    base: _Base,
    cut: Windows,
    metrics: Sequence[str],
    about: Mapping[str, Any],
) -> Row:
    state = stack.init_state(1, cut.length, chunk=min(max(BUCKETS), cut.length))  # as generate reads a text
    runs = _decoding(stack, params, base, cut) if "decode" in metrics else {}
    with ThreadPoolExecutor(1) as pool:  # what decodes is compiled while quality is measured, which takes no time
        compiled = [pool.submit(run) for run in runs.values()]
        scores = measure(stack, params, cut, base.read)
        for each in compiled:
            each.result()
    return Row(
        name,
        key,
        str(stack.recipe),
        json.loads(stack.spec.to_json()),
        [list(step) for step in stack.recipe.steps],
        stack.exact,
        sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
        _values(stack),
        float(np.max([0.0, *(np.max(np.abs(q.error)) for q in _packed(params))])),
        stack.token_bytes(),
        sum(leaf.nbytes for leaf in jax.tree.leaves(state.kv)),
        scores,
        _greedy(stack, params, base, cut) if "greedy" in metrics else None,
        _speeds(runs),
        about,
    )


def _packed(params: Params) -> list[QTensor]:
    return [q for q in jax.tree.leaves(params, is_leaf=is_qtensor) if is_qtensor(q)]


def _greedy(stack: Model, params: Params, base: _Base, cut: Windows) -> Any:
    size = min(PROMPT, stack.spec.config.context // 2)
    prompts = [row[:size].tolist() for row in cut.spread(PROMPTS * cut.length).rows[:PROMPTS]]
    new = min(MOST_GREEDY, stack.spec.config.context - size)
    return greedy_agreement(stack, params, (base.model, base.params), prompts, max_new=new)


def _decoding(stack: Model, params: Params, base: _Base, cut: Windows) -> dict[str, Callable[[], float]]:
    """Runs of decoding, of the stack and of the base, that give the seconds that one token takes."""
    slots, new = base.decoding
    both = {"own": (stack, params), "base": (base.model, base.params)}
    runs = {name: decoding(*each, cut.rows[0][:1], slots, new) for name, each in both.items()}
    return {name: lambda run=run: run() / new for name, run in runs.items()}


def _speeds(runs: dict[str, Callable[[], float]]) -> tuple[tuple[float, float], ...]:
    """Tokens a second, the stack's and the base's, turn by turn."""
    taken = turns(runs, TURNS)
    return tuple((1 / own, 1 / other) for own, other in zip(taken["own"], taken["base"], strict=True)) if runs else ()


@contextmanager
def _rows(out: str | Path | None, about: Mapping[str, Any]) -> Iterator[tuple[dict[str, Row], Callable[..., None]]]:
    """The rows that are in the folder, by key, and a function that writes all of them anew; nobody else has it then."""
    if out is None:
        yield {}, lambda rows: None
        return
    folder = Path(out).expanduser().resolve()

    def keep(rows: Iterable[Row]) -> None:
        write(folder / ROWS, "".join(row.to_json() + "\n" for row in rows).encode())

    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            alone = held.enter_context(disk.held(folder))
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be written.", **disk.refused(error, "another folder")) from error
        if not alone:
            raise EvaluationError(
                f"another process is measuring into {folder}.",
                why="each would write its rows over the other's.",
                fix="wait for it, or another folder",
            )
        for left in folder.glob(f".{ROWS}.*"):  # of a process that was killed while it wrote
            left.unlink(missing_ok=True)
        done = _read(folder, about)
        keep(done.values())
        yield done, keep


def _read(folder: Path, about: Mapping[str, Any]) -> dict[str, Row]:
    """The rows that are there, by key."""
    path = folder / ROWS
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        text = ""
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path} cannot be read.", why=str(error), fix="another folder") from error
    try:
        rows = [Row.from_json(line) for line in text.splitlines()]
    except EvaluationError as error:
        raise EvaluationError(f"{path} holds what is no row.", why=error.why, fix="another folder") from error
    for row in rows:
        if row.about["model"]["digest"] != about["model"]["digest"]:
            raise EvaluationError(
                f"{folder} holds rows of another model: {row.about['model']['what']}.",
                why=f"a table compares stacks of one model with one set of params; this is {about['model']['what']}.",
                fix="another folder",
            )
    return {row.key: row for row in rows}
