"""Flax: an NNX module, as a Flax user writes it, becomes a model that transforms wrap; and its params go back."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from infopt import ops
from infopt.errors import InfoptError, ParamsError
from infopt.model import FAMILIES, Model, Weights, assemble, check_params, define_whole
from infopt.models.base import unrotated
from infopt.nnx import checks
from infopt.nnx.module import Opened, Run
from infopt.spec import Config, Window
from infopt.typing import Array, Params

UNLIMITED = 1 << 20
"""The context of a module whose positions are rows of no table."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NNXConfig(Config):
    """What the library must know of a module; the rest stands in its own code.

    Args:
      own: each layer's own window, 0 for none.
      table: whether positions are rows of a table.
    """

    own: tuple[int, ...]
    table: bool

    @property
    def period(self) -> int:
        return self.layers  # one block of all: nothing is sliced out of a stack

    def windows(self) -> tuple[Window | None, ...]:
        return tuple(Window(n) if n else None for n in self.own)

    @property
    def learned_positions(self) -> bool:
        return self.table

    @property
    def rotated_queries(self) -> bool:
        return True


_OPENED: dict[str, Opened] = {}


def from_nnx(
    module: nnx.Module, *, context: int | None = None, tokenizer: Any = None, name: str | None = None
) -> tuple[Model, Params]:
    """Make a model of a Flax NNX transformer, whose source stays as it is.

    The module is called as `module(tokens[B, T], positions[B, T])` and gives logits `[B, T, V]`. Its `nnx.Linear`,
    `nnx.LinearGeneral` and `nnx.Embed` become `ops.linear` and `ops.embed`, which transforms may pack. An attribute
    `attention_fn`, which `nnx.MultiHeadAttention` has, becomes `attend`, which keeps keys and values; one attribute is
    one layer. A mask must be causal, or a causal window, which the cache then keeps. Everything else is traced as it
    stands. It is tried out on a text of 256 tokens, its `attention_fn` on 1,024 and its masks on 4,097: what cannot be
    cached there, or would compute something else, is refused; what a module does only to longer texts is not seen.

    Weights are named by their place in the module: what belongs to one attention's block `layers.<i>.<place>`, the rest
    by its own attributes. `hidden` gives logits, and sinks are refused, since queries come rotated already.

    Args:
      module: left as it is; dropout is off.
      context: positions that it was trained on; by default the rows of its table of positions, or without one 2**20.
      tokenizer: or None: then prompts are token ids.
      name: the family's name, which a saved stack holds; by default the class's, and a digest of the structure. As with
        `define`, a name that is given again is defined again.

    Returns:
      The model, and its params: `to_nnx` takes them back.

    Raises:
      InfoptError: it cannot be cached; names the line of its source, says why and what to do.

    >>> from flax import nnx
    >>> import infopt as ip
    >>> class Tiny(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.embed, self.place = nnx.Embed(61, 32, rngs=rngs), nnx.Embed(64, 32, rngs=rngs)
    ...         self.attention = nnx.MultiHeadAttention(4, 32, decode=False, rngs=rngs)
    ...
    ...     def __call__(self, tokens, positions):
    ...         x = self.embed(tokens) + self.place(positions)
    ...         return self.embed.attend(x + self.attention(x, is_causal=True))
    >>> model, params = ip.from_nnx(Tiny(nnx.Rngs(0)))
    >>> fast = (ip.quantize(bits=8) | ip.cache_kv())(model)
    >>> ip.generate(fast, fast.convert(params), [1, 2, 3], max_new=4).finish
    'length'
    """
    if not isinstance(module, nnx.Module):
        raise InfoptError(
            f"{type(module).__name__} is not a Flax NNX module.",
            why="from_nnx reads nnx.Module's structure.",
            fix="an instance of a class MyModel(nnx.Module); Linen modules: nnx.bridge.ToNNX",
        )
    opened = Opened(module, checks.positions_argument(type(module)))
    try:
        return _made(opened, opened.weights_of(module), context, tokenizer, name)
    except InfoptError:
        raise
    except Exception as e:
        raise InfoptError(
            f"{type(module).__name__} fails when it is called with tokens [1, T] and their positions.",
            why=f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else 'no more is said'}.",
            fix="see that module(tokens, positions) gives logits for texts of 1 token and of several; "
            "from_nnx(..., context=N) where it takes no more than N",
        ) from e


