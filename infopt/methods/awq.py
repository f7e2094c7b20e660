"""AWQ: channels that much goes through are scaled up before they are rounded, as far as a search finds it pays."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, final

import jax
import jax.numpy as jnp

from infopt.errors import InfoptError
from infopt.methods.base import check_reading, text_of, to_nearest
from infopt.methods.folds import Place, Scaled, times_columns
from infopt.qtensor import Format, dequantize_array
from infopt.typing import Array


@final
@dataclasses.dataclass(frozen=True, repr=False)
class AWQ(Scaled):
    grid: int = 20

    def factors(self, place: Place) -> Array:
        size = place.size(lambda inputs: jnp.sqrt(jnp.diagonal(inputs.gram, axis1=-2, axis2=-1)))
        powers = [size ** (i / self.grid) for i in range(self.grid)]
        tried = jnp.stack([s / jnp.sqrt(jnp.max(s, -1, keepdims=True) * jnp.min(s, -1, keepdims=True)) for s in powers])
        rounded = {n: (place.readers[n], place.inputs[n].gram) for n in place.formats}
        harm = _harm(rounded, tried, tuple(place.formats.items()), place.clip, place.of_experts)
        best = jnp.argmin(harm, 0)
        return jnp.take_along_axis(tried, best[None, ..., None], 0)[0] if place.of_experts else tried[best]


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _harm(
    rounded: dict[str, tuple[Array, Array]],
    tried: Array,
    formats: tuple[tuple[str, Format], ...],
    clip: str | None,
    of_experts: bool,
) -> Array:
    """For each of `tried`, the sum over matrices of tr((W - Q) H (W - Q)^T); of each expert, if they choose alone."""

    def of(s: Array) -> Array:
        total = jnp.zeros(s.shape[:-1], jnp.float32)
        for name, form in formats:
            w, gram = rounded[name]
            off = w - times_columns(dequantize_array(to_nearest(times_columns(w, s), form, clip), w.dtype), 1 / s)
            off = off.astype(jnp.float32)
            each = jnp.sum(jnp.matmul(off, gram, precision=jax.lax.Precision.HIGHEST) * off, (-2, -1))
            total = total + (each if of_experts else jnp.sum(each))
        return total

    return jax.lax.map(of, tried)


def awq(text: Any = None, tokens: int | None = None, length: int = 512, grid: int = 20) -> AWQ:
    """Scale up the channels that much goes through, so that rounding to nearest harms them less.

    Where a norm, or a matrix without a function in between, feeds matrices W by x, W diag(s) is rounded in place of W,
    and what feeds them is divided by s: without rounding nothing changes. s = x_rms^a, over the root of its greatest
    times its least, and a is that of {0, 1/grid, ..., (grid-1)/grid} with the least tr((W - Q) H (W - Q)^T),
    H = sum(x x^T): never worse than a = 0, where s = 1. A matrix that nothing of the kind feeds is rounded to nearest.

    Source: Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", section
    3.2, with the root mean square of x for its mean size, and without its search for ranges (`clip="mse"`).

    Args:
      text, tokens, length: what is read, as for `gptq`.
      grid: exponents that are tried.

    Raises:
      InfoptError: numbers that are none; or, when params are converted, a family whose stream is not known.

    >>> import infopt as ip
    >>> ip.quantize(bits=4, group=64, method=ip.awq())
    quantize(bits=4, group=64, method=awq())
    """
    check_reading("awq", tokens=tokens, length=length)
    if isinstance(grid, bool) or not isinstance(grid, int) or grid < 1:
        raise InfoptError(f"awq(grid={grid!r}).", why="it counts exponents.", fix="grid=20")
    return AWQ(text_of(text, "awq"), tokens, length, grid)
