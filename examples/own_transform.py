"""A transform of your own, outside the package, in one file: it stacks with the library's, and the contract tests it.

python examples/own_transform.py
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, final

import numpy as np

import infopt as ip
from infopt.model import Weights, shapes
from infopt.transforms.base import need_dense


@final
@dataclasses.dataclass(frozen=True, repr=False)
class ShuffleNeurons(ip.Transform):
    """Renumber the feed-forward neurons of every layer: another file, the same function."""

    name: ClassVar[str] = "shuffle_neurons"
    seed: int

    @property
    def exact(self) -> bool:
        return True

    def names(self, spec: ip.Spec) -> list[str]:
        return [name for name in shapes(spec) if ".mlp." in name]

    def check(self, spec: ip.Spec) -> None:
        need_dense(self, spec, self.names(spec), "the inputs of a packed row lie in groups, and cannot change places.")

    def edit(self, spec: ip.Spec) -> ip.Spec:
        return spec

    def params(self, weights: Weights, before: ip.Model, after: ip.Spec, **extra: Any) -> Weights:
        def shuffled(name: str, w: Any) -> Any:
            axis = 1 if name.endswith("down") else 0  # neurons are the inputs of `down`, the outputs of `gate` and `up`
            return w.take(np.random.default_rng(self.seed).permutation(w.shape[axis]), axis=axis)

        return weights.map(self.names(before.spec), shuffled)


def main() -> None:
    model = (ShuffleNeurons(7) | ip.quantize(bits=8) | ip.cache_kv())(ip.models.llama())
    print(model)
    ip.testing.check_transform(ShuffleNeurons(7), families=["llama"], partners=False)
    print("alone, over a bare and over a cached model: equal to its oracle, and exact as it says")


if __name__ == "__main__":
    main()
