"""What devices can hold and how fast they could go: one table of published figures, and this CPU, measured."""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from infopt.errors import InfoptError, nearest


@dataclasses.dataclass(frozen=True)
class Device:
    """One accelerator, or this CPU.

    Args:
      name: as `--device` takes it.
      title: as its maker calls it.
      memory: bytes, at 10**9 a GB (the smaller of the two readings).
      bandwidth: bytes a second between memory and processor, at most.
      flops: floating-point operations a second, at most: dense bfloat16 products where the device has them.
      source: whose figures these are.
    """

    name: str
    title: str
    memory: int
    bandwidth: float
    flops: float
    source: str


def _row(name: str, title: str, gigabytes: float, gb_s: float, tflops: float, source: str) -> Device:
    return Device(name, title, int(gigabytes * 1e9), gb_s * 1e9, tflops * 1e12, source)


_H100 = "NVIDIA's figures, as in glennklockwood.com/garden/processors/h100"
_A100 = "NVIDIA's figures, as in glennklockwood.com/garden/processors/A100"
_ADA = "NVIDIA's figures, float32 sums, as in gist.github.com/mikasenghaas/d63ded03f1f0417b1677627119bacc0d"
_TPU = "https://docs.cloud.google.com/tpu/docs/"
# Apple gives memory and bandwidth, and no operations a second: those are GPU cores x 128 lanes x 2 x clock, in float32.
_M1 = "Apple's announcement, as reported; operations from cores at 1.278 GHz (hmc-tech.com)"
_M2 = "Apple's announcement, as reported; operations from cores at 1.398 GHz (hmc-tech.com)"

# name, title, GB, GB/s, TFLOP/s, source. Apple's chips with the most memory that each comes with: NAME:GB for less.
_TABLE = (
    _row("h100", "NVIDIA H100 SXM 80 GB", 80, 3350, 989.4, _H100),
    _row("a100", "NVIDIA A100 SXM 80 GB", 80, 2039, 312, _A100),
    _row("a100-40", "NVIDIA A100 SXM 40 GB", 40, 1555, 312, _A100),
    _row("rtx4090", "NVIDIA GeForce RTX 4090", 24, 1008, 165, _ADA),
    _row("m1", "Apple M1, 8 GPU cores", 16, 68, 2.6, _M1),
    _row("m1-pro", "Apple M1 Pro, 16 GPU cores", 32, 200, 5.2, _M1),
    _row("m1-max", "Apple M1 Max, 32 GPU cores", 64, 400, 10.4, _M1),
    _row("m1-ultra", "Apple M1 Ultra, 64 GPU cores", 128, 800, 20.9, _M1),
    _row("m2", "Apple M2, 10 GPU cores", 24, 100, 3.6, _M2),
    _row("m2-pro", "Apple M2 Pro, 19 GPU cores", 32, 200, 6.8, _M2),
    _row("m2-max", "Apple M2 Max, 38 GPU cores", 96, 400, 13.6, _M2),
    _row("m2-ultra", "Apple M2 Ultra, 76 GPU cores", 192, 800, 27.2, _M2),
    _row("m3", "Apple M3, 10 GPU cores", 24, 100, 3.6, _M2),
    _row("m3-pro", "Apple M3 Pro, 18 GPU cores", 36, 150, 6.4, _M2),
    _row("m3-max", "Apple M3 Max, 40 GPU cores", 128, 400, 14.3, _M2),
    _row("m3-ultra", "Apple M3 Ultra, 80 GPU cores", 512, 819, 28.6, _M2),
    _row("tpu-v5e", "Google TPU v5e, one chip", 16, 800, 197, _TPU + "v6e"),
    _row("tpu-v5p", "Google TPU v5p, one chip", 95, 2765, 459, _TPU + "v5p-training"),
    _row("tpu-v6e", "Google TPU v6e, one chip", 32, 1600, 918, _TPU + "v6e"),
)
DEVICES: dict[str, Device] = {device.name: device for device in _TABLE}
"""Published figures, by name. `device("cpu")` is measured instead."""

_READ = 128 << 20  # bytes that the measurement reads: beyond most caches, and a few hundredths of a second


def device(name: str) -> Device:
    """A device by name, `"cpu"` for this one; `"m3-max:36"` is an M3 Max with 36 GB.

    Raises:
      InfoptError: no such name, or no such amount of memory.

    >>> device("rtx4090").memory
    24000000000
    >>> device("m3-max:36").memory
    36000000000
    """
    base, colon, gigabytes = name.strip().lower().partition(":")
    if base != "cpu" and base not in DEVICES:
        raise InfoptError(
            f"no device is called {base!r}.",
            why="its memory and speed come from a table.",
            fix=nearest(base, ["cpu", *DEVICES]),
        )
    found = _cpu() if base == "cpu" else DEVICES[base]
    if not colon:
        return found
    try:
        memory = int(float(gigabytes) * 1e9)
    except (ValueError, OverflowError):
        memory = 0
    if memory < 1:
        raise InfoptError(
            f"{name!r} does not say how much memory the device has.",
            why="what follows the colon is read as GB.",
            fix=f"{base}:{found.memory / 1e9:g}, say",
        )
    return dataclasses.replace(found, name=f"{base}:{gigabytes}", memory=memory)


@functools.cache
def _cpu() -> Device:
    """This machine, measured once a process: whatever else runs takes its share."""
    data, workers = np.ones(_READ // 8), os.cpu_count() or 1
    parts = np.array_split(data, workers)
    with ThreadPoolExecutor(workers) as pool:
        seconds = min(_seconds(lambda: list(pool.map(np.max, parts))) for _ in range(5))
    square = np.ones((1024, 1024), np.float32)
    product = min(_seconds(lambda: square @ square) for _ in range(8))
    return Device(
        "cpu",
        f"this CPU, {workers} cores",
        _memory(),
        data.nbytes / seconds,
        2 * 1024**3 / product,
        f"measured now, beside all else that runs: a read of {_READ >> 20} MB by all cores, a float32 product",
    )


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _memory() -> int:
    """Bytes of this machine, or of the container that it runs in."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(limit).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return total
