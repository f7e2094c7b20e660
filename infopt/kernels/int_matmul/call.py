"""What every implementation of the integer product is given, and how inputs are rounded."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from infopt.typing import Array

LEAST = 2.0**-119
"""A row of nothing greater counts as zeros: 127 over it, and its scale, are still numbers that processors have."""


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["codes", "scale", "weight", "layer"], meta_fields=["dtype"]
)
@dataclasses.dataclass(frozen=True)
class Call:
    """Rounded rows, and the matrix that they are multiplied by. A pytree.

    Args:
      codes: of the rows, int8 `[M, I]`.
      scale: float32 `[M, 1]`.
      weight: a QTensor `[..., O, I]`, whole stacks.
      layer: which matrix of them: an index for each leading axis, int32.
      dtype: of the result. Static.
    """

    codes: Any
    scale: Any
    weight: Any
    layer: tuple[Any, ...]
    dtype: Any


def rounded(x: Array, static: Any = None) -> tuple[Array, Array]:
    """Rows `[M, I]` as int8 codes, and the scale of each, float32 `[M, 1]`.

        most = max|x|;  code = clip(round_half_even(x * (127 / most)), -127, 127);  scale = most * (1 / 127)

    all in float32; with `static`, a number, that takes the place of each row's `most`. A row without anything of at
    least `LEAST` is zeros, with a scale of 0. One that holds NaN or infinity has codes of 0 and a scale of NaN, so that
    what is made of it is NaN.
    """
    x = x.astype(jnp.float32)
    most = jnp.max(jnp.abs(x), -1, keepdims=True)
    finite = jnp.isfinite(most)
    if static is not None:
        most = jnp.broadcast_to(static.astype(jnp.float32), most.shape)
        finite &= jnp.isfinite(most)
    some = most >= LEAST
    inverse = 127 / jnp.where(some & finite, most, 1)
    codes = jnp.clip(jnp.round(x * jnp.broadcast_to(inverse, x.shape)), -127, 127)
    codes = jnp.where(jnp.broadcast_to(some & finite, x.shape), codes, 0).astype(jnp.int8)
    return codes, jnp.where(finite, jnp.where(some, most * np.float32(1 / 127), 0), jnp.nan)
