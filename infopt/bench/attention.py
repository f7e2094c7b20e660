"""`infopt bench attention`: every implementation that this machine runs, beside what its processor can do."""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import infopt
from infopt import models
from infopt.errors import human
from infopt.kernels import decode_attention as decode
from infopt.kernels import flash_attention as flash
from infopt.kernels.decode_attention.shapes import TIMED as DECODES
from infopt.kernels.decode_attention.shapes import Shape as DecodeShape
from infopt.kernels.flash_attention.shapes import TIMED as FLASHES
from infopt.kernels.flash_attention.shapes import Shape as FlashShape
from infopt.sampling import Sampling
from infopt.timing import timed, turns
from infopt.transforms import cache_kv

LENGTHS = (1024, 4096, 16384)
"""Tokens at which memory is asked for."""
SLOTS, AT = (256, 8192), 200
"""Caches whose steps are compared, and the tokens that they hold."""


def limits(repeats: int = 5) -> dict[str, float]:
    """What this machine does at most, measured now: `flops` a second in a float32 product, `bytes` a second read."""
    x = jax.random.normal(jax.random.key(0), (2048, 2048), jnp.float32)
    big = jnp.zeros(64 * 2**20, jnp.float32)
    product = jax.jit(functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST))  # as in attention
    total = jax.jit(jnp.sum)
    taken = turns({"flops": lambda: timed(lambda: product(x, x)), "bytes": lambda: timed(lambda: total(big))}, repeats)
    return {"flops": 2 * 2048**3 / min(taken["flops"]), "bytes": big.nbytes / min(taken["bytes"])}


Call = Callable[[], Any]


def _call(attend: Callable[..., Any], name: str, arrays: Sequence[Any], options: Mapping[str, Any]) -> Call:
    """A compiled call of an implementation, to which every array is an argument and not a constant to fold."""
    traced = {key: value for key, value in options.items() if any(map(_is_array, jax.tree.leaves(value)))}
    static = {key: value for key, value in options.items() if key not in traced}
    run = jax.jit(functools.partial(attend, **static, implementation=name))
    return functools.partial(run, *arrays, **traced)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array)


def _calls(
    flashes: Sequence[FlashShape], decodes: Sequence[DecodeShape]
) -> Iterator[tuple[str, FlashShape | DecodeShape, str, Call]]:
    """Kind, shape, implementation and a call, for each that this machine runs."""
    for shape in flashes:
        for name in flash.available():
            yield "flash", shape, name, _call(flash.flash_attention, name, shape.arrays(), shape.options())
    for shape in decodes:
        arrays, options = shape.arguments()
        for name in decode.available():
            yield "decode", shape, name, _call(decode.decode_attention, name, arrays, options)


def rows(
    flashes: Sequence[FlashShape] = FLASHES,
    decodes: Sequence[DecodeShape] = DECODES,
    repeats: int = 5,
) -> list[dict[str, Any]]:
    """Median seconds of each shape with each implementation, in turn; FLOPs that count and bytes that must move."""
    calls = list(_calls(flashes, decodes))
    runs = {f"{kind}/{shape.name}/{name}": functools.partial(timed, call) for kind, shape, name, call in calls}
    return [
        {
            "kind": kind,
            "shape": shape.name,
            "implementation": name,
            "seconds": float(np.median(seconds)),
            "fastest": min(seconds),
            "slowest": max(seconds),
            "flops": shape.flops,
            "bytes": shape.moved,
            "flops_per_second": shape.flops / float(np.median(seconds)),
            "bytes_per_second": shape.moved / float(np.median(seconds)),
        }
        for (kind, shape, name, _), seconds in zip(calls, turns(runs, repeats).values())
    ]


def memory() -> list[dict[str, Any]]:
    """Temporary bytes that XLA plans for SmolLM2's attention at `LENGTHS`, by implementation, and under a window."""
    found = []
    for length in LENGTHS:
        shape = FlashShape("", queries=length, heads=9, kv_heads=3, width=64)
        q, k, v = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in jax.eval_shape(shape.arrays))
        for name in flash.available():
            for window in (None, 512):
                run = jax.jit(
                    lambda q, k, v, n=name, w=window: flash.flash_attention(q, k, v, window=w, implementation=n)
                )
                plan: Any = run.lower(q, k, v).compile().memory_analysis()
                found.append(
                    {"length": length, "implementation": name, "window": window, "bytes": plan.temp_size_in_bytes}
                )
    return found


