"""Ctrl-C, heard by a handler of one's own for a while."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def heard_by(handler: Callable[[int, Any], Any]) -> Iterator[None]:
    """`handler(number, frame)` hears Ctrl-C within the block. Outside the main thread, where none may be set, nothing.

    >>> heard = []
    >>> with heard_by(lambda number, frame: heard.append(number)):
    ...     signal.raise_signal(signal.SIGINT)
    >>> len(heard)
    1
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
