"""Hadamard matrices: entries of one size, orthonormal; of most widths that models have, as products of small ones."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from infopt.typing import Array

BLOCK = 64
"""Factors are multiplied with each other up to this order: fewer, larger products are faster."""
LARGEST = 256
"""The largest order of Paley's that is tried: a product with a larger factor costs as much as a layer's own."""


def _prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def paley(order: int) -> np.ndarray | None:
    """A Hadamard matrix of signs `[order, order]` from the squares modulo a prime q, or None where there is no such q.

    With chi(a) = 1 for squares, -1 for the others and 0 for 0, and Q[i, j] = chi(i - j): where order = q + 1 and
    q = 3 mod 4, it is I + [[0, 1], [-1, Q]]; where order = 2 (q + 1) and q = 1 mod 4, [[0, 1], [1, Q]] with each 1
    replaced by [[1, 1], [1, -1]], each -1 by its negative, each 0 by [[1, -1], [-1, -1]].

    Source: Paley 1933, "On Orthogonal Matrices", constructions I and II.

    >>> [n for n in range(4, 80, 4) if paley(n) is not None]
    [4, 8, 12, 20, 24, 28, 32, 36, 44, 48, 60, 68, 72, 76]
    """
    for q, first in ((order - 1, True), (order // 2 - 1, False)):
        if order % 4 or q % 4 != (3 if first else 1) or not _prime(q):
            continue
        chi = np.full(q, -1.0)
        chi[[x * x % q for x in range(1, q)]] = 1
        chi[0] = 0
        core = np.zeros((q + 1, q + 1))
        core[1:, 1:] = chi[(np.arange(q)[:, None] - np.arange(q)[None]) % q]
        core[0, 1:], core[1:, 0] = 1, -1 if first else 1
        if first:
            return np.eye(q + 1) + core
        return np.kron(core, [[1, 1], [1, -1]]) + np.kron(np.eye(q + 1), [[1, -1], [-1, -1]])
    return None


def _orders(width: int) -> tuple[int, ...] | None:
    """Orders of matrices by Paley, and of Sylvester's 2 x 2, whose Kronecker product has this width."""
    if width & (width - 1) == 0:
        return (2,) * (width.bit_length() - 1)
    for order in range(12, min(width, LARGEST) + 1, 4):
        if width % order == 0 and order & (order - 1) and paley(order) is not None:
            rest = _orders(width // order)
            if rest is not None:
                return (order, *rest)
    return None


@functools.cache
def factors(width: int) -> tuple[tuple[np.ndarray, ...], int]:
    """Orthonormal factors of a Hadamard matrix, and the width that is left where none has the full one.

    Returns:
      Matrices `[n_i, n_i]`, float32, and m: m n_1 n_2 ... = width, with m as small as the known matrices allow.

    >>> [len(f) for f in factors(576)[0]], factors(576)[1], factors(11008)[1]
    ([12, 48], 1, 43)
    """
    divisors = (d for d in range(width, 0, -1) if width % d == 0)
    whole, orders = next((d, found) for d in divisors if (found := _orders(d)) is not None)
    blocks: list[np.ndarray] = []
    for order in orders:
        signs = paley(order) if order > 2 else np.array([[1.0, 1.0], [1.0, -1.0]])
        assert signs is not None
        if blocks and len(blocks[-1]) * order <= BLOCK:
            blocks[-1] = np.kron(blocks[-1], signs)
        else:
            blocks.append(signs)
    return tuple((b * len(b) ** -0.5).astype(np.float32) for b in blocks), width // whole


def times(x: Array, matrices: Sequence[np.ndarray]) -> Array:
    """x `[..., N]` times the Kronecker product of matrices `[n_i, n_i]`, where N = n_1 n_2 ..., in float32."""
    y = x.astype(jnp.float32).reshape(*x.shape[:-1], *map(len, matrices))
    for m in matrices:  # contracts the first of these axes and appends the new one: in the end they are in order
        y = jnp.tensordot(y, jnp.asarray(m), axes=((x.ndim - 1,), (0,)), precision=jax.lax.Precision.HIGHEST)
    return y.reshape(x.shape).astype(x.dtype)


def turned(x: Array) -> Array:
    """x `[..., N]` times the Hadamard matrix of its width; in blocks of the largest that there is, where none has it.

    >>> turned(jnp.asarray([1.0, 0.0, 0.0, 0.0])).tolist()
    [0.5, 0.5, 0.5, 0.5]
    """
    matrices, left = factors(x.shape[-1])
    return times(x.reshape(*x.shape[:-1], left, -1), matrices).reshape(x.shape)
