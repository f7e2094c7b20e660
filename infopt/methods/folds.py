"""Channels scaled before they are rounded: what a matrix's columns are multiplied by, what feeds them is divided by."""

from __future__ import annotations

import abc
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from infopt.errors import InfoptError
from infopt.methods.base import ByLayer, nothing_went_in, to_nearest
from infopt.methods.layers import Inputs, Layer
from infopt.model import Model, Stream, family_of, shapes, stream_of
from infopt.qtensor import Format
from infopt.spec import Spec
from infopt.typing import Array


@dataclasses.dataclass(frozen=True)
class Fold:
    """A place where channels can be scaled and nothing changes.

    Args:
      source: a norm, whose weight's channels are divided, or a matrix, whose rows are.
      readers: all matrices whose columns are multiplied.
      is_norm: which of the two the source is.
    """

    source: str
    readers: tuple[str, ...]
    is_norm: bool


def folds_of(stream: Stream, formats: Iterable[str], turned: Iterable[str]) -> list[Fold]:
    """Those that some matrix of `formats` reads; rows of matrices first, which read what norms give.

    The matrices that are `turned`, by their names within a layer, read channels that are mixed before.
    """
    rounded, mixed = {*formats}, {*turned}
    free = {n for n in rounded if re.sub(r"^layers\.\d+\.", "", n) not in mixed}
    found = [Fold(a, (b,), False) for a, b in stream.feeds.items() if b in free]
    return found + [Fold(n, readers, True) for n, readers in stream.reads.items() if rounded.intersection(readers)]


@dataclasses.dataclass(frozen=True)
class Place:
    """What is known where factors are chosen.

    Args:
      readers: the matrices, by name within the layer, those that stay dense too.
      inputs: of each that is rounded.
      formats: of those.
      clip: how groups' ranges are searched for.
      heads: (n, width): each n neighbouring heads of so many channels are fed by one, and must have the same factors.
      of_experts: whether each expert has channels of its own.
    """

    readers: dict[str, Array]
    inputs: dict[str, Inputs]
    formats: dict[str, Format]
    clip: str | None
    heads: tuple[int, int]
    of_experts: bool

    def size(self, of: Callable[[Inputs], Array]) -> Array:
        """The greatest over all readers of a size of their inputs, `[I]` or `[E, I]`, the same for heads fed by one.

        What nothing came in through has the least size of all others.
        """
        each = [of(inputs) for inputs in self.inputs.values()]
        if not self.of_experts:
            each = [jnp.max(size.reshape(-1, size.shape[-1]), 0) for size in each]
        size = self.even(functools.reduce(jnp.maximum, each))
        least = jnp.min(jnp.where(size > 0, size, jnp.inf), -1, keepdims=True)
        return jnp.where(size > 0, size, jnp.broadcast_to(jnp.where(jnp.isfinite(least), least, 1), size.shape))

    def even(self, size: Array) -> Array:
        """The greatest of the heads that are fed by one, in each of them."""
        n, width = self.heads
        grouped = size.reshape(*size.shape[:-1], -1, n, width)
        return jnp.broadcast_to(jnp.max(grouped, -2, keepdims=True), grouped.shape).reshape(size.shape)


@dataclasses.dataclass(frozen=True, repr=False)
class Scaled(ByLayer):
    """A method that scales channels, and rounds to nearest."""

    @abc.abstractmethod
    def factors(self, place: Place) -> Array:
        """What to multiply columns by, `[I]`, or `[E, I]` where experts have channels of their own."""

    def gives(self, model: Model, formats: Mapping[str, Format]) -> list[str]:
        known, found = shapes(model.spec), dict.fromkeys(formats)
        for fold in folds_of(stream_of(model.spec), formats, model.spec.online):
            names = (fold.source, f"{fold.source}_bias", *fold.readers)
            found |= dict.fromkeys(n for n in names if n in known)
        return list(found)

    def check(self, spec: Spec, formats: Mapping[str, Format]) -> None:
        super().check(spec, formats)
        folds, packed = folds_of(stream_of(spec), formats, spec.online), dict(spec.weights)
        if not folds:
            raise InfoptError(
                f"{self!r} has nothing to scale before {', '.join([*formats][:3])}.",
                why="no norm, and no matrix without a function in between, feeds what is to be rounded.",
                fix="another method",
            )
        for name in (n for fold in folds for n in (fold.source, *fold.readers) if n in packed):
            raise InfoptError(
                f"{self!r} scales {name}, which is packed as {packed[name].name}.",
                why="what is rounded would have to be rounded anew.",
                fix="one quantize(where={...}) for all that one norm feeds; or another method",
            )

    def change(self, layer: Layer, formats: Mapping[str, Format], clip: str | None) -> dict[str, Any]:
        family, config = family_of(layer.spec), layer.spec.config
        assert family.stream is not None
        p, seen, changed = dict(layer.p), layer.statistics, set[str]()
        for fold in folds_of(family.stream, formats, layer.spec.online):
            readers = {n: p[n] for n in fold.readers if n in p}
            rounded = {n: formats[n] for n in readers if n in formats}
            if not any(bool(jnp.any(seen[n].peak)) for n in rounded):
                raise nothing_went_in(self, layer.prefix + next(iter(rounded)))
            source = p[fold.source]
            heads = (1, 1)
            if not fold.is_norm and source.shape[-2] < next(iter(readers.values())).shape[-1]:
                heads = (config.heads // config.kv_heads, config.head_dim)
            place = Place(readers, {n: seen[n] for n in rounded}, rounded, clip, heads, source.ndim > 2)
            s = self.factors(place)
            own = s if heads[0] == 1 else s.reshape(-1, *heads)[:, 0].reshape(-1)
            p |= {n: times_columns(w, s) for n, w in readers.items()}
            p |= _divided(p, fold, own, family.stream.offset)
            changed |= {fold.source, f"{fold.source}_bias", *readers}.intersection(p)
        return {n: p[n] for n in changed} | {n: to_nearest(p[n], f, clip) for n, f in formats.items()}


def times_columns(w: Array, s: Array) -> Array:
    """`w` `[..., O, I]` times `s`, `[I]` or one an expert."""
    s = s[..., None, :] if s.ndim > 1 else s
    return (w.astype(jnp.float32) * jnp.broadcast_to(s, w.shape)).astype(w.dtype)


def _divided(p: dict[str, Any], fold: Fold, s: Array, offset: float) -> dict[str, Array]:
    """The source, and its bias, so that channels come out divided by `s`."""
    w, bias = p[fold.source], p.get(f"{fold.source}_bias")
    of_rows, exactly = jnp.broadcast_to(s if fold.is_norm else s[..., None], w.shape), w.astype(jnp.float32)
    new = {fold.source: (exactly + offset) / of_rows - offset if fold.is_norm else exactly / of_rows}
    if bias is not None:
        new[f"{fold.source}_bias"] = bias.astype(jnp.float32) / jnp.broadcast_to(s, bias.shape)
    return {n: x.astype(p[n].dtype) for n, x in new.items()}
