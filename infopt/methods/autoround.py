"""Learned rounding: a layer at a time, whether each value goes up or down, by the sign of a gradient."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, final

import jax
import jax.numpy as jnp
import numpy as np

from infopt.errors import InfoptError
from infopt.methods.base import (
    Method,
    check_reading,
    check_start,
    refuse_rounded_inputs,
    run_layers,
    text_of,
    to_nearest,
)
from infopt.methods.freed import give_back
from infopt.methods.kept import Kept
from infopt.methods.layers import Layer, Run
from infopt.model import Model, Weights
from infopt.qtensor import Format, Grid, QTensor, dequantize_array, in_groups, on_grid
from infopt.spec import Spec
from infopt.typing import Array

LEAST = 0.5
"""Of its range a group keeps at least this share."""
PARTS = 5
"""Parts that the steps are done in; after each, all windows are read."""
WITHIN = 0.49
"""How near to half a level a value may begin: it is then rounded as the start rounded it."""


@final
@dataclasses.dataclass(frozen=True, repr=False)
class AutoRound(Method):
    start: Method | None = None
    steps: int = 100
    batch: int = 4
    rate: float | None = None
    seed: int = 0

    @property
    def first(self) -> Method | None:
        return self.start

    def check(self, spec: Spec, formats: Mapping[str, Format]) -> None:
        super().check(spec, formats)
        if any(not n.startswith("layers.") for n in formats):
            raise InfoptError(
                f"{self!r} learns no head.",
                why="what it gives, for all that is read, would have to be held: a number a word and token.",
                fix="a quantize(where='head') of its own, with ip.gptq(), say",
            )
        refuse_rounded_inputs(self, spec, formats)
        for name, form in formats.items():
            if form.row.levels is not None or form.row.dtype is not None or form.row.tensor:
                raise InfoptError(
                    f"{self!r}: levels of {form.name}, in which {name} is to be stored, are no whole numbers.",
                    why="up and down are a step of one.",
                    fix="a format of whole levels, as int4; or another method",
                )

    def round(
        self, model: Model, weights: Weights, formats: Mapping[str, Format], clip: str | None, kept: Kept
    ) -> dict[str, Any]:
        begun: dict[str, Any] = {}
        if self.start is not None:
            if set(self.start.gives(model, formats)) != set(formats):
                raise InfoptError(
                    f"{self!r} cannot start from {self.start!r}.",
                    why="that changes what is rounded, too, and not only how.",
                    fix="start=ip.gptq(), or none",
                )
            begun = self.start.rounded(model, weights, formats, clip)

        def change(layer: Layer) -> dict[str, QTensor]:
            own = {n: formats[layer.prefix + n] for n in layer.names}
            first = {n: begun.get(layer.prefix + n) for n in own}
            return self._learned(layer, own, {n: q or to_nearest(layer.p[n], own[n], clip) for n, q in first.items()})

        return run_layers(self, model, weights, formats, kept, change, targets=True)

    def _learned(self, layer: Layer, formats: dict[str, Format], begun: dict[str, QTensor]) -> dict[str, QTensor]:
        assert layer.targets is not None
        update, error = _programs(layer.run, tuple(sorted(formats.items())))
        points = {n: _point(layer.p[n], q, formats[n]) for n, q in begun.items()}
        free = {n: Free(jnp.zeros_like(p.level), jnp.ones_like(p.scale)) for n, p in points.items()}
        pairs = list(zip(layer.inputs, layer.targets, strict=True))
        windows = [(i, row) for i, (x, _) in enumerate(pairs) for row in range(len(x))]
        rate, size, part = self.rate or 1 / self.steps, min(self.batch, len(windows)), max(self.steps // PARTS, 1)

        def of(found: dict[str, QTensor]) -> float:
            return sum(float(error(layer.p | found, x, y)) for x, y in pairs)

        least, best = of(begun), begun
        if not math.isfinite(least):
            raise InfoptError(
                f"{self!r}: what {layer.prefix.strip('.')} gives cannot be compared: its squares are not finite.",
                why="a weight is NaN or infinite, or what it makes leaves what its type can hold.",
                fix="model.audit(params), to see weights; another method",
            )
        give_back(())
        for step in range(1, self.steps + 1):
            chosen = np.random.default_rng((self.seed, step)).choice(len(windows), size, replace=False)
            own = [(pairs[i][0][row], pairs[i][1][row]) for i, row in (windows[at] for at in chosen)]
            x, y = (jnp.stack(rows) for rows in zip(*own, strict=True))
            now = jnp.asarray(rate * (1 - (step - 1) / self.steps), jnp.float32)
            free = update(layer.p, points, free, x, y, now)
            if step % part == 0 or step == self.steps:
                found = {n: _stored(layer.p[n], points[n], free[n], formats[n]) for n in points}
                error_now = of(found)
                if not math.isfinite(error_now):
                    warnings.warn(
                        f"{self!r} left what numbers can hold in {layer.prefix.strip('.')} before step {step}: the "
                        "best state before it is kept; a smaller rate=... may go further",
                        stacklevel=2,
                    )
                    break
                if error_now < least:
                    least, best = error_now, found
                give_back(free)
        return best


class Point(NamedTuple):
    """Where a matrix begins, in groups `[..., groups, group]` and numbers a group `[..., groups]`.

    Args:
      level: of each value before it is rounded, in steps of the scale.
      scale, low: float32, as they are stored; low is None where nothing is added.
      zero: what levels are counted from, where formats store it.
    """

    level: Array
    scale: Array
    low: Array | None
    zero: Array | None


class Free(NamedTuple):
    """What is learned: added to each level, and the share of its range that a group keeps."""

    up: Array
    share: Array


@functools.partial(jax.jit, static_argnums=2)
def _point(w: Array, q: QTensor, form: Format) -> Point:
    def steps(x: Array) -> Array:
        x = in_groups(x, form, 2)[0]
        if low is not None:
            x = x - low[..., None]
        return x / jnp.where(scale == 0, 1, scale)[..., None]

    scale = q.scale.astype(jnp.float32)
    low = None if q.minimum is None else q.minimum.astype(jnp.float32)
    code = jnp.round(steps(dequantize_array(q)))
    level = code + jnp.clip(steps(w.astype(jnp.float32)) - code, -WITHIN, WITHIN)
    return Point(level, scale, low, None if q.zero is None else q.zero.astype(jnp.float32))


def _kept(x: Array, form: Format) -> Array:
    """x as it is stored, with the gradient of x."""
    return x + jax.lax.stop_gradient(x.astype(form.scale).astype(jnp.float32) - x)


def _levels(point: Point, free: Free, form: Format) -> Array:
    level, zero = point.level + free.up, 0 if point.zero is None else point.zero[..., None]
    level = level + jax.lax.stop_gradient(jnp.round(level) - level)
    return jnp.clip(level + zero, form.row.low, form.row.high) - zero


def _values(w: Array, point: Point, free: Free, form: Format) -> Array:
    values = _levels(point, free, form) * _kept(point.scale * free.share, form)[..., None]
    if point.low is not None:
        values = values + _kept(point.low * free.share, form)[..., None]
    return values.reshape(*values.shape[:-2], -1)[..., : w.shape[-1]].astype(w.dtype)


@functools.partial(jax.jit, static_argnums=3)
def _stored(w: Array, point: Point, free: Free, form: Format) -> QTensor:
    level, stored = _levels(point, free, form), {"scale": (point.scale * free.share).astype(form.scale)}
    code = level + form.row.zero
    if point.low is not None:
        stored["minimum"] = (point.low * free.share).astype(form.scale)
    if point.zero is not None:
        code, stored["zero"] = level + point.zero[..., None], point.zero.astype(jnp.uint8)
    grid = Grid(stored, point.scale)
    return on_grid(jnp.round(code).astype(form.row.code_dtype), grid, form, w.astype(jnp.float32), 2)


@functools.lru_cache(maxsize=64)
def _programs(run: Run, formats: tuple[tuple[str, Format], ...]) -> tuple[Callable[..., Any], Callable[..., Array]]:
    """A step of learning, and the squared error of a layer's result."""

    def error(p: dict[str, Any], x: Array, y: Array) -> Array:
        return jnp.sum(jnp.square((run(p, x) - y).astype(jnp.float32)))

    def update(
        p: dict[str, Any], points: dict[str, Point], free: dict[str, Free], x: Array, y: Array, rate: Array
    ) -> dict[str, Free]:
        def loss(free: dict[str, Free]) -> Array:
            return error(p | {n: _values(p[n], points[n], free[n], f) for n, f in formats}, x, y)

        def moved(old: Free, slope: Free) -> Free:
            up, share = (a - rate * jnp.sign(b) for a, b in zip(old, slope, strict=True))
            return Free(jnp.clip(up, -0.5, 0.5), jnp.clip(share, LEAST, 1))

        slopes = jax.grad(loss)(free)
        return {n: moved(free[n], slopes[n]) for n in free}

    return jax.jit(update), jax.jit(error)


