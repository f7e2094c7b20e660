"""Programs compiled for TPUs where there is none: kernels and whole steps, for v5e, v5p and v6e, with what they take.

libtpu holds XLA's and Mosaic's compilers for every generation, and compiles against a topology that it is told of. That
shows that a program compiles and how much memory it takes; nothing runs, so no time is measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.experimental.layout import Format as ArrayFormat
from jax.experimental.layout import Layout as ArrayLayout
from jax.sharding import SingleDeviceSharding

from infopt import cache as kv
from infopt.cache import Layout
from infopt.devices import DEVICES
from infopt.errors import InfoptError
from infopt.formats import Format
from infopt.kernels.decode_attention import decode_attention
from infopt.kernels.flash_attention import flash_attention as attention
from infopt.kernels.flash_attention import pallas_tpu
from infopt.kernels.flash_attention.options import Options, Places
from infopt.kernels.int_matmul import int_matmul
from infopt.model import Model
from infopt.models import llama
from infopt.planner import SIZES, abstract_params, abstract_state
from infopt.qtensor import quantize_array
from infopt.sampling import Sampling
from infopt.spec import Window
from infopt.transforms import cache_kv, flash_attention, paged, quantize

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
"""The smallest topology of each generation; a program is compiled for one of its chips."""
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # there is no cloud to ask
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
}
"""What libtpu is told before it is loaded."""
KERNEL = "tpu_custom_call"
"""How a Mosaic kernel stands in a compiled program."""
CODECS = {None: None, 8: Format("int8", 32, "float16"), 4: Format("int4_min", 32, "float16")}


def missing() -> str:
    """Why nothing can be compiled for a TPU here, or ""."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "libtpu is built for Linux on x86-64."
    if importlib.util.find_spec("libtpu") is None:
        return "libtpu is not installed."
    return ""


@functools.cache
def chip(generation: str) -> Any:
    """One device of a generation, which is not here: to be compiled for.

    Raises:
      InfoptError: there is no such generation in the table, or no libtpu.
    """
    if generation not in TOPOLOGIES:
        raise InfoptError(
            f"no TPU called {generation!r} is known.",
            why="libtpu is told which.",
            fix="one of " + ", ".join(TOPOLOGIES),
        )
    if why := missing():
        raise InfoptError("cannot compile for TPUs.", why=why, fix="pip install 'jax[tpu]', on Linux on x86-64")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation]).devices[0]


def compiled(fn: Callable[..., Any], args: Any, generation: str, donate: Any = (), choose: bool = False) -> Any:
    """`fn`, compiled ahead of time for one chip.

    Args:
      fn: a function of arrays.
      args: its arguments; their shapes and dtypes are what counts.
      generation: a key of `TOPOLOGIES`.
      donate: which arguments the results may overwrite.
      choose: let XLA choose how arguments and results lie in memory, not what it would be given by default.

    Returns:
      The executable (`jax.stages.Compiled`), which cannot be called.
    """
    sharding = SingleDeviceSharding(chip(generation))
    if choose:
        own = ArrayFormat(ArrayLayout.AUTO, sharding)
        args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
        return jax.jit(fn, donate_argnums=donate, in_shardings=own, out_shardings=own).lower(*args).compile()
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    return jax.jit(fn, donate_argnums=donate).lower(*args).compile()


def facts(program: Any) -> dict[str, int]:
    """What the compiler says of a program: bytes that it takes, operations and bytes that it moves.

    XLA counts the body of a loop once, and of a kernel what its author estimates: neither operations nor bytes are a
    measurement where there is one.
    """
    memory, cost = program.memory_analysis(), program.cost_analysis()
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "cost_flops": int(cost["flops"]),
        "cost_bytes_accessed": int(cost["bytes accessed"]),
        "kernels": program.as_text().count(f'custom_call_target="{KERNEL}"'),
    }


def taken(found: Mapping[str, int]) -> int:
    """Bytes of a chip's memory that a program needs while it runs."""
    return found["argument_bytes"] + found["output_bytes"] - found["alias_bytes"] + found["temp_bytes"]


