"""`infopt ablate`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from infopt.ablation.run import MORE, STANDARD, ablate
from infopt.ablation.study import study, tradeoffs
from infopt.ablation.table import USUAL, Table, write
from infopt.errors import EvaluationError


def main(args: argparse.Namespace) -> int:
    """Runs it; returns the exit code."""
    from infopt.io import load

    if args.study is not None:
        return _study(args)
    if args.tradeoffs and (args.stack or args.all or args.metrics):
        raise EvaluationError(
            "--tradeoffs was given stacks or metrics.",
            why="it measures each transform alone, in speed, quality and memory.",
            fix="one of the two",
        )
    given: dict[str, str] = {}
    for name, text in map(_named, args.stack or ()):
        if name in given or (args.all and name in STANDARD | MORE):
            raise EvaluationError(f"two stacks are named {name!r}.", why="a row goes by its name.", fix="another name")
        given[name] = text
    stacks = STANDARD | MORE | given if args.all else given or STANDARD
    metrics = USUAL if args.metrics is None else tuple(args.metrics.replace(" ", "").split(","))
    text = None
    if args.text is not None:
        try:
            text = Path(args.text).expanduser().read_text("utf-8")
        except (OSError, ValueError) as error:
            raise EvaluationError(f"{args.text} cannot be read.", why=str(error), fix="a file of UTF-8 text") from error
    if args.out is not None and args.picture:
        raise EvaluationError(
            "--picture was given beside --out.", why="the picture goes into that folder.", fix="one of the two"
        )
    name = args.model or "tiny"
    model, params = load(name, **({} if args.dtype is None else {"dtype": args.dtype}))
    options: dict[str, Any] = {"text": text, "tokens": args.tokens, "seed": args.seed, "out": args.out}
    options |= {"length": args.length, "name": name}
    if args.tradeoffs:
        found = tradeoffs(model, params, **options)
        if args.out is not None:
            write(Path(args.out) / "tradeoffs.md", found.to_markdown().encode())
        print(found.table.to_json() if args.json else found, end="" if args.json else "\n")
        return 0
    table = ablate(model, params, stacks, metrics=metrics, **options)
    _show(table, args.json)
    if args.out is not None:
        table.save(args.out)
        print(f"rows, table and picture: {args.out}", file=sys.stderr)
    elif args.picture != "":
        picture = args.picture or "ablation.png"
        table.save_picture(picture)
        print(f"picture: {picture}", file=sys.stderr)
    return 0


def _study(args: argparse.Namespace) -> int:
    names = ("stack", "all", "tradeoffs", "text", "metrics", "tokens", "length", "dtype", "seed", "picture")
    given = [args.model] * bool(args.model) + [f"--{name}" for name in names if getattr(args, name)]
    if given or args.out is None:
        raise EvaluationError(
            f"--study was given {', '.join(given)} too." if given else "--study was given no folder.",
            why="the file says all of it." if given else "a study's tables are kept, and it goes on where it was.",
            fix="write it into the file" if given else "--out FOLDER",
        )
    for (model, text), table in study(args.study, args.out).items():
        print(f"{model}, {text}" if not args.json else "", end="\n" if not args.json else "")
        _show(table, args.json)
    return 0


def _show(table: Table, as_json: bool) -> None:
    print(table.to_json() if as_json else table, end="" if as_json else "\n", flush=True)


def _named(text: str) -> tuple[str, str]:
    """A stack's name and its text: NAME=TEXT where what stands before the first = is no call's beginning.

    >>> _named("8 bits=quantize(bits=8)"), _named("quantize(bits=8)")
    (('8 bits', 'quantize(bits=8)'), ('quantize(bits=8)', 'quantize(bits=8)'))
    """
    name, equals, rest = text.partition("=")
    return (name.strip(), rest) if equals and "(" not in name else (text, text)
