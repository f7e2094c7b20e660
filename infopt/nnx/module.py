"""A Flax NNX module as a function of weights by logical name: its dense layers and its attention are the library's."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import math
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal, cast

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from infopt import ops
from infopt.errors import InfoptError
from infopt.qtensor import dequantize_array, is_qtensor
from infopt.typing import Array

ModulePath = tuple[Any, ...]

_LIBRARIES = (*(str(Path(p.__file__ or "").parent) for p in (jax, flax)), str(Path(__file__).parent.parent))
_OWN = str(Path(__file__).with_name("example.py"))


def is_users(file: str) -> bool:
    """Whether a line of code is the user's own, not a library's."""
    standard = file.startswith(sysconfig.get_paths()["stdlib"]) and "site-packages" not in file
    return file == _OWN or not (standard or file.startswith((*_LIBRARIES, "<frozen")))


def calling_line() -> str:
    """The innermost line of the user's that is being called: "model.py:12, in Block.__call__"."""
    frame = sys._getframe(1)
    while frame is not None and not is_users(frame.f_code.co_filename):
        frame = frame.f_back
    return "an unknown line" if frame is None else line(frame.f_code.co_filename, frame.f_lineno, frame.f_code)


def line(file: str, number: int, code: Any) -> str:
    name = code if isinstance(code, str) else getattr(code, "co_qualname", code.co_name)
    return f"{Path(file).name}:{number}, in {name}"


# ------------------------------------------------------------------------------------------------------ what is called


@dataclasses.dataclass
class Run:
    """One call of a module: where its attention goes, and what its packed weights are.

    Args:
      attend: `(layer, q, k, v) -> out`.
      watch: is told of each call of attention: the module's path, the line, and what was given besides.
    """

    attend: Callable[[int, Array, Array, Array], Array]
    watch: Callable[[Call], None] | None = None
    weights: dict[int, Any] = dataclasses.field(default_factory=dict)  # by the id of the variable that they stand for
    used: set[int] = dataclasses.field(default_factory=set)  # of these, what the library's layers asked for
    calls: int = 0


@dataclasses.dataclass(frozen=True)
class Call:
    """What attention was called with."""

    path: ModulePath
    where: str
    shape: tuple[int, int, int]  # query heads, key/value heads, values in a head
    mask: Any
    causal: bool
    written: Callable[..., Array]  # `(q, k, v, mask) -> out`: as the module would have attended


_RUN: ContextVar[Run] = ContextVar("infopt_nnx_run")


def _weight(variable: Any) -> Any:
    """The stored form of a variable; None where the module was taken apart by a transformation of its own."""
    run = _RUN.get(None)
    if run is None or id(variable) not in run.weights:
        return None
    run.used.add(id(variable))
    return run.weights[id(variable)]


def _product(layer: Any, x: Array, inputs: int, outputs: tuple[int, ...]) -> Array | None:
    kernel, bias = layer.kernel, layer.bias
    if (w := _weight(kernel)) is None:
        return None
    arrays = [kernel, *([] if bias is None else [bias])]
    dtype = layer.dtype or functools.reduce(jnp.promote_types, (a.dtype for a in arrays), x.dtype)
    rows = x.astype(dtype).reshape(*x.shape[: x.ndim - inputs], -1)
    y = ops.linear(rows, w, None, None if bias is None else bias[...].reshape(-1))
    return y.reshape(*y.shape[:-1], *outputs)


class _Linear(nnx.Linear):
    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        y = _product(self, inputs, 1, (self.out_features,)) if out_sharding is None else None
        return super().__call__(inputs, out_sharding) if y is None else y


class _LinearGeneral(nnx.LinearGeneral):
    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        y = _product(self, inputs, len(self.in_features), self.out_features) if out_sharding is None else None
        return super().__call__(inputs, out_sharding) if y is None else y


