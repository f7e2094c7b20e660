"""Memory that methods leave behind goes back to the system, where the C library keeps it otherwise."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from infopt.bench.methods import _resident
from infopt.methods import freed

BLOCK, COUNT = 100_000, 400  # less than what glibc maps one by one: 40 MB of its heap


@pytest.mark.skipif(freed._trim() is None, reason="the C library has no malloc_trim")
def test_what_was_freed_goes_back() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    freed.give_back(())
    blocks = [libc.malloc(BLOCK) for _ in range(COUNT)]
    for block in blocks:
        ctypes.memset(block, 1, BLOCK)
    for block in blocks[:-1]:  # the last holds the heap's end where it is
        libc.free(block)
    before = _resident()
    freed.give_back(())
    after = _resident()
    libc.free(blocks[-1])
    assert before is not None and after is not None
    assert before - after > BLOCK * COUNT / 2


@pytest.mark.parametrize("error", [OSError, TypeError, AttributeError])
def test_where_no_library_can_it_does_nothing(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def library(_: Any) -> Any:
        raise error

    monkeypatch.setattr(ctypes, "CDLL", library)
    freed._trim.cache_clear()
    try:
        assert freed._trim() is None
        freed.give_back(())
    finally:
        freed._trim.cache_clear()