def steps(repeats: int = 5) -> dict[str, float]:
    """Median seconds of a decoding step of SmolLM2's shape that holds `AT` tokens, by the slots of its cache."""
    model = cache_kv()(models.llama(layers=30, dim=576, heads=9, kv_heads=3, mlp=1536, vocab=49152, context=8192))
    params = jax.jit(model.init)(jax.random.key(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 49152, (1, AT)), jnp.int32)
    step, read = jax.jit(model.decode, donate_argnums=2), jax.jit(model.hidden, donate_argnums=2)
    states = {slots: read(params, tokens, model.init_state(1, slots, chunk=AT))[1] for slots in SLOTS}

    def run(slots: int) -> float:
        last, sampling = jnp.ones(1, jnp.int32), Sampling.of(1)

        def once() -> Any:
            emitted, states[slots] = step(params, last, states[slots], sampling)
            return emitted.tokens, states[slots].lengths

        seconds = timed(once)
        states[slots] = states[slots].replace(lengths=jnp.full(1, AT, jnp.int32))
        return seconds

    taken = turns({str(slots): lambda slots=slots: run(slots) for slots in SLOTS}, max(repeats, 5))
    return {slots: float(np.median(seconds)) for slots, seconds in taken.items()}


def attention(repeats: int = 5) -> dict[str, Any]:
    """What `infopt bench attention` measures.

    Args:
      repeats: runs that a median is over.
    """
    return {
        "device": f"{jax.devices()[0].device_kind} ({platform.machine()}, {os.cpu_count()} cores)",
        "versions": {"infopt": infopt.__version__, "jax": jax.__version__},
        "repeats": repeats,
        "implementations": {"flash": flash.available(), "decode": list(decode.available())},
        "limits": limits(repeats),
        "rows": rows(repeats=repeats),
        "memory": memory(),
        "steps": steps(repeats),
    }


def main(args: argparse.Namespace) -> int:
    """`infopt bench attention`."""
    found = attention(args.repeats)
    if args.json:
        print(json.dumps(found))
        return 0
    top = found["limits"]
    print(f"{found['device']}, jax {found['versions']['jax']}; medians of {found['repeats']} interleaved runs")
    print(
        f"at most, measured now: {top['flops'] / 1e9:.0f} GFLOP/s in a float32 product, {human(top['bytes'])}/s read\n"
    )
    rates = f"{'GFLOP/s':>8} {'of most':>8} {'bytes/s':>9} {'of most':>8}"
    print(f"{'attention':<38}{'implementation':<15}{'ms':>7} {rates}  of first")
    first = {row["shape"]: row["seconds"] for row in reversed(found["rows"])}
    for row in found["rows"]:
        flops, read = row["flops_per_second"], row["bytes_per_second"]
        print(
            f"{row['kind'] + ' ' + row['shape']:<38}{row['implementation']:<15}{1e3 * row['seconds']:>7.1f} "
            f"{flops / 1e9:>8.1f} {flops / top['flops']:>8.0%} {human(read):>9} {read / top['bytes']:>8.0%}  "
            f"{row['seconds'] / first[row['shape']]:.2f}x its time"
        )
    print("\ntemporary memory of SmolLM2's attention (XLA's own plan)")
    for row in found["memory"]:
        window = f", window {row['window']}" if row["window"] else ""
        print(f"  {row['length']:>6} tokens  {row['implementation'] + window:<28}{human(row['bytes']):>10}")
    one, other = (found["steps"][str(slots)] for slots in SLOTS)
    print(f"\na step of SmolLM2's shape at {AT} tokens: {1e3 * one:.1f} ms in a cache of {SLOTS[0]} slots,")
    print(f"{1e3 * other:.1f} ms in one of {SLOTS[1]} ({other / one:.2f}x)")
    return 0
