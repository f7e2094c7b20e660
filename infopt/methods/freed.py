"""Memory that nothing holds any more, given back to the system."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import jax


def give_back(made: Any) -> None:
    """Wait until `made` is computed, then give the system what freed arrays took, on a CPU.

    glibc would keep it, for each of its arenas: hundreds of MB after some training steps. On other devices, and where
    the C library has no malloc_trim, this does nothing.
    """
    if jax.default_backend() == "cpu" and (trim := _trim()):
        jax.block_until_ready(made)
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):  # TypeError: CDLL takes no None on Windows
        return None