class _Embed(nnx.Embed):
    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        if out_sharding is None and is_qtensor(table := _weight(self.embedding)):
            return ops.embed(table, inputs).astype(self.dtype)
        return super().__call__(inputs, out_sharding)

    def attend(self, query: Array, out_sharding: Any = None) -> Array:
        if out_sharding is None and (table := _weight(self.embedding)) is not None:
            return ops.linear(query.astype(self.dtype), table)
        return super().attend(query, out_sharding)


REPLACED: dict[type[Any], type[Any]] = {nnx.Linear: _Linear, nnx.LinearGeneral: _LinearGeneral, nnx.Embed: _Embed}


def _as_published(m: Any) -> bool:
    """Whether a layer computes what its class does by default, so that ours may stand in for it."""
    usual = {
        "dot_general": (None, jax.lax.dot_general),
        "dot_general_cls": (None,),
        "precision": (None,),
        "preferred_element_type": (None,),
        "promote_dtype": (promote_dtype,),
    }
    if any(getattr(m, name, values[0]) not in values for name, values in usual.items()):
        return False
    if isinstance(m, nnx.Embed):
        return m.num_embeddings > 1
    if isinstance(m, nnx.LinearGeneral):
        return not m.batch_axis and tuple(m.axis) == tuple(range(-len(m.axis), 0))
    return True


_ORDER = tuple(inspect.signature(nnx.dot_product_attention).parameters)[3:]


def _attention(
    path: ModulePath,
    written: Callable[..., Array],
    query: Array,
    key: Array,
    value: Array,
    *more: Any,
    **options: Any,
) -> Array:
    """What `attention_fn` becomes; takes what `nnx.dot_product_attention` takes."""
    given = dict(zip(_ORDER, more)) | options
    bias, mask, is_causal = given.get("bias"), given.get("mask"), given.get("is_causal", False)
    others = sorted({*given} - {*_ORDER})
    if "scale" in others and given["scale"] in (None, query.shape[-1] ** -0.5):
        others.remove("scale")
    run, where = _RUN.get(), calling_line()

    def refuse(why: str, fix: str) -> InfoptError:
        return InfoptError(f"the attention at {where} cannot be cached.", why=why, fix=fix)

    if bias is not None:
        raise refuse("it adds a bias to its scores, which `attend` has no place for.", "rotary or learned positions")
    if others:
        raise refuse(f"it is given {', '.join(others)}.", "the arguments of nnx.dot_product_attention")
    if given.get("dropout_rate") and not given.get("deterministic") and given.get("dropout_rng") is not None:
        raise refuse("it drops weights at random.", "deterministic=True when it is called")
    if given.get("module") is not None:
        raise refuse("it records its weights (sow_weights).", "sow_weights=False")
    query, key, value = promote_dtype((query, key, value), dtype=given.get("dtype"))
    if query.ndim != 4 or key.shape != value.shape or query.shape[:2] != key.shape[:2]:
        raise refuse(
            f"queries are {list(query.shape)}, keys {list(key.shape)}, values {list(value.shape)}: each token must have"
            " one of each, of one width.",
            "causal self-attention, [B, T, heads, width] of each",
        )
    if query.shape[3] != key.shape[3] or query.shape[2] % key.shape[2]:
        raise refuse(
            f"{query.shape[2]} query heads of {query.shape[3]} do not share {key.shape[2]} keys of {key.shape[3]}.",
            "heads of one width, each key head serving an equal number of query heads",
        )
    if run.watch is not None:

        def again(q: Array, k: Array, v: Array, mask: Array) -> Array:
            replaced = {} if given.get("mask") is None else {"mask": mask.astype(given["mask"].dtype)}
            return written(q, k, v, **given | replaced | ({"dtype": None} if "dtype" in given else {}))

        run.watch(Call(path, where, (query.shape[2], key.shape[2], query.shape[3]), mask, is_causal, again))
    run.calls += 1
    return run.attend(run.calls - 1, query, key, value)


# ------------------------------------------------------------------------------------------------- the module, opened


