"""Rounding to nearest, as a method: for what it reads, as static scales are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, final

from infopt.errors import InfoptError
from infopt.methods.base import Method, check_reading, text_of, to_nearest
from infopt.methods.kept import Kept
from infopt.model import Model, Weights
from infopt.qtensor import Format
from infopt.spec import Spec


@final
@dataclasses.dataclass(frozen=True, repr=False)
class Nearest(Method):
    def check(self, spec: Spec, formats: Mapping[str, Format]) -> None:
        super().check(spec, formats)
        if not any(form.static for form in formats.values()):
            raise InfoptError(
                f"{self!r} would read its text for nothing.",
                why="rounding to nearest takes no statistics; only static scales of inputs do.",
                fix="static=True with activations=8, or no method",
            )

    def round(
        self, model: Model, weights: Weights, formats: Mapping[str, Format], clip: str | None, kept: Kept
    ) -> dict[str, Any]:
        return {n: to_nearest(weights[n], f, clip) for n, f in formats.items()}


def nearest(text: Any = None, tokens: int | None = None, length: int = 512) -> Nearest:
    """Round to nearest, and read a text: for static scales of inputs. Without those, leave the method out.

    Args:
      text, tokens, length: what is read, as for `gptq`.

    Raises:
      InfoptError: no text, or numbers that are none; by the stack, where no scale is static.

    >>> import infopt as ip
    >>> ip.quantize(bits=8, activations=8, static=True, method="nearest")
    quantize(bits=8, method=nearest(), activations=8, static=True)
    """
    check_reading("nearest", tokens=tokens, length=length)
    return Nearest(text_of(text, "nearest"), tokens, length)
