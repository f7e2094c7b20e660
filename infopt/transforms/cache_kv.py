"""cache_kv: keep keys and values, so that a step computes the new tokens only."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, final

from infopt.errors import InfoptError
from infopt.formats import FORMATS, Format
from infopt.spec import Codec, Spec
from infopt.transforms.base import Transform, order_error, whole

CODECS = {8: "int8", 4: "int4_min", 2: "int2_min"}
"""The format, by bits."""
GROUP = 32
"""At most so many channels share a scale, unless asked otherwise."""
TAIL = 32
"""Tokens after which a group is seen rounded, unless asked otherwise."""


@final
@dataclasses.dataclass(frozen=True, repr=False)
class CacheKV(Transform):
    name: ClassVar[str] = "cache_kv"
    bits: int | None = None
    group: int | None = None
    rotate: bool = False
    split: int | None = None
    tail: int | None = None

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
        if codec is None:
            return
        form, unit = codec.format, codec.format.row.codes
        if form.group is not None and width % form.group:
            least = max(unit, 2)
            raise InfoptError(
                f"{self!r}: groups of {form.group} do not divide a head, which has {width} channels.",
                why="every channel needs a scale, and heads share none.",
                fix="group=" + " or ".join(str(n) for n in range(least, width + 1, least) if width % n == 0),
            )
        form.check_width(width, "a head of keys or values")
        if self.rotate and width & (width - 1):
            raise InfoptError(
                f"{self!r}: a head has {width} channels, which is no power of two.",
                why="the Hadamard matrix that turns keys is made by doubling.",
                fix="leave rotate out" + ("" if self.split else f", or split={GROUP} in place of it"),
            )

    def edit(self, spec: Spec) -> Spec:
        return spec.replace(cache=True, kv=self._codec(spec))

    def _codec(self, spec: Spec) -> Codec | None:
        if self.bits is None:
            return None
        width, step = spec.config.head_dim, max(FORMATS[CODECS[self.bits]].codes, 2)
        even = (n for n in range(GROUP, 1, -step) if width % n == 0)
        form = Format(CODECS[self.bits], self.group or next(even, width), "float16")
        if self.split is None:
            return Codec(form, self.rotate)
        return Codec(form, self.rotate, self.split, TAIL if self.tail is None else self.tail)


def cache_kv(
    bits: int | None = None,
    group: int | None = None,
    *,
    rotate: bool = False,
    split: int | None = None,
    tail: int | None = None,
) -> CacheKV:
    """Keep keys and values: a step then computes its new tokens only.

    Linear where a layer sees everything, a ring where its window is shorter than the text (see `infopt.cache`).
    Exact; with `bits` not: keys and values are rounded, each token by itself, before they are used, in prefill too.

    8 bits: symmetric, a 16-bit scale a group. 4 and 2 bits: two and four to a byte, a 16-bit scale and a 16-bit minimum
    a group.

    Some channels of keys are far greater than the others, and a group of channels that has one rounds the rest to
    little. Two ways out:

    `split`: each channel of keys has a scale of its own, over so many tokens (Liu et al. 2024, "KIVI: A Tuning-Free
    Asymmetric 2bit Quantization for KV Cache", section 3). A group of tokens, at absolute positions, is rounded when
    its last one arrives, keys by channel and values by token; and a query sees a group rounded once `tail` tokens have
    followed it, and before that as it was computed. The latest tokens therefore lie in a ring of split + tail + chunk
    - 2 slots beside the rounded ones (chunk: of `init_state`), whatever the length of the text.

    `rotate`: keys, and queries alike, are multiplied by an orthonormal Hadamard matrix after their rope, which spreads
    what is great over all channels and changes no score (Ashkboos et al. 2024, "QuaRot", section 4).

    Args:
      bits: None keeps them as computed; 8, 4 or 2 stores so many a value.
      group: channels of a head that share a scale; must divide the head. By default its largest even divisor up to 32
        (with 2 bits, one that 4 divides).
      rotate: whether keys are rotated; a head's width must be a power of two.
      split: tokens that share a scale in each channel of keys; KIVI's are 32. Even with 4 bits, with 2 a multiple of 4.
      tail: tokens that must have followed a group before it is seen rounded; 32 by default, 0 rounds it at once.

    Raises:
      TransformOrderError: there is a cache already.
      InfoptError: there is no such codec, the group does not divide the head, split groups do not fill bytes, or what
        is to be rotated is no power of two.

    >>> import infopt as ip
    >>> model = ip.models.llama(layers=2, kv_heads=2, head_dim=16)
    >>> [cache_kv(bits=bits)(model).token_bytes() for bits in (None, 8, 4)]
    [512, 144, 96]
    >>> cache_kv(bits=2, split=32)(model).token_bytes()
    56
    """
    if bits not in (None, *CODECS) or isinstance(bits, float | bool):
        raise InfoptError(
            f"cache_kv(bits={bits!r}) is not a codec.",
            why="keys and values are stored as they are, or in 8, 4 or 2 bits.",
            fix="bits=None, bits=8, bits=4 or bits=2",
        )
    if not isinstance(rotate, bool):
        raise InfoptError(f"cache_kv(rotate={rotate!r})", why="keys are rotated or not.", fix="rotate=True")
    if bits is None:
        given = {"group": group, "rotate": rotate or None, "split": split, "tail": tail}
        if found := [f"{name}={value!r}" for name, value in given.items() if value is not None]:
            raise InfoptError(
                f"cache_kv({', '.join(found)}) rounds nothing.",
                why="it says how keys and values are rounded, and without bits they are not.",
                fix=f"cache_kv(bits=4, {', '.join(found)}), or cache_kv()",
            )
        return CacheKV()
    if split is None and tail is not None:
        raise InfoptError(
            f"cache_kv(bits={bits}, tail={tail!r}) has no groups of tokens that a tail could follow.",
            why="without split each token is rounded by itself, before it is used.",
            fix=f"cache_kv(bits={bits}, split={GROUP}, tail={tail!r}), or without a tail",
        )
    form = FORMATS[CODECS[bits]]
    return CacheKV(
        bits,
        None if group is None else whole("group", group, 2),
        rotate,
        None if split is None else _filling("split", whole("split", split, 2), form.codes),
        None if tail is None else whole("tail", tail, 0),
    )


def _filling(name: str, value: int, codes: int) -> int:
    """`value` if so many codes fill whole bytes."""
    if value % codes:
        raise InfoptError(
            f"cache_kv({name}={value}) does not fill whole bytes.",
            why=f"{codes} codes share a byte, and each channel's are stored by themselves.",
            fix=f"{name}={-(-value // codes) * codes}",
        )
    return value
