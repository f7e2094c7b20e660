"""The table of number formats: each row says the levels, the packing and the scale rule; `infopt.qtensor` packs by it.

A value is  scale * level,  or  scale * level + minimum,  or  scale * (level - zero point).  Levels are whole numbers, a
float type's values, or any 2 ** bits numbers. Neighbours along the last axis share a scale in groups.

Codes of 2 to 6 bits lie in words: as few codes as fill whole bytes (four in a byte, eight in three bytes, two in one,
eight in five, four in three), the first lowest. Of a group of g codes, n to a word, word j holds elements j, j + g/n,
j + 2g/n, ...; byte m of it is byte m * g/n + j of the group. For 4 bits that is the order of GGUF's plain blocks, so
that a file's are kept without loss; and codes come out of words as n planes, each a run of neighbours.

GGUF's K-quants have sub-groups within a group of 256: each has a whole number that multiplies the group's scale, and,
where there are minima, one that multiplies its minimum. Of a group first come all of the scale's, then the minimum's;
those of 6 bits lie in words, as a group of codes does.
"""

from __future__ import annotations

import dataclasses
import math

import ml_dtypes  # noqa: F401 (numpy then knows bfloat16 and the 8-bit floats by name)
import numpy as np

from infopt.errors import InfoptError, nearest

RULES = {
    "none": "no scale: values as the float type stores them",
    "absmax": "scale = max|x| / high",
    "extreme": "scale = the value of greatest magnitude / low, so that it is hit exactly",
    "minmax": "scale = (max - min) / high, and min is stored",
    "zero": "scale = (max - min) / high over x and 0, and a whole zero point is stored, so that 0 is hit exactly",
    "power": "scale = 2 ** (floor(log2 max|x|) - floor(log2 high)); what is above high is cut",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """What a format is: the levels, the packing and the scale rule.

    Args:
      bits: bits a code takes in memory: 2, 3, 4, 5, 6, 8 or 16.
      low, high: the least and the greatest level.
      zero: added to a whole level to make its code, so that none is negative.
      rule: a key of `RULES`.
      levels: the value of each code, where levels are not whole numbers. Between two the nearer one, ties to the even
        code; of two codes of equal value the first.
      dtype: the float type that codes are, where they are one.
      group: neighbours that share a scale unless the user says; None is the whole last axis.
      scale: dtype of the scales and minima of groups; those of a whole axis are float32, unless that is no choice.
      tensor: whether scales are themselves relative to a float32 one, of which a matrix has one.
      ggml: round as llama.cpp does, by the scale before it is rounded itself, ties away from zero; then blocks are its
        own, bit for bit.
      sub: how many neighbours within a group share a whole number that its scale is multiplied by.
      sub_bits: of such a number: 6, from 0 on, or 8, signed.
      kept: nothing rounds to this format: files hold it, and their blocks are kept. `rule` then says what is stored.
    """

    bits: int
    low: float
    high: float
    zero: int = 0
    rule: str = "absmax"
    levels: tuple[float, ...] | None = None
    dtype: str | None = None
    group: int | None = None
    scale: str = "float16"
    tensor: bool = False
    ggml: bool = False
    sub: int | None = None
    sub_bits: int = 6
    kept: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 5, 6, 8, 16) or (self.bits > 8 and self.dtype is None):
            raise InfoptError(
                f"a row with codes of {self.bits} bits.",
                why="a few codes must fill whole bytes, and whole levels at most one.",
                fix="bits=2, 3, 4, 5, 6 or 8; or 16 with a float type",
            )
        if self.rule not in RULES:
            raise InfoptError(
                f"a row with the scale rule {self.rule!r}.",
                why="no code knows it.",
                fix=nearest(self.rule, list(RULES)),
            )
        if self.levels is not None and (len(self.levels) != 2**self.bits or not np.all(np.isfinite(self.levels))):
            raise InfoptError(
                f"a row of {self.bits} bits with {len(self.levels)} levels.",
                why="each code needs a finite value.",
                fix=f"{2**self.bits} levels; a value may come twice",
            )
        if self.sub and (not self.kept or self.sub_bits not in (6, 8) or (self.group or 1) % (self.codes * self.sub)):
            raise InfoptError(
                f"a row with sub-groups of {self.sub} in groups of {self.group}.",
                why="their numbers have 6 or 8 bits, none lies in two planes of codes, and nothing rounds to them.",
                fix=f"kept=True, sub_bits=6 or 8, and a group that is a multiple of {self.codes * self.sub}",
            )

    @property
    def minimum(self) -> bool:
        return self.rule == "minmax"

    @property
    def whole(self) -> bool:
        """Whether a value is a scale times a whole number, perhaps with a minimum, so that products can be of these."""
        return self.levels is None and self.dtype is None and self.sub is None and not self.tensor

    @property
    def codes(self) -> int:
        """Codes in a word."""
        return math.lcm(self.bits, 8) // self.bits

    @property
    def sub_numbers(self) -> int:
        """Whole numbers of a group's sub-groups."""
        return 0 if self.sub is None or self.group is None else self.group // self.sub * (1 + self.minimum)

    @property
    def sub_bytes(self) -> int:
        """Bytes that they take."""
        return self.sub_numbers * self.sub_bits // 8

    @property
    def sub_dtype(self) -> str:
        return "int8" if self.sub_bits == 8 else "uint8"

    @property
    def code_dtype(self) -> str:
        """The type of the array of codes, or of the bytes of words."""
        return self.dtype or (
            "int8" if self.bits == 8 and self.levels is None and self.low < 0 == self.zero else "uint8"
        )


_NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
        1.0)  # fmt: skip
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


class _Table(dict[str, Row]):
    """Rows by name. A name means one row as long as a process lives: programs are compiled, and kept, by it."""

    def __init__(self, rows: dict[str, Row]) -> None:
        super().__init__(rows)
        self._ever = dict(rows)

    def __setitem__(self, name: str, row: Row) -> None:
        if self._ever.setdefault(name, row) != row:
            raise InfoptError(
                f"the format {name!r} was another row before.",
                why="programs and results that were made with that row are known by this name.",
                fix=f"another name, as FORMATS['{name}_2'] = Row(...)",
            )
        super().__setitem__(name, row)


FORMATS: dict[str, Row] = _Table(
    {
        "fp16": Row(bits=16, low=-65504.0, high=65504.0, rule="none", dtype="float16"),
        "bf16": Row(bits=16, low=-(2 - 2**-7) * 2.0**127, high=(2 - 2**-7) * 2.0**127, rule="none", dtype="bfloat16"),
        "fp8_e4m3": Row(bits=8, low=-448.0, high=448.0, dtype="float8_e4m3fn", scale="float32"),
        "fp8_e5m2": Row(bits=8, low=-57344.0, high=57344.0, dtype="float8_e5m2", scale="float32"),
        "int8": Row(bits=8, low=-127, high=127),
        "int4": Row(bits=4, low=-8, high=7, zero=8, rule="extreme", group=32),
        "int4_absmax": Row(bits=4, low=-7, high=7, zero=8, group=32),
        "int4_min": Row(bits=4, low=0, high=15, rule="minmax", group=32),
        "int4_zero": Row(bits=4, low=0, high=15, rule="zero", group=32),
        "int8_zero": Row(bits=8, low=0, high=255, rule="zero", group=32),
        "int2_zero": Row(bits=2, low=0, high=3, rule="zero", group=32),
        "int2_min": Row(bits=2, low=0, high=3, rule="minmax", group=32),
        "nf4": Row(bits=4, low=-1.0, high=1.0, levels=_NF4, group=64),
        "mxfp4": Row(bits=4, low=-6.0, high=6.0, rule="power", levels=_E2M1, group=32, scale="float8_e8m0fnu"),
        "nvfp4": Row(bits=4, low=-6.0, high=6.0, levels=_E2M1, group=16, scale="float8_e4m3fn", tensor=True),
        "int6": Row(bits=6, low=-32, high=31, zero=32, rule="extreme", group=32),
        "int5": Row(bits=5, low=-16, high=15, zero=16, rule="extreme", group=32),
        "int3": Row(bits=3, low=-4, high=3, zero=4, rule="extreme", group=32),
        "int2": Row(bits=2, low=-2, high=1, zero=2, rule="extreme", group=32),
        "q8_0": Row(bits=8, low=-127, high=127, group=32, ggml=True),
        "q4_0": Row(bits=4, low=-8, high=7, zero=8, rule="extreme", group=32, ggml=True),
        "q4_1": Row(bits=4, low=0, high=15, rule="minmax", group=32, ggml=True),
        "q4_k": Row(bits=4, low=0, high=15, rule="minmax", group=256, sub=32, kept=True),
        "q5_k": Row(bits=5, low=0, high=31, rule="minmax", group=256, sub=32, kept=True),
        "q6_k": Row(bits=6, low=-32, high=31, zero=32, rule="extreme", group=256, sub=16, sub_bits=8, kept=True),
    }
)
"""The formats by name. NF4's levels are those of QLoRA (Dettmers et al. 2023, appendix E); MXFP4 is that of the OCP
Microscaling specification 1.0, of NVFP4 the scale of a matrix is max|x| / (6 * 448).

A format of your own is a row; `reference.LEVELS` gets one too, if the composition contract is to check it:

>>> import infopt as ip
>>> FORMATS["three_levels"] = Row(bits=2, low=-1, high=1, zero=1, group=64)
>>> ip.quantize(format="three_levels")(ip.models.llama(dim=64)).spec.format_of("layers.0.attn.q")
Format(name='three_levels', group=64, scale='float16')
>>> del FORMATS["three_levels"]
"""


