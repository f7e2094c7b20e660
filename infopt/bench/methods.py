"""`infopt bench methods`: what rounding by each method takes, beside one forward pass over the tokens that it reads."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import mmap
import os
import platform
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax

import infopt
from infopt.errors import InfoptError, human
from infopt.io import load
from infopt.methods import METHODS, Method
from infopt.model import Model
from infopt.timing import timed
from infopt.transforms import parse_stack
from infopt.transforms.quantize import Quantize
from infopt.typing import Params

STACKS = tuple(f"quantize(bits=4, group=32, method={name}())" for name in METHODS if name != "nearest")


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a stack's conversion took.

    Args:
      stack: its text.
      tokens: that were read.
      steps: updates that were made, or None where nothing is learned.
      seconds: of the conversion, its compilations included.
      forward: of one float32 forward pass over the tokens, logits included: the median.
      result: bytes of the params that came out.
      more: bytes that the process took at most beyond those before it, results included; None where nobody tells.
    """

    stack: str
    tokens: int
    steps: int | None
    seconds: float
    forward: float
    result: int
    more: int | None

    @property
    def ratio(self) -> float:
        return self.seconds / self.forward


def methods(
    model: Model, params: Params, stacks: Sequence[str] = STACKS, repeats: int = 3, progress: bool = True
) -> list[Cost]:
    """Convert by each stack once, with nothing kept from before, and time the base's forward pass around it.

    Args:
      model, params: the base.
      stacks: texts, each with one `quantize` that has a method.
      repeats: forward passes that a median is over.
      progress: whether each cost is said as it is known.

    Raises:
      InfoptError: a stack without a method.
    """
    found, forward = list[Cost](), jax.jit(lambda params, tokens: model.apply(params, tokens)[0])
    for text in stacks:
        stack = parse_stack(text)(model)
        how = _method(text, stack)
        rows = how.windows(stack.parent or model)
        timed(lambda rows=rows: forward(params, rows[0][None]))
        taken = [_pass(forward, params, rows) for _ in range(repeats)]
        jax.clear_caches()  # of what earlier stacks compiled
        with _nothing_kept(), _most() as most:
            start = time.perf_counter()
            made = jax.block_until_ready(stack.convert(params, model))
            seconds = time.perf_counter() - start
        result = sum(leaf.nbytes for leaf in jax.tree.leaves(made))
        del made
        steps = getattr(how, "steps", None)
        cost = Cost(text, rows.size, steps, seconds, statistics.median(taken), result, most())
        found.append(cost)
        if progress:
            print(_line(cost), flush=True)
    return found


def _method(text: str, stack: Model) -> Method:
    found = [t.method for t, _ in stack.transforms() if isinstance(t, Quantize) and t.method is not None]
    if len(found) != 1:
        raise InfoptError(
            f"{text!r} has {len(found) or 'no'} methods.", why="one is timed at a time.", fix=f"{STACKS[0]!r}, say"
        )
    return found[0]


def _pass(forward: Any, params: Params, rows: Any) -> float:
    return sum(timed(lambda row=row: forward(params, row[None])) for row in rows)


@contextlib.contextmanager
def _nothing_kept() -> Iterator[None]:
    before = os.environ.get("INFOPT_METHOD_CACHE")
    os.environ["INFOPT_METHOD_CACHE"] = "0"
    try:
        yield
    finally:
        del os.environ["INFOPT_METHOD_CACHE"]
        if before is not None:
            os.environ["INFOPT_METHOD_CACHE"] = before


def _resident() -> int | None:
    """Bytes of memory that the process has now; where nobody tells, None."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * mmap.PAGESIZE
    except OSError:
        return None


@contextlib.contextmanager
def _most() -> Iterator[Any]:
    """Gives what tells, afterwards, by how much the process grew at most within the block."""
    before, most, over = _resident(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            most[0] = max(most[0], (_resident() or 0) - (before or 0))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lambda: None if before is None else most[0]
    finally:
        over.set()
        watcher.join()


def _line(cost: Cost) -> str:
    steps = "-" if cost.steps is None else str(cost.steps)
    more = "-" if cost.more is None else human(cost.more)
    return (
        f"{cost.tokens:>7,} {steps:>6} {cost.seconds:>8.1f} {cost.forward:>8.1f} {cost.ratio:>6.1f} {more:>9} "
        f"{human(cost.result):>9}  {cost.stack}"
    )


def main(args: argparse.Namespace) -> int:
    """`infopt bench methods`."""
    model, params = load(args.model)
    stacks = args.stack or STACKS
    device = f"{jax.devices()[0].device_kind} ({platform.machine()}, {os.cpu_count()} cores)"
    if not args.json:
        print(f"{args.model} on {device}, jax {jax.__version__}; a conversion with its compilations, once; a float32")
        print(
            f"forward pass over the same tokens, the median of {args.repeats}; memory beyond that before, results too\n"
        )
        print(f"{'tokens':>7} {'steps':>6} {'s':>8} {'pass, s':>8} {'ratio':>6} {'memory':>9} {'result':>9}  stack")
    found = methods(model, params, stacks, args.repeats, progress=not args.json)
    if args.json:
        versions = {"infopt": infopt.__version__, "jax": jax.__version__}
        costs = [dataclasses.asdict(cost) | {"ratio": cost.ratio} for cost in found]
        print(json.dumps({"model": args.model, "device": device, "versions": versions, "costs": costs}))
    return 0
