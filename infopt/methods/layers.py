"""A stack run a layer at a time over calibration tokens: what goes into a layer's matrices, then what it gives."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from infopt import ops
from infopt.errors import InfoptError
from infopt.model import Weights, family_of, shapes
from infopt.spec import Spec
from infopt.typing import Array

TOKENS = 4096
"""Tokens that go through a layer at once."""

Change = Callable[[dict[str, np.ndarray]], Mapping[str, Any]]
"""From the Gram matrices of a layer's inputs, by logical name, `[I, I]` or one an expert, to what takes their place."""


def by_layer(spec: Spec, weights: Weights, tokens: np.ndarray, names: set[str], change: Change) -> dict[str, Any]:
    """Run the layers in turn, each on what the changed ones before it give.

    A layer's weights are held one layer at a time, and of the texts the hidden states `[tokens, D]` alone.

    Args:
      spec, weights: of the stack, which is run without a cache.
      tokens: `[N, T]`.
      names: the matrices whose inputs are wanted: linear layers of blocks, or the head.
      change: called once for each layer that has some.

    Returns:
      What `change` gave, of all layers.

    Raises:
      InfoptError: the stack's family is one function, or a name is no matrix that `ops.linear` multiplies by.
    """
    family = family_of(spec)
    if family.block is None or family.embed is None or family.final is None:
        raise InfoptError(
            f"a {spec.family} cannot be run a layer at a time.",
            why="its forward pass is one function.",
            fix="quantize without a method; or write its layers with ip.define",
        )
    outside = {n for n in names if not n.startswith("layers.")}
    if outside - {"head"}:
        raise InfoptError(
            f"nothing is known of what goes into {', '.join(sorted(outside - {'head'}))}.",
            why="statistics are of the inputs of linear layers, and it is a table.",
            fix="a quantize(where=...) of its own for it, without a method",
        )
    top = {n: weights[n] for n in shapes(spec) if not n.startswith("layers.")}
    per = max(TOKENS // tokens.shape[1], 1)
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    embed = jax.jit(functools.partial(family.embed, spec.config))
    batches = [slice(at, at + per) for at in range(0, len(tokens), per)]
    xs = [embed(top, jnp.asarray(tokens[each]), places[each]) for each in batches]
    found: dict[str, Any] = {}
    for layer in range(spec.config.layers):
        prefix = f"layers.{layer}."
        own = [n for n in shapes(spec) if n.startswith(prefix)]
        p = {n.removeprefix(prefix): jax.tree.map(jnp.asarray, weights[n]) for n in own}
        wanted = tuple(sorted(n.removeprefix(prefix) for n in names.intersection(own)))
        run, grams = _programs(spec, layer % spec.config.period, spec.window[layer])
        if wanted:
            total = functools.reduce(_add, (grams(p, x, wanted) for x in xs))
            new = change({prefix + n: np.asarray(g) for n, g in total.items()})
            found |= new
            p |= {n.removeprefix(prefix): x for n, x in new.items()}
        xs = [run(p, x) for x in xs]
    if outside:
        hidden = jnp.concatenate([family.final(spec.config, top, x) for x in xs]).astype(jnp.float32)
        rows = hidden.reshape(-1, hidden.shape[-1])
        found |= change({"head": np.asarray(jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST))})
    return found


def _add(one: dict[str, Array], other: dict[str, Array]) -> dict[str, Array]:
    return jax.tree.map(jnp.add, one, other)


@functools.lru_cache(maxsize=64)
def _programs(spec: Spec, phase: int, window: Any) -> tuple[Callable[..., Array], Callable[..., dict[str, Array]]]:
    """A layer's forward pass `(p, x) -> x`, and its Gram matrices `(p, x, names) -> {name: [..., I, I]}`."""
    block = family_of(spec).block
    assert block is not None

    def forward(p: dict[str, Any], x: Array) -> Array:
        batch, length = x.shape[:2]
        at = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (batch, length))
        lengths, keep = jnp.full(batch, length, jnp.int32), jnp.ones((batch, length), bool)
        context = ops.Context(at, keep, lengths, window, spec.kv, attention=spec.attention, straight=True)
        return block(spec.config, phase, p, x, None, functools.partial(ops.attend, context=context), None)[0]

    def grams(p: dict[str, Any], x: Array, names: tuple[str, ...]) -> dict[str, Array]:
        def total(taps: dict[str, Array]) -> Array:
            tapped = {n: ops.Tapped(p[n], tap, routed=tap.ndim > 2) for n, tap in taps.items()}
            return jnp.sum(forward(p | tapped, x).astype(jnp.float32))

        sizes = {n: (*p[n].shape[:-2], p[n].shape[-1], p[n].shape[-1]) for n in names}
        return jax.grad(total)({n: jnp.zeros(size, jnp.float32) for n, size in sizes.items()})

    return jax.jit(forward), jax.jit(grams, static_argnums=2)
