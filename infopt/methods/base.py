"""What a method is: it rounds a stack's matrices, and has seen what goes into them."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from infopt import texts
from infopt.errors import InfoptError
from infopt.model import Model, Weights, check_length
from infopt.qtensor import Format, QTensor


@dataclasses.dataclass(frozen=True)
class Method(abc.ABC):
    """A way of rounding, as a value.

    Args:
      text: what the stack reads meanwhile: a text, or token ids; None is the calibration split of CPython's topics.
      tokens: how many of its tokens are read, spread over it.
      length: tokens that are read at a time.
    """

    text: str | tuple[int, ...] | None = None
    tokens: int = 16384
    length: int = 512

    @abc.abstractmethod
    def round(
        self, model: Model, weights: Weights, formats: Mapping[str, Format], clip: str | None
    ) -> dict[str, QTensor]:
        """The matrices of `formats`, by logical name, rounded; `model` is the stack before it."""

    def digest(self) -> str:
        """Of the text: with the repr, it says what was computed."""
        if isinstance(self.text, tuple):
            return hashlib.sha256(np.asarray(self.text, "<i8").tobytes()).hexdigest()[:12]
        return texts.digest(texts.topics("calibration") if self.text is None else self.text)

    def __repr__(self) -> str:
        given = [
            f"{f.name}={self.digest() if f.name == 'text' else getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        ]
        return f"{type(self).__name__.lower()}({', '.join(given)})"

    def windows(self, model: Model) -> np.ndarray:
        """The tokens `[N, length]` that are read, equally spaced in the text.

        Raises:
          InfoptError: the text is shorter than one window, holds tokens that the model has not, or lacks a tokenizer.
          PromptError: windows are longer than the model's context.
        """
        check_length(model.spec, self.length, f"windows of {self.length} tokens to calibrate on", "a shorter length=")
        if isinstance(self.text, tuple):
            ids = np.asarray(self.text, np.int32)
        elif model.tokenizer is None:
            raise InfoptError(
                f"{self!r} reads a text, and the model has no tokenizer.",
                why="a text becomes token ids by the tokenizer that the model was trained with.",
                fix=f"token ids: {type(self).__name__.lower()}(tokens_of_your_text)",
            )
        else:
            text = texts.topics("calibration") if self.text is None else self.text
            ids = np.asarray(model.tokenizer.encode(text), np.int32)
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
        count = min(max(self.tokens // self.length, 1), len(ids) // self.length)
        starts = np.linspace(0, len(ids) - self.length, count).astype(int)
        return ids[starts[:, None] + np.arange(self.length)]


def text_of(text: Any, what: str) -> str | tuple[int, ...] | None:
    """What a method was given to read, hashable.

    Raises:
      InfoptError: it is neither texts nor token ids.
    """
    if text is None or isinstance(text, str):
        return text
    if isinstance(text, list | tuple) and text and all(isinstance(each, str) for each in text):
        return "\n\n".join(text)
    ids = np.asarray(text)
    if ids.ndim != 1 or not ids.size or ids.dtype.kind not in "iu":
        raise InfoptError(
            f"{what} was given {type(text).__name__} to read.",
            why="a method reads a text, as the model would.",
            fix="a text, several, or one row of token ids; None is ip.texts.topics('calibration')",
        )
    return tuple(ids.tolist())
