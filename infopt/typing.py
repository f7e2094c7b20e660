"""Array types of the public signatures, checked in the tests by jaxtyping and beartype.

Axis letters, everywhere: B rows of a batch, T tokens, S cache slots, H query heads, K key/value heads,
D a head's or the model's width, V words, L or R stacked layers, E tokens emitted in one round.
"""

from typing import Any

import jax
import jax.core
from jaxtyping import Bool, Float, Int

Array = jax.Array
Params = dict[str, Any]
"""A pytree of arrays and QTensors: `{"embed", "final_norm", ["head"], "segments"}`; see `infopt.model`."""


def is_traced(x: Any) -> bool:
    """Whether `x` is inside a transformation (jit, grad, vmap), where its values are not known."""
    return isinstance(x, jax.core.Tracer)


__all__ = ["Array", "Bool", "Float", "Int", "Params", "is_traced"]
