"""Transform: a function Model -> Model, checked and edited on Specs alone, stackable with `|`."""

from __future__ import annotations

import abc
import dataclasses
import operator
from collections.abc import Iterable
from typing import Any, ClassVar, final

import jax

from infopt.errors import InfoptError, TransformOrderError
from infopt.model import Model, Weights, is_matrix, shapes
from infopt.qtensor import dequantize_array
from infopt.spec import Spec


@dataclasses.dataclass(frozen=True)
class Transform(abc.ABC):
    """What every transform is. A subclass is a frozen dataclass, final, with a lower-case factory beside it.

    It gives `check` and `edit`, on Specs; `params`, if weights change; `exact`. What it may follow is read off facts
    of the Spec, never off other transforms' names, so that a user's own takes part.

    >>> import infopt as ip
    >>> (ip.quantize(bits=8) | ip.cache_kv())(ip.models.llama()).recipe.steps
    (('quantize(bits=8)', ''), ('cache_kv()', ''))
    """

    name: ClassVar[str]
    """The factory's name, as in a stack's text."""
    extras: ClassVar[tuple[str, ...]] = ()
    """Keyword arguments of `convert` that `params` needs."""

    @property
    @abc.abstractmethod
    def exact(self) -> bool:
        """Whether what comes out equals what went in, to float rounding."""

    @abc.abstractmethod
    def check(self, spec: Spec) -> None:
        """Raise TransformOrderError (or InfoptError) where this transform cannot follow what made `spec`."""

    @abc.abstractmethod
    def edit(self, spec: Spec) -> Spec:
        """What the stack computes afterwards."""

    def check_model(self, model: Model) -> None:
        """The same for what is not in a Spec: a tokenizer."""

    def params(self, weights: Weights, before: Model, after: Spec, **extra: Any) -> Weights:
        """The weights afterwards, by logical name, lazily: `weights.map(names, change)`."""
        return weights

    def digest(self) -> str:
        """A hash of the arrays that this transform holds; "" where it holds none."""
        return ""

    def reads(self, model: Model) -> list[Any]:
        """The texts that `params` looks at, as rows of token ids: what they are measured on must be another."""
        return []

    @property
    def steps(self) -> tuple[Transform, ...]:
        """The transforms that this one is made of, first applied first."""
        return (self,)

    @final
    def __call__(self, model: Model) -> Model:
        if not isinstance(model, Model):
            raise InfoptError(
                f"{self!r} was given a {type(model).__name__}.",
                why="a transform maps a Model to a Model.",
                fix="a model: model, params = ip.load(...)",
            )
        for step in self.steps:
            if model.spec.program is not None:
                raise order_error(
                    step,
                    "must come before speculative, which is outermost",
                    "a draft and its target are two models by then, and it is open which of them is meant.",
                    f"... | {step!r} | speculative(...), or self_draft({step!r}) for the draft alone",
                )
            step.check(model.spec)
            step.check_model(model)
            model = Model(
                step.edit(model.spec),
                model.recipe.then(repr(step), step.digest()),
                model.tokenizer,
                parent=model,
                transform=step,
            )
        return model

    @final
    def __or__(self, other: Transform) -> Transform:
        if not isinstance(other, Transform):
            return NotImplemented
        return compose(self, other)

    def __repr__(self) -> str:
        given = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if f.default is dataclasses.MISSING or getattr(self, f.name) != f.default
        ]
        return f"{self.name}({', '.join(given)})"


@final
@dataclasses.dataclass(frozen=True, repr=False)
class Compose(Transform):
    name: ClassVar[str] = "compose"
    transforms: tuple[Transform, ...] = ()

    @property
    def exact(self) -> bool:
        return all(t.exact for t in self.transforms)

    @property
    def steps(self) -> tuple[Transform, ...]:
        return tuple(step for t in self.transforms for step in t.steps)

    def check(self, spec: Spec) -> None:
        self.edit(spec)

    def edit(self, spec: Spec) -> Spec:
        for step in self.steps:
            step.check(spec)
            spec = step.edit(spec)
        return spec

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.steps)) or "compose()"


def compose(*transforms: Transform) -> Transform:
    """One transform out of several; the first listed is applied first, as in `optax.chain`.

    >>> import infopt as ip
    >>> ip.compose(ip.gqa(1), ip.cache_kv()) == ip.gqa(1) | ip.cache_kv()
    True
    """
    for t in transforms:
        if not isinstance(t, Transform):
            raise InfoptError(
                f"compose was given {t!r}, which is not a transform.",
                why="it composes functions from Model to Model.",
                fix="call the factory: cache_kv(), not cache_kv" if callable(t) else "transforms only",
            )
    return Compose(tuple(step for t in transforms for step in t.steps))


def order_error(step: Transform, what: str, why: str, fix: str) -> TransformOrderError:
    return TransformOrderError(f"{step!r} {what}.", why=why, fix=fix)


def need_dense(step: Transform, spec: Spec, names: Iterable[str], why: str) -> None:
    """Raise unless none of `names` is packed."""
    packed = dict(spec.weights)
    for name in names:
        if name in packed:
            f = packed[name]
            raise order_error(
                step,
                f"needs dense weights, but {name} is packed as {f.label}" + f" in groups of {f.group}" * bool(f.group),
                why,
                f"{step!r} before what packs them, or dequantize() | {step!r}",
            )


def densify(spec: Spec, weights: Weights) -> Weights:
    """The weights with every packed one unpacked."""
    return weights.map([n for n, _ in spec.weights], lambda _, w: _unpack(w))


_unpack = jax.jit(dequantize_array)


def layer_matrices(spec: Spec) -> list[str]:
    """Names of the blocks' linear layers."""
    return [
        n
        for n, shape in shapes(spec).items()
        if n.startswith("layers.") and is_matrix(n, shape) and not n.endswith("router")
    ]


def whole(name: str, value: Any, least: int) -> int:
    """`value` if it is a whole number of at least `least`."""
    number = operator.index(value) if hasattr(value, "__index__") and not isinstance(value, bool) else -1
    if not least <= number < 2**30:
        raise InfoptError(
            f"{name}={value!r} is not a whole number >= {least} (and below 2**30).",
            why="it counts things, and indices are 32-bit.",
            fix=f"{name}={max(least, 1)}, say",
        )
    return number
