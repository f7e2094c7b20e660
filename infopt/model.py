"""Model: a Spec, its params and its pure functions; `define` for families; `build` from a Spec to functions."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from infopt import cache as kv
from infopt import ops
from infopt.cache import Layout, State
from infopt.errors import InfoptError, ParamsError, PromptError, human, nearest
from infopt.qtensor import Format, is_qtensor, quantize_array
from infopt.sampling import Sampling, sample
from infopt.spec import ROPE_SCALINGS, Codec, Config, Recipe, Spec, Speculation, Window
from infopt.typing import Array, Params, is_traced

if TYPE_CHECKING:
    from infopt.audit import Audit
    from infopt.transforms.base import Transform


@runtime_checkable
class Attend(Protocol):
    """Attention as a family's block receives it: positions, lengths, layout, codec and window are already bound."""

    def __call__(
        self,
        q: Array,
        k: Array,
        v: Array,
        cache: Any,
        layer: Any,
        *,
        rope: Callable[[Array, Array], Array],
        scale: float,
        softcap: float | None = None,
        sink_logits: Array | None = None,
    ) -> tuple[Array, Any]: ...


# ---------------------------------------------------------------------------------------------------------- families


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Stream:
    """How a family's layers read and write the residual stream: what can be folded into what, and nothing changes.

    Names are those within a layer, as `attn.q`, or those outside of layers, as `head`. What a layer lacks is passed
    over. `<name>_bias` belongs to the norm or matrix `<name>`, where there is one.

    Args:
      reads: for each norm of the stream, all matrices that read what it gives: scaling its weight (and bias) by s,
        channel by channel, is scaling their columns.
      writes: all matrices whose output is added to the stream (weighted by a number a token, if it is an expert's).
      feeds: pairs of matrices of which row i of the first, its bias too, goes into column i of the second, linearly:
        scaling row i by s is scaling column i. Where the second has more columns, heads of values are shared: head h
        of its columns is fed by head h * kv_heads // heads of the first's rows.
      tables: whose rows are added to the stream at its start.
      offset: a norm's weight w multiplies by w + offset.
      unrotatable: why the stream cannot be rotated; "" where it can.
    """

    reads: Mapping[str, tuple[str, ...]]
    writes: tuple[str, ...]
    feeds: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tables: tuple[str, ...] = ("embed",)
    offset: float = 0.0
    unrotatable: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """A model definition: pure functions over a config. Made by `define` and `define_whole`."""

    name: str
    config: type[Config]
    init: Callable[[Any, Array], dict[str, Array]]
    embed: Callable[[Any, Params, Array, Array], Array] | None = None
    block: Callable[..., tuple[Array, Any]] | None = None
    final: Callable[[Any, Params, Array], Array] | None = None
    logits: Callable[[Any, Array], Array] | None = None
    whole: Callable[..., Array] | None = None
    stream: Stream | None = None


FAMILIES: dict[str, Family] = {}


def define(
    name: str,
    config: type[Config],
    *,
    init: Callable[..., dict[str, Array]],
    embed: Callable[..., Array],
    block: Callable[..., tuple[Array, Any]],
    final: Callable[..., Array],
    logits: Callable[..., Array] | None = None,
    stream: Stream | None = None,
) -> Family:
    """Join a family to the library: afterwards every transform works on it.

    Args:
      name: what a Spec stores. Defining a name again replaces it, for every model of that name.
      config: a frozen dataclass, a subclass of `Config`.
      init: `(config, key) -> {logical name: weight}`. A layer's weights are named `layers.<i>.<name>`; matrices are
        `[out, in]`; the embedding is `embed` `[V, D]`; an untied head is `head` `[V, D]`.
      embed: `(config, params, tokens[B, T], positions[B, T]) -> x[B, T, D]`.
      block: `(config, phase, p, x, layer, attend, cache) -> (x, cache)`, one layer. `p[name]` is a stack of the
        weights `layers.*.name` and `layer` an index for `ops.linear(x, p[name], layer)`; `phase` is the layer's place
        in the config's period.
      final: `(config, params, x) -> hidden`, what the head reads.
      logits: `(config, logits) -> logits`, float32: a soft-cap, say; nothing by default.
      stream: what reads and writes the residual stream, for transforms that fold one weight into another; without it
        they refuse.

    Returns:
      The family; `Model.of(family, config)` is a model.
    """
    return _join(Family(name, config, init, embed, block, final, logits, stream=stream))


def define_whole(
    name: str, config: type[Config], *, init: Callable[..., dict[str, Array]], whole: Callable[..., Array]
) -> Family:
    """Join a family whose forward pass is one function, which nothing can scan: a Flax module, say.

    Its `hidden` is its logits, and `head` passes them on.

    Args:
      name, config, init: as for `define`; the config's `period` should be all its layers, so that none is sliced.
      whole: `(config, weights, tokens[B, T], positions[B, T], attend) -> logits[B, T, V]`. `weights` maps logical names
        to arrays and QTensors; `attend(layer, q, k, v, rope=..., scale=...) -> out[B, T, H, D]` is to be called once
        for each layer, in order, outside any transformation.
    """
    return _join(Family(name, config, init, whole=whole))


def _join(family: Family) -> Family:
    if not family.name.isidentifier():
        raise InfoptError(
            f"a family cannot be named {family.name!r}.",
            why="the name goes into saved Specs and error messages.",
            fix="a name like a Python identifier",
        )
    FAMILIES[family.name] = family
    build.cache_clear()
    _abstract.cache_clear()
    segments.cache_clear()
    return family


def family_of(spec: Spec) -> Family:
    if spec.family not in FAMILIES:
        raise _no_family(spec.family)
    return FAMILIES[spec.family]


def _no_family(name: str) -> InfoptError:
    return InfoptError(
        f"no family named {name!r} is defined here.",
        why=f"a Spec holds the name of its functions, not the functions. {nearest(name, list(FAMILIES))}",
        fix="call ip.define(...) or ip.from_nnx(...) before, as the program that made this Spec did",
    )


