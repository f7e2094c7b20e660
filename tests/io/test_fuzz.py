"""Thousands of damaged files: an error of ours, or the right answer. More of them: `python tests/io/fuzz.py`."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("fuzz", Path(__file__).with_name("fuzz.py"))
assert SPEC is not None and SPEC.loader is not None
fuzz = sys.modules["fuzz"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(fuzz)

COUNTS = {"gguf": 600, "tables": 500, "safetensors": 500, "index": 300, "config": 400, "tokenizer": 800}
COUNTS |= {"template": 400, "stuffed": fuzz.STUFFED}
LOADED = {"gguf": 60, "tables": 60, "safetensors": 40, "index": 10, "config": 60, "tokenizer": 30, "template": 100}
"""At least so many are loaded and compared, or the damage is too great to say much."""


@pytest.mark.parametrize("kind", COUNTS)
def test_a_damaged_file_is_refused_or_read_right(kind: str) -> None:
    """And costs at most 64 MB and twice its bytes (on Linux), ten seconds, and no word on stderr."""
    totals = fuzz.run(kind, COUNTS[kind])
    assert not totals.wrong, "\n\n".join([str(totals), *totals.wrong[:5]])
    assert totals.mutations == totals.refused + totals.loaded == COUNTS[kind]
    assert totals.refused > COUNTS[kind] / 5 and totals.loaded >= LOADED.get(kind, 0)


def test_the_memory_limit_is_noticed(tmp_path: Path) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("RLIMIT_DATA, which counts all libraries' memory, is Linux's")
    code = "import fuzz, numpy as np; fuzz._limited(0); np.ones(7 << 20); print('less'); np.ones(9 << 20)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.stdout == "less\n" and "MemoryError" in done.stderr
