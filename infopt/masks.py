"""Who sees whom: a pure function of positions, the one place where causality, windows and sinks are decided."""

from __future__ import annotations

import jax.numpy as jnp

from infopt.spec import Window
from infopt.typing import Array, Bool, Int


def allowed(query: Int[Array, "B T"], key: Int[Array, "B S"], window: Window | None) -> Bool[Array, "B T S"]:
    """Whether each query position sees each key position.

        key >= 0  and  key <= query  and  (key > query - size  or  key < sinks)

    Args:
      query, key: absolute positions; a key position of -1 is an empty slot, seen by nobody.
      window: the layer's window, or None.
    """
    q, k = query[:, :, None], key[:, None, :]
    seen = (k >= 0) & (k <= q)
    if window is not None:
        seen &= (k > q - window.size) | (k < window.sinks)
    return seen


def sink_query_position(query: Int[Array, "B T"], window: Window) -> Int[Array, "B T"]:
    """Where a query stands when it looks at a sink: never further from it than the window is long.

    Distances then stay inside what the model was trained on, however long the text grows
    (Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks", section 3.2).
    """
    return jnp.minimum(query, window.size - 1)
