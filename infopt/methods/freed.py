"""Memory that nothing holds any more, given back to the system."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def give_back() -> None:
    """Return what freed arrays took: glibc keeps it for each of its arenas, hundreds of MB after some training steps.

    50 ms at most for what SmolLM2-135M leaves. Where the C library has no malloc_trim, nothing.
    """
    if trim := _trim():
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):  # TypeError: Windows has no library by that name
        return None
