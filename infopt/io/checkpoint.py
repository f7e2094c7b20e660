"""What every reader hands over, and the checks that all readers share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from infopt.errors import CheckpointError, InfoptError, nearest
from infopt.io.tokenizer import Tokenizer
from infopt.qtensor import Format
from infopt.spec import Config

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "keep": np.dtype(np.float32),
}
"""What a weight becomes where it is not kept packed."""

CHUNK = 1 << 18
"""Values converted at once: temporaries stay within a few MB, whatever the tensor."""


class LazyWeights(Mapping[str, Any]):
    """Weights by logical name, each read out of its file when it is asked for, and not kept."""

    def __init__(self, readers: dict[str, Callable[[], Any]]) -> None:
        self._readers = readers

    def __getitem__(self, name: str) -> Any:
        return self._readers[name]()

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the weight
        return name in self._readers

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """An opened checkpoint: everything but the weights is read and checked.

    Args:
      family: a key of `FAMILIES`.
      config: the family's config.
      formats: the format of each weight that stays packed, by logical name.
      weights: each weight by logical name, read when it is asked for.
      tokenizer: or None.
    """

    family: str
    config: Config
    formats: dict[str, Format]
    weights: LazyWeights
    tokenizer: Tokenizer | None


@dataclasses.dataclass(frozen=True)
class Source:
    """Where in a checkpoint a weight lies.

    Args:
      files: the tensor's name; or one of each expert.
      start: the first row of the tensor that is this weight's.
      of: rows that the tensor has in all, where it holds several weights; None where it holds this one alone.
      transposed: it is stored `[in, out]`.
    """

    files: tuple[str, ...]
    start: int = 0
    of: int | None = None
    transposed: bool = False


def file_shapes(sources: Mapping[str, Source], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shape that each tensor of the checkpoint must have."""
    wanted: dict[str, tuple[int, ...]] = {}
    for name, where in sources.items():
        shape = shapes[name] if len(where.files) == 1 else shapes[name][1:]
        shape = shape if where.of is None else (where.of, *shape[1:])
        wanted |= dict.fromkeys(where.files, shape[::-1] if where.transposed else shape)
    return wanted


def make_config(cls: type[Any], where: str, **fields: Any) -> Any:
    """A config; numbers that cannot be are the checkpoint's fault."""
    try:
        return cls(**fields)
    except InfoptError as error:
        raise CheckpointError(
            f"{where} describes a model that cannot be.", why=error.one_line, fix="fetch or convert the model again"
        ) from error


def check_layers(where: str, config: Config, tensors: int) -> None:
    """Raise where a damaged number of layers would have us list millions of names."""
    if config.layers > tensors:
        raise CheckpointError(
            f"{where} has {tensors} tensors, too few for {config.layers} layers.",
            why="its config asks for them.",
            fix="fetch or convert the model again",
        )


def check_tensors(where: str, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """Raise unless the tensors found are those wanted, in name and shape."""
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted]
    if missing:
        guess = f" {nearest(missing[0], extra)}" if extra else ""
        raise CheckpointError(
            f"{where} has no tensor {_some(missing)}.",
            why=f"its config asks for it.{guess}",
            fix="fetch or convert the model again",
        )
    if extra:
        raise CheckpointError(
            f"{where} holds a tensor that the model does not use: {_some(extra)}.",
            why="leaving it out would compute another model than the file's.",
            fix="use a checkpoint of the plain architecture, without biases or adapters",
        )
    for name, shape in wanted.items():
        if found[name] != shape:
            raise CheckpointError(
                f"{where}: {name} has shape {_shape(found[name])}, not {_shape(shape)}.",
                why="its config asks for the latter.",
                fix="fetch or convert the model again",
            )


def _shape(shape: Iterable[int]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def row_chunks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of the first axis of at most CHUNK values each."""
    step = max(1, CHUNK // max(1, int(np.prod(shape[1:]))))
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))
