"""paged: keep the cache in pages, found through a block table."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, final

from infopt.spec import Spec
from infopt.transforms.base import Transform, order_error, whole


@final
@dataclasses.dataclass(frozen=True, repr=False)
class Paged(Transform):
    name: ClassVar[str] = "paged"
    page: int

    @property
    def exact(self) -> bool:
        return True

    def check(self, spec: Spec) -> None:
        if not spec.cache:
            raise order_error(
                self,
                "needs a cache, and there is none yet",
                "pages are how a cache is laid out.",
                f"cache_kv() | {self!r}",
            )
        if spec.page is not None:
            raise order_error(
                self,
                f"was applied to a cache that has pages of {spec.page} already",
                "a slot lies in one page.",
                "leave one of the two out",
            )
        if spec.kv is not None and spec.kv.split and self.page % spec.kv.split:
            raise order_error(
                self,
                f"was applied to a cache whose keys are rounded over {spec.kv.split} tokens",
                "such a group lies in one page.",
                f"a page that {spec.kv.split} divides: paged({-(-self.page // spec.kv.split) * spec.kv.split})",
            )

    def edit(self, spec: Spec) -> Spec:
        return spec.replace(page=self.page)


def paged(page: int = 16) -> Paged:
    """Lay the cache out in pages of `page` slots, found through a block table a row. Exact.

    `init_state` gives every row its own pages in order; an engine that shares or moves pages replaces `state.tables`.
    Under a window the ring itself is paged, so that bytes follow the window.

    Source: Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention".

    Args:
      page: slots in a page.

    Raises:
      TransformOrderError: no cache yet, or pages already; or groups of tokens that do not fill them.

    >>> import infopt as ip
    >>> model = (ip.cache_kv() | paged(4))(ip.models.llama())
    >>> model.init_state(batch=2, max_len=10).tables[0].shape
    (2, 3)
    """
    return Paged(whole("page", page, 1))
