"""A model with some of its matrices rounded, against itself: KL, without a program for each choice of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from infopt import ops
from infopt.errors import EvaluationError, InfoptError
from infopt.evaluate import Windows, divergence
from infopt.model import Family, Model, as_run, build, check_params, family_of, segments
from infopt.progress import bar
from infopt.qtensor import Format, dequantize_array, quantize_array
from infopt.spec import Spec
from infopt.typing import Array, Params

BASE = 256e6
"""Bytes of the base's log-probabilities that are kept at once; of one window at least."""
PIECE = 50e6
"""Bytes of a rounded model's log-probabilities at once; some four arrays of that size are alive."""
TOKENS = 4096
"""Tokens that go through a layer at once, at most; one window at least."""

Choice = Mapping[str, Format]
"""Which matrices are rounded, and to what."""


def layer_of(name: str) -> int:
    """The layer that a weight belongs to; -1 for those outside."""
    return int(name.split(".")[1]) if name.startswith("layers.") else -1


def plain(model: Model) -> Spec:
    """What the model computes, without a cache.

    Raises:
      InfoptError: it is a pair, or its layers cannot be run one by one.
    """
    if model.spec.program is not None:
        raise InfoptError(
            "the rounding of a speculative stack was to be measured.",
            why="it is two models, and quantize comes before speculative.",
            fix="the stack before speculative(...)",
        )
    if family_of(model.spec).block is None:
        raise InfoptError(
            f"a {model.spec.family} cannot be run a layer at a time.",
            why="its forward pass is one function.",
            fix="ip.ablate with a quantize(where=...) for each matrix; or write its layers with ip.define",
        )
    return model.spec.replace(cache=False, page=None)


def divergences(
    model: Model,
    params: Params,
    choices: Sequence[Choice],
    cut: Windows,
    clip: str | None = None,
    progress: bool = False,
) -> list[float]:
    """KL(model || the model with these matrices rounded) of each choice, in nats a scored token.

    Rounded values take a layer's dense ones' place, and layers are run one by one from the first that is changed: so
    there is one program a kind of layer, however many choices. The text is read in blocks of windows. Held beside the
    params: of a block the base's log-probabilities (`BASE`) and one layer's inputs; some pieces of logits; a layer.

    Args:
      model, params: the base; without a cache it computes the same.
      choices: each names a matrix at least, all of them dense.
      cut: the windows.
      clip: as for `quantize`.
      progress: whether to show a bar, on a terminal.

    Raises:
      EvaluationError: a choice's logits are not finite.
    """
    spec = plain(model)
    check_params(spec, params)
    stack = _Stack(spec, params, clip)
    order = sorted(range(len(choices)), key=lambda i: min(map(layer_of, choices[i])))
    sums, blocks = np.zeros(len(choices)), _blocks(cut, spec.config.vocab)
    with bar("sensitivity", len(choices) * len(blocks), progress) as show:
        for round_, block in enumerate(blocks):
            tokens, places = _padded(block)
            base = _Base(stack, tokens, places)
            x, layer = None, -1
            for done, i in enumerate(order, 1):
                start = min(map(layer_of, choices[i]))
                while layer < start:
                    x = stack.embed({}, tokens) if x is None else stack.layer(layer, {}, x)
                    layer += 1
                sums[i] += base.divergence(choices[i], start, x)
                show(round_ * len(choices) + done, next(iter(choices[i])))
    for i in order:
        if not np.isfinite(sums[i]):
            raise EvaluationError(
                f"with {', '.join(list(choices[i])[:3])} rounded the logits are not finite.",
                why="a weight is NaN or infinite, or what it makes is.",
                fix="model.audit(params), to see which",
            )
    return (sums / cut.scored).tolist()


class _Stack:
    """A model's parts, each with some of its matrices rounded."""

    def __init__(self, spec: Spec, params: Params, clip: str | None) -> None:
        self.spec, self.params, self.clip = spec, params, clip
        self.family = family_of(spec)
        self.programs = _programs(self.family, spec)
        self.top = {n: w for n, w in params.items() if n != "segments"}
        self.places = {
            seg.layer(repeat, phase): (n, phase, repeat)
            for n, seg in enumerate(segments(spec))
            for repeat in range(seg.repeats)
            for phase in range(seg.period)
        }

    def _changed(self, weights: dict[str, Any], choice: Choice, prefix: str = "") -> dict[str, Any]:
        return {
            n: _rounded(w, choice[prefix + n], self.clip) if prefix + n in choice else w for n, w in weights.items()
        }

    def outside(self, choice: Choice) -> dict[str, Any]:
        return self._changed(self.top, choice)

    def embed(self, choice: Choice, tokens: Array) -> Array:
        return self.programs.embed(self.outside(choice), tokens)

    def layer(self, layer: int, choice: Choice, x: Array) -> Array:
        n, phase, repeat = self.places[layer]
        p = _taken(self.params["segments"][n][phase], repeat)
        run = _layer_program(self.family, self.spec, layer % self.spec.config.period, self.spec.window[layer])
        return run(self._changed(p, choice, f"layers.{layer}."), x)

    def hidden(self, choice: Choice, start: int, x: Array | None, tokens: Array) -> Array:
        """`[B * T, D]`, from layer `start` on, whose inputs are `x`; from the tokens on where it is -1."""
        if start < 0:
            start, x = 0, self.embed(choice, tokens)
        for layer in range(start, self.spec.config.layers):
            x = self.layer(layer, choice, x)  # type: ignore[arg-type]
        return self.programs.final(self.outside(choice), x)


