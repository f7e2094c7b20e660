"""What every platform runs where nothing is asked for: all scores at once where they are few, else by block."""

from __future__ import annotations

from typing import Any

from infopt.kernels.flash_attention import blockwise, reference
from infopt.kernels.flash_attention.options import Options, Places
from infopt.typing import Array

PLAIN = 512 * 512
"""Up to so many scores a head the plain form is as fast as blocks, and its memory is no matter."""


def is_plain(queries: int, keys: int) -> bool:
    """Whether so many queries and keys of a row are computed at once."""
    return queries * keys <= PLAIN


def forward(q: Array, sink_q: Any, k: Array, v: Array, places: Places, o: Options) -> tuple[Array, Array]:
    """The output `[B, T, H, D]` and the log-sum-exp of scores `[B, T, H]`."""
    form = reference if is_plain(q.shape[1], k.shape[1]) else blockwise
    return form.forward(q, sink_q, k, v, places, o)
