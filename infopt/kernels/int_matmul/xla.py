"""The integer product in XLA, a group of terms at a time."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from infopt.kernels.int_matmul.call import Call
from infopt.qtensor import of_layer, split_planes, whole_planes
from infopt.typing import Array


def forward(call: Call) -> Array:
    """The product `[M, O]`: of int8, summed in int32 in each group, and in float32 over groups, the first one first."""
    w = of_layer(call.weight, call.layer)
    # in float32 [G, O], a scale and a minimum of each group
    scale, low = (None if x is None else x.astype(jnp.float32).T for x in (w.scale, w.minimum))
    first = jnp.zeros((call.codes.shape[0], w.shape[0]), jnp.float32)

    def add(y: Array, group: Any) -> tuple[Array, None]:
        parts, scale, low = group
        dots, codes = sums(parts)
        y = y + dots.astype(jnp.float32) * jnp.broadcast_to(scale[None], y.shape)
        return (y if low is None else y + codes.astype(jnp.float32)[:, None] * low[None]), None

    parts = in_groups(call.codes, w)
    if w.scale.shape[-1] == 1:
        y, _ = add(first, jax.tree.map(lambda leaf: leaf[0], (parts, scale, low)))
    else:
        y, _ = jax.lax.scan(add, first, (parts, scale, low))
    return (y * jnp.broadcast_to(call.scale, y.shape)).astype(call.dtype)


def in_groups(codes: Array, w: Any) -> tuple[Any, Any, Any]:
    """What `sums` takes of each group: rows in planes `[G, M, K]`, the matrix's `[G, O, K]`, and what is taken off."""
    (whole, less), groups = whole_planes(w), w.scale.shape[-1]

    def grouped(x: Array) -> Array:
        return x.reshape(x.shape[0], groups, x.shape[1] // groups).transpose(1, 0, 2)

    return tuple(map(grouped, split_planes(codes, w))), tuple(map(grouped, whole)), None if less is None else less.T


def sums(parts: tuple[Any, Any, Any]) -> tuple[Array, Array]:
    """In one group, the sums of codes times levels, int32 `[M, O]`, and of codes alone, `[M]`."""
    rows, matrix, less = parts
    product: Any = functools.partial(
        jax.lax.dot_general, dimension_numbers=(((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
    )
    dots = functools.reduce(jnp.add, (product(a, b) for a, b in zip(rows, matrix, strict=True)))
    codes = functools.reduce(jnp.add, (jnp.sum(a, -1, dtype=jnp.int32) for a in rows))
    return (dots if less is None else dots - codes[:, None] * less[None]), codes
