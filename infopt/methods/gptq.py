"""GPTQ: columns rounded one by one, each one's error spread over those that are still to come."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, final

import jax
import jax.numpy as jnp

from infopt.errors import InfoptError
from infopt.methods.base import ByLayer, check_reading, nothing_went_in, text_of
from infopt.methods.layers import Layer
from infopt.qtensor import Format, Grid, QTensor, codes_of, grid_of, in_groups, on_grid, values_of
from infopt.typing import Array

BLOCK = 128
"""Columns whose errors reach the columns after them at once, at most."""


@final
@dataclasses.dataclass(frozen=True, repr=False)
class GPTQ(ByLayer):
    damp: float = 0.01
    order: bool = True

    def change(self, layer: Layer, formats: Mapping[str, Format], clip: str | None) -> dict[str, QTensor]:
        found = layer.statistics
        return {n: self._one(layer.prefix + n, layer.p[n], found[n].gram, f, clip) for n, f in formats.items()}

    def _one(self, name: str, w: Array, gram: Array, form: Format, clip: str | None) -> QTensor:
        if gram.ndim == 2 and not bool(jnp.any(gram)):
            raise nothing_went_in(self, name)
        solve = functools.partial(solved, format=form, damp=self.damp, order=self.order, clip=clip)
        if gram.ndim == 2:
            found, fine = solve(w, gram)
        else:
            each = [solve(one, of_one) for one, of_one in zip(w, gram, strict=True)]
            found, fine = jax.tree.map(lambda *x: jnp.stack(x), *(q for q, _ in each)), all(bool(f) for _, f in each)
        if not bool(fine):
            raise InfoptError(
                f"{self!r}: the statistics of {name} have no inverse.",
                why="too few different tokens went through it, or some were not finite.",
                fix=f"more tokens, or damp > {self.damp}",
            )
        return found


def gptq(
    text: Any = None, tokens: int | None = None, length: int = 512, damp: float = 0.01, order: bool = True
) -> GPTQ:
    """Round a matrix's columns one by one, and let those after each make up for its error where inputs are alike.

    With H = sum(x x^T) over calibration tokens, what a layer gives is off by tr((W - Q) H (W - Q)^T) in squares. Each
    layer is rounded on what the rounded layers before it give. A row that rounding to nearest serves better keeps that.

    Source: Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
    algorithm 1; columns in the order of H's diagonal, and scales that are those of rounding to nearest.

    Args:
      text: what the stack reads: a text, several, or token ids, which must be of its own tokenizer (those beyond its
        vocabulary are an error, others go unnoticed); None is `ip.texts.topics("calibration")`.
      tokens: how many tokens of it, in whole windows spread over the text: what is left over is not read; by default
        16,384, or all that it has.
      length: of a window.
      damp: this share of the mean of H's diagonal is added to the diagonal.
      order: columns with the greatest inputs first; otherwise from left to right.

    Raises:
      InfoptError: no text, or numbers that are none.

    >>> import infopt as ip
    >>> ip.quantize(bits=4, group=32, method=ip.gptq(tokens=4096))
    quantize(bits=4, group=32, method=gptq(tokens=4096))
    """
    check_reading("gptq", tokens=tokens, length=length)
    if isinstance(damp, bool) or not isinstance(damp, int | float) or not 0 <= damp < float("inf"):
        raise InfoptError(f"gptq(damp={damp!r}).", why="it is a share of H's diagonal.", fix="damp=0.01, say")
    if not isinstance(order, bool):
        raise InfoptError(f"gptq(order={order!r}).", why="columns are ordered or not.", fix="order=True")
    return GPTQ(text_of(text, "gptq"), tokens, length, float(damp), order)


@functools.partial(jax.jit, static_argnames=("format", "order", "clip"))
def solved(
    w: Array, gram: Any, *, format: Format, damp: float = 0.01, order: bool = True, clip: str | None = None
) -> tuple[QTensor, Array]:
    """A matrix `[O, I]` rounded for inputs of Gram matrix `[I, I]`, and whether that had an inverse."""
    groups, outer = in_groups(w, format, 2)
    grid = grid_of(groups, format, outer, clip)
    rows, count, group = groups.shape
    width = count * group
    h = jnp.pad(jnp.asarray(gram, jnp.float32), [(0, width - gram.shape[0])] * 2)
    dead = jnp.diagonal(h) == 0  # nothing ever came in: such a column's error harms nobody
    mean = jnp.sum(jnp.diagonal(h)) / jnp.maximum(jnp.sum(~dead), 1).astype(jnp.float32)
    add = jnp.where(dead, jnp.where(mean == 0, 1.0, mean), damp * mean)
    damped = h + jnp.diag(add)
    at = jnp.argsort(-jnp.diagonal(h), stable=True) if order else jnp.arange(width)
    upper = _inverse_factor(damped[at][:, at])
    block = max(n for n in range(1, BLOCK + 1) if width % n == 0)
    flat = groups.reshape(rows, width)[:, at]

    def of_column(j: Array) -> Grid:
        cut = jax.tree.map(lambda leaf: leaf[:, j // group, None], dataclasses.replace(grid, outer=None))
        return dataclasses.replace(cut, outer=grid.outer)

    def columns(b: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        rest, codes = carry
        start = b * block
        mine = jax.lax.dynamic_slice(rest, (0, start), (rows, block))
        u = jax.lax.dynamic_slice(upper, (start, start), (block, block))

        def column(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            mine, errors, codes = carry
            j, x = at[start + i], mine[:, i]
            own = of_column(j)
            code = codes_of(x[:, None, None], own, format)
            error = (x - values_of(code, own, format)[:, 0, 0]) / u[i, i]
            mine = mine - error[:, None] * u[i][None, :]  # u[i, :i] is 0: what is done stays
            return mine, errors.at[:, i].set(error), codes.at[:, j].set(code[:, 0, 0])

        _, errors, codes = jax.lax.fori_loop(0, block, column, (mine, jnp.zeros_like(mine), codes))
        factor = jax.lax.dynamic_slice(upper, (start, 0), (block, width))
        return rest - jnp.matmul(errors, factor, precision=jax.lax.Precision.HIGHEST), codes

    plain = codes_of(groups, grid, format)
    codes = jax.lax.fori_loop(0, width // block, columns, (flat, plain.reshape(rows, width)))[1].reshape(plain.shape)

    def harm(codes: Array) -> Array:  # of each row, tr((w - q) H (w - q)^T)
        off = (groups - values_of(codes, grid, format)).reshape(rows, width)
        return jnp.sum(jnp.matmul(off, h, precision=jax.lax.Precision.HIGHEST) * off, -1)

    better = harm(codes) < harm(plain)
    codes = jnp.where(better[:, None, None], codes, plain)
    return on_grid(codes, grid, format, w.astype(jnp.float32), 2), jnp.isfinite(upper).all()


def _inverse_factor(h: Array) -> Array:
    """The upper Cholesky factor of H's inverse, of which row i says how column i's error is spread."""
    lower = jnp.linalg.cholesky(h)
    inverse = jax.scipy.linalg.cho_solve((lower, True), jnp.eye(h.shape[0], dtype=h.dtype))
    return jnp.linalg.cholesky((inverse + inverse.T) / 2).T
