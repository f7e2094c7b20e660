"""Distilled scales: of a rounded model, scales and minima trained until its words are those of the model it was."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, final

import jax
import jax.numpy as jnp
import numpy as np
import optax

from infopt import ops
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
from infopt.methods.layers import Layer, Run, embedded, last_of, layer_of, programs, scannable, top_of
from infopt.model import Family, Model, Weights
from infopt.progress import bar
from infopt.qtensor import Format, QTensor, dequantize_array, measured
from infopt.spec import Spec
from infopt.typing import Array

ROWS = 64
"""Tokens whose logits are there at once."""
HELD = 8
"""Of so many windows one is held back, to choose the rate and the end by."""
TOKENS = 512
"""Tokens that go through at once, at most; one window at least."""
PARTS = 6
"""Parts that the steps are done in; after each, what is held back is read."""


@final
@dataclasses.dataclass(frozen=True, repr=False)
class Distilled(Method):
    start: Method | None = None
    steps: int = 60
    rates: tuple[float, ...] = (0.0003, 0.001)
    batch: int = 1
    seed: int = 0

    def gives(self, model: Model, formats: Mapping[str, Format]) -> list[str]:
        return list(formats) if self.start is None else self.start.gives(model, formats)

    @property
    def first(self) -> Method | None:
        return self.start

    def check(self, spec: Spec, formats: Mapping[str, Format]) -> None:
        super().check(spec, formats)
        refuse_rounded_inputs(self, spec, formats)
        for name, form in formats.items():
            if form.row.tensor or form.row.rule == "power" or form.scale not in ("float16", "float32", "bfloat16"):
                raise InfoptError(
                    f"{self!r}: scales of {form.name}, in which {name} is to be stored, cannot be trained.",
                    why=f"they are {form.scale}: the next one is too far.",
                    fix="a format whose scales are float16, as int4 or nf4; or another method",
                )

    def round(
        self, model: Model, weights: Weights, formats: Mapping[str, Format], clip: str | None, kept: Kept
    ) -> dict[str, Any]:
        tokens = self.windows(model)
        held = len(tokens) // HELD or 1
        if len(tokens) < 2:
            raise InfoptError(
                f"{self!r} has {len(tokens)} window of tokens to read.",
                why="some are trained on, and others held back, to choose the learning rate by and when to stop.",
                fix="a longer text, more tokens=, or a shorter length=",
            )
        if self.start is None:  # layer by layer, which says of inputs that they are always 0

            def nearest(layer: Layer) -> dict[str, Any]:
                return {n: to_nearest(layer.p[n], formats[layer.prefix + n], clip) for n in layer.names}

            begun = run_layers(self, model, weights, formats, kept, nearest)
        else:
            begun = self.start.rounded(model, weights, formats, clip)
        packed = {n: q for n, q in begun.items() if isinstance(q, QTensor)}
        found = kept.get("changes", {n: _unchanged(q) for n, q in packed.items()})
        if found is None:
            found = _Distillation(self, model.spec, weights, begun, tokens[:-held], tokens[-held:], kept).trained()
            kept.put("changes", found)
        trained = {n: _changed(q, found[n], stored=True) for n, q in packed.items()}
        if set(self.gives(model, formats)) == set(formats):  # else what was rounded is not in `weights`
            trained = {n: _measured(q, weights[n], begun[n].error) for n, q in trained.items()}
        return begun | trained


@jax.jit
def _measured(q: QTensor, w: Array, before: Array) -> QTensor:
    found = measured(q, w)
    return dataclasses.replace(found, error=jnp.copysign(found.error, before))


class Change(NamedTuple):
    """Of a matrix: its scales are multiplied by 1 + `scale`, to its minima `minimum` scales are added."""

    scale: Array
    minimum: Array | None


class _State(NamedTuple):
    changes: dict[str, Change]
    moments: Any
    kl: Array


class _Distillation:
    def __init__(
        self,
        how: Distilled,
        spec: Spec,
        weights: Weights,
        begun: dict[str, Any],
        tokens: np.ndarray,
        held: np.ndarray,
        kept: Kept,
    ) -> None:
        self.how, self.spec, self.kept = how, spec, kept
        self.tokens = tokens
        self.student = weights.made(begun, lambda name: begun[name])
        self.begun = {n: q for n, q in begun.items() if isinstance(q, QTensor)}
        self.top = top_of(spec, self.student)
        self.runs = [programs(spec, i % spec.config.period, spec.window[i])[0] for i in range(spec.config.layers)]
        self.programs = [_trained(run) for run in self.runs]
        self.loss = _loss(spec, scannable(spec))
        top = top_of(spec, weights)
        self.plain_head = top.get("head", top["embed"])
        self.rows = np.concatenate([tokens, held])
        xs = embedded(spec, top, self.rows, 1)
        for i in range(spec.config.layers):
            p = layer_of(spec, weights, i)
            xs = [self.runs[i](p, x) for x in xs]
        hidden = last_of(spec)
        self.aims = np.concatenate([np.asarray(hidden(top, x)) for x in xs])
        del xs
        give_back(())

    def trained(self) -> dict[str, Change]:
        how, zero = self.how, {n: _unchanged(q) for n, q in self.begun.items()}
        adam = {rate: _adam(rate, how.steps) for rate in how.rates}
        part = max(how.steps // PARTS, 1)
        ends = [*range(part, how.steps, part), how.steps]
        with bar("distilled", how.steps + part * (len(how.rates) - 1)) as show:
            first = self._kl(zero)
            if not (bool(jnp.isfinite(first)) and np.isfinite(self.aims).all()):
                raise InfoptError(
                    f"{how!r}: what the stack gives for its text is not finite.",
                    why="a weight is NaN or infinite, or what it makes leaves what its type can hold.",
                    fix="model.audit(params), to see weights; params in float32, where float16 is too narrow",
                )

            def tried(i: int) -> _State:
                rate = how.rates[i]
                state = _State(zero, adam[rate].init(zero), first)
                state = self._steps(f"rate-{i}", state, adam[rate], 0, ends[0])
                show(part * (i + 1), f"distilled, KL {float(first):.4f} to {float(state.kl):.4f}")
                return state

            best, state = min(enumerate(map(tried, range(len(how.rates)))), key=lambda each: float(each[1].kl))
            rate, found, worse = how.rates[best], (first, zero), 0
            for begin, end in zip(ends, [*ends[1:], None]):
                if not bool(jnp.isfinite(state.kl)):
                    warnings.warn(
                        f"{how!r} left what numbers can hold before step {begin}: the best state before it is kept; "
                        "smaller rates=... may go further",
                        stacklevel=2,
                    )
                    break
                worse = 0 if state.kl < found[0] else worse + 1
                if not worse:
                    found = state.kl, state.changes
                if end is None or worse == 2:
                    break
                state = self._steps(f"rate-{best}-to-{end}", state, adam[rate], begin, end)
                show(end + part * (len(how.rates) - 1), f"distilled, KL {float(first):.4f} to {float(found[0]):.4f}")
        return found[1]

    def _steps(self, name: str, state: _State, optimiser: Any, begin: int, end: int) -> _State:
        """The state after steps `begin` to `end`; its KL is infinite where one was not finite."""
        if (done := self.kept.get(name, state)) is not None:
            return done
        changes, moments = state.changes, state.moments
        for step in range(begin, end):
            rng = np.random.default_rng((self.how.seed, step))
            chosen = rng.choice(len(self.tokens), min(self.how.batch, len(self.tokens)), replace=False)
            loss, slopes = self._slopes(changes, sorted(int(i) for i in chosen))
            if not bool(jnp.isfinite(loss)):
                return _State(changes, moments, jnp.asarray(jnp.inf, jnp.float32))
            changes, moments = optimiser.step(changes, moments, slopes)
        new = _State(changes, moments, self._kl(changes))
        self.kept.put(name, new)
        return new

    def _layers(self, changes: dict[str, Change]) -> Any:
        for i, programs_of in enumerate(self.programs):
            prefix = f"layers.{i}."
            own = {n.removeprefix(prefix): c for n, c in changes.items() if n.startswith(prefix)}
            yield prefix, programs_of, layer_of(self.spec, self.student, i), own

    def _through(self, changes: dict[str, Change], windows: list[int]) -> tuple[list[Array], Any, Any, Array]:
        """What goes into each layer, and into the head, for some windows; the head, with its changes; and the aims."""
        xs = embedded(self.spec, self.top, self.rows[windows], len(windows))
        for _, (run, _), p, own in self._layers(changes):
            xs.append(run(p, own, xs[-1]))
        give_back(xs[-1])
        return xs, self.top.get("head", self.top["embed"]), changes.get("head"), jnp.asarray(self.aims[windows])

    def _at_once(self, windows: Sequence[int]) -> list[list[int]]:
        """The windows, as many at a time as may be, in parts of one size but for the last."""
        size = max(TOKENS // self.rows.shape[1], 1)
        return [list(windows[at : at + size]) for at in range(0, len(windows), size)]

    def _kl(self, changes: dict[str, Change]) -> Array:
        held, found = range(len(self.tokens), len(self.rows)), []
        for some in self._at_once(held):
            xs, head, own, aims = self._through(changes, some)
            found.append(self.loss[0](self.top, head, own, xs[-1], self.plain_head, aims) * len(some))
            del xs  # all layers' inputs, before the next window's
        kl = jnp.sum(jnp.stack(found)) / len(held)
        return jnp.where(jnp.isfinite(kl), kl, jnp.inf)

    def _slopes(self, changes: dict[str, Change], windows: list[int]) -> tuple[Array, dict[str, Change]]:
        total = None
        for some in self._at_once(windows):
            xs, head, own, aims = self._through(changes, some)
            loss, (of_head, dx) = self.loss[1](self.top, head, own, xs.pop(), self.plain_head, aims)
            give_back(dx)
            found = {} if own is None else {"head": of_head}
            for prefix, (_, back), p, mine in reversed(list(self._layers(changes))):
                slopes, dx = back(p, mine, xs.pop(), dx)
                found |= {prefix + n: slope for n, slope in slopes.items()}
            total = _added(total, (loss, found), len(some) / len(windows))
            give_back(total)
        assert total is not None
        return total


@jax.jit
def _added(total: Any, more: Any, share: Any) -> Any:
    mine = jax.tree.map(lambda x: x * share, more)
    return mine if total is None else jax.tree.map(jnp.add, total, mine)


class _Adam(NamedTuple):
    init: Callable[..., Any]
    step: Callable[..., Any]


@functools.lru_cache(maxsize=16)
def _adam(rate: float, steps: int) -> _Adam:
    """Adam whose rate falls along a cosine: its first moments, and a step's changes and moments."""
    own = optax.adam(optax.cosine_decay_schedule(rate, steps), b2=0.95)

    def step(changes: Any, moments: Any, slopes: Any) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"):
            updates, moments = own.update(slopes, moments)
            return optax.apply_updates(changes, updates), moments

    return _Adam(own.init, jax.jit(step))


