"""cache_kv: keep keys and values, so that a step computes the new tokens only."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, final

from infopt.errors import InfoptError
from infopt.qtensor import Format
from infopt.spec import Spec
from infopt.transforms.base import Transform, order_error


@final
@dataclasses.dataclass(frozen=True, repr=False)
class CacheKV(Transform):
    name: ClassVar[str] = "cache_kv"
    bits: int | None = None

    @property
    def exact(self) -> bool:
        return self.bits is None

    def check(self, spec: Spec) -> None:
        if spec.cache:
            raise order_error(
                self,
                "was applied to a stack that has a cache already",
                "keys and values are kept once.",
                "leave one of the two out",
            )

    def edit(self, spec: Spec) -> Spec:
        return spec.replace(cache=True, kv=None if self.bits is None else Format("int8"))


def cache_kv(bits: int | None = None) -> CacheKV:
    """Keep keys and values: a step then computes its new tokens only.

    Linear where a layer sees everything, a ring where its window is shorter than the text (see `infopt.cache`).
    Exact; with `bits=8` not: keys and values are rounded, with a float32 scale a head of a token, before they are
    used, in prefill too.

    Args:
      bits: None keeps them as computed; 8 stores int8.

    Raises:
      TransformOrderError: there is a cache already.

    >>> import infopt as ip
    >>> cache_kv(bits=8)(ip.models.llama(layers=2, kv_heads=2, head_dim=16)).token_bytes()
    160
    """
    if bits not in (None, 8) or isinstance(bits, float | bool):
        raise InfoptError(
            f"cache_kv(bits={bits!r}) is not a codec.",
            why="keys and values are stored as they are, or in 8 bits.",
            fix="bits=None or bits=8",
        )
    return CacheKV(bits)
