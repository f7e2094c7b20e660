"""rotate: turn the residual stream by a Hadamard matrix, folded into the weights."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, final

import jax
import jax.numpy as jnp
import numpy as np

from infopt import hadamard
from infopt.errors import InfoptError
from infopt.model import Model, Stream, Weights, shapes, stream_of
from infopt.spec import Spec
from infopt.transforms.base import Transform, need_dense, whole
from infopt.typing import Array


@final
@dataclasses.dataclass(frozen=True, repr=False)
class Rotate(Transform):
    name: ClassVar[str] = "rotate"
    seed: int = 0
    online: bool = False

    @property
    def exact(self) -> bool:
        return True

    def _stream(self, spec: Spec) -> Stream:
        """Of a Spec whose head is its own."""
        try:
            return stream_of(spec)
        except InfoptError as e:
            raise InfoptError(f"{self!r}: {e.what}", why=e.why, fix=e.fix) from e

    def check(self, spec: Spec) -> None:
        stream = self._stream(spec)
        if stream.unrotatable:
            raise InfoptError(
                f"{self!r}: the residual stream of a {spec.family} cannot be rotated.",
                why=stream.unrotatable,
                fix="leave it out for this family",
            )
        after = self.edit(spec)
        if "head" not in shapes(after):
            raise InfoptError(
                f"{self!r}: the head of a {spec.family} is always its embedding.",
                why="after a rotation they differ: the last norm's weight is folded into the head alone.",
                fix="a config with a field `tied`, and an init that gives `head` where it is False",
            )
        stream = self._stream(after)
        readers = [name for names in stream.reads.values() for name in names]
        if "head" not in readers or "embed" not in stream.tables:
            raise InfoptError(
                f"{self!r}: the Stream of {spec.family} lacks the head or the embedding.",
                why="both are turned with what lies between them.",
                fix='ip.Stream(reads={"final_norm": ("head",), ...}, tables=("embed",), ...)',
            )
        if biased := [n for n in stream.reads if f"{n}_bias" in shapes(spec)]:
            raise InfoptError(
                f"{self!r}: the norm {biased[0]} of a {spec.family} has a bias.",
                why="it would have to be folded into biases that the readers may not have.",
                fix="leave it out for this family, whose Stream may say why: unrotatable=...",
            )
        if self.online and not after.online:
            raise InfoptError(
                f"{self!r}: {spec.family} has no matrix that writes to the stream and is named like 'mlp.*'.",
                why="what goes into those is turned while the model runs.",
                fix="rotate() without online=True",
            )
        changed = [n for n in (*stream.tables, *readers, *stream.writes) if n in shapes(spec)]
        need_dense(self, spec, changed, "turning rounded weights gives weights that are not on the grid.")

    def edit(self, spec: Spec) -> Spec:
        if getattr(spec.config, "tied", False):
            spec = spec.replace(config=dataclasses.replace(spec.config, tied=False))  # type: ignore[call-arg]
        if not self.online:
            return spec
        names = {n.split(".", 2)[2] for n in stream_of(spec).writes}
        return spec.replace(online=tuple(sorted({*spec.online, *(n for n in names if n.startswith("mlp."))})))

    def params(self, weights: Weights, before: Model, after: Spec, **extra: Any) -> Weights:
        stream, turn = stream_of(after), _rotation(after.config.dim, self.seed)
        norm_of = {name: norm for norm, names in stream.reads.items() for name in names}
        newly = set(after.online) - set(before.spec.online)

        def read(name: str) -> Any:
            w = weights["embed" if name == "head" and name not in weights else name]
            return _folded(jnp.asarray(w), jnp.asarray(weights[norm_of[name]]), stream.offset, turn)

        def written(name: str, w: Any) -> Any:
            w = _turned(jnp.asarray(w).mT, turn).mT
            return _online(w) if name.split(".", 2)[2] in newly else w

        biases = [f"{name}_bias" for name in stream.writes if f"{name}_bias" in weights]
        return (
            weights.made(norm_of, read)
            .map((*stream.tables, *biases), lambda _, w: _turned(jnp.asarray(w), turn))
            .map(stream.writes, written)
            .map(stream.reads, lambda _, w: jnp.full_like(jnp.asarray(w), 1 - stream.offset))
        )


Turn = tuple[np.ndarray, tuple[np.ndarray, ...]]
"""The signs of channels, and the factors of the orthogonal matrix that they are multiplied by then."""


@functools.lru_cache(maxsize=8)
def _rotation(width: int, seed: int) -> Turn:
    rng = np.random.default_rng(seed)
    signs = rng.choice(np.array([-1, 1], np.float32), width)
    matrices, left = hadamard.factors(width)
    if left > 1:
        q, r = np.linalg.qr(rng.standard_normal((left, left)))
        matrices = ((q * np.sign(np.diag(r))).astype(np.float32), *matrices)
    return signs, matrices


def rotation(width: int, seed: int = 0) -> np.ndarray:
    """The matrix Q of `rotate(seed)` for a stream of this width, float32.

    >>> q = rotation(576).astype(np.float64)
    >>> bool(np.abs(np.abs(q) - 576**-0.5).max() < 1e-7), bool(np.abs(q @ q.T - np.eye(576)).max() < 1e-6)
    (True, True)
    """
    return np.asarray(_turned(jnp.eye(width, dtype=jnp.float32), _rotation(width, seed)))


@jax.jit
def _turned(x: Array, turn: Turn) -> Array:
    signs, matrices = turn
    y = x.astype(jnp.float32)
    return hadamard.times(y * jnp.broadcast_to(jnp.asarray(signs), y.shape), matrices).astype(x.dtype)


@jax.jit
def _folded(w: Array, norm: Array, offset: float, turn: Turn) -> Array:
    scale = norm.astype(jnp.float32) + jnp.float32(offset)
    return _turned(w.astype(jnp.float32) * jnp.broadcast_to(scale, w.shape), turn).astype(w.dtype)


_online = jax.jit(hadamard.turned)


def rotate(seed: int = 0, online: bool = False) -> Rotate:
    """Turn the residual stream by a random orthogonal matrix Q, folded into the weights. Exact, to float rounding.

    No channel of what goes into the layers is then much larger than the others, and rounding loses less: put it before
    `quantize`. With g the weight of a norm, and of matrices W `[out, in]` those that read the stream and those that
    write to it,

        embedding E Q    readers W diag(g) Q, and the head    writers Q^T W, their biases b Q    norms 1

    which changes nothing, as a norm without weights gives x Q / rms(x Q) = (x / rms(x)) Q.

    Q is diag(random signs) H. H is a Hadamard matrix, all of whose entries are 1 / sqrt(D) or its negative: a Kronecker
    product of matrices by Paley (of primes; orders up to 256) and of Sylvester's [[1, 1], [1, -1]]. For D = 576 it is
    H_12 x H_12 x H_2 x H_2, each H_12 by Paley of the prime 11. Where no such product has order D, it is one of the
    largest divisor that has, times a random orthogonal matrix (D = 61: that alone; D = 6: of order 3).

    The head is no longer the embedding's transpose, since the last norm's weight is in it: a tied model grows by V D
    weights (SmolLM2-135M: 49,152 x 576 x 4 bytes = 113 MB in float32, 28.3 million over 134.5 million), which
    `model.weight_bytes()`, its repr and `ip.plan` count; `quantize(where=["head", ...])` packs them too.
    Weights keep their type: in bfloat16 they are rounded to it once more.

    Source: Ashkboos et al. 2024, "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", section 4 (stages 1a and 1b);
    Paley 1933, "On Orthogonal Matrices".

    Args:
      seed: of the signs. Rotating twice is exact too.
      online: whether what goes into the matrix that ends the MLP (each expert's) is multiplied by a Hadamard matrix
        while the model runs, and the matrix by its transpose: that input has the largest outliers. Where no
        Hadamard matrix of its width is known, it is turned in blocks. Each layer multiplies by the small factors then,
        at every step; and what is saved so cannot be exported.

    Raises:
      InfoptError: the family's stream cannot be rotated, it is not known how, or its head is always its embedding.
      TransformOrderError: a weight that it changes is packed.

    >>> import infopt as ip
    >>> model = rotate(seed=3)(ip.models.llama(tied=True))
    >>> model.spec.config.tied, str(model.recipe), model.exact
    (False, 'rotate(seed=3)', True)
    """
    if not isinstance(online, bool):
        raise InfoptError(f"rotate(online={online!r}).", why="it is turned or not.", fix="online=True")
    return Rotate(whole("seed", seed, 0), online)
