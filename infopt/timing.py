"""Taking times: runs in turn, medians after a warm-up, compilations left out."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from infopt.generation import BUCKETS, compiled
from infopt.model import Model, build
from infopt.sampling import Sampling
from infopt.typing import Params


def interleaved(runs: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """The median seconds of each run, of those that `turns` takes."""
    return {name: statistics.median(seconds) for name, seconds in turns(runs, repeats).items()}


def turns(runs: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run, taken in turn, `repeats` times, after one turn that is not counted.

    >>> clock = iter(range(100))
    >>> turns({"a": lambda: float(next(clock)), "b": lambda: 0.0}, 2)
    {'a': [1.0, 2.0], 'b': [0.0, 0.0]}
    """
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            seconds = run()
            if turn:
                taken[name].append(seconds)
    return taken


def timed(run: Callable[[], Any]) -> float:
    """Seconds until what `run` returns is computed."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def prefilled(model: Model, params: Params, tokens: np.ndarray, length: int) -> Any:
    """A state that holds all tokens but the last, as `generate` reads them."""
    state = build(model.spec).init_state(1, length, chunk=max(BUCKETS))
    read, _ = compiled(model.spec)
    for start in range(0, len(tokens) - 1, max(BUCKETS)):
        piece = tokens[start : start + max(BUCKETS)]
        count = min(len(piece), len(tokens) - 1 - start)
        padded = np.zeros((1, max(BUCKETS)), np.int32)
        padded[0, : len(piece)] = piece
        state = read(params, jnp.asarray(padded), state, jnp.asarray([count], jnp.int32))
    return state


def decoding(model: Model, params: Params, tokens: np.ndarray, length: int, new: int) -> Callable[[], float]:
    """A run that decodes `new` greedy tokens after `tokens`, and takes only that time."""
    _, rounds = compiled(model.spec)

    def run() -> float:
        state, last = prefilled(model, params, tokens, length), jnp.asarray(tokens[-1:], jnp.int32)
        jax.block_until_ready(state.lengths)
        budget, seconds = jnp.asarray([new], jnp.int32), 0.0
        while int(budget[0]):
            compiling = rounds.seconds
            start = time.perf_counter()
            last, state, budget, *_ = jax.block_until_ready(
                rounds(params, last, state, Sampling.of(1), budget, jnp.asarray([-2], jnp.int32), jnp.int32(32))
            )
            seconds += time.perf_counter() - start - (rounds.seconds - compiling)
        return seconds

    return run
