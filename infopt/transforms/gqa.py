"""gqa: fewer key/value heads, each the mean of those it replaces."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, final

from infopt.errors import InfoptError
from infopt.model import Model, Weights, shapes
from infopt.spec import Spec
from infopt.transforms.base import Transform, need_dense, whole


@final
@dataclasses.dataclass(frozen=True, repr=False)
class GQA(Transform):
    name: ClassVar[str] = "gqa"
    kv_heads: int

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
                why="each new head is the mean of an equal number of old ones.",
                fix=f"kv_heads={' or '.join(divisors)}",
            )
        names = self.names(spec)
        if sum(not n.endswith("bias") for n in names) != 2 * spec.config.layers:
            raise InfoptError(
                f"{self!r}: {spec.family} has no separate key and value projections in every layer.",
                why="pooling heads averages their rows of those weights.",
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

        def pool(_: str, w: Any) -> Any:
            heads = w.reshape(self.kv_heads, c.kv_heads // self.kv_heads, c.head_dim, *w.shape[1:])
            return heads.mean(1).reshape(-1, *w.shape[1:])

        return weights.map(self.names(before.spec), pool)


def gqa(kv_heads: int) -> GQA:
    """Share key/value heads between more query heads: each new head is the mean of those it replaces. Not exact.

    Source: Ainslie et al. 2023, "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head
    Checkpoints", section 2.1. `kv_heads=1` is multi-query attention.

    Args:
      kv_heads: a divisor of the model's.

    Raises:
      InfoptError: it does not divide, or the family has no separate projections.
      TransformOrderError: the projections are packed.

    >>> import infopt as ip
    >>> gqa(1)(ip.models.llama(kv_heads=2)).spec.config.kv_heads
    1
    """
    return GQA(whole("kv_heads", kv_heads, 1))