def _made(
    opened: Opened, weights: dict[str, Any], context: int | None, tokenizer: Any, name: str | None
) -> tuple[Model, Params]:
    calls, vocab, coarse = checks.attention_calls(opened, weights)
    alone = checks.compiled(opened)
    rows = checks.table_length(opened, alone, weights, vocab)
    if context is not None and (context < 1 or (rows is not None and context > rows)):
        raise InfoptError(
            f"context={context}, but the module has {rows or 'a positive number of'} positions.",
            why="its positions are rows of a table." if rows else "a context holds at least one token.",
            fix=f"context <= {rows}" if rows else "context >= 1",
        )
    context = context or rows or UNLIMITED
    checks.check_local(opened, alone, weights, vocab, context, coarse)
    if opened.positions is None or not calls:
        raise InfoptError(
            f"{checks.definition(opened.cls)} {'calls no attention_fn' if not calls else 'takes no positions'}.",
            why="a cached step must be told where its tokens stand, and attention is what a cache serves.",
            fix="def __call__(self, tokens, positions), and nnx.MultiHeadAttention or an attribute `attention_fn`",
        )
    if len({c.shape for c in calls}) > 1:
        raise InfoptError(
            f"the attention at {calls[0].where} and that at {calls[-1].where} differ in heads or width.",
            why="one cache holds all layers.",
            fix="as many heads of one width in each layer",
        )
    opened.name_layers(tuple(c.path for c in calls))
    weights = dict(zip(opened.names.values(), weights.values(), strict=True))
    heads, kv_heads, width = calls[0].shape
    own = checks.windows(opened, weights, vocab, context)
    checks.check_attention(calls, own, context)
    config = NNXConfig(
        vocab=vocab,
        dim=next((v.shape[1] for v in opened.variables if v.kind == "table"), heads * width),
        layers=len(calls),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width,
        context=context,
        own=tuple(w.size if w else 0 for w in own),
        table=rows is not None,
    )
    name = _defined(opened, name)
    model = Model.of(FAMILIES[name], config, tokenizer)
    params = assemble(model.spec, weights)
    checks.check_logits(opened, model, params, context, coarse)
    return model, params


def _defined(opened: Opened, name: str | None) -> str:
    """The name of the module's family, which is defined unless this very structure has it already."""
    given, base = name is not None, f"nnx_{opened.cls.__name__}_{opened.digest()}"
    name, n = name or base, 1
    while not given and name in FAMILIES and _OPENED[name].graphdef != opened.graphdef:
        name, n = f"{base}_{n + 1}", n + 1  # what tells them apart has no text
    if name in FAMILIES and name not in _OPENED:
        raise InfoptError(
            f"name={name!r} is taken.",
            why="another family is defined by it.",
            fix="another name, or none for a new one",
        )
    if name not in FAMILIES or _OPENED[name].graphdef != opened.graphdef:
        define_whole(
            name,
            NNXConfig,
            init=lambda _, key: ops.random_weights(key, opened.shapes()),
            whole=functools.partial(_logits, opened),
        )
        _OPENED[name] = opened
    return name


def _logits(
    opened: Opened,
    c: NNXConfig,
    weights: Mapping[str, Any],
    tokens: Array,
    positions: Array,
    attend: Callable[..., Array],
) -> Array:
    def attention(layer: int, q: Array, k: Array, v: Array) -> Array:
        return attend(layer, q, k, v, rope=unrotated, scale=c.head_dim**-0.5)

    # padding may lie beyond a table's end; the host checks what is real
    at = jnp.minimum(positions, c.context - 1) if c.table else positions
    return opened(weights, tokens, at, Run(attention))


def to_nnx(model: Model, params: Params) -> Any:
    """The Flax module of a model that `from_nnx` made, with these params: to train on, or to save with Flax.

    A window or a cache is the stack's, not the module's: it computes what it computed before.

    Args:
      model: a stack over `from_nnx`'s model, no weight of which is packed.
      params: the stack's.

    Returns:
      A new module of the same class, set for inference: `.train()` turns its dropout on.

    Raises:
      InfoptError: the model is no Flax module's.
      ParamsError: weights are packed, or the params are another stack's.

    >>> from flax import nnx
    >>> import infopt as ip
    >>> class Tiny(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.embed = nnx.Embed(61, 32, rngs=rngs)
    ...         self.attention = nnx.MultiHeadAttention(4, 32, decode=False, rngs=rngs)
    ...
    ...     def __call__(self, tokens, positions):
    ...         x = self.embed(tokens)
    ...         return self.embed.attend(x + self.attention(x, is_causal=True))
    >>> model, params = ip.from_nnx(Tiny(nnx.Rngs(0)))
    >>> ip.to_nnx(model, params).embed.embedding.shape
    (61, 32)
    """
    spec = model.spec.replace(program=None)
    if spec.family not in _OPENED:
        raise InfoptError(
            f"a {spec.family} is no Flax module.",
            why="only what from_nnx made can go back to one.",
            fix="ip.save, or ip.export for Hugging Face names",
        )
    check_params(model.spec, params)
    if spec.weights:
        raise ParamsError(
            f"{spec.weights[0][0]} is packed as {spec.weights[0][1].name}.",
            why="a Flax module's own layers multiply by dense arrays.",
            fix="dequantize() at the end of the stack",
        )
    opened = _OPENED[spec.family]
    return opened.restored(Weights.of(spec, params["target"] if model.spec.program else params))
