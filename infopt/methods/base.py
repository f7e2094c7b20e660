"""What a method is: it rounds a stack's matrices, and has seen what goes into them."""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Mapping
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np

from infopt import texts
from infopt.errors import InfoptError
from infopt.methods.kept import Kept, kept_for
from infopt.methods.layers import Layer, by_layer, scannable
from infopt.model import Model, Weights, check_length, shapes
from infopt.qtensor import Format, QTensor, quantize_array
from infopt.spec import Spec
from infopt.typing import Array

TOKENS = 16384
"""That are read by default, of a text that has as many."""


@dataclasses.dataclass(frozen=True)
class Method(abc.ABC):
    """A way of rounding, as a value.

    Args:
      text: what the stack reads meanwhile: a text, or token ids; None is the calibration split of CPython's topics.
      tokens: how many of its tokens are read, in whole windows spread over it; None: 16,384, or all that it has.
      length: tokens that are read at a time.
    """

    text: str | tuple[int, ...] | None = None
    tokens: int | None = None
    length: int = 512

    @property
    def first(self) -> Method | None:
        """The method that this one goes on from."""
        return None

    @property
    def name(self) -> str:
        """The factory's, as in a stack's text."""
        return type(self).__name__.lower()

    def gives(self, model: Model, formats: Mapping[str, Format]) -> list[str]:
        """The logical names of what `round` gives: those of `formats`, and of the dense weights that change too."""
        return list(formats)

    def check(self, spec: Spec, formats: Mapping[str, Format]) -> None:
        """Raise where the stack cannot be run a layer at a time, or nothing can be chosen in a format."""
        scannable(spec)
        if self.first is not None:
            self.first.check(spec, formats)
        if tables := sorted(n for n in formats if not n.startswith("layers.") and n != "head"):
            raise InfoptError(
                f"{self!r}: nothing is known of what goes into {', '.join(tables)}.",
                why="statistics are of the inputs of linear layers, and it is a table.",
                fix="a quantize(where=...) of its own for it, without a method",
            )
        for name, form in formats.items():
            if form.row.rule == "none":
                raise InfoptError(
                    f"{self!r}: {form.name}, in which {name} is to be stored, has no grid.",
                    why="a float is rounded best to the nearest one.",
                    fix="quantize without a method for it",
                )

    @abc.abstractmethod
    def round(
        self, model: Model, weights: Weights, formats: Mapping[str, Format], clip: str | None, kept: Kept
    ) -> dict[str, Any]:
        """What takes the place of the weights that `gives` names; `model` is the stack before it."""

    @final
    def rounded(
        self, model: Model, weights: Weights, formats: Mapping[str, Format], clip: str | None
    ) -> dict[str, Any]:
        """The same, out of what was kept where it was computed before."""
        read = hashlib.sha256(b"".join(row.tobytes() for row in self.reads(model))).hexdigest()
        dynamic = {n: dataclasses.replace(f, static=False) for n, f in formats.items()}
        kept = kept_for(f"{self!r} {read}", model.spec, weights, dynamic, clip, jax.default_backend())
        found = self.round(model, weights, dynamic, clip, kept)
        static = {n: f for n, f in formats.items() if f.static}
        inputs = {n: jax.ShapeDtypeStruct((*shapes(model.spec)[n][:-2], 1, 1), jnp.float32) for n in static}
        if static and (scales := kept.get("static", inputs)) is None:
            scales = self._static(model, weights.made(list(found), found.__getitem__), static)
            kept.put("static", scales)
        return found | {n: dataclasses.replace(found[n], format=f, input=scales[n]) for n, f in static.items()}

    def _static(self, model: Model, weights: Weights, formats: Mapping[str, Format]) -> dict[str, Array]:
        """Of each of these matrices, rounded by now, the greatest value that goes in."""

        def change(layer: Layer) -> dict[str, Any]:
            found = {}
            for n, peak in layer.peaks.items():
                if not bool(jnp.all(jnp.any(peak, -1))):  # an expert's too: a scale of 0 would silence it
                    raise nothing_went_in(self, layer.prefix + n)
                most = jnp.max(peak, -1)[..., None, None]
                found[n] = dataclasses.replace(layer.p[n], format=formats[layer.prefix + n], input=most)
            return found

        made = by_layer(model.spec, weights, self.windows(model), set(formats), change, what="static scales")
        return {n: q.input for n, q in made.items()}

    def digest(self) -> str:
        """Of all texts that are read: with the repr, it says what was computed."""
        own = self._text()
        return own if self.first is None else texts.digest(own + self.first.digest())

    def _text(self) -> str:
        if isinstance(self.text, tuple):
            return hashlib.sha256(np.asarray(self.text, "<i8").tobytes()).hexdigest()[:12]
        return texts.digest(texts.topics("calibration") if self.text is None else self.text)

    def __repr__(self) -> str:
        given = [
            f"{f.name}={self._text() if f.name == 'text' else getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        ]
        return f"{self.name}({', '.join(given)})"

    def reads(self, model: Model) -> list[np.ndarray]:
        """All that is read, rows of token ids; a method that starts from another reads that one's text too."""
        return [*self.windows(model), *([] if self.first is None else self.first.reads(model))]

    def windows(self, model: Model) -> np.ndarray:
        """The tokens `[N, length]` that are read, equally spaced in the text.

        Raises:
          InfoptError: the text is a digest, it or `tokens` is less than one window, it holds tokens that the model has
            not, or a tokenizer is lacking.
          PromptError: windows are longer than the model's context.
        """
        if isinstance(self.text, str) and re.fullmatch("[0-9a-f]{12}", self.text):
            raise InfoptError(
                f"{self.name} was given {self.text!r} to read, the digest of a text.",
                why="so a stack says which text it read; the text itself is not in it.",
                fix=f"the text, or its token ids: ip.{self.name}(text)",
            )
        check_length(model.spec, self.length, f"windows of {self.length} tokens to calibrate on", "a shorter length=")
        if isinstance(self.text, tuple):
            ids = np.asarray(self.text, np.int64)
        elif model.tokenizer is None:
            raise InfoptError(
                f"{self!r} reads a text, and the model has no tokenizer.",
                why="a text becomes token ids by the tokenizer that the model was trained with.",
                fix=f"token ids: {self.name}(tokens_of_your_text)",
            )
        else:
            text = texts.topics("calibration") if self.text is None else self.text
            ids = np.asarray(model.tokenizer.encode(text), np.int64)
        if self.tokens is not None and self.tokens < self.length:
            raise InfoptError(
                f"{self!r} reads less than a window.",
                why=f"{self.tokens} tokens were asked for, and one window holds {self.length}.",
                fix=f"length={self.tokens}, or more tokens=",
            )
        if self.tokens is not None and len(ids) < self.tokens:
            raise InfoptError(
                f"{self!r}: the text has {len(ids)} tokens.",
                why=f"it was to read {self.tokens}.",
                fix=f"a longer text, or tokens={len(ids)}",
            )
        if len(ids) < self.length:
            raise InfoptError(
                f"{self!r}: the text has {len(ids)} tokens.",
                why=f"one window holds {self.length}.",
                fix="a longer text, or length=..., shorter windows",
            )
        vocab = model.spec.config.vocab
        if not 0 <= ids.min() <= ids.max() < vocab:
            raise InfoptError(
                f"{self!r}: the text has a token {ids.min() if ids.min() < 0 else ids.max()}.",
                why=f"the model has {vocab}, from 0 on: these are another tokenizer's.",
                fix="ids made by the model's tokenizer",
            )
        count = min(max((self.tokens or TOKENS) // self.length, 1), len(ids) // self.length)
        starts = np.linspace(0, len(ids) - self.length, count).astype(int)
        return ids[starts[:, None] + np.arange(self.length)].astype(np.int32)


@dataclasses.dataclass(frozen=True, repr=False)
class ByLayer(Method):
    """A method that changes one layer after the other, each on what the changed ones before it give."""

    @abc.abstractmethod
    def change(self, layer: Layer, formats: Mapping[str, Format], clip: str | None) -> dict[str, Any]:
        """What takes the place of a layer's weights, by name within it; so are `formats`."""

    def round(
        self, model: Model, weights: Weights, formats: Mapping[str, Format], clip: str | None, kept: Kept
    ) -> dict[str, Any]:
        def change(layer: Layer) -> dict[str, Any]:
            return self.change(layer, {n: formats[layer.prefix + n] for n in layer.names}, clip)

        return run_layers(self, model, weights, formats, kept, change)


def run_layers(
    method: Method,
    model: Model,
    weights: Weights,
    formats: Mapping[str, Format],
    kept: Kept,
    change: Callable[[Layer], dict[str, Any]],
    targets: bool = False,
) -> dict[str, Any]:
    """`by_layer` over what the method reads, which keeps all that it gives."""
    like = {n: _like_rounded(shapes(model.spec)[n], f) for n, f in formats.items()}
    for n in method.gives(model, formats):
        if n not in like:
            like[n] = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), weights[n])
    return by_layer(
        model.spec, weights, method.windows(model), set(formats), change,
        what=method.name, targets=targets, kept=kept, like=like,
    )  # fmt: skip


@functools.lru_cache(maxsize=256)
def _like_rounded(shape: tuple[int, ...], form: Format) -> QTensor:
    """The shapes and types of a matrix in a format."""
    return jax.eval_shape(lambda w: quantize_array(w, form, 2), jax.ShapeDtypeStruct(shape, jnp.float32))


@functools.partial(jax.jit, static_argnums=(1, 2))
def to_nearest(w: Any, form: Format, clip: str | None) -> QTensor:
    """A matrix rounded to the nearest values."""
    return quantize_array(w, form, 2, clip)


def text_of(text: Any, what: str) -> str | tuple[int, ...] | None:
    """What a method was given to read, hashable.

    Raises:
      InfoptError: it is neither texts nor token ids.
    """
    if text is None or isinstance(text, str):
        return text
    if isinstance(text, list | tuple) and text and all(isinstance(each, str) for each in text):
        return "\n\n".join(text)
    try:
        ids: Any = np.asarray(text)
    except ValueError:  # rows of different lengths
        ids = np.zeros((0, 0), np.int32)
    if ids.ndim != 1 or not ids.size or ids.dtype.kind not in "iu" or ids.max() > np.iinfo(np.int64).max:
        raise InfoptError(
            f"{what} was given {type(text).__name__} to read.",
            why="a method reads a text, as the model would.",
            fix="a text, several, or one row of token ids; None is ip.texts.topics('calibration')",
        )
    return tuple(ids.tolist())


def check_reading(what: str, **counts: Any) -> None:
    """Raise unless the numbers count something: a `length` at least 2 tokens."""
    for name, value in counts.items():
        if value is None and name == "tokens":
            continue
        least = 2 if name == "length" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InfoptError(
                f"{what}({name}={value!r}).", why=f"it counts {_COUNTED.get(name, 'tokens')}.", fix=f"{name} >= {least}"
            )


def check_start(what: str, start: Any, seed: Any) -> None:
    """Raise unless what learning begins with is a method, or none, and its windows' order has a seed."""
    if start is not None and not isinstance(start, Method):
        raise InfoptError(f"{what}(start={start!r}).", why="a method is a value.", fix="start=ip.gptq(), say")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise InfoptError(f"{what}(seed={seed!r}).", why="it seeds an order.", fix="seed=0")


_COUNTED = {"steps": "steps", "batch": "windows"}


def refuse_rounded_inputs(method: Method, spec: Spec, formats: Mapping[str, Format]) -> None:
    """Raise where a gradient would have to go through inputs that are rounded."""
    for name, form in (*formats.items(), *spec.weights):
        if form.activations is not None:
            raise InfoptError(
                f"{method!r}: the inputs of {name} are rounded.",
                why="gradients do not go through what is rounded.",
                fix="ip.gptq() or ip.smoothquant(), which take none",
            )


def nothing_went_in(method: Method, name: str) -> InfoptError:
    return InfoptError(
        f"{method!r}: nothing but zeros went into {name}.",
        why="without inputs there is nothing to make up for.",
        fix="a quantize(where=...) of its own for it, without a method",
    )