class _Base:
    """What the unchanged model says of a block of text."""

    def __init__(self, stack: _Stack, tokens: Array, places: np.ndarray) -> None:
        self.stack, self.tokens, self.count = stack, tokens, len(places)
        size = min(max(1, int(PIECE / (4 * stack.spec.config.vocab))), len(places))
        starts = range(0, len(places), size)
        self.pieces = [places[np.minimum(np.arange(i, i + size), len(places) - 1)] for i in starts]
        hidden = stack.hidden({}, -1, None, tokens)
        self.words = [stack.programs.words(stack.top, hidden, piece) for piece in self.pieces]

    def divergence(self, choice: Choice, start: int, x: Array | None) -> float:
        """Summed over the block's scored tokens."""
        hidden, top = self.stack.hidden(choice, start, x, self.tokens), self.stack.outside(choice)
        found = [self.stack.programs.kl(top, hidden, *each) for each in zip(self.pieces, self.words)]
        return float(np.concatenate(found)[: self.count].sum(dtype=np.float64))


def _blocks(cut: Windows, vocab: int) -> list[list[tuple[np.ndarray, int]]]:
    """The windows and where they begin to be scored, as many as fit at once."""
    rows = list(zip(cut.rows, cut.starts))
    size = max(1, min(TOKENS, int(BASE / (4 * vocab))) // cut.length)
    return [rows[at : at + size] for at in range(0, len(rows), size)]


def _padded(block: list[tuple[np.ndarray, int]]) -> tuple[Array, np.ndarray]:
    """Tokens `[B, T]`, and which of the B * T places say what each scored token is likely to be."""
    length = max(len(row) for row, _ in block)
    tokens = np.zeros((len(block), length), np.int32)
    for b, (row, _) in enumerate(block):
        tokens[b, : len(row)] = row
    places = [b * length + np.arange(start, len(row)) - 1 for b, (row, start) in enumerate(block)]
    return jnp.asarray(tokens), np.concatenate(places).astype(np.int32)


@jax.jit
def _taken(stacks: Any, layer: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False), stacks)


@jax.jit(static_argnums=(1, 2))
def _rounded(w: Any, form: Format, clip: str | None) -> Array:
    return dequantize_array(quantize_array(w, form, trailing=2, clip=clip), w.dtype)


class _Programs(NamedTuple):
    embed: Callable[..., Array]
    final: Callable[..., Array]
    words: Callable[..., Array]
    kl: Callable[..., Array]


@functools.lru_cache(maxsize=64)
def _programs(family: Family, spec: Spec) -> _Programs:
    config, head = spec.config, build(spec).head
    assert family.embed is not None and family.final is not None
    embedding, last = family.embed, family.final

    def embed(top: Params, tokens: Array) -> Array:
        at = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
        return embedding(config, top, tokens, at)

    def final(top: Params, x: Array) -> Array:
        hidden = last(config, top, x)
        return hidden.reshape(-1, hidden.shape[-1])

    def words(top: Params, hidden: Array, places: Array) -> Array:
        return jax.nn.log_softmax(head(top, hidden[places]))

    def kl(top: Params, hidden: Array, places: Array, base: Array) -> Array:
        return divergence(words(top, hidden, places), base)

    return _Programs(jax.jit(embed), jax.jit(final), jax.jit(words), jax.jit(kl))


@functools.lru_cache(maxsize=256)
def _layer_program(family: Family, spec: Spec, phase: int, window: Any) -> Callable[..., Array]:
    """A layer's forward pass `(p, x) -> x`."""
    block = family.block
    assert block is not None

    def forward(p: Params, x: Array) -> Array:
        batch, length = x.shape[:2]
        at = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (batch, length))
        lengths, keep = jnp.full(batch, length, jnp.int32), jnp.ones((batch, length), bool)
        context = ops.Context(at, keep, lengths, window, spec.kv, attention=spec.attention)
        attend = functools.partial(ops.attend, context=context)
        return block(spec.config, phase, as_run(spec, p), x, None, attend, None)[0]

    return jax.jit(forward)
