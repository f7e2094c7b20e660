"""SmoothQuant: outliers of what goes in are divided out of it, and multiplied into the weights."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, final

import jax.numpy as jnp

from infopt.errors import InfoptError
from infopt.methods.base import check_reading, text_of
from infopt.methods.folds import Place, Scaled
from infopt.typing import Array


@final
@dataclasses.dataclass(frozen=True, repr=False)
class SmoothQuant(Scaled):
    strength: float = 0.5

    def factors(self, place: Place) -> Array:
        size = place.size(lambda inputs: inputs.peak)
        greatest = [jnp.max(jnp.abs(w), -2) for w in place.readers.values()]
        if not place.of_experts:
            greatest = [jnp.max(each.reshape(-1, each.shape[-1]), 0) for each in greatest]
        widest = place.even(functools.reduce(jnp.maximum, greatest).astype(jnp.float32))
        s = size**self.strength / jnp.where(widest > 0, widest, 1) ** (1 - self.strength)
        return jnp.where(widest > 0, jnp.maximum(s, 1e-5), 1)


def smoothquant(text: Any = None, tokens: int | None = None, length: int = 512, strength: float = 0.5) -> SmoothQuant:
    """Even out what goes in against the weights, so that both are rounded well: for `quantize(activations=8)`.

    Where a norm, or a matrix without a function in between, feeds matrices W by x, columns j of W are multiplied, and x
    is divided before, by

        s_j = max|x_j|^a / max|W_j|^(1-a)

    which without rounding changes nothing. Then W is rounded to nearest. A matrix that nothing of the kind feeds is
    rounded as it is.

    Source: Xiao et al. 2022, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
    Models", equation 4; values and the gated half of a feed-forward layer are places too.

    Args:
      text, tokens, length: what is read, as for `gptq`.
      strength: a, how much of the trouble goes to the weights: 0 to 1.

    Raises:
      InfoptError: numbers that are none; or, when params are converted, a family whose stream is not known.

    >>> import infopt as ip
    >>> ip.quantize(bits=8, method=ip.smoothquant(strength=0.6))
    quantize(bits=8, method=smoothquant(strength=0.6))
    """
    check_reading("smoothquant", tokens=tokens, length=length)
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 <= strength <= 1:
        raise InfoptError(f"smoothquant(strength={strength!r}).", why="it is an exponent.", fix="strength from 0 to 1")
    return SmoothQuant(text_of(text, "smoothquant"), tokens, length, float(strength))