# ------------------------------------------------------------------------------------------------- weights by name


@functools.lru_cache(maxsize=256)
def _abstract(family: str, config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    init = FAMILIES[family].init
    return jax.eval_shape(lambda key: init(config, key), jax.random.key(0))


def shapes(spec: Spec) -> dict[str, tuple[int, ...]]:
    """Every logical name of a Spec's weights, with the shape of what it stands for."""
    family_of(spec)
    return {name: leaf.shape for name, leaf in _abstract(spec.family, spec.config).items()}


def stream_of(spec: Spec) -> Stream:
    """The family's `Stream` with the full names of this Spec's weights, of every layer.

    Raises:
      InfoptError: the family does not say, or names what no layer has.

    >>> import infopt as ip
    >>> stream_of(ip.models.llama(layers=2).spec).reads["layers.1.attn_norm"]
    ('layers.1.attn.q', 'layers.1.attn.k', 'layers.1.attn.v')
    """
    stream, known = family_of(spec).stream, shapes(spec)
    if stream is None:
        raise InfoptError(
            f"it is not known what reads and writes the residual stream of a {spec.family}.",
            why="a weight can be folded only into all that read what it scales.",
            fix="ip.define(..., stream=ip.Stream(reads=..., writes=...))",
        )
    prefixes, dim = ["", *(f"layers.{i}." for i in range(spec.config.layers))], spec.config.dim
    given = {*stream.reads, *stream.writes, *stream.feeds, *stream.tables, *stream.feeds.values()}
    for name in sorted(given.union(*stream.reads.values()) - {"head"}):  # which a tied model has not
        if not any(prefix + name in known for prefix in ([""] if name in stream.tables else prefixes)):
            raise InfoptError(
                f"the Stream of {spec.family} names {name!r}, which no layer has.",
                why="its names are those of the family's own weights.",
                fix=nearest(name, [n.split(".", 2)[-1] if n.startswith("layers.") else n for n in known]),
            )

    def full(prefix: str, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(prefix + n for n in names if prefix + n in known)

    reads = {p + n: full(p, readers) for p in prefixes for n, readers in stream.reads.items() if p + n in known}
    writes = tuple(n for p in prefixes for n in full(p, stream.writes))
    last = [*reads, *stream.tables, *(n for each in reads.values() for n in each)]
    outputs = [(n, known[n][-2] if is_matrix(n, known[n]) else 0) for n in writes]
    for name, width in [*((n, known[n][-1]) for n in last), *outputs]:
        if width != dim:
            raise InfoptError(
                f"the Stream of {spec.family} names {name}, of shape {known[name]}.",
                why=f"it reads or writes {width} channels, and the stream has {dim}.",
                fix="matrices [out, in] that multiply the stream, or whose output is added to it",
            )
    feeds = {p + a: p + b for p in prefixes for a, b in stream.feeds.items() if full(p, (a, b)) == (p + a, p + b)}
    return dataclasses.replace(stream, reads=reads, writes=writes, feeds=feeds)


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a weight is a matrix, or one an expert; the biases of experts have two axes too, and are none.

    >>> is_matrix("mlp.experts.up", (4, 192, 64)), is_matrix("mlp.experts.up_bias", (4, 192))
    (True, False)
    """
    return len(shape) > 1 and not name.endswith("_bias")


def as_run(spec: Spec, p: Mapping[str, Any]) -> dict[str, Any]:
    """A layer's weights, by their names within it, as a block is handed them."""
    return {name: ops.Turned(w) if name in spec.online else w for name, w in p.items()}


@dataclasses.dataclass(frozen=True)
class Segment:
    """A run of blocks of one structure; a block is one period of layers.

    Args:
      first: its first layer.
      period: layers in a block.
      repeats: blocks.
      names: for each layer of the block, its weights' names within the layer.
      windows: for each layer of the block, its window.
    """

    first: int
    period: int
    repeats: int
    names: tuple[tuple[str, ...], ...]
    windows: tuple[Window | None, ...]

    def layer(self, repeat: int, phase: int) -> int:
        return self.first + repeat * self.period + phase


@functools.lru_cache(maxsize=1024)
def segments(spec: Spec) -> tuple[Segment, ...]:
    """The layers as runs of equal blocks: equal in windows, and in their weights' names, shapes and formats."""
    config, formats = spec.config, dict(spec.weights)
    layers: list[list[tuple[str, Any, Any]]] = [[] for _ in range(config.layers)]
    for name, shape in shapes(spec).items():
        if name.startswith("layers."):
            _, index, rest = name.split(".", 2)
            layers[int(index)].append((rest, shape, formats.get(name)))
    runs: list[tuple[Any, int, int]] = []  # what the block is, its first layer, repeats
    for first in range(0, config.layers, config.period):
        last = min(first + config.period, config.layers)
        block = tuple((tuple(sorted(layers[i], key=lambda w: w[0])), spec.window[i]) for i in range(first, last))
        if runs and runs[-1][0] == block:
            runs[-1] = (block, runs[-1][1], runs[-1][2] + 1)
        else:
            runs.append((block, first, 1))
    return tuple(
        Segment(
            first,
            len(block),
            repeats,
            tuple(tuple(name for name, _, _ in weights) for weights, _ in block),
            tuple(window for _, window in block),
        )
        for block, first, repeats in runs
    )


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A weight not read yet. Where it is a layer of a stack, `stack[index]`, the stack can be shared."""

    get: Callable[[], Any]
    stack: Any = None
    index: int | None = None


class Weights(Mapping[str, Any]):
    """A stack's weights by logical name, read one at a time: a conversion never holds a second copy of the whole."""

    def __init__(self, entries: dict[str, _Entry]) -> None:
        self._entries = entries

    @staticmethod
    def of(spec: Spec, params: Params) -> Weights:
        """The weights in `params`, which must be those of `spec`."""
        if spec.program is not None:
            target = Weights.of(spec.replace(program=None), params["target"])
            return target.join("draft.", Weights.of(spec.program.draft, params["draft"]))
        entries = {n: _Entry(lambda x=x: x) for n, x in params.items() if n != "segments"}
        for segment, blocks in zip(segments(spec), params["segments"], strict=True):
            for phase, stacks in enumerate(blocks):
                for name, stack in stacks.items():
                    for r in range(segment.repeats):
                        entries[f"layers.{segment.layer(r, phase)}.{name}"] = _Entry(
                            lambda stack=stack, r=r: jax.tree.map(lambda leaf: leaf[r], stack), stack, r
                        )
        return Weights(entries)

    def __getitem__(self, name: str) -> Any:
        return self._entries[name].get()

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def map(self, names: Iterable[str], change: Callable[[str, Any], Any]) -> Weights:
        """The same, with `change(name, weight)` in place of each weight of `names`, once it is read."""
        changed = {n: _Entry(lambda n=n, e=self._entries[n]: change(n, e.get())) for n in names}
        return Weights(self._entries | changed)

    def made(self, names: Iterable[str], make: Callable[[str], Any]) -> Weights:
        """The same, with `make(name)` in place of each weight of `names`, once it is read."""
        return Weights(self._entries | {n: _Entry(lambda n=n: make(n)) for n in names})

    @staticmethod
    def named(names: Iterable[str]) -> Weights:
        """Weights that cannot be read: what a transform does to them tells which ones it changes."""

        def unread() -> Any:
            raise ParamsError("a weight was read that has no value.", why="it stands for its name.", fix="do not read")

        return Weights({n: _Entry(unread) for n in names})

    def changed_from(self, before: Weights) -> set[str]:
        """The names whose weights are not those that were there before."""
        return {n for n, e in self._entries.items() if before._entries.get(n) is not e}

    def join(self, prefix: str, other: Weights) -> Weights:
        """Both, the other's names behind a prefix."""
        return Weights(self._entries | {prefix + n: e for n, e in other._entries.items()})

    def under(self, prefix: str) -> Weights:
        return Weights({n.removeprefix(prefix): e for n, e in self._entries.items() if n.startswith(prefix)})

    def shared_stack(self, names: list[str]) -> Any:
        """The stack whose layers are exactly `names`, in order, or None."""
        entries = [self._entries[n] for n in names]
        stack = entries[0].stack
        whole = stack is not None and jax.tree.leaves(stack)[0].shape[0] == len(names)
        return stack if whole and all(e.stack is stack and e.index == i for i, e in enumerate(entries)) else None


def assemble(spec: Spec, weights: Mapping[str, Any], platform: str | None = None) -> Params:
    """Params of a Spec from weights by logical name, each read once and written into its stack.

    Args:
      spec: the Spec; its formats say which weights must be QTensors.
      weights: arrays (numpy or JAX) and QTensors, read lazily.
      platform: `"cpu"`, `"gpu"`, `"tpu"`: whose memory holds the result; JAX's default where None.

    Raises:
      ParamsError: a name is missing, or a weight's shape or format is not the Spec's.
    """
    if spec.program is not None:
        assert isinstance(weights, Weights)
        return {
            "target": assemble(spec.replace(program=None), weights, platform),
            "draft": assemble(spec.program.draft, weights.under("draft."), platform),
        }
    device = None if platform is None else _device(platform)
    expected, formats = shapes(spec), dict(spec.weights)

    def read(name: str) -> Any:
        if name not in weights:
            raise ParamsError(
                f"the weight {name!r} is missing.",
                why=f"a {spec.family} of this config has it.",
                fix=nearest(name, list(weights)),
            )
        x = weights[name]
        check_weight(name, x, expected[name], formats.get(name), leading=())
        return x

    def put(x: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf if is_traced(leaf) else jax.device_put(leaf, device), x)

    def stacked(names: list[str]) -> Any:
        if isinstance(weights, Weights) and (stack := weights.shared_stack(names)) is not None:
            return stack
        first = read(names[0])
        if any(is_traced(leaf) for leaf in jax.tree.leaves(first)):
            return jax.tree.map(_stack_traced, first, *map(read, names[1:]))
        stack = jax.tree.map(lambda leaf: aligned_empty((len(names), *leaf.shape), leaf.dtype), first)
        for i, name in enumerate(names):
            x = first if i == 0 else read(name)
            stack = jax.tree.map(functools.partial(_write, i), stack, x)
        return stack

    params: Params = {name: put(read(name)) for name in expected if not name.startswith("layers.")}
    params["segments"] = tuple(
        tuple(
            {name: put(stacked([f"layers.{seg.layer(r, phase)}.{name}" for r in range(seg.repeats)])) for name in names}
            for phase, names in enumerate(seg.names)
        )
        for seg in segments(spec)
    )
    return params


def _stack_traced(*leaves: Array) -> Array:
    dtype = functools.reduce(jnp.promote_types, (leaf.dtype for leaf in leaves))
    return jnp.stack([leaf.astype(dtype) for leaf in leaves])


def _write(i: int, stack: np.ndarray, leaf: Any) -> np.ndarray:
    """`stack[i] = leaf`, in a wider stack where layers differ in dtype (one of them was unpacked, say)."""
    dtype = jnp.promote_types(stack.dtype, leaf.dtype)
    if dtype != stack.dtype:
        narrow, stack = stack, aligned_empty(stack.shape, dtype)
        stack[:i] = narrow[:i].astype(dtype)
    stack[i] = np.asarray(leaf).astype(dtype, copy=False)
    return stack


def _device(platform: str) -> Any:
    try:
        return jax.devices(platform)[0]
    except RuntimeError as e:
        here = ", ".join(sorted({d.platform for d in jax.devices()}))
        raise ParamsError(f"there is no platform {platform!r} here.", why=str(e), fix=f"one of: {here}") from e


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An empty array on a 64-byte boundary, which JAX's CPU backend takes over without a copy."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def check_weight(name: str, x: Any, shape: tuple[int, ...], fmt: Format | None, leading: tuple[int, ...]) -> None:
    """Raise ParamsError unless a weight, or a stack of weights, has a shape and a format."""
    fix = "model.convert(params) with this very model, or params that were converted for it"
    if fmt is None:
        if is_qtensor(x):
            raise ParamsError(
                f"{name} is packed as {x.format.label}, but this stack computes with it dense.",
                why="they are the params of another stack, or were never converted.",
                fix=fix,
            )
        if tuple(x.shape) != (*leading, *shape):
            raise ParamsError(
                f"{name} has shape {tuple(x.shape)}, but this stack needs {(*leading, *shape)}.",
                why="they are the params of another model or stack.",
                fix=fix,
            )
        return
    if not is_qtensor(x):
        raise ParamsError(
            f"{name} is dense, but this stack computes with it as {fmt.label}.",
            why="they are the params of another stack, or were never converted.",
            fix=fix,
        )
    *_, rows, width = shape  # experts stand before a matrix's two axes
    found = (*x.codes.shape[:-2], *x.shape)
    if x.format != fmt or x.shape != (rows, width) or found != (*leading, *shape):
        raise ParamsError(
            f"{name} is {x.format} of {found}, but this stack needs {fmt} of {(*leading, *shape)}.",
            why="they are the params of another model or stack.",
            fix=fix,
        )
    if fmt.static and x.input is None:
        raise ParamsError(
            f"{name} is {fmt} without the scale of its inputs.",
            why="it was packed by hand, or went through something that knows no static scales.",
            fix=fix,
        )


def params_digest(params: Params) -> str:
    """A hash of all values, in the order of their names: of one Spec it tells params apart."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        found.update(np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()


def check_params(spec: Spec, params: Params) -> None:
    """Raise ParamsError unless `params` are those of `spec`. Looks at names, shapes and formats only."""
    if spec.program is not None:
        if not isinstance(params, Mapping) or set(params) != {"target", "draft"}:
            raise ParamsError(
                "a speculative stack's params are a pair, target and draft, and these are not.",
                why="the draft has weights of its own.",
                fix="params = model.convert(base_params)",
            )
        check_params(spec.replace(program=None), params["target"])
        check_params(spec.program.draft, params["draft"])
        return
    check_names(spec, params)
    expected, formats = shapes(spec), dict(spec.weights)
    for name in set(params) - {"segments"}:
        check_weight(name, params[name], expected[name], formats.get(name), ())
    for seg, blocks in zip(segments(spec), params["segments"], strict=True):
        for phase, stacks in enumerate(blocks):
            for name, stack in stacks.items():
                full = f"layers.{seg.layer(0, phase)}.{name}"
                check_weight(full, stack, expected[full], formats.get(full), (seg.repeats,))


def check_names(spec: Spec, params: Params) -> None:
    """Raise ParamsError unless `params` have the names of one model, and its segments of layers."""
    expected, segs = shapes(spec), segments(spec)
    fix = "params of this stack: model.convert(base_params), or model.init(key)"
    if not isinstance(params, Mapping) or "segments" not in params:
        raise ParamsError(
            "these are not one model's params: they have no 'segments'.",
            why="they may be a speculative stack's pair." if isinstance(params, Mapping) else "they are no mapping.",
            fix=fix,
        )
    top = {n for n in expected if not n.startswith("layers.")} | {"segments"}
    if set(params) != top:
        raise ParamsError(
            f"params have {sorted(set(params) - {'segments'})}, this stack has {sorted(top - {'segments'})}.",
            why="they are the params of another model or stack.",
            fix=fix,
        )
    got = tuple(tuple(tuple(sorted(p)) for p in blocks) for blocks in params["segments"])
    if got != tuple(tuple(tuple(sorted(n)) for n in seg.names) for seg in segs):
        raise ParamsError(
            f"params have {len(got)} segments of layers, this stack has {len(segs)}, or other weights in them.",
            why="they belong to another stack.",
            fix=fix,
        )


def trainable(params: Params) -> tuple[Params, Callable[[Params], Params]]:
    """Split what gradients reach from what they do not.

    `jax.grad` over params that hold packed weights stops with JAX's own error ("grad requires real- or complex-valued
    inputs"), before this library is asked; with `allow_int=True`, with ours. Take it over the dense part instead.

    Returns:
      The params with every QTensor taken out, and a function that puts them back.

    >>> import infopt as ip, jax
    >>> model = ip.quantize(bits=8)(ip.models.llama())
    >>> dense, join = ip.trainable(model.init(jax.random.key(0)))
    >>> grads = jax.grad(lambda p: model.apply(join(p), jax.numpy.ones((1, 4), int))[0].sum())(dense)
    """
    dense = jax.tree.map(lambda x: None if is_qtensor(x) else x, params, is_leaf=is_qtensor)

    def join(dense: Params) -> Params:
        return jax.tree.map(
            lambda x, y: x if is_qtensor(x) else y, params, dense, is_leaf=lambda x: is_qtensor(x) or x is None
        )

    return dense, join


# ----------------------------------------------------------------------------------------------------- the functions


@functools.partial(jax.tree_util.register_dataclass, data_fields=["tokens", "count", "logprobs"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Emitted:
    """What one round of decoding gave.

    Args:
      tokens: `[B, E]`, of which row b has `count[b]`; the others are -1.
      count: `[B]`.
      logprobs: `[B, E]` under the model's own log-softmax; NaN where nobody asked.
    """

    tokens: Any
    count: Any
    logprobs: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Functions:
    """The pure functions of a Spec. Equal Specs give the same objects, so that compilations are shared."""

    init_state: Callable[..., State]
    hidden: Callable[..., tuple[Array, State]]
    head: Callable[[Params, Array], Array]
    apply: Callable[..., tuple[Array, State]]
    decode: Callable[..., tuple[Emitted, State]]
    lookahead: int


def window_groups(spec: Spec) -> tuple[Window | None, ...]:
    """The distinct windows of a Spec's layers, in order: one layout and one block table for each."""
    return tuple(dict.fromkeys(spec.window))


@functools.lru_cache(maxsize=1024)
def build(spec: Spec) -> Functions:
    """The functions that compute a Spec."""
    return _build_plain(spec) if spec.program is None else _build_speculative(spec, spec.program)


def _check_tokens(tokens: Any, state: State, count: Any, vocab: int) -> None:
    if tokens.ndim != 2 or tokens.shape[0] != state.batch or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise PromptError(
            f"tokens are {tokens.dtype}{list(tokens.shape)}.",
            why="each row of the state takes a row of token ids.",
            fix=f"whole numbers [B, T] with B = {state.batch}, as in init_state(batch={state.batch}, ...)",
        )
    if tokens.shape[1] > (state.lookahead or state.max_len):
        bound = f"a ring that looks ahead {state.lookahead}" if state.lookahead else f"a state of {state.max_len}"
        raise PromptError(
            f"{tokens.shape[1]} tokens at once do not fit {bound}.",
            why="a longer chunk would overwrite keys that its own first tokens still see."
            if state.lookahead
            else "each token needs a slot.",
            fix=f"init_state(..., chunk={tokens.shape[1]}), or shorter chunks"
            if state.lookahead
            else f"init_state(max_len={tokens.shape[1]})",
        )
    if is_traced(tokens) or is_traced(count):
        return
    ids = np.asarray(tokens)
    taken = np.arange(ids.shape[1]) < (ids.shape[1] if count is None else np.asarray(count)[:, None])
    if (bad := ids[taken & ((ids < 0) | (ids >= vocab))]).size:
        raise PromptError(
            f"token {bad[0]} is outside the vocabulary of {vocab} words.",
            why="it has no embedding.",
            fix="ids made by this model's own tokenizer",
        )


def _build_plain(spec: Spec) -> Functions:
    family, config, groups = family_of(spec), spec.config, window_groups(spec)

    def init_state(batch: int, max_len: int, chunk: int | None = None, dtype: Any = jnp.float32) -> State:
        """An empty state of `batch` rows of at most `max_len` tokens.

        Args:
          chunk: the most tokens that one call will append (a ring is sized by it, and what holds a tail of tokens as
            computed); 128, or max_len if that is less.
          dtype: of keys and values without a codec.
        """
        if batch < 1 or max_len < 1 or (chunk is not None and chunk < 1):
            raise PromptError(
                f"a state of {batch} rows, {max_len} tokens and chunks of {chunk} is empty.",
                why="it would hold nothing.",
                fix="all >= 1",
            )
        check_length(spec, max_len)
        layouts: tuple[Layout, ...] = ()
        caches: tuple[Any, ...] = ()
        if spec.cache:
            chunk = min(chunk or 128, max_len)
            layouts = tuple(Layout.plan(w, max_len, chunk, spec.page, spec.kv) for w in groups)
            caches = tuple(
                tuple(
                    kv.empty_layers(
                        layouts[groups.index(w)],
                        seg.repeats,
                        batch,
                        config.kv_heads,
                        config.head_dim,
                        spec.kv,
                        dtype,
                    )
                    for w in seg.windows
                )
                for seg in segments(spec)
            )
        tables = tuple(kv.identity_table(layout, batch) for layout in layouts if layout.page is not None)
        return State(
            jnp.zeros(batch, jnp.int32),
            jnp.zeros(batch, jnp.int32),
            jnp.zeros((batch, max_len), jnp.int32),
            caches,
            tables,
            layouts,
        )

    def attend_of(window: Window | None, context: ops.Context, state: State | None) -> Attend:
        bound = dataclasses.replace(context, window=window)
        if state is not None:
            g = groups.index(window)
            bound = dataclasses.replace(bound, layout=state.layouts[g], table=state.tables[g] if state.tables else None)
        return functools.partial(ops.attend, context=bound)

    def run_whole(params: Params, tokens: Array, context: ops.Context, state: State | None) -> tuple[Array, Any]:
        assert family.whole is not None
        caches = None if state is None else [list(blocks) for blocks in state.kv]
        places = [
            (n, phase, r)
            for n, seg in enumerate(segments(spec))
            for r in range(seg.repeats)
            for phase in range(seg.period)
        ]

        def attend(layer: int, q: Array, k: Array, v: Array, **how: Any) -> Array:
            n, phase, r = places[layer]
            old = None if caches is None else caches[n][phase]
            out, new = attend_of(spec.window[layer], context, state)(q, k, v, old, r, **how)
            if caches is not None:
                caches[n][phase] = new
            return out

        logits = family.whole(config, Weights.of(spec, params), tokens, context.positions, attend)
        return logits, () if caches is None else tuple(map(tuple, caches))

    def run(params: Params, tokens: Array, context: ops.Context, state: State | None) -> tuple[Array, Any]:
        if family.whole is not None:
            return run_whole(params, tokens, context, state)
        assert family.embed is not None and family.block is not None and family.final is not None
        x, block = family.embed(config, params, tokens, context.positions), family.block
        caches: list[Any] = []
        for n, (seg, stacks) in enumerate(zip(segments(spec), params["segments"], strict=True)):
            attends = [attend_of(window, context, state) for window in seg.windows]

            def layers(x: Array, p: Any, layer: Any, cache: Any, attends: Any = attends) -> tuple[Array, Any]:
                new = []
                for phase, attend in enumerate(attends):
                    own, old = as_run(spec, p[phase]), None if cache is None else cache[phase]
                    x, c = block(config, phase, own, x, layer, attend, old)
                    new.append(c)
                return x, tuple(new)

            if state is None:  # over slices: what gradients want
                x, _ = jax.lax.scan(lambda x, p, f=layers: (f(x, p, None, None)[0], None), x, stacks)
            else:  # over an index: weights are not copied before a kernel, and the cache is updated in place
                (x, new), _ = jax.lax.scan(
                    lambda carry, i, f=layers, p=stacks: (f(carry[0], p, i, carry[1]), None),
                    (x, state.kv[n]),
                    jnp.arange(seg.repeats, dtype=jnp.int32),
                )
                caches.append(new)
        return family.final(config, params, x), tuple(caches)

    def hidden(params: Params, tokens: Array, state: State, count: Array | None = None) -> tuple[Array, State]:
        """Append the first `count[b]` tokens of each row (all by default).

        Args:
          tokens: `[B, T]`.
          state: donate it; a row with count 0 is left as it is.
          count: `[B]`.

        Returns:
          `[B, T, D]` (beyond a row's count: meaningless) and the new state.
        """
        check_params(spec, params)
        _check_tokens(tokens, state, count, config.vocab)
        tokens = tokens.astype(jnp.int32)
        batch, length = tokens.shape
        steps = jnp.arange(length, dtype=jnp.int32)[None]
        positions = state.lengths[:, None] + steps
        count = jnp.full(batch, length, jnp.int32) if count is None else count.astype(jnp.int32)
        keep = (steps < count[:, None]) & (positions < state.max_len)
        rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
        history = state.tokens.at[rows, jnp.where(keep, positions, 2**30)].set(tokens, mode="drop")
        lengths = jnp.minimum(state.lengths + jnp.clip(count, 0, length), state.max_len)
        if spec.cache:
            context = ops.Context(positions, keep, lengths, None, spec.kv, attention=spec.attention)
            x, caches = run(params, tokens, context, state)
        else:
            every = jnp.broadcast_to(jnp.arange(state.max_len, dtype=jnp.int32)[None], history.shape)
            context = ops.Context(every, every < lengths[:, None], lengths, None, spec.kv, attention=spec.attention)
            x, caches = run(params, history, context, None)
            x = jnp.take_along_axis(x, jnp.minimum(positions, state.max_len - 1)[..., None], axis=1)
        return x, state.replace(lengths=lengths, peak=jnp.maximum(state.peak, lengths), tokens=history, kv=caches)

    def head(params: Params, hidden: Array) -> Array:
        """`[..., D] -> [..., V]`, float32."""
        if family.whole is not None:
            return hidden.astype(jnp.float32)
        table = params["head"] if "head" in params else params["embed"]
        logits = ops.linear(hidden, table).astype(jnp.float32)
        return logits if family.logits is None else family.logits(config, logits)

    def apply(params: Params, tokens: Array, state: State | None = None, count: Array | None = None):
        """Logits `[B, T, V]` of the tokens appended, and the new state; without a state, of a fresh one."""
        if state is None:
            state = init_state(tokens.shape[0], tokens.shape[1], tokens.shape[1])
        x, state = hidden(params, tokens, state, count)
        return head(params, x), state

    def decode(params: Params, last: Array, state: State, sampling: Sampling, active: Array | None = None):
        """One round: append `last[b]`, emit the token that follows it. A row that is not active is left as it is."""
        count = jnp.ones(last.shape, jnp.int32) if active is None else active.astype(jnp.int32)
        count = jnp.where(state.lengths < state.max_len, count, 0)  # a full row emits nothing
        x, state = hidden(params, last[:, None], state, count)
        token, logprob = sample(head(params, x), sampling, state.tokens, state.lengths[:, None])
        return Emitted(jnp.where(count[:, None] > 0, token, -1), count, logprob), state

    return Functions(init_state, hidden, head, apply, decode, lookahead=1)


def _build_speculative(spec: Spec, program: Speculation) -> Functions:
    """A draft guesses k tokens, the target checks them in one call; both draw with the noise of (seed, position).

    The draft's guess is accepted where it is the very token that the target draws there, so what is emitted is what
    plain decoding emits, whatever the draft and k (Leviathan et al. 2023, with the coupling of a shared Gumbel draw).
    """
    target, draft, k = build(spec.replace(program=None)), build(program.draft), program.k

    def split(state: State) -> tuple[State, State]:
        one, two = (state.replace(kv=state.kv[i], tables=state.tables[i], layouts=state.layouts[i]) for i in (0, 1))
        return one, two

    def join(one: State, two: State) -> State:
        return one.replace(kv=(one.kv, two.kv), tables=(one.tables, two.tables), layouts=(one.layouts, two.layouts))

    def init_state(batch: int, max_len: int, chunk: int | None = None, dtype: Any = jnp.float32) -> State:
        """Both models' states in one: lengths and tokens are shared."""
        chunk = max(chunk or 128, k + 1)
        return join(target.init_state(batch, max_len, chunk, dtype), draft.init_state(batch, max_len, chunk, dtype))

    def hidden(params: Params, tokens: Array, state: State, count: Array | None = None) -> tuple[Array, State]:
        """Append to both; the target's hidden states."""
        check_params(spec, params)
        one, two = split(state)
        x, one = target.hidden(params["target"], tokens, one, count)
        _, two = draft.hidden(params["draft"], tokens, two, count)
        return x, join(one, two)

    def head(params: Params, hidden: Array) -> Array:
        return target.head(params["target"], hidden)

    def apply(params: Params, tokens: Array, state: State | None = None, count: Array | None = None):
        """Logits `[B, T, V]` of the target, and both states."""
        if state is None:
            state = init_state(tokens.shape[0], tokens.shape[1], tokens.shape[1])
        x, state = hidden(params, tokens, state, count)
        return head(params, x), state

    def decode(params: Params, last: Array, state: State, sampling: Sampling, active: Array | None = None):
        """One round: between 1 and k + 1 tokens a row."""
        check_params(spec, params)
        active = jnp.ones(last.shape, bool) if active is None else active
        start = state.lengths
        one, two = split(state)
        silent = dataclasses.replace(sampling, logprobs=jnp.zeros_like(sampling.logprobs))

        def guess(carry: tuple[State, Array], _: None) -> tuple[tuple[State, Array], Array]:
            # k + 1 steps, the last only to store its token: draft and target then hold the same text
            emitted, two = draft.decode(params["draft"], carry[1], carry[0], silent, active)
            token = jnp.where(active, emitted.tokens[:, 0], 0)
            return (two, token), token

        (two, _), guesses = jax.lax.scan(guess, (two, last), None, length=k + 1)
        guesses = guesses.T[:, :k]
        tokens = jnp.concatenate([last[:, None], guesses], 1)
        x, one = target.hidden(params["target"], tokens, one, jnp.where(active, k + 1, 0))
        drawn, logprobs = sample(
            target.head(params["target"], x),
            sampling,
            one.tokens,
            start[:, None] + jnp.arange(1, k + 2, dtype=jnp.int32)[None],
        )
        accepted = jnp.sum(jnp.cumprod((drawn[:, :k] == guesses).astype(jnp.int32), 1), 1, dtype=jnp.int32)
        if sampling.mask is not None:
            accepted = jnp.where(jnp.all(sampling.mask, -1), accepted, 0)
        count = jnp.where(active, jnp.minimum(accepted + 1, state.max_len - start), 0)  # a full row emits nothing
        emitted = jnp.where(jnp.arange(k + 1, dtype=jnp.int32)[None] < count[:, None], drawn, -1)
        state = join(one, two)
        return Emitted(emitted, count, logprobs), state.replace(lengths=start + count)

    return Functions(init_state, hidden, head, apply, decode, lookahead=k + 1)


def context_limit(spec: Spec) -> int | None:
    """The longest text that a stack and its draft can read; None where every layer has a window within the context."""
    context = spec.config.context
    bounded = spec.config.learned_positions or any(w is None or w.size > context for w in spec.window)
    own = [context] if bounded else []
    draft = context_limit(spec.program.draft) if spec.program else None
    return min(own + ([] if draft is None else [draft]), default=None)


def check_length(spec: Spec, length: int, what: str = "", fix: str = "") -> None:
    """Raise unless texts of `length` tokens stay inside what `context_limit` says."""
    limit = context_limit(spec)
    if limit is not None and length > limit:
        raise PromptError(
            f"{what or f'{length} tokens'} exceed the model's context of {limit}.",
            why="its positions are rows of a table, which has no more."
            if spec.config.learned_positions
            else "some layers see further back than the model was trained on.",
            fix=(fix or f"at most {limit} tokens")
            + (
                ""
                if spec.config.learned_positions
                else f", or sliding_window({max(limit // 2, 1)}, sinks=4) to go on for ever"
            ),
        )


# ------------------------------------------------------------------------------------------------------------ model


@dataclasses.dataclass(frozen=True)
class Model:
    """Data (a Spec, how its params came about, a tokenizer) whose functions are `build(spec)`'s.

    Args:
      spec: what it computes.
      recipe: how its params came about.
      tokenizer: or None: then text is an error, and token ids are fine.
      parent, transform: the model that it was made from, and by what; None for a base model.
      restored_exact: of a base that is a saved stack: whether it was exact when it was saved.
    """

    spec: Spec
    recipe: Recipe = dataclasses.field(default_factory=Recipe)
    tokenizer: Any = None
    parent: Model | None = dataclasses.field(default=None, compare=False, repr=False)
    transform: Transform | None = dataclasses.field(default=None, compare=False, repr=False)
    restored_exact: bool = dataclasses.field(default=True, compare=False, repr=False)

    @staticmethod
    def of(
        family: Family, config: Config, tokenizer: Any = None, weights: tuple[tuple[str, Format], ...] = ()
    ) -> Model:
        """A base model: a family and a config (and the formats of weights that a file holds packed)."""
        return Model(Spec(family.name, config, tuple(sorted(weights)), config.windows()), Recipe(), tokenizer)

    @property
    def init_state(self) -> Callable[..., State]:
        return build(self.spec).init_state

    @property
    def hidden(self) -> Callable[..., tuple[Array, State]]:
        return build(self.spec).hidden

    @property
    def head(self) -> Callable[[Params, Array], Array]:
        return build(self.spec).head

    @property
    def apply(self) -> Callable[..., tuple[Array, State]]:
        return build(self.spec).apply

    @property
    def decode(self) -> Callable[..., tuple[Emitted, State]]:
        return build(self.spec).decode

    @property
    def base(self) -> Model:
        return self if self.parent is None else self.parent.base

    def transforms(self, source: Model | None = None) -> Iterator[tuple[Transform, Model]]:
        """What made it of the base, or of `source`, an ancestor: the last transform first, and what each was given."""
        model = self
        while model != source and model.parent is not None and model.transform is not None:
            yield model.transform, model.parent
            model = model.parent

    @property
    def exact(self) -> bool:
        """Whether every transform of the recipe gives what it was given, to float rounding."""
        return self.base.restored_exact and all(transform.exact for transform, _ in self.transforms())

    def init(self, key: Array, **extra: Any) -> Params:
        """Random params: the base's, converted; `extra` as for `convert`."""

        def random(spec: Spec) -> Params:
            if spec.program is not None:  # a saved stack is a base, and may be a pair
                return {"target": random(spec.replace(program=None)), "draft": random(spec.program.draft)}
            weights = family_of(spec).init(spec.config, key)
            packed = {n: quantize_array(weights[n], f, trailing=2) for n, f in spec.weights}
            return assemble(spec, weights | packed)

        return self.convert(random(self.base.spec), **extra)

    def convert(self, params: Params, source: Model | None = None, platform: str | None = None, **extra: Any) -> Params:
        """Params of this stack, from those of the base, or of an ancestor.

        Args:
          params: the params of `source`.
          source: the base model by default; an ancestor whose own params are to be kept (after training, say).
          platform: whose memory holds the result, `"cpu"`, `"gpu"` or `"tpu"`.
          extra: what a transform asks for, as `draft=` for `speculative(draft=model)`.

        Raises:
          ParamsError: params are not the source's, the source is no ancestor, or an extra is missing or unknown.
        """
        steps = list(self.transforms(source))
        model = steps[-1][1] if steps else self
        if source is not None and model != source:
            raise ParamsError(
                f"{source.recipe} is no ancestor of {self.recipe}.",
                why="only the transforms between a model and its descendant say how params change.",
                fix="a model that this one was made from by transforms",
            )
        wanted = {name for transform, _ in steps for name in transform.extras}
        if set(extra) != wanted:
            raise ParamsError(
                f"convert was given {sorted(extra) or 'no extra params'}, this stack needs {sorted(wanted) or 'none'}.",
                why="each is asked for by a transform of the stack, by name.",
                fix="convert(params" + "".join(f", {n}={n}_params" for n in sorted(wanted)) + ")",
            )
        check_params(model.spec, params)
        weights = Weights.of(model.spec, params)
        after = [self.spec, *(before.spec for _, before in steps)]
        for (transform, before), spec in reversed([*zip(steps, after)]):
            weights = transform.params(weights, before, spec, **{n: extra[n] for n in transform.extras})
        return assemble(self.spec, weights, platform)

    def audit(self, params: Params) -> Audit:
        """Matrix by matrix what this stack made of it: rule, format, bits, bytes, the error of its rounding, changed.

        What is printed is a table. A stack that was saved and loaded gives the very same.

        Args:
          params: those of this stack; their values are read.

        Raises:
          AuditError: a matrix that a rule meant to touch is dense, in another format or shape, or not finite; all of
            them are named, and the error's `audit` holds the table.
          ParamsError: the params are another model's altogether.

        >>> import infopt as ip, jax
        >>> model = ip.quantize(format="nf4", where="*.mlp.*")(ip.models.llama(dim=64, mlp=64))
        >>> lines = model.audit(model.init(jax.random.key(0))).lines
        >>> [(line.name, line.rule, line.format, line.changed) for line in lines if ".0." in line.name][3:5]
        [('layers.0.attn.v', '-', 'float32', 'no'), ('layers.0.mlp.down', '1: *.mlp.*', 'nf4', 'yes')]
        """
        from infopt.audit import inspect

        found = inspect(self, params)
        found.check()
        return found

    def weight_bytes(self) -> int:
        """Bytes of all weights, at 4 a dense value: the params' own, unless they were loaded in 16 bits."""
        return _weight_bytes(self.spec)

    def token_bytes(self) -> int:
        """Bytes that one more token takes in the cache while no window is full, at 4 a value without a codec.

        A tail's are not among them: it takes as much for every text.
        """
        return _token_bytes(self.spec)

    def __repr__(self) -> str:
        values = sum(int(np.prod(s)) for s in shapes(self.spec).values())
        if self.spec.program:
            values += sum(int(np.prod(s)) for s in shapes(self.spec.program.draft).values())
        size = f"{self.weight_bytes() / values:.2f} bytes a weight ({human(self.weight_bytes())}, dense in float32)"
        cached = f"{self.token_bytes():,} bytes a token" if self.spec.cache else "no cache"
        c = self.spec.config
        return (
            f"{self.spec.family} {c.layers} x {c.dim} | {self.recipe}\n"
            f"  {size}, {cached}, {'exact' if self.exact else 'not exact'}"
        )


def _weight_bytes(spec: Spec) -> int:
    formats, total = dict(spec.weights), 0
    for name, shape in shapes(spec).items():
        total += formats[name].bytes(shape) if name in formats else 4 * math.prod(shape)
    return total + (_weight_bytes(spec.program.draft) if spec.program else 0)


def _token_bytes(spec: Spec) -> int:
    c = spec.config
    if spec.kv is None:
        keys, tokens, values = 4 * c.head_dim, 1, 4 * c.head_dim
    else:
        row, tokens = spec.kv.split or c.head_dim, spec.kv.split or 1
        keys, values = c.head_dim * tokens // row * spec.kv.keys.bytes((row,)), spec.kv.format.bytes((c.head_dim,))
    heads = c.layers * c.kv_heads
    own = -(-heads * keys // tokens) + heads * values if spec.cache else 0
    return own + (_token_bytes(spec.program.draft) if spec.program else 0)


def spec_from_json(text: str) -> Spec:
    """The Spec that `Spec.to_json` wrote; its family must be defined.

    >>> import infopt as ip
    >>> spec = ip.quantize(bits=8)(ip.models.gemma3()).spec
    >>> spec_from_json(spec.to_json()) == spec
    True
    """

    def codec(x: Any) -> Codec | None:
        if x is None:
            return None
        return Codec(**x | {"format": Format(**x["format"])}) if "format" in x else Codec(Format(**x))

    def window(x: Any) -> Window | None:
        return None if x is None else Window(**x)

    def hashable(x: Any) -> Any:
        return tuple(map(hashable, x)) if isinstance(x, list) else x

    def spec(x: Any) -> Spec:
        config: dict[str, Any] = {k: hashable(v) for k, v in x["config"].items()}
        if scaling := config.get("rope_scaling"):
            config["rope_scaling"] = ROPE_SCALINGS[scaling["kind"]](
                **{k: hashable(v) for k, v in scaling.items() if k != "kind"}
            )
        if x["family"] not in FAMILIES:
            raise _no_family(x["family"])
        return Spec(
            x["family"],
            FAMILIES[x["family"]].config(**config),
            tuple((n, Format(**f)) for n, f in x["weights"]),
            tuple(map(window, x["window"])),
            x["attention"],
            x["cache"],
            codec(x["kv"]),
            x["page"],
            None if x["program"] is None else Speculation(spec(x["program"]["draft"]), x["program"]["k"]),
            tuple(x.get("online", ())),
        )

    try:
        return spec(json.loads(text))
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as e:
        if isinstance(e, InfoptError):
            raise
        raise InfoptError(
            f"the text is not a Spec: {type(e).__name__}: {e}.",
            why="it was damaged, or written by hand or by another version.",
            fix="what Spec.to_json wrote, by this version of infopt",
        ) from e
