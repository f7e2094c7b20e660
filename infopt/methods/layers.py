"""A stack run a layer at a time over calibration tokens: what goes into a layer's matrices, then what it gives."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from infopt import ops
from infopt.errors import InfoptError
from infopt.methods.freed import give_back
from infopt.methods.kept import Kept
from infopt.model import Family, Weights, as_run, family_of, shapes
from infopt.progress import bar
from infopt.qtensor import is_qtensor
from infopt.spec import Config, Spec
from infopt.typing import Array

TOKENS = 4096
"""Tokens that go through a layer at once."""

Run = Callable[[dict[str, Any], Array], Array]
"""A layer: its weights by name within it and what goes in `[B, T, D]` to what it gives."""


class Inputs(NamedTuple):
    """What went into a matrix `[O, I]`, or one an expert: with leading axes then.

    Args:
      gram: sum over tokens of x x^T, `[I, I]`.
      peak: the greatest |x| of each input, `[I]`.
    """

    gram: Array
    peak: Array


@dataclasses.dataclass
class Layer:
    """A layer whose turn it is; the head is the last one, its inputs what `final` gives.

    Args:
      spec: of the stack.
      prefix: of its logical names: "layers.3."; "" for the head.
      names: of its matrices that are to be changed, within it.
      p: its weights by name within it, as they were; for the head, all that are outside of layers.
      inputs: what the changed layers before it give, `[B, T, D]`, some windows of tokens each.
      targets: what it gives itself where nothing was changed before it, or None where nobody asked.
      run: compiled once for all layers of its kind.
    """

    spec: Spec
    prefix: str
    names: tuple[str, ...]
    p: dict[str, Any]
    inputs: list[Array]
    targets: list[Array] | None
    run: Run
    tapped: Callable[..., Any]

    @functools.cached_property
    def statistics(self) -> dict[str, Inputs]:
        """Of the inputs of each of `names`."""
        found = None
        for x in self.inputs:
            new = self.tapped(self.p, x, self.names)
            found = new if found is None else _joined(found, new)
        assert found is not None
        self._check({n: each.peak for n, each in found.items()})
        return found

    @functools.cached_property
    def peaks(self) -> dict[str, Array]:
        """The same without Gram matrices, which are the work: the greatest |x| of each input, `[I]`."""
        if "statistics" in self.__dict__:
            return {n: found.peak for n, found in self.statistics.items()}
        found = functools.reduce(_greater, [self.tapped(self.p, x, self.names, peaks=True) for x in self.inputs])
        self._check(found)
        return found

    def _check(self, peaks: dict[str, Array]) -> None:
        for n, peak in peaks.items():
            if not bool(jnp.isfinite(peak).all()):
                raise InfoptError(
                    f"what goes into {self.prefix}{n} is not finite.",
                    why="a weight before it is NaN or infinite, or what it makes leaves what its type can hold.",
                    fix="model.audit(params), to see weights; params in float32, where float16 is too narrow",
                )


@jax.jit
def _greater(one: dict[str, Array], other: dict[str, Array]) -> dict[str, Array]:
    return jax.tree.map(jnp.maximum, one, other)


@jax.jit
def _joined(one: dict[str, Inputs], other: dict[str, Inputs]) -> dict[str, Inputs]:
    return {n: Inputs(s.gram + other[n].gram, jnp.maximum(s.peak, other[n].peak)) for n, s in one.items()}


def scannable(spec: Spec) -> Family:
    """The stack's family.

    Raises:
      InfoptError: its forward pass is one function.
    """
    family = family_of(spec)
    if family.block is None or family.embed is None or family.final is None:
        raise InfoptError(
            f"a {spec.family} cannot be run a layer at a time.",
            why="its forward pass is one function.",
            fix="quantize without a method; or write its layers with ip.define",
        )
    return family


def top_of(spec: Spec, weights: Weights) -> dict[str, Any]:
    """The weights outside layers, for `embed` and `final`."""
    return {n: weights[n] for n in shapes(spec) if not n.startswith("layers.")}


def layer_of(spec: Spec, weights: Mapping[str, Any], layer: int) -> dict[str, Any]:
    """The weights of one layer, by name within it."""
    prefix = f"layers.{layer}."
    own = [n for n in shapes(spec) if n.startswith(prefix)]
    return {n.removeprefix(prefix): jax.tree.map(jnp.asarray, weights[n]) for n in own}


def embedded(spec: Spec, top: dict[str, Any], tokens: np.ndarray, per: int) -> list[Array]:
    """What goes into the first layer, `per` windows at a time."""
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    embed = _embed(scannable(spec), spec.config)
    return [embed(top, jnp.asarray(tokens[at : at + per]), places[at : at + per]) for at in range(0, len(tokens), per)]


@functools.lru_cache(maxsize=64)
def _embed(family: Family, config: Config) -> Callable[..., Array]:
    return jax.jit(functools.partial(family.embed, config))  # type: ignore[arg-type]


def last_of(spec: Spec) -> Callable[[dict[str, Any], Array], Array]:
    """What follows the layers: weights outside of them, and what the last gives, to what goes into the head."""
    return _final(scannable(spec), spec.config)


@functools.lru_cache(maxsize=64)
def _final(family: Family, config: Config) -> Callable[..., Array]:
    return jax.jit(functools.partial(family.final, config))  # type: ignore[arg-type]


def by_layer(
    spec: Spec,
    weights: Weights,
    tokens: np.ndarray,
    names: set[str],
    change: Callable[[Layer], Mapping[str, Any]],
    *,
    what: str = "layers",
    targets: bool = False,
    kept: Kept | None = None,
    like: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Run the layers in turn, each on what the changed ones before it give.

    A layer's weights are held one layer at a time, and of the texts the hidden states `[tokens, D]` alone.

    Args:
      spec, weights: of the stack, which is run without a cache.
      tokens: `[N, T]`.
      names: the matrices that are to be changed: linear layers of blocks, or the head.
      change: called once for each layer that has some; what takes its weights' place, by name within the layer.
      what: is said beside the progress.
      targets: whether the layers are run as they were, too, each on what unchanged ones give.
      kept: where the layers are kept that are done.
      like: the shapes and types of all that `change` gives, by logical name; with `kept`.

    Returns:
      What `change` gave, of all layers, by logical name.

    Raises:
      InfoptError: the stack's family is one function, or what goes into a matrix is not finite.
    """
    done = {} if kept is None else _done(kept, spec, names, like or {})
    if done and None not in done.values():  # then no layer needs to be run
        return {prefix + n: x for prefix, new in done.items() for n, x in (new or {}).items()}
    outside = {n for n in names if not n.startswith("layers.")}
    top = top_of(spec, weights)
    xs = embedded(spec, top, tokens, max(TOKENS // tokens.shape[1], 1))
    plain = xs if targets else None
    found: dict[str, Any] = {}

    def turn(layer: Layer) -> dict[str, Any]:
        new = done.get(layer.prefix)
        if new is None:
            new = _marked(layer, dict(change(layer)))
            if kept:
                kept.put(_step(layer.prefix), {n: new[n] for n in _within(layer.prefix, like or {})})
        found.update({layer.prefix + n: x for n, x in new.items()})
        return new

    with bar(what, spec.config.layers) as show:
        for i in range(spec.config.layers):
            p = layer_of(spec, weights, i)
            run, tapped = programs(spec, i % spec.config.period, spec.window[i])
            mine = tuple(sorted(n for n in p if f"layers.{i}.{n}" in names))
            plain = None if plain is None else [run(p, x) for x in plain]
            if mine:
                p |= turn(Layer(spec, f"layers.{i}.", mine, p, xs, plain, run, tapped))
            xs = [run(p, x) for x in xs]
            give_back((xs, plain))
            show(i + 1)
    if outside:
        run, tapped = _head(spec)
        final = last_of(spec)
        xs = [final(top, x) for x in xs]
        p = jax.tree.map(jnp.asarray, top)
        plain = None if plain is None else [run(p, final(top, x)) for x in plain]
        turn(Layer(spec, "", ("head",), p, xs, plain, run, tapped))
    return found


def _within(prefix: str, like: Mapping[str, Any]) -> dict[str, Any]:
    """Of a layer by name within it; of "" what is outside of layers."""
    if not prefix:
        return {n: x for n, x in like.items() if not n.startswith("layers.")}
    return {n.removeprefix(prefix): x for n, x in like.items() if n.startswith(prefix)}


def _step(prefix: str) -> str:
    """What a layer's result is kept as."""
    return prefix.strip(".") or "head"


def _done(kept: Kept, spec: Spec, names: set[str], like: Mapping[str, Any]) -> dict[str, dict[str, Any] | None]:
    """What was kept of each layer that some of `names` belong to, by its prefix; None where nothing was."""
    prefixes = [*(f"layers.{i}." for i in range(spec.config.layers)), ""]
    mine = [prefix for prefix in prefixes if _within(prefix, dict.fromkeys(names))]
    return {prefix: kept.get(_step(prefix), _within(prefix, like)) for prefix in mine}


def _marked(layer: Layer, new: dict[str, Any]) -> dict[str, Any]:
    """With a minus, the errors of experts that nothing went into, and of matrices with an input that was always 0:
    `Model.audit` says so."""
    for n in layer.names:
        if not is_qtensor(layer.p[n]) and is_qtensor(new[n]):
            live = layer.peaks[n] > 0
            unread = ~(jnp.any(live, -1) if live.ndim > 1 else jnp.all(live, -1))[..., None, None]
            size = jnp.abs(new[n].error)
            new[n] = dataclasses.replace(new[n], error=jnp.where(unread, -size, size))
    return new


def programs(spec: Spec, phase: int, window: Any) -> tuple[Run, Callable[..., Any]]:
    """A layer's forward pass `(p, x) -> x`, and its statistics `(p, x, names) -> {name: Inputs}`; or peaks alone."""
    return _programs(scannable(spec), spec, phase, window)


@functools.lru_cache(maxsize=64)
def _programs(family: Family, spec: Spec, phase: int, window: Any) -> Any:  # of a family that is defined anew, anew
    block = family.block
    assert block is not None

    def forward(p: dict[str, Any], x: Array) -> Array:
        batch, length = x.shape[:2]
        at = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (batch, length))
        lengths, keep = jnp.full(batch, length, jnp.int32), jnp.ones((batch, length), bool)
        context = ops.Context(at, keep, lengths, window, spec.kv, attention=spec.attention, straight=True)
        return block(
            spec.config, phase, as_run(spec, p), x, None, functools.partial(ops.attend, context=context), None
        )[0]

    return jax.jit(forward), _taps(forward)


@functools.cache
def _head(spec: Spec) -> tuple[Run, Callable[..., Any]]:
    def forward(p: dict[str, Any], x: Array) -> Array:
        return ops.linear(x, p["head"])

    return jax.jit(forward), _taps(forward)


def _taps(forward: Run) -> Callable[..., Any]:
    return jax.jit(functools.partial(_tapped, forward), static_argnums=2, static_argnames="peaks")


def _tapped(forward: Run, p: dict[str, Any], x: Array, names: tuple[str, ...], *, peaks: bool = False) -> Any:
    rounds = {n: ops.Straight(w) for n, w in p.items() if is_qtensor(w) and w.format.activations is not None}
    own = p | rounds

    def total(taps: dict[str, tuple[Array, Array]]) -> Array:
        tapped = {n: ops.Tapped(own[n], *tap, routed=tap[0].ndim > 2) for n, tap in taps.items()}
        return jnp.sum(forward(own | tapped, x).astype(jnp.float32))

    def zeros(w: Any) -> tuple[Array, Array]:
        lead, width = (w.codes if is_qtensor(w) else w).shape[:-2], w.shape[-1]
        return jnp.zeros((*lead, width, width), jnp.float32), jnp.zeros((*lead, width), jnp.float32)

    found = {n: Inputs(*tap) for n, tap in jax.grad(total)({n: zeros(p[n]) for n in names}).items()}
    return {n: tap.peak for n, tap in found.items()} if peaks else found
