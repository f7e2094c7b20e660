"""quantize: store weights in few bits, rounded to nearest."""

from __future__ import annotations

import dataclasses
import fnmatch
from typing import Any, ClassVar, final

import jax
import jax.numpy as jnp

from infopt.errors import InfoptError, ParamsError, nearest
from infopt.model import Model, Weights, shapes
from infopt.qtensor import Format, quantize_array
from infopt.spec import Spec
from infopt.transforms.base import Transform, layer_matrices, need_dense, whole
from infopt.typing import is_traced


@final
@dataclasses.dataclass(frozen=True, repr=False)
class Quantize(Transform):
    name: ClassVar[str] = "quantize"
    bits: int
    group: int | None = None
    where: str | None = None

    @property
    def exact(self) -> bool:
        return False

    @property
    def format(self) -> Format:
        if self.bits == 8:
            return Format("int8", self.group, "float32" if self.group is None else "float16")
        return Format("int4", self.group or 32, "float16")

    def names(self, spec: Spec) -> list[str]:
        if self.where is None:
            if not (found := layer_matrices(spec)):
                raise InfoptError(
                    f"{self!r}: {spec.family} has no matrix that belongs to a layer.",
                    why="by default the layers' own matrices are packed.",
                    fix="where=..., a pattern over "
                    + (
                        ", ".join([n for n, shape in shapes(spec).items() if len(shape) > 1][:4])
                        or "matrices, of which it has none"
                    ),
                )
            return found
        matrices = [n for n, shape in shapes(spec).items() if len(shape) > 1]
        found = [n for n in matrices if fnmatch.fnmatchcase(n, self.where)]
        if not found:
            raise InfoptError(
                f"{self!r}: no weight is named like {self.where!r}.",
                why=nearest(self.where, matrices),
                fix="a pattern over logical names, as 'layers.*.mlp.*', 'embed', 'head'",
            )
        return found

    def check(self, spec: Spec) -> None:
        names = self.names(spec)
        need_dense(self, spec, names, "rounding what is rounded already is another experiment than rounding once.")
        for name in names:
            self.format.check_width(shapes(spec)[name][-1], name)

    def edit(self, spec: Spec) -> Spec:
        return spec.replace(weights=tuple(sorted((*spec.weights, *((n, self.format) for n in self.names(spec))))))

    def params(self, weights: Weights, before: Model, after: Spec, **extra: Any) -> Weights:
        def pack(name: str, w: Any) -> Any:
            if not is_traced(w) and not bool(jnp.isfinite(w).all()):
                raise ParamsError(
                    f"{name} holds NaN or infinite weights.",
                    why="they would spoil their whole group.",
                    fix="look where they came from; jnp.nan_to_num if they are meant to be finite",
                )
            return _pack(w, self.format)

        return weights.map(self.names(before.spec), pack)


@jax.jit(static_argnums=1)
def _pack(w: Any, fmt: Format) -> Any:
    return quantize_array(w, fmt, trailing=2)


def quantize(bits: int = 8, group: int | None = None, where: str | None = None) -> Quantize:
    """Store weights in 8 or 4 bits, rounded to nearest.

    8 bits: symmetric, a scale a row of the matrix (or a group of its inputs); 1 byte a weight and the scales.
    4 bits: packed two to a byte, symmetric in groups of `group` inputs (32 by default), scale = extreme value / -8,
    16-bit scales; 0.5625 bytes a weight in groups of 32. Not exact.

    Args:
      bits: 8 or 4.
      group: neighbouring inputs that share a scale; must divide every matrix it meets.
      where: a pattern over logical names (`"layers.*.mlp.*"`, `"embed"`); by default the blocks' linear layers.

    Raises:
      InfoptError: bits or group make no format; `where` matches nothing; the group does not divide.
      TransformOrderError: a matched weight is packed already.

    >>> import infopt as ip
    >>> dict(quantize(bits=4)(ip.models.llama()).spec.weights)["layers.0.mlp.up"]
    Format(name='int4', group=32, scale='float16')
    """
    if bits not in (4, 8) or isinstance(bits, float | bool):
        raise InfoptError(
            f"quantize(bits={bits!r}) is not a format.",
            why="those are the formats that bits can name.",
            fix="bits=8 or bits=4",
        )
    if group is not None:
        whole("group", group, 2)
    if where is not None and not isinstance(where, str):
        raise InfoptError(
            f"quantize(where={where!r}) is not a pattern.",
            why="it is compared with each weight's name.",
            fix="one text, as 'layers.*.mlp.*'; several: stack quantize",
        )
    transform = Quantize(bits, group, where)
    _ = transform.format
    return transform
