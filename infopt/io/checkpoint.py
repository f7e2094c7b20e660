"""What every reader hands over, and the checks that all readers share."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from infopt.errors import CheckpointError, InfoptError, nearest
from infopt.io.tokenizer import Tokenizer
from infopt.ops import rope_frequencies
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


MOST_LAYERS = 1000


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
      step: from one of this weight's rows to the next, where the rows of several alternate.
      stacked: the tensor is that of all experts, one after the other.
    """

    files: tuple[str, ...]
    start: int = 0
    of: int | None = None
    transposed: bool = False
    step: int = 1
    stacked: bool = False

    def rows(self, part: slice) -> slice:
        """The rows of the tensor that are some of the weight's.

        >>> Source(("gate_up",), start=1, of=8, step=2).rows(slice(0, 3))
        slice(1, 6, 2)
        """
        return slice(self.start + part.start * self.step, self.start + (part.stop - 1) * self.step + 1, self.step)


def file_shapes(sources: Mapping[str, Source], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shape that each tensor of the checkpoint must have."""
    wanted: dict[str, tuple[int, ...]] = {}
    for name, where in sources.items():
        shape = shapes[name][1:] if len(where.files) > 1 or where.stacked else shapes[name]
        shape = shape if where.of is None else (where.of, *shape[1:])
        shape = shape[::-1] if where.transposed else shape
        wanted |= dict.fromkeys(where.files, (*shapes[name][:1], *shape) if where.stacked else shape)
    return wanted


def make_config(cls: type[Any], where: str, **fields: Any) -> Any:
    """A config; numbers that cannot be are the checkpoint's fault."""
    try:
        config = cls(**fields)
    except InfoptError as error:
        raise CheckpointError(
            f"{where} describes a model that cannot be.", why=error.one_line, fix="fetch or convert the model again"
        ) from error
    _check_numbers(where, config)
    return config


def _check_numbers(where: str, config: Any) -> None:
    """Raise unless every number is positive, and is one for indices and float32."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for x in value if isinstance(value, tuple) else (value,):
            if dataclasses.is_dataclass(x):
                _check_numbers(where, x)
            elif isinstance(x, int) and not isinstance(x, bool):
                if not 0 < x < 2**31:
                    raise _no_number(where, field.name, x)
            elif isinstance(x, float) and not (1e-30 < x < 1e30 or (x == 0 and field.name == "norm_eps")):
                raise _no_number(where, field.name, x)


def _no_number(where: str, name: str, value: Any) -> CheckpointError:
    return CheckpointError(
        f"{where} describes a model that cannot be: {name}={value!r:.40}.",
        why="no model computes with such a number.",
        fix="fetch or convert the model again",
    )


def check_rotation(where: str, config: Config) -> None:
    """Raise unless each pair of a head's values turns by a number; after the tensors' shapes, which bound the pairs."""
    c: Any = config
    if not hasattr(c, "rope_theta"):
        return
    rotated = getattr(c, "rotated", None)
    width = rotated if isinstance(rotated, int) else c.head_dim
    ropes = [(c.rope_theta, c.rope_scaling), *([(c.local_rope_theta, None)] if hasattr(c, "local_rope_theta") else [])]
    try:
        with np.errstate(all="ignore"):
            found = [rope_frequencies(width, theta, scaling) for theta, scaling in ropes]
        right = all(f.shape == (width // 2,) and np.isfinite(f).all() and (f >= 0).all() for f in found)
    except (ArithmeticError, ValueError):
        right = False
    if not right or width % 2 or width > c.head_dim:
        raise CheckpointError(
            f"{where} turns {width} of a head's {c.head_dim} values by angles that cannot be computed.",
            why="they are turned in pairs, by the base and the stretch that the config gives.",
            fix="fetch or convert the model again",
        )


def bound_layers(where: str, layers: int) -> None:
    """Raise before anything is listed for each of too many layers."""
    if layers > MOST_LAYERS:
        raise CheckpointError(
            f"{where} asks for {layers} layers.",
            why=f"no model has more than {MOST_LAYERS}.",
            fix="fetch or convert the model again",
        )


def check_layers(where: str, layers: int, tensors: int, experts: int = 0) -> None:
    """Raise where there are fewer tensors than layers, or than experts, where each of them has tensors of its own."""
    if layers * max(1, experts) > tensors:
        raise CheckpointError(
            f"{where} has {tensors} tensors, too few for {layers} layers"
            + f" of {experts} experts" * (experts > 0)
            + ".",
            why="its config asks for them.",
            fix="fetch or convert the model again",
        )
    bound_layers(where, layers)


def check_tensors(where: str, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """Raise unless the tensors found are those wanted, in name and shape."""
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted]
    if missing:
        guess = f" {nearest(missing[0][:100], [name[:100] for name in extra[:100]])}" if extra else ""
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


def shown(value: Any) -> str:
    """What a file holds, as an error message shows it."""
    try:
        return f"{value!r:.60}"
    except RecursionError:
        return f"a {type(value).__name__} nested too deep"


def _some(names: list[str]) -> str:
    return ", ".join(f"{name!r:.100}" for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@contextlib.contextmanager
def converting(where: str, dtype: np.dtype[Any]) -> Iterator[None]:
    """Values that are no numbers stay none; one that a narrower type cannot hold is an error, not infinity."""
    try:
        with np.errstate(invalid="ignore", over="raise"):
            yield
    except FloatingPointError as error:
        raise CheckpointError(
            f"{where} holds values beyond what {dtype} can say.",
            why="they would become infinite, and so would all that is computed with them.",
            fix='load it with dtype="float32" or "bfloat16"; where these fail too, fetch the model again',
        ) from error


def row_chunks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of the first axis of at most CHUNK values each."""
    step = max(1, CHUNK // max(1, int(np.prod(shape[1:]))))
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))