def _unchanged(q: QTensor) -> Change:
    none = None if q.minimum is None else jnp.zeros(q.minimum.shape, jnp.float32)
    return Change(jnp.zeros(q.scale.shape, jnp.float32), none)


@functools.partial(jax.jit, static_argnames="stored")
def _changed(q: QTensor, change: Change, *, stored: bool = False) -> QTensor:
    """With other scales and minima: as they are stored, or in float32 for gradients, of the same values."""

    def kept(x: Array, like: Array) -> Array:
        new = x.astype(like.dtype)
        return new if stored else x + jax.lax.stop_gradient(new.astype(jnp.float32) - x)

    scale = jnp.asarray(q.scale).astype(jnp.float32)
    parts: dict[str, Any] = {"scale": kept(scale * (1 + change.scale), q.scale)}
    if change.minimum is not None:
        parts["minimum"] = kept(jnp.asarray(q.minimum).astype(jnp.float32) + change.minimum * scale, q.minimum)
    return dataclasses.replace(q, **parts)


def _dense(p: dict[str, Any], changes: dict[str, Change]) -> dict[str, Any]:
    return p | {n: dequantize_array(_changed(p[n], change)) for n, change in changes.items()}


@functools.lru_cache(maxsize=64)
def _trained(run: Run) -> tuple[Run, Callable[..., Any]]:
    """A layer with changed scales `(p, changes, x) -> x`; and `(p, changes, x, slope of x) -> slopes of both`."""

    def forward(p: dict[str, Any], changes: dict[str, Change], x: Array) -> Array:
        return run(_dense(p, changes), x)

    def back(p: dict[str, Any], changes: dict[str, Change], x: Array, dy: Array) -> Any:
        return jax.vjp(functools.partial(forward, p), changes, x)[1](dy)

    return jax.jit(forward), jax.jit(back)  # type: ignore[return-value]


