"""dequantize: unpack every packed weight."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, final

from infopt.model import Model, Weights
from infopt.spec import Spec
from infopt.transforms.base import Transform, densify


@final
@dataclasses.dataclass(frozen=True, repr=False)
class Dequantize(Transform):
    name: ClassVar[str] = "dequantize"

    @property
    def exact(self) -> bool:
        return True

    def check(self, spec: Spec) -> None:
        pass

    def edit(self, spec: Spec) -> Spec:
        return spec.replace(weights=())

    def params(self, weights: Weights, before: Model, after: Spec, **extra: Any) -> Weights:
        return densify(before.spec, weights)


def dequantize() -> Dequantize:
    """Unpack every packed weight to float32: the values stay, exactly, the bytes grow. Inputs are rounded no more.

    >>> import infopt as ip
    >>> (ip.quantize(bits=8) | dequantize())(ip.models.llama()).spec.weights
    ()
    """
    return Dequantize()
