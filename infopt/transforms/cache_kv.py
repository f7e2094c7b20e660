"""cache_kv: keep keys and values, so that a step computes the new tokens only."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, final

from infopt.errors import InfoptError
from infopt.qtensor import Format
from infopt.spec import Spec
from infopt.transforms.base import Transform, order_error, whole

CODECS = {8: "int8", 4: "int4_min"}
"""The format, by bits."""
GROUP = 32
"""At most so many channels share a scale, unless asked otherwise."""


@final
@dataclasses.dataclass(frozen=True, repr=False)
class CacheKV(Transform):
    name: ClassVar[str] = "cache_kv"
    bits: int | None = None
    group: int | None = None

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
        codec, width = self._codec(spec), spec.config.head_dim
        if codec is not None and codec.group is not None and width % codec.group:
            raise InfoptError(
                f"{self!r}: groups of {codec.group} do not divide a head, which has {width} channels.",
                why="every channel needs a scale, and heads share none.",
                fix="group=" + " or ".join(str(n) for n in range(2, width + 1, 2) if width % n == 0),
            )
        if codec is not None:
            codec.check_width(width, "a head of keys or values")

    def edit(self, spec: Spec) -> Spec:
        return spec.replace(cache=True, kv=self._codec(spec))

    def _codec(self, spec: Spec) -> Format | None:
        if self.bits is None:
            return None
        width = spec.config.head_dim
        even = (n for n in range(GROUP, 1, -2) if width % n == 0)
        return Format(CODECS[self.bits], self.group or next(even, width), "float16")


def cache_kv(bits: int | None = None, group: int | None = None) -> CacheKV:
    """Keep keys and values: a step then computes its new tokens only.

    Linear where a layer sees everything, a ring where its window is shorter than the text (see `infopt.cache`).
    Exact; with `bits` not: keys and values are rounded, each token by itself, before they are used, in prefill too.

    8 bits: symmetric, a 16-bit scale a group. 4 bits: two to a byte, a 16-bit scale and a 16-bit minimum a group.

    Args:
      bits: None keeps them as computed; 8 or 4 stores so many a value.
      group: channels of a head that share a scale; must divide the head. By default its largest even divisor up to 32.

    Raises:
      TransformOrderError: there is a cache already.
      InfoptError: there is no such codec, or the group does not divide the head.

    >>> import infopt as ip
    >>> model = ip.models.llama(layers=2, kv_heads=2, head_dim=16)
    >>> [cache_kv(bits=bits)(model).token_bytes() for bits in (None, 8, 4)]
    [512, 144, 96]
    """
    if bits not in (None, *CODECS) or isinstance(bits, float | bool):
        raise InfoptError(
            f"cache_kv(bits={bits!r}) is not a codec.",
            why="keys and values are stored as they are, or in 8 or 4 bits.",
            fix="bits=None, bits=8 or bits=4",
        )
    if group is None:
        return CacheKV(bits)
    if bits is None:
        raise InfoptError(
            f"cache_kv(group={group!r}) rounds nothing.",
            why="a group shares a scale, and without bits there is none.",
            fix="cache_kv(bits=8, group=...), or without a group",
        )
    return CacheKV(bits, whole("group", group, 2))