@dataclasses.dataclass(frozen=True)
class Case:
    """A program to compile.

    Args:
      name: what it is.
      make: returns the function and its abstract arguments.
      donate: which arguments the results may overwrite.
      generations: for which it is compiled: an 8B model in bfloat16 does not fit a v5e.
      choose: compile it also with layouts of XLA's own choice, and say what is temporary then.
    """

    name: str
    make: Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]
    donate: Any = ()
    generations: tuple[str, ...] = tuple(TOPOLOGIES)
    choose: bool = False


def _shape(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def flash_case(
    name: str, length: int, heads: int = 32, kv_heads: int = 8, width: int = 128, implementation: str = "pallas_tpu",
    **options: Any,
) -> Case:  # fmt: skip
    """Attention of one text of `length` tokens over itself."""

    def make() -> tuple[Callable[..., Any], tuple[Any, ...]]:
        q = _shape(1, length, heads, width, dtype=jnp.bfloat16)
        k = _shape(1, length, kv_heads, width, dtype=jnp.bfloat16)
        return lambda q, k, v: attention(q, k, v, implementation=implementation, **options), (q, k, k)

    return Case(name, make)


def decode_case(
    name: str, tokens: int, slots: int, heads: int = 32, kv_heads: int = 8, width: int = 128, batch: int = 1,
    bits: int | None = None, window: Window | None = None, page: int | None = None, layers: int = 4,
) -> Case:  # fmt: skip
    """Attention of `tokens` new tokens over a cache of `layers` layers, a ring where there is a window."""
    layout = Layout.plan(window, slots, 128, page)

    def make() -> tuple[Callable[..., Any], tuple[Any, ...]]:
        keys = jax.eval_shape(lambda: kv.empty(layout, layers, batch, kv_heads, width, CODECS[bits], jnp.bfloat16))
        table = None if page is None else _shape(batch, layout.pages)

        def run(q: Any, keys: Any, values: Any, layer: Any, positions: Any, lengths: Any, table: Any) -> Any:
            return decode_attention(
                q, keys, values, layer, layout=layout, heads=kv_heads, positions=positions, lengths=lengths,
                table=table, implementation="pallas_tpu",
            )  # fmt: skip

        q = _shape(batch, tokens, heads, width, dtype=jnp.bfloat16)
        return run, (q, keys, keys, _shape(), _shape(batch, tokens), _shape(batch), table)

    return Case(name, make)


def product_case(name: str, rows: int, inputs: int, outputs: int, form: Format, **how: str) -> Case:
    """Rows rounded to 8 bits, times one matrix of a stack of four."""

    def make() -> tuple[Callable[..., Any], tuple[Any, ...]]:
        packed = jax.eval_shape(
            lambda w: quantize_array(w, form, trailing=2), _shape(4, outputs, inputs, dtype=jnp.float32)
        )
        x = _shape(rows, inputs, dtype=jnp.bfloat16)
        return lambda *args: int_matmul(*args, **how), (x, packed, _shape())

    return Case(name, make)


def step_case(name: str, model: Model, context: int, tokens: int | None = None, batch: int = 1, **options: Any) -> Case:
    """A whole step of a stack in bfloat16: `tokens` of a prompt, or where that is None, one round of decoding."""

    def make() -> tuple[Callable[..., Any], tuple[Any, ...]]:
        params = abstract_params(model.spec, jnp.bfloat16)
        state = abstract_state(model.spec, batch, context, 128, jnp.bfloat16)
        if tokens is None:
            sampling = jax.eval_shape(lambda: Sampling.of(batch))
            return model.decode, (params, _shape(batch), state, sampling)
        return model.hidden, (params, _shape(batch, tokens), state)

    return Case(name, make, donate=2, **options)


def smollm2() -> Model:
    """A bare Llama of SmolLM2-135M's shape."""
    return llama(
        layers=30, dim=576, heads=9, kv_heads=3, head_dim=64, mlp=1536, vocab=49152, context=8192, tied=True,
        rope_theta=100000.0,
    )  # fmt: skip


def llama_8b() -> Model:
    """A bare Llama of Llama 3.1 8B's shape."""
    return next(size for size in SIZES if size.name == "8B").model()


def kernels() -> Iterator[Case]:
    """Every TPU kernel, on heads as Llama 3.1 8B and SmolLM2-135M have them."""
    yield flash_case("flash, 8k", 8192)
    yield flash_case("flash, 32k", 32768)
    yield flash_case("flash, 32k, window 4096, 4 sinks", 32768, window=4096, sinks=4)
    yield flash_case("flash, 8k, heads of 64", 8192, 9, 3, 64)
    yield decode_case("decode, 8k, heads of 64, bfloat16", 1, 8192, 9, 3, 64)
    for bits in CODECS:
        kept = "bfloat16" if bits is None else f"{bits} bits"
        yield decode_case(f"decode, 8k, {kept}", 1, 8192, bits=bits)
        yield decode_case(f"decode, 32k, 4 rows, {kept}", 1, 32768, batch=4, bits=bits)
        yield decode_case(f"decode, ring of 4096, {kept}", 1, 32768, bits=bits, window=Window(4096, 4))
        yield decode_case(f"decode, 8k, pages of 16, {kept}", 1, 8192, bits=bits, page=16)
        yield decode_case(f"chunk of 128, 8k, {kept}", 128, 8192, bits=bits)
    for rows in (1, 256):
        name = f"product of {rows} x 4096 and 4096 x 14336"
        for kept, form in {"8 bits": Format("int8"), "4 bits in groups of 32": Format("int4", 32, "float16")}.items():
            yield product_case(f"{name}, {kept}", rows, 4096, 14336, form, implementation="pallas_tpu")


def steps() -> Iterator[Case]:
    """Whole prefill and decode steps."""
    flash = flash_attention()
    small, large = smollm2(), llama_8b()
    for kept, stack in {
        "bfloat16": flash | cache_kv(),
        "8 bits": quantize(bits=8) | flash | cache_kv(bits=8),
    }.items():
        yield step_case(f"SmolLM2-135M, {kept}, decode at 8k", stack(small), 8192, choose=True)
        yield step_case(f"SmolLM2-135M, {kept}, prefill 128 at 8k", stack(small), 8192, 128)
    yield step_case("SmolLM2-135M, no cache, 8k at once", flash(small), 8192, 8192)
    yield step_case("SmolLM2-135M, pages of 16, decode at 8k", (flash | cache_kv() | paged(16))(small), 8192)
    eight = quantize(bits=8) | flash | cache_kv()
    yield step_case("Llama 8B, 8-bit weights, decode at 8k", eight(large), 8192)
    yield step_case("Llama 8B, 8-bit weights, prefill 128 at 8k", eight(large), 8192, 128)
    four = quantize(bits=4) | flash | cache_kv(bits=8)
    yield step_case("Llama 8B, 4-bit weights, 8-bit cache, decode at 32k", four(large), 32768)
    plain = (flash | cache_kv())(large)
    yield step_case("Llama 8B, bfloat16, decode at 32k", plain, 32768, generations=("v5p", "v6e"))


def row(case: Case, generation: str) -> dict[str, Any]:
    """A case compiled for a generation, as a row of the table."""
    began = time.perf_counter()
    fn, args = case.make()
    found: dict[str, Any] = {"name": case.name, "generation": generation}
    found |= facts(compiled(fn, args, generation, case.donate))
    found["fits"] = taken(found) <= DEVICES[f"tpu-{generation}"].memory
    if case.choose:
        chosen = facts(compiled(fn, args, generation, case.donate, choose=True))
        found["own_layouts"] = {k: chosen[k] for k in ("argument_bytes", "temp_bytes")}
    return found | {"compile_seconds": round(time.perf_counter() - began, 1)}


def versus(length: int, generation: str = "v5p", group: int = 4, width: int = 128, **options: Any) -> dict[str, Any]:
    """The flash kernel beside XLA's unfused attention: one key/value head and its queries, bfloat16, causal.

    The kernel's bytes are counted from its grid (`pallas_tpu.traffic`), and what is laid out anew around it, once in
    and once out; XLA's are those of its cost analysis, of a program that has neither kernels nor loops. One head: for
    more the scores of 32k tokens fit no chip.

    Args:
      length: of the text.
      generation: for which both are compiled.
      group: query heads.
      width: channels of a head.
      options: of `attention`: `window`.
    """
    fused, plain = (
        facts(compiled(*flash_case("", length, group, 1, width, name, **options).make(), generation))
        for name in ("pallas_tpu", "reference")
    )
    q, k = np.zeros((1, length, group, width), jnp.bfloat16), np.zeros((1, length, 1, width), jnp.bfloat16)
    at = jnp.arange(length, dtype=jnp.int32)[None]
    plan, order, count, _ = pallas_tpu.planned(q, k, k, Places(at, at), Options(width**-0.5, **options))
    kernel = pallas_tpu.traffic(plan, np.asarray(order), np.asarray(count))
    around = 2 * (2 * q.nbytes + 2 * k.nbytes)
    return {
        "length": length,
        "generation": generation,
        "query_heads": group,
        "kv_heads": 1,
        "head_dim": width,
        **options,
        "kernel_bytes": kernel,
        "around_bytes": around,
        "unfused_bytes_accessed": plain["cost_bytes_accessed"],
        "unfused_bytes_over_kernel": round(plain["cost_bytes_accessed"] / (kernel + around), 1),
        "kernel_temp_bytes": fused["temp_bytes"],
        "unfused_temp_bytes": plain["temp_bytes"],
        "unfused_temp_over_kernel": round(plain["temp_bytes"] / max(fused["temp_bytes"], 1), 1),
    }


NOTES = (
    "Compiled ahead of time by libtpu, executed nowhere. cost_* are XLA's cost analysis: it counts a loop's body once, "
    "and of a kernel what its author estimates. temp_bytes are of high-bandwidth memory: what XLA keeps in vector "
    "memory counts as 0. own_layouts: with arguments and results as XLA itself would lay them out."
)


def report(say: Callable[[str], None] = print) -> dict[str, Any]:
    """What `infopt bench tpu` writes, each row said as it comes."""
    rows, ratios = {"kernels": [], "steps": []}, []
    for part, cases in (("kernels", kernels), ("steps", steps)):
        say(f"\n{part}\n{'':<56}{'chip':>5}{'arguments':>11}{'temporary':>11}{'fits':>6}{'compiled':>10}")
        for case in cases():
            for generation in case.generations:
                found = row(case, generation)
                rows[part].append(found)
                say(
                    f"{case.name:<56}{generation:>5}{found['argument_bytes'] / 1e6:>8.1f} MB"
                    f"{found['temp_bytes'] / 1e6:>8.1f} MB{'yes' if found['fits'] else 'no':>6}"
                    f"{found['compile_seconds']:>8.1f} s"
                )
    say("\nflash kernel and unfused attention, one key/value head and its 4 query heads of 128, v5p")
    texts: list[tuple[int, dict[str, Any]]] = [(8192, {}), (32768, {}), (32768, {"window": 4096})]
    for length, options in texts:
        found = versus(length, **options)
        ratios.append(found)
        window = f", window {options['window']}" if options else ""
        temp, unfused = (f"{found[k] / 1e6:.1f} MB" for k in ("kernel_temp_bytes", "unfused_temp_bytes"))
        more = found["unfused_bytes_over_kernel"]
        say(f"{length} tokens{window}: unfused moves {more} x the bytes; temporary memory {unfused}, kernel {temp}")
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}
    return {"notes": NOTES, "versions": versions, **rows, "flash_against_unfused": ratios}


def main(args: argparse.Namespace) -> int:
    """`infopt bench tpu`."""
    found = report((lambda line: None) if args.json else functools.partial(print, flush=True))
    if args.out:
        Path(args.out).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if args.json:
        print(json.dumps(found))
    return 0
