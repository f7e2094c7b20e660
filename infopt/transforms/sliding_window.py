"""sliding_window: each position sees the last few and the first few."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import ClassVar, final

from infopt.errors import InfoptError
from infopt.spec import Spec, Window
from infopt.transforms.base import Transform, whole


@final
@dataclasses.dataclass(frozen=True, repr=False)
class SlidingWindow(Transform):
    name: ClassVar[str] = "sliding_window"
    size: int
    sinks: int = 0
    layers: tuple[int, ...] | None = None

    @property
    def exact(self) -> bool:
        return False

    def narrowed(self, old: Window | None) -> Window:
        return (
            Window(self.size, self.sinks)
            if old is None
            else Window(min(self.size, old.size), max(self.sinks, old.sinks))
        )

    def chosen(self, spec: Spec) -> set[int]:
        return set(range(spec.config.layers) if self.layers is None else self.layers)

    def check(self, spec: Spec) -> None:
        chosen = self.chosen(spec)
        if beyond := sorted(chosen - set(range(spec.config.layers))):
            raise InfoptError(
                f"{self!r}: there is no layer {beyond[0]}.",
                why="a rule that touches no layer is a mistake in it.",
                fix=f"layers from 0 to {spec.config.layers - 1}",
            )
        if self.sinks and spec.config.rotated_queries:
            raise InfoptError(
                f"{self!r}: {spec.family} cannot keep sinks.",
                why="a sink is seen from no further than the window is long, and these queries come rotated already.",
                fix=f"sliding_window({self.size})",
            )
        for i in chosen:
            w = self.narrowed(spec.window[i])
            if w.size < w.sinks:
                raise InfoptError(
                    f"{self!r}: layer {i} would see {w.size} positions and keep {w.sinks} sinks.",
                    why="its own window is narrower than the sinks.",
                    fix=f"sinks <= {w.size}",
                )

    def edit(self, spec: Spec) -> Spec:
        chosen = self.chosen(spec)
        return spec.replace(window=tuple(self.narrowed(w) if i in chosen else w for i, w in enumerate(spec.window)))


def sliding_window(size: int, sinks: int = 0, layers: Sequence[int] | None = None) -> SlidingWindow:
    """Let each position see the last `size`, itself included, and the first `sinks` of the text. Not exact.

    With a cache the window is a ring of constant size. A sink is looked at from no further than the window is long,
    so that text may go on past the trained context (Xiao et al. 2023, "Efficient Streaming Language Models with
    Attention Sinks"). A layer that has a window keeps the narrower of the two, and the more sinks.

    Args:
      size: positions seen, at least 1 and at least `sinks`.
      sinks: first positions that stay visible.
      layers: which layers; all by default.

    Raises:
      InfoptError: size < max(1, sinks), or a layer that is not there.

    >>> import infopt as ip
    >>> sliding_window(4, sinks=1, layers=[1])(ip.models.llama(layers=2)).spec.window
    (None, Window(size=4, sinks=1))
    """
    sinks, size = whole("sinks", sinks, 0), whole("size", size, 1)
    if size < sinks:
        raise InfoptError(
            f"sliding_window({size}, sinks={sinks}) keeps more sinks than it sees.",
            why="a sink's distance is kept below the window's size, and must differ from the next one's.",
            fix="sinks <= size",
        )
    if layers is not None:
        if not isinstance(layers, Iterable) or isinstance(layers, str):
            raise InfoptError(
                f"sliding_window(layers={layers!r}) is not a list of layers.",
                why="several layers may be named.",
                fix="a list of whole numbers, as layers=[0, 2]",
            )
        layers = tuple(sorted({whole("layers", i, 0) for i in layers}))
        if not layers:
            raise InfoptError(
                "sliding_window(layers=[]) names no layer.",
                why="it would change nothing.",
                fix="layers=None for all of them",
            )
    return SlidingWindow(size, sinks, layers)