@dataclasses.dataclass(frozen=True)
class Variable:
    """One array of the module, and how it is kept here.

    Args:
      kind: `"matrix"`: kept as `[out, in]`, where a kernel is `[in.., out..]`; `"table"`: as it is; `"other"`: flat, so
        that no transform takes it for a matrix.
      inputs: how many axes of a kernel are inputs.
    """

    path: ModulePath
    kind: Literal["matrix", "table", "other"]
    shape: tuple[int, ...]
    dtype: Any
    inputs: int = 0

    @property
    def stored_shape(self) -> tuple[int, ...]:
        if self.kind == "matrix":
            return (math.prod(self.shape[self.inputs :]), math.prod(self.shape[: self.inputs]))
        return self.shape if self.kind == "table" else (math.prod(self.shape),)

    def store(self, x: Array) -> Array:
        return x.reshape(self.stored_shape[::-1]).T if self.kind == "matrix" else x.reshape(self.stored_shape)

    def restore(self, w: Any) -> Array:
        x = dequantize_array(w) if is_qtensor(w) else w
        return (x.T if self.kind == "matrix" else x).reshape(self.shape).astype(self.dtype)


class Opened:
    """A module's structure, without its weights.

    Args:
      module: left as it is; this one has its dropout off.
      positions: the name of the argument that takes positions; None where there is none.
    """

    def __init__(self, module: nnx.Module, positions: str | None) -> None:
        module = nnx.merge(*nnx.split(module))  # another one, of the same arrays
        for _, m in nnx.iter_graph(module):
            if isinstance(m, nnx.Module):
                flags = {"deterministic": True, "use_running_average": True}
                flags |= {"decode": False} if isinstance(m, nnx.MultiHeadAttention) else {}
                for flag, value in flags.items():
                    if flag in vars(m):
                        setattr(m, flag, value)
        self.graphdef, state = nnx.split(module)
        self._attributes = [
            (path, type(m).__qualname__, {k: _plain(v) for k, v in vars(m).items() if not k.startswith("_pytree")})
            for path, m in nnx.iter_graph(module)
            if isinstance(m, nnx.Module)
        ]
        self.cls, self.positions = type(module), positions
        layers = {path: m for path, m in nnx.iter_graph(module) if type(m) in REPLACED and _as_published(m)}
        kernels: dict[ModulePath, Any] = {
            (*path, "embedding" if isinstance(m, nnx.Embed) else "kernel"): m for path, m in layers.items()
        }
        self.sizes = {n for leaf in jax.tree.leaves(state) for n in jnp.shape(leaf)}
        self.variables: list[Variable] = []
        self._flat: dict[ModulePath, Any] = {}
        for path, leaf in nnx.to_flat_state(state):
            value = leaf.get_value() if isinstance(leaf, nnx.Variable) else None
            if not isinstance(value, jax.Array) or not jnp.issubdtype(value.dtype, jnp.floating):
                self._flat[path] = leaf  # random keys, counts, tables of whole numbers
                continue
            kind, inputs, m = "other", 0, kernels.get(path)
            if m is not None:
                kind = "table" if isinstance(m, nnx.Embed) else "matrix"
                inputs = len(m.in_features) if isinstance(m, nnx.LinearGeneral) else 1
            self.variables.append(Variable(path, kind, tuple(value.shape), value.dtype, inputs))
            self._flat[path] = leaf.replace(jax.ShapeDtypeStruct(value.shape, value.dtype))
        # by the path of a layer: its variable, unless that is another's, which stands under the other's name
        own = {v.path for v in self.variables}
        self._layers = {path[:-1]: path for path in kernels if path in own}
        self.name_layers(())

    def name_layers(self, attentions: tuple[ModulePath, ...]) -> None:
        """Name the weights by the layers that they belong to, given each layer's attention."""
        prefixes = [_prefix(p, attentions) for p in attentions]
        members: dict[ModulePath, set[Any]] = {}
        for v in self.variables:
            members.setdefault(v.path[:1], set()).add(v.path[1] if len(v.path) > 1 else None)

        def named(path: ModulePath) -> str:
            at = next((i for i, p in enumerate(prefixes) if p and path[: len(p)] == p), None)
            if at is not None:
                path = ("layers", at, *path[len(prefixes[at]) :])
            elif len(path) > 1 and members[path[:1]] == set(range(len(attentions))):
                path = ("layers", path[1], path[0], *path[2:])  # a list with something for each layer
            elif path[:1] == ("layers",):
                path = ("module", *path)
            return ".".join(map(str, path))

        self.names: dict[ModulePath, str] = {}
        for v in self.variables:
            above, last = v.path[:-1], v.path[-1]
            # a layer's matrix has the layer's name, its bias that and `_bias`: no name is the beginning of another
            own = named(above) if v.kind != "other" else named(v.path)
            self.names[v.path] = f"{named(above)}_{last}" if v.kind == "other" and above in self._layers else own

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {self.names[v.path]: v.stored_shape for v in self.variables}

    def weights_of(self, module: nnx.Module) -> dict[str, Array]:
        """The weights of a module of this structure, by logical name."""
        flat = dict(nnx.to_flat_state(nnx.state(module)))
        return {self.names[v.path]: v.store(flat[v.path].get_value()) for v in self.variables}

    def restored(self, weights: Mapping[str, Any]) -> Any:
        """A module with these weights, set for inference."""
        restored = {v.path: self._flat[v.path].replace(v.restore(weights[self.names[v.path]])) for v in self.variables}
        # variables belong to the trace that they are made in
        rest = {p: x.copy() if isinstance(x, nnx.Variable) else x for p, x in self._flat.items() if p not in restored}
        return nnx.merge(self.graphdef, nnx.from_flat_state({**rest, **restored}.items()))

    def alone(self, weights: Mapping[str, Any], tokens: Array, positions: Array) -> Any:
        """What the module computes as it is written."""
        return self._call(self.restored(weights), tokens, positions)

    def __call__(self, weights: Mapping[str, Any], tokens: Array, positions: Array, run: Run) -> Any:
        """What the module computes, its dense layers and its attention being the library's."""
        module, names = self.restored(weights), dict[int, str]()
        for path, m in list(nnx.iter_graph(module)):
            if path in self._layers:
                m.__class__ = REPLACED[type(m)]
                variable = self._layers[path]
                own = id(getattr(m, variable[-1]))
                names[own] = self.names[variable]
                run.weights[own] = weights[names[own]]
            elif isinstance(m, nnx.Module) and callable(getattr(m, "attention_fn", None)):
                cast(Any, m).attention_fn = functools.partial(_attention, path, cast(Any, m).attention_fn)
        with _running(run):
            out = self._call(module, tokens, positions)
        for own, name in names.items():
            w = run.weights[own]
            if is_qtensor(w) and w.format.activations is not None and own not in run.used:
                raise InfoptError(
                    f"the module multiplies by {name} by itself, and its inputs would not be rounded.",
                    why="its code reads the kernel, or calls the layer within a transformation (nnx.remat, say).",
                    fix="quantize without activations for it",
                )
        return out

    def _call(self, module: Any, tokens: Array, positions: Array) -> Any:
        return module(tokens) if self.positions is None else module(tokens, **{self.positions: positions})

    def digest(self) -> str:
        """What tells two structures apart, the same in every process."""
        text = f"{self._attributes} {[(v.path, v.kind, v.shape, str(v.dtype)) for v in self.variables]} {self.names}"
        return hashlib.sha256(text.encode()).hexdigest()[:8]


def _plain(x: Any) -> str:
    """A static attribute as text that is the same in every process; "" for what stands in the graph by itself."""
    if isinstance(x, nnx.Pytree | nnx.Variable | jax.Array | np.ndarray):
        return ""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(x))


@contextlib.contextmanager
def _running(run: Run) -> Iterator[None]:
    token = _RUN.set(run)
    try:
        yield
    finally:
        _RUN.reset(token)


def _prefix(path: ModulePath, others: tuple[ModulePath, ...]) -> ModulePath:
    """The shortest beginning that is this attention's alone; () where it is called for several layers."""
    for n in range(1, len(path) + 1):
        if sum(other[:n] == path[:n] for other in others) == 1:
            return path[: n + 1] if n < len(path) and isinstance(path[n], int) else path[:n]
    return ()
