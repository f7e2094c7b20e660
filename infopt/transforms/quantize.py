"""quantize: store weights in few bits, rounded to nearest or by a method."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, final

import jax
import jax.numpy as jnp

from infopt.errors import InfoptError, ParamsError, nearest
from infopt.formats import FORMATS
from infopt.methods import METHODS, Method
from infopt.model import Model, Weights, is_matrix, shapes
from infopt.qtensor import Format, kept_only, quantize_array
from infopt.spec import Spec
from infopt.transforms.base import Transform, layer_matrices, need_dense, whole
from infopt.typing import is_traced

BITS = {8: "int8", 6: "int6", 5: "int5", 4: "int4", 3: "int3", 2: "int2"}
"""The formats that bits can name."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """What `where` says of the weights of a pattern.

    Args:
      pattern: over logical names; None: the blocks' linear layers.
      format: None leaves them dense.
    """

    pattern: str | None
    format: Format | None


@final
@dataclasses.dataclass(frozen=True, repr=False)
class Quantize(Transform):
    name: ClassVar[str] = "quantize"
    bits: int | None
    group: int | None = None
    where: str | tuple[str, ...] | tuple[tuple[str, int | str | None], ...] | None = None
    format: str | None = None
    clip: str | None = None
    pad: bool = False
    method: Method | None = None
    activations: int | None = None
    static: bool = False

    @property
    def exact(self) -> bool:
        return False

    def _format(self, what: int | str | None) -> Format | None:
        if what is None:
            return None
        name = what if isinstance(what, str) else BITS[what]
        row = FORMATS[name] if name in FORMATS else Format(name).row  # raises
        group = row.group if self.group is None else self.group
        if row.rule == "none":
            return Format(name, activations=self.activations)
        scale = "float32" if group is None and row.scale in ("float16", "float32") else row.scale
        return Format(name, group, scale, self.pad, self.activations, self.static)

    @property
    def rules(self) -> tuple[Rule, ...]:
        """What applies to a weight: the first whose pattern its name matches."""
        own = self._format(self.bits if self.format is None else self.format)
        if self.where is None or isinstance(self.where, str):
            return (Rule(self.where, own),)
        return tuple(
            Rule(each, own) if isinstance(each, str) else Rule(each[0], self._format(each[1])) for each in self.where
        )

    def matched(self, spec: Spec) -> dict[str, Rule]:
        """The rule of each weight that has one.

        Raises:
          InfoptError: a rule touches no weight.
        """
        matrices = [n for n, shape in shapes(spec).items() if is_matrix(n, shape)]
        found: dict[str, Rule] = {}
        for rule in self.rules:
            if rule.pattern is None:
                names = layer_matrices(spec)
            else:
                names = [n for n in matrices if fnmatch.fnmatchcase(n, rule.pattern)]
            if not names:
                raise self._nothing(spec, rule.pattern, matrices)
            if not (left := [n for n in names if n not in found]):
                raise InfoptError(
                    f"{self!r}: the rule {rule.pattern!r} touches nothing: rules before it have all that it matches.",
                    why="the first rule that matches a name holds, so this one would be lost.",
                    fix="put it before them, or leave it out",
                )
            found |= dict.fromkeys(left, rule)
        return found

    def _nothing(self, spec: Spec, pattern: str | None, matrices: list[str]) -> InfoptError:
        if pattern is None:
            return InfoptError(
                f"{self!r}: {spec.family} has no matrix that belongs to a layer.",
                why="by default the layers' own matrices are packed.",
                fix=f"where=..., a pattern over {', '.join(matrices[:4]) or 'matrices, of which it has none'}",
            )
        return InfoptError(
            f"{self!r}: no weight is named like {pattern!r}.",
            why=_why_nothing(spec, pattern, matrices),
            fix="a pattern over logical names, as 'layers.*.mlp.*', 'embed', 'head'",
        )

    def formats(self, spec: Spec) -> dict[str, Format]:
        """The format of each weight that is packed."""
        return {name: rule.format for name, rule in self.matched(spec).items() if rule.format is not None}

    def check(self, spec: Spec) -> None:
        formats = self.formats(spec)
        need_dense(self, spec, formats, "rounding what is rounded already is another experiment than rounding once.")
        for name, fmt in formats.items():
            fmt.check_width(shapes(spec)[name][-1], name)
            if fmt.activations is not None and name != "head" and not name.startswith("layers."):
                tied = name == "embed" and "head" not in shapes(spec)
                raise InfoptError(
                    f"{self!r}: {name} is no layer's matrix, and no head.",
                    why="it is taken for a table, whose rows are looked up: there is no input to round"
                    + (": it is the head too, but packed once." if tied else "."),
                    fix="a where= that leaves it out, as 'layers.*'; and for it a quantize without activations",
                )
        if self.method is not None:
            self.method.check(spec, formats)

    def edit(self, spec: Spec) -> Spec:
        return spec.replace(weights=tuple(sorted((*spec.weights, *self.formats(spec).items()))))

    def params(self, weights: Weights, before: Model, after: Spec, **extra: Any) -> Weights:
        formats = self.formats(before.spec)

        @functools.cache
        def rounded() -> Mapping[str, Any]:  # all at once, when the first of them is read
            assert self.method is not None
            checked(first := next(iter(formats)), weights[first])  # before anything is read
            return self.method.rounded(before, weights.map(formats, checked), formats, self.clip)

        def checked(name: str, w: Any) -> Any:
            if is_traced(w) and self.method is not None:
                raise ParamsError(
                    f"{self!r} was asked to convert weights that have no value yet.",
                    why="it reads texts with them, a layer at a time.",
                    fix="model.convert(params) outside of jax.jit and jax.eval_shape",
                )
            if not is_traced(w) and not bool(jnp.isfinite(w).all()):
                raise ParamsError(
                    f"{name} holds NaN or infinite weights.",
                    why="they would spoil their whole group.",
                    fix="look where they came from; jnp.nan_to_num if they are meant to be finite",
                )
            return w

        if self.method is not None:
            return weights.made(self.method.gives(before, formats), lambda name: rounded()[name])
        return weights.map(formats, lambda name, w: _pack(checked(name, w), formats[name], self.clip))

    def digest(self) -> str:
        return "" if self.method is None else self.method.digest()

    def reads(self, model: Model) -> list[Any]:
        return [] if self.method is None else self.method.reads(model)

    def __repr__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        usual = {f.name: f.default for f in dataclasses.fields(self)}
        if isinstance(self.where, tuple):
            mapping = any(not isinstance(each, str) for each in self.where)
            given["where"] = dict(self.where) if mapping else list(self.where)  # type: ignore[arg-type]
        return f"quantize({', '.join(f'{k}={v!r}' for k, v in given.items() if v is not usual[k] and v is not None)})"


def _why_nothing(spec: Spec, pattern: str, matrices: list[str]) -> str:
    """The near names, those of all layers as one."""
    if pattern == "head" and "embed" in matrices:
        return "the head of this model is its embedding: 'embed'."
    for wider in (f"*.{pattern}", f"*.{pattern}.*"):
        if names := fnmatch.filter(matrices, wider):
            return f"did you mean {wider!r}? It is compared with the whole name, as {names[0]!r}."
    if index := re.match(r"layers\.(\d+)\.", pattern):
        own = [n for n in matrices if n.startswith(index[0])]
        return nearest(pattern, own) if own else f"the model has layers 0 to {spec.config.layers - 1}."
    return nearest(pattern, list(dict.fromkeys(re.sub(r"^layers\.\d+\.", "layers.*.", n) for n in matrices)))


@jax.jit(static_argnums=(1, 2))
def _pack(w: Any, fmt: Format, clip: str | None) -> Any:
    return quantize_array(w, fmt, trailing=2, clip=clip)


def quantize(
    bits: int | None = None,
    group: int | None = None,
    where: str | Sequence[str] | Mapping[str, int | str | None] | None = None,
    format: str | None = None,
    clip: str | None = None,
    pad: bool = False,
    method: Method | str | None = None,
    activations: int | None = None,
    static: bool = False,
) -> Quantize:
    """Store weights in few bits, rounded to the nearest level or by a method. Not exact.

    8 bits: symmetric, a scale a row of the matrix (or a group of its inputs); 1 byte a weight and the scales.
    4 bits: packed two to a byte, symmetric in groups of `group` inputs (32 by default), scale = extreme value / -8,
    16-bit scales; 0.5625 bytes a weight in groups of 32. 6, 5, 3 and 2 bits alike, of `bits / 8 + 0.0625` bytes.
    `infopt.formats.FORMATS` lists all formats, and takes a user's own; nothing rounds to GGUF's K-quants, which are
    kept as files hold them. Activations stay as they are, and products are accumulated in their type, unless
    `activations` says otherwise.

    Args:
      bits: 8 (the default), 6, 5, 4, 3 or 2; as format="int8", "int4", ...
      group: neighbouring inputs that share a scale; must divide every matrix it meets. By default the format's own.
      where: a pattern over logical names (`"layers.*.mlp.*"`, `"embed"`), several, or a mapping of patterns to bits or
        formats, None for what is to stay dense; by default the blocks' linear layers. Of several patterns the first
        that matches a name holds, and each must hold for some weight.
      format: "fp16", "bf16", "fp8_e4m3", "nf4", "mxfp4", ...; in place of bits.
      clip: "mse" shrinks each group's range where that lessens its squared error, down to half (`qtensor.SHRINK`).
      pad: fill rows up to whole groups where the group does not divide; what is filled up takes memory, and is counted.
      method: what chooses the codes: `ip.gptq(...)`, or "gptq" with its own arguments left as they are. It reads texts
        with the stack before it, when params are converted. By default each value is rounded to the nearest.
      activations: 8 rounds what is multiplied by these weights to 8 bits as well, each token by a scale of its own, and
        sums products in int32 (`infopt.kernels.int_matmul`, which defines it). Only of formats with whole levels.
      static: with activations, one scale for all tokens that go into a matrix: the greatest value that went in while
        the method read its text, through the rounded stack; what is greater later is cut off. `method="nearest"` is
        rounding to nearest with such a text.

    Raises:
      InfoptError: bits, format or group make no format; a pattern matches nothing; the group does not divide;
        activations where levels are not whole, or of a table; static scales without activations or a method.
      TransformOrderError: a matched weight is packed already.

    >>> import infopt as ip
    >>> dict(quantize(bits=4)(ip.models.llama()).spec.weights)["layers.0.mlp.up"]
    Format(name='int4', group=32, scale='float16')
    >>> mixed = quantize(where={"layers.0.*": None, "*.mlp.*": "nf4", "layers.*": 8})(ip.models.llama())
    >>> [mixed.spec.format_of(f"layers.{name}") for name in ("0.mlp.up", "1.mlp.up", "1.attn.q")]
    [None, Format(name='nf4', group=64, scale='float16'), Format(name='int8', group=None, scale='float32')]
    >>> quantize(bits=8, activations=8)(ip.models.llama()).spec.format_of("layers.0.attn.q").label
    'int8/a8'
    """
    mapping = isinstance(where, Mapping)
    if bits is None:
        bits = None if format is not None or mapping else 8
    elif format is not None or mapping:
        raise InfoptError(
            f"quantize(bits={bits!r}) was given {'a mapping' if mapping else f'format={format!r}'} too.",
            why="both say the format.",
            fix="one of the two",
        )
    if mapping and format is not None:
        raise InfoptError(
            f"quantize(format={format!r}) was given a mapping too.", why="both say the format.", fix="one of the two"
        )
    if bits is not None:
        bits = _bits(bits)
    if format is not None:
        _check_name(format)
    if group is not None:
        group = whole("group", group, 2)
    if clip not in (None, "mse"):
        raise InfoptError(f"quantize(clip={clip!r}) is no search.", why="one is known.", fix='clip="mse", or None')
    if not isinstance(pad, bool):
        raise InfoptError(f"quantize(pad={pad!r}) is no truth.", why="rows are padded or not.", fix="pad=True")
    if activations is not None and (isinstance(activations, bool) or activations != 8):
        raise InfoptError(
            f"quantize(activations={activations!r}).",
            why="inputs are rounded to 8 bits, or not at all.",
            fix="activations=8, or None",
        )
    activations = None if activations is None else 8
    if not isinstance(static, bool) or (static and (activations is None or method is None)):
        lacks = "activations" if activations is None else "a method"
        raise InfoptError(
            f"quantize(static={static!r})" + (f" without {lacks}." if isinstance(static, bool) else " is no truth."),
            why="static scales are of inputs that are rounded, and are read off a text.",
            fix='quantize(bits=8, activations=8, static=True, method="nearest"), or "smoothquant"',
        )
    transform = Quantize(bits, group, _patterns(where), format, clip, pad, _method(method), activations, static)
    for rule in transform.rules:
        _check_scale(transform, rule.format)
    return transform


def _method(method: Any) -> Method | None:
    if method is None or isinstance(method, Method):
        return method
    if not isinstance(method, str) or method not in METHODS:
        raise InfoptError(
            f"quantize(method={method!r}) is no method.",
            why="a method is a value, or the name of one.",
            fix=nearest(str(method), list(METHODS)) + " or ip.gptq(...)",
        )
    return METHODS[method]()


def _bits(bits: Any) -> int:
    if isinstance(bits, bool) or not hasattr(bits, "__index__") or operator.index(bits) not in BITS:
        raise InfoptError(
            f"quantize(bits={bits!r}) is not a format.",
            why="those are the formats that bits can name.",
            fix='bits=8, 6, 5, 4, 3 or 2, or format="nf4", say',
        )
    return operator.index(bits)


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or name not in FORMATS:
        if name in ("fp32", "float32", "f32"):
            raise InfoptError(
                f"quantize(format={name!r}) is what weights are without it.",
                why="the table infopt.formats.FORMATS has rows of fewer bits.",
                fix="leave quantize out; for some weights, a mapping: where={'*.mlp.*': None, 'layers.*': 8}",
            )
        raise InfoptError(
            f"quantize(format={name!r}) is not a format.",
            why="the table infopt.formats.FORMATS has no such row.",
            fix=nearest(str(name), [known for known, row in FORMATS.items() if not row.kept]),
        )
    if FORMATS[name].kept:
        raise kept_only(name)


def _check_scale(transform: Quantize, fmt: Format | None) -> None:
    """Raise where an argument would be lost on a format without scales."""
    if fmt is not None and fmt.row.rule == "none":
        for argument in ("group", "clip"):
            if getattr(transform, argument) is not None:
                raise InfoptError(
                    f"{transform!r}: {fmt.name} has no scales.",
                    why=f"{argument} says how they are made, and would be lost.",
                    fix=f"leave {argument} out",
                )


def _patterns(where: Any) -> Any:
    """What `where` says, hashable."""
    if where is None or isinstance(where, str):
        return where
    if isinstance(where, Mapping):
        for what in where.values():
            if isinstance(what, str):
                _check_name(what)
        found = tuple((k, v if v is None or isinstance(v, str) else _bits(v)) for k, v in where.items())
    else:
        found = tuple(where) if isinstance(where, list | tuple) else (None,)
    if not found or not all(isinstance(p, str) for p in _keys(found)) or len(set(_keys(found))) < len(found):
        raise InfoptError(
            f"quantize(where={where!r}) is not a pattern.",
            why="it is compared with each weight's name.",
            fix="a text, as 'layers.*.mlp.*'; several different ones; or a mapping, as {'head': 8, '*.mlp.*': 'int4'}",
        )
    return found


def _keys(found: tuple[Any, ...]) -> Iterator[Any]:
    return (each[0] if isinstance(each, tuple) else each for each in found)