def autoround(
    text: Any = None,
    tokens: int | None = None,
    length: int = 512,
    start: Method | None = None,
    steps: int = 100,
    batch: int = 4,
    rate: float | None = None,
    seed: int = 0,
) -> AutoRound:
    """Learn for each value whether it is rounded up or down, and for each group the range it keeps, a layer at a time.

    Of a level u = w / scale the code is round(u + v), |v| <= 1/2, and the scale is s times the start's, 1/2 <= s <= 1.
    By the sign of their gradients, v and s lessen the squared distance of what the layer gives, on what the rounded
    layers before it give, from what it gave in the unrounded stack. After each fifth of the steps that is measured on
    all that is read, and the best stays, be it the start.

    Source: Cheng et al. 2023, "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs"
    (AutoRound), with one share for both ends of a range.

    Args:
      text, tokens, length: what is read, as for `gptq`.
      start: what chooses the codes to begin with; by default rounding to nearest.
      steps: updates a layer.
      batch: windows an update.
      rate: of the first step, by which v and s move; it falls to 0 in a straight line. 1 / steps by default.
      seed: of the order of windows.

    Raises:
      InfoptError: numbers that are none; or, when params are converted, levels that are no whole numbers.

    >>> import infopt as ip
    >>> ip.quantize(bits=3, group=32, method=ip.autoround(steps=50))
    quantize(bits=3, group=32, method=autoround(steps=50))
    """
    check_reading("autoround", tokens=tokens, length=length, steps=steps, batch=batch)
    check_start("autoround", start, seed)
    if rate is not None and (isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate <= 0.5):
        raise InfoptError(f"autoround(rate={rate!r}).", why="it is a share of a level.", fix="rate=0.01, say")
    return AutoRound(
        text_of(text, "autoround"), tokens, length, start, steps, batch, None if rate is None else float(rate), seed
    )
