"""flash_attention: attention without the matrix of all scores."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, final

from infopt.errors import InfoptError, nearest
from infopt.kernels.flash_attention import IMPLEMENTATIONS
from infopt.ops import FLASH
from infopt.spec import Spec
from infopt.transforms.base import Transform, order_error

NAMES = tuple(name for name in IMPLEMENTATIONS if name != "reference")


@final
@dataclasses.dataclass(frozen=True, repr=False)
class FlashAttention(Transform):
    name: ClassVar[str] = "flash_attention"
    implementation: str | None = None

    @property
    def exact(self) -> bool:
        return True

    def check(self, spec: Spec) -> None:
        if spec.attention != "reference":
            raise order_error(
                self,
                f"was applied to a stack whose attention is {spec.attention} already",
                "attention is computed by one implementation.",
                "leave one of the two out",
            )

    def edit(self, spec: Spec) -> Spec:
        return spec.replace(attention=self.implementation or FLASH)


def flash_attention(implementation: str | None = None) -> FlashAttention:
    """Compute attention block by block: memory grows with the length, not with its square. Exact, to float rounding.

    Differentiable, through a cache too: the backward pass computes each block's scores again. Stacks with every window,
    codec and layout; through rounded keys and values no gradient may be asked.

    Source: Dao et al. 2022, "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness".

    Args:
      implementation: `"blockwise"` (XLA, anywhere), `"pallas_tpu"` or `"pallas_gpu"`, which raise where a program is
        compiled for anything else, or for a shape that they cannot serve. By default what suits the platform: the
        kernel on a TPU, blocks elsewhere, the plain form for short texts. A cache is read by the TPU's kernel, with
        `"pallas_gpu"` by the GPU's, or else through XLA.

    Raises:
      InfoptError: there is no such implementation.
      TransformOrderError: the stack has one already.

    >>> import infopt as ip
    >>> (flash_attention() | ip.cache_kv())(ip.models.llama()).exact
    True
    """
    if implementation is not None and implementation not in NAMES:
        raise InfoptError(
            f"no implementation of flash attention is called {implementation!r}.",
            why=nearest(str(implementation), NAMES),
            fix="None, or " + ", ".join(map(repr, NAMES)),
        )
    return FlashAttention(implementation)
