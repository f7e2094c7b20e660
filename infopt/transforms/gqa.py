"""gqa: fewer key/value heads, each made of those it replaces."""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any, ClassVar, final

import jax.numpy as jnp
import numpy as np

from infopt.errors import InfoptError
from infopt.model import Model, Weights, shapes
from infopt.spec import Spec
from infopt.transforms.base import Transform, need_dense, whole

INITS = ("mean", "first", "random")
"""What a new head is: see `gqa`."""


@final
@dataclasses.dataclass(frozen=True, repr=False)
class GQA(Transform):
    name: ClassVar[str] = "gqa"
    kv_heads: int
    init: str = "mean"
    seed: int | None = None

    @property
    def exact(self) -> bool:
        return False

    def names(self, spec: Spec) -> list[str]:
        ends = (".attn.k", ".attn.v", ".attn.k_bias", ".attn.v_bias")
        return [n for n in shapes(spec) if n.startswith("layers.") and n.endswith(ends)]

    def check(self, spec: Spec) -> None:
        have = spec.config.kv_heads
        if have % self.kv_heads:
            divisors = [str(d) for d in range(1, have + 1) if have % d == 0]
            raise InfoptError(
                f"{self!r}: {self.kv_heads} does not divide the model's {have} key/value heads.",
                why="each new head stands for an equal number of old ones.",
                fix=f"kv_heads={' or '.join(divisors)}",
            )
        names = self.names(spec)
        if sum(not n.endswith("bias") for n in names) != 2 * spec.config.layers:
            raise InfoptError(
                f"{self!r}: {spec.family} has no separate key and value projections in every layer.",
                why="heads are rows of those weights.",
                fix="name them layers.<i>.attn.k and layers.<i>.attn.v",
            )
        after = shapes(self.edit(spec))
        if any(after[n][0] != self.kv_heads * spec.config.head_dim for n in names):
            raise InfoptError(
                f"{self!r}: the number of heads of {spec.family} stands in its own code.",
                why="fewer key/value heads would not fit the arrays that it makes.",
                fix="make the model with fewer heads, or use a family whose config says how many",
            )
        need_dense(self, spec, names, "pooling rounded heads differs from rounding pooled heads.")

    def edit(self, spec: Spec) -> Spec:
        return spec.replace(config=dataclasses.replace(spec.config, kv_heads=self.kv_heads))

    def params(self, weights: Weights, before: Model, after: Spec, **extra: Any) -> Weights:
        c = before.spec.config

        def pool(name: str, w: Any) -> Any:
            if c.kv_heads == self.kv_heads:
                return w
            heads = w.reshape(self.kv_heads, c.kv_heads // self.kv_heads, c.head_dim, *w.shape[1:])
            if self.init == "random":
                new = self._random(name, heads[:, 0].shape, w)
            else:
                new = heads.mean(1) if self.init == "mean" else heads[:, 0]
            return new.reshape(-1, *w.shape[1:])

        return weights.map(self.names(before.spec), pool)

    def _random(self, name: str, shape: tuple[int, ...], old: Any) -> Any:
        """Normal, of the old weights' own size, by (seed, name) alone; a bias is 0."""
        if name.endswith("_bias"):
            return jnp.zeros(shape, old.dtype)
        assert self.seed is not None
        drawn = np.random.default_rng((self.seed, zlib.crc32(name.encode()))).standard_normal(shape, np.float32)
        size = jnp.sqrt(jnp.mean(jnp.square(jnp.asarray(old).astype(jnp.float32))))
        return (jnp.asarray(drawn) * jnp.broadcast_to(size, shape)).astype(old.dtype)


def gqa(kv_heads: int, init: str = "mean", seed: int | None = None) -> GQA:
    """Share key/value heads between more query heads: each new head is the mean of those it replaces. Not exact.

    Of `n` old heads to a new one, new head g's rows of the key projection W (of the value projection, of their biases):

        mean: W'[g] = (W[g n] + ... + W[g n + n - 1]) / n    first: W'[g] = W[g n]    random: W'[g] ~ N(0, mean(W^2))

    Where the heads of a group are equal, mean and first are exact. Else `ip.uptrain` wins most of the loss back.

    Source: Ainslie et al. 2023, "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head
    Checkpoints", section 2.1, and section 3.3 for the three beginnings. `kv_heads=1` is multi-query attention (Shazeer
    2019, "Fast Transformer Decoding: One Write-Head is All You Need").

    Args:
      kv_heads: a divisor of the model's; as many as it has leave it as it is.
      init: "mean", "first" (the first of those it replaces) or "random" (nothing of them is kept; biases are 0): the
        last two are baselines.
      seed: of "random", 0 by default.

    Raises:
      InfoptError: it does not divide, the family has no separate projections, there is no such init, or it has no seed.
      TransformOrderError: the projections are packed.

    >>> import infopt as ip
    >>> gqa(1)(ip.models.llama(kv_heads=2)).spec.config.kv_heads
    1
    >>> gqa(1, init="first"), gqa(1, init="random")
    (gqa(kv_heads=1, init='first'), gqa(kv_heads=1, init='random', seed=0))
    """
    kv_heads = whole("kv_heads", kv_heads, 1)
    if init not in INITS:
        raise InfoptError(
            f"gqa: there is no init={init!r}.",
            why="it says what a new head is made of.",
            fix="init='mean', 'first' or 'random'",
        )
    if init == "random":
        return GQA(kv_heads, init, whole("seed", 0 if seed is None else seed, 0))
    if seed is not None:
        raise InfoptError(
            f"gqa: init={init!r} takes no seed.", why="nothing is drawn.", fix="leave it out, or init='random'"
        )
    return GQA(kv_heads, init)