@functools.lru_cache(maxsize=16)
def _loss(spec: Spec, family: Family) -> tuple[Callable[..., Array], Callable[..., Any]]:
    """Mean over tokens of KL(what the model was || what it is); and the same with slopes of the head and its input."""
    assert family.final is not None
    final = functools.partial(family.final, spec.config)

    def words(hidden: Array, table: Any) -> Array:
        logits = ops.linear(hidden, table).astype(jnp.float32)
        return jax.nn.log_softmax(logits if family.logits is None else family.logits(spec.config, logits))

    def of_rows(change: Any, now: Array, head: Any, aim: Array, plain_head: Any) -> Array:
        table = head if change is None else _dense({"head": head}, {"head": change})["head"]
        was = words(aim, plain_head)
        return jnp.sum(jnp.exp(was) * (was - words(now, table)))

    def in_parts(hidden: Array) -> Array:
        """`ROWS` tokens at a time; the last part is filled up with zeros, for which all words are as likely in both."""
        count = hidden.size // hidden.shape[-1]
        rows = min(ROWS, count)
        padded = jnp.pad(hidden.reshape(count, -1), ((0, -count % rows), (0, 0)))
        return padded.reshape(-1, rows, hidden.shape[-1])

    def loss(top: Any, head: Any, change: Any, x: Array, plain_head: Any, aim: Array) -> Array:
        def add(total: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
            return total + of_rows(change, part[0], head, part[1], plain_head), None

        parts = in_parts(final(top, x)), in_parts(aim)
        total, _ = jax.lax.scan(add, jnp.zeros((), jnp.float32), parts)
        return total / (aim.size // aim.shape[-1])

    def slopes(top: Any, head: Any, change: Any, x: Array, plain_head: Any, aim: Array) -> Any:
        """Taken within the loop over parts: through it, the tables would be turned round, each a copy."""

        def add(totals: Any, part: tuple[Array, Array]) -> tuple[Any, Array]:
            one, (of_change, of_now) = jax.value_and_grad(of_rows, (0, 1))(change, part[0], head, part[1], plain_head)
            return jax.tree.map(jnp.add, totals, (one, of_change)), of_now

        hidden, back = jax.vjp(functools.partial(final, top), x)
        start = jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, change)
        (total, of_change), of_now = jax.lax.scan(add, start, (in_parts(hidden), in_parts(aim)))
        count = aim.size // aim.shape[-1]
        of_hidden = of_now.reshape(-1, of_now.shape[-1])[:count].reshape(hidden.shape) / count
        return total / count, (jax.tree.map(lambda y: y / count, of_change), back(of_hidden)[0])

    return jax.jit(loss), jax.jit(slopes)


def distilled(
    text: Any = None,
    tokens: int | None = None,
    length: int = 512,
    start: Method | None = None,
    steps: int = 60,
    rates: Any = (0.0003, 0.001),
    batch: int = 1,
    seed: int = 0,
) -> Distilled:
    """Train the scales and minima of a rounded model until its next words are as likely as those of the model it was.

    Codes stay. What falls, by Adam, is the mean over tokens of KL(softmax(z) || softmax(z')), z the logits of the stack
    before and z' those of the rounded one; a group's scale is multiplied by 1 + a, its minimum moved by b scales. One
    window in eight is held back: on these the rates are compared after a sixth of the steps, and the best state stays.
    From a start that scales channels, as AWQ, the error that an audit shows of a matrix stays that of the start.

    Source: mlx-lm's DWQ (Hannun 2025, "Distilled weight quantization"), which trains the same numbers.

    Args:
      text, tokens, length: what is read, as for `gptq`.
      start: what chooses the codes, and the scales to begin with; by default rounding to nearest.
      steps: updates, of those that the chosen rate makes.
      rates: the learning rates to choose from. From GPTQ a smaller one serves than from rounding.
      batch: windows an update.
      seed: of the order of windows.

    Raises:
      InfoptError: numbers that are none; or, when params are converted, scales that are powers of two.

    >>> import infopt as ip
    >>> ip.quantize(bits=4, group=64, method=ip.distilled(start=ip.gptq(), steps=120))
    quantize(bits=4, group=64, method=distilled(start=gptq(), steps=120))
    """
    check_reading("distilled", tokens=tokens, length=length, steps=steps, batch=batch)
    check_start("distilled", start, seed)
    given = tuple(rates) if isinstance(rates, list | tuple) else (rates,)
    if not given or not all(isinstance(r, int | float) and not isinstance(r, bool) and 0 < r < 1 for r in given):
        raise InfoptError(
            f"distilled(rates={rates!r}).", why="they are learning rates.", fix="rates=(0.0003, 0.001), say"
        )
    return Distilled(text_of(text, "distilled"), tokens, length, start, steps, tuple(map(float, given)), batch, seed)