@dataclasses.dataclass(frozen=True, order=True, repr=False)
class Format:
    """A row of `FORMATS` and its group; static, hashable, JSON-able.

    Args:
      name: a key of `FORMATS`.
      group: neighbours that share a scale; None is the whole last axis (one scale a channel of a weight, one a head
        of a token in a cache).
      scale: dtype of scales and minima.
      pad: whether a last axis that does not split into whole groups is padded to the next one that does.
      activations: of a weight, bits of what is multiplied by it: 8, then inputs are rounded too, and the product is of
        whole numbers (`infopt.kernels.int_matmul`); None leaves them as they are.
      static: whether those inputs have one scale for all tokens, stored with the weight, or each token its own.

    >>> Format("int4", 32, "float16").bytes_per_value(576)
    0.5625
    >>> Format("int4", 128, "float16", pad=True).bytes((10, 576))  # rows of 640 codes
    3304
    """

    name: str
    group: int | None = None
    scale: str = "float32"
    pad: bool = False
    activations: int | None = None
    static: bool = False

    def __post_init__(self) -> None:
        if self.name not in FORMATS:
            raise InfoptError(
                f"unknown weight format {self.name!r}.",
                why="codes mean values only by a row of the table of formats.",
                fix=nearest(str(self.name), list(FORMATS)),
            )
        if self.group is not None and self.group < 1:
            raise InfoptError(
                f"a group of {self.group} values cannot share a scale.",
                why="a group is some neighbours along the input axis.",
                fix="group >= 1, or None",
            )
        if self.row.sub and self.group != self.row.group:
            raise InfoptError(
                f"{self.name} has no groups of {self.group}.",
                why="its blocks are kept as files hold them.",
                fix=f"group={self.row.group}",
            )
        if self.group is not None and self.group % self.row.codes:
            raise InfoptError(
                f"a group of {self.group} {self.row.bits}-bit codes does not fill whole bytes.",
                why=f"{self._words()}, and a group must not share one.",
                fix=f"{'an even group' if self.row.codes == 2 else f'a multiple of {self.row.codes}'}",
            )
        if self.activations not in (None, 8):
            raise InfoptError(
                f"activations of {self.activations!r} bits.",
                why="inputs are rounded to 8 bits, or not at all.",
                fix="activations=8, or None",
            )
        if self.activations is not None and not self.row.whole:
            whole = [name for name, row in FORMATS.items() if row.whole and not row.kept]
            raise InfoptError(
                f"activations of {self.activations} bits against weights in {self.name}.",
                why="the product is one of whole numbers, and its levels are none, or have further scales.",
                fix=f"one of {', '.join(whole)}; or no activations",
            )
        if not isinstance(self.static, bool):
            raise InfoptError(
                f"static={self.static!r}.", why="inputs have one scale for all tokens or not.", fix="static=True"
            )
        if self.static and self.activations is None:
            raise InfoptError(
                "static scales, and no activations.",
                why="they are those of inputs that are rounded.",
                fix="activations=8, or static=False",
            )

    def __repr__(self) -> str:
        more = ", pad=True" * self.pad + f", activations={self.activations}" * (self.activations is not None)
        more += ", static=True" * self.static
        return f"Format(name={self.name!r}, group={self.group}, scale={self.scale!r}{more})"

    @property
    def label(self) -> str:
        """As tables say it: `int4`, or `int4/a8` where inputs are rounded too, `int4/a8s` by static scales."""
        return self.name + f"/a{self.activations}" * (self.activations is not None) + "s" * self.static

    def _words(self) -> str:
        count, size = self.row.codes, self.row.codes * self.row.bits // 8
        return "two codes share a byte" if count == 2 else f"{count} codes share {size} byte{'s' * (size > 1)}"

    @property
    def row(self) -> Row:
        return FORMATS[self.name]

    def padded(self, width: int) -> int:
        """Codes that a last axis of `width` values takes."""
        if not self.pad:
            return width
        unit = self.group or self.row.codes
        return -(-width // unit) * unit

    def group_of(self, width: int) -> int:
        return self.group or self.padded(width)

    def bytes_per_value(self, width: int) -> float:
        """Bytes that one value takes, its share of scales and padding included, in a last axis of `width` values."""
        return self._row_bytes(width) / width

    def _row_bytes(self, width: int) -> int:
        codes, row = self.padded(width), self.row
        each = 0 if row.rule == "none" else np.dtype(self.scale).itemsize * (1 + row.minimum) + (row.rule == "zero")
        each += row.sub_bytes
        return codes * row.bits // 8 + codes // self.group_of(width) * each

    def bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes that a weight `[..., out, in]` takes, all included: the error of its rounding too, 4 a matrix."""
        of_matrix = 4 * (self.row.tensor + self.static + (len(shape) > 1))
        return math.prod(shape[:-1]) * self._row_bytes(shape[-1]) + math.prod(shape[:-2]) * of_matrix

    def check_width(self, width: int, name: str) -> None:
        """Raise unless the last axis of the tensor `name` splits into whole groups and bytes."""
        if self.pad:
            return
        group, unit = self.group_of(width), self.row.codes
        if width % group:
            divisors = [d for d in range(2, width + 1) if width % d == 0 and d % unit == 0]
            raise InfoptError(
                f"group={group} does not divide {name}, whose rows have {width} values.",
                why="every value needs a scale, and groups share none between rows.",
                fix=(
                    f"a group that divides {width}: {', '.join(map(str, divisors[-6:]))}"
                    if divisors
                    else "leave it out with where=..., or use bits=8 without a group"
                )
                + "; or pad=True, which fills the last group up",
            )
        if group % unit:
            raise InfoptError(
                f"{name} has rows of {width} values, which {self.row.bits}-bit codes cannot fill in whole bytes.",
                why=f"{self._words()}, and a row must not share one.",
                fix="leave it out with where=..., or use bits=8, or pad=True",
            )
