"""Spec and Recipe: what a stack computes, and how its params came about. Static, hashable, JSON-able."""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
from typing import Any, ClassVar

from infopt.errors import InfoptError
from infopt.qtensor import Format


@dataclasses.dataclass(frozen=True)
class Window:
    """What a layer sees: the last `size` positions, itself included, and the first `sinks` of the text."""

    size: int
    sinks: int = 0

    def __str__(self) -> str:
        return f"{self.size}+{self.sinks} sinks" if self.sinks else f"{self.size}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearRope:
    """Every position divided by `factor` (Chen et al. 2023, "Position Interpolation")."""

    kind: ClassVar[str] = "linear"
    factor: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Rope:
    """Llama 3's stretch of the rotary wavelengths.

    Args:
      factor: wavelengths longer than original_context / low_freq_factor are multiplied by it.
      low_freq_factor, high_freq_factor: wavelengths shorter than original_context / high_freq_factor stay; between
        the two, the frequency is interpolated.
      original_context: positions that the model was first trained on.
    """

    kind: ClassVar[str] = "llama3"
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnRope:
    """Yarn's stretch: pairs that turn often stay, pairs that turn seldom are slowed (Peng et al. 2023, section 3).

    Args:
      factor: the slowest pairs turn this many times slower.
      original_context: positions that the model was first trained on.
      beta_fast, beta_slow: turns within the original context from which a pair stays, and up to which it is slowed in
        full; between the two pairs the slowing is interpolated.
      attention_factor: cosines and sines are multiplied by it.
      truncate: round the two pairs outwards to whole ones.
    """

    kind: ClassVar[str] = "yarn"
    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableRope:
    """A divisor for each pair's frequency, as LongRoPE found by search (Ding et al. 2024).

    Args:
      divisors: one a pair.
      attention_factor: cosines and sines are multiplied by it.
    """

    kind: ClassVar[str] = "table"
    divisors: tuple[float, ...]
    attention_factor: float = 1.0


RopeScaling = LinearRope | Llama3Rope | YarnRope | TableRope
ROPE_SCALINGS: dict[str, type[Any]] = {c.kind: c for c in (LinearRope, Llama3Rope, YarnRope, TableRope)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What every family's config has. A family subclasses it with fields of its own (hashable, JSON-able).

    Args:
      vocab: words.
      dim: width of the residual stream.
      layers: number of layers.
      heads, kv_heads: query heads, and key/value heads (a divisor of heads).
      head_dim: width of one head.
      context: positions that the model was trained on.
    """

    vocab: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int

    def __post_init__(self) -> None:
        for field in ("vocab", "dim", "layers", "heads", "kv_heads", "head_dim", "context"):
            value = getattr(self, field)
            if not isinstance(value, numbers.Integral) or value < 1:
                raise InfoptError(
                    f"{type(self).__name__}: {field}={value!r} is not a positive whole number.",
                    why="it is the size of an array.",
                    fix=f"{field} >= 1",
                )
            object.__setattr__(self, field, int(value))  # numpy's are not JSON-able
        if self.heads % self.kv_heads:
            raise InfoptError(
                f"{type(self).__name__}: kv_heads={self.kv_heads} does not divide heads={self.heads}.",
                why="each key/value head serves an equal share of the query heads.",
                fix=f"kv_heads={math.gcd(self.heads, self.kv_heads)}, say",
            )

    @property
    def period(self) -> int:
        """Layers in one period of the family's layer pattern."""
        return 1

    def windows(self) -> tuple[Window | None, ...]:
        """Each layer's own window; None sees everything."""
        return (None,) * self.layers

    @property
    def learned_positions(self) -> bool:
        """Whether positions are rows of a table, so that there are none beyond the context."""
        return False

    @property
    def rotated_queries(self) -> bool:
        """Whether queries and keys reach attention rotated already, so that a sink's distance cannot be held."""
        return False


@dataclasses.dataclass(frozen=True)
class Codec:
    """How keys and values are rounded.

    Args:
      format: of values, in groups of a head's channels; of keys too, unless they are split.
      rotate: whether keys, and queries with them, are turned by a Hadamard matrix first.
      split: tokens that share a scale in each channel of keys (0: keys are rounded as values are). Group g holds
        positions g * split to (g + 1) * split - 1.
      tail: tokens that must have followed a group, of those that are split, before it is seen rounded.
    """

    format: Format
    rotate: bool = False
    split: int = 0
    tail: int = 0

    @property
    def keys(self) -> Format:
        """The format of keys, in groups of tokens where they are split."""
        return dataclasses.replace(self.format, group=self.split) if self.split else self.format

    def __str__(self) -> str:
        rotated, split = ", keys rotated" * self.rotate, f", keys by channel over {self.split} tokens"
        return self.format.name + rotated + (split if self.split else "")


@dataclasses.dataclass(frozen=True)
class Speculation:
    """The program of a speculative stack: the draft's Spec, and how many tokens it guesses a round."""

    draft: Spec
    k: int


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a stack computes. Equal Specs are built into the same functions.

    Args:
      family: the name under which the family was defined.
      config: the family's config.
      weights: (logical name, Format) of each weight that is not dense, sorted.
      window: each layer's window, or None.
      attention: which implementation computes attention.
      cache: whether keys and values are kept.
      kv: the codec of keys and values (None: as computed). Apart from `cache`: recomputation goes through it too.
      page: slots in a page of the cache; None: not paged.
      program: None is plain decoding.
      online: names within a layer of the matrices whose input is multiplied by a Hadamard matrix first, sorted.
    """

    family: str
    config: Config
    weights: tuple[tuple[str, Format], ...] = ()
    window: tuple[Window | None, ...] = ()
    attention: str = "reference"
    cache: bool = False
    kv: Codec | None = None
    page: int | None = None
    program: Speculation | None = None
    online: tuple[str, ...] = ()

    def format_of(self, name: str) -> Format | None:
        return dict(self.weights).get(name)

    def replace(self, **changes: Any) -> Spec:
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        return json.dumps(_plain(self), sort_keys=True)


def _plain(x: Any) -> Any:
    if isinstance(x, Codec) and x == Codec(x.format):
        return _plain(x.format)  # as in Specs from before there was any other
    if dataclasses.is_dataclass(x):
        fields = {f.name: _plain(getattr(x, f.name)) for f in dataclasses.fields(x)}
        for new in ("pad", "activations", "static"):  # as in Specs from before there were any
            if isinstance(x, Format) and not fields[new]:
                del fields[new]
        if isinstance(x, Spec) and not x.online:
            del fields["online"]
        return fields | {"kind": x.kind} if isinstance(x, RopeScaling) else fields
    return [_plain(v) for v in x] if isinstance(x, tuple) else x


def oracle(spec: Spec) -> Spec:
    """The Spec without cache, page, kernels and program; what changes the mathematics stays."""
    return spec.replace(cache=False, page=None, attention="reference", program=None)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a stack's params came about: each transform's text, and a hash of the arrays it holds ("" for none)."""

    steps: tuple[tuple[str, str], ...] = ()

    def then(self, text: str, digest: str = "") -> Recipe:
        return Recipe((*self.steps, (text, digest)))

    def __str__(self) -> str:
        return " | ".join(text for text, _ in self.steps) or "(bare)"
