"""A sensitivity as a picture: layers by kinds of matrices, a panel a format."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import LogNorm

from infopt.ablation.picture import Picture
from infopt.budget.alone import layer_of
from infopt.budget.sensitivity import Sensitivity


def draw(s: Sensitivity) -> Picture:
    """See `Sensitivity.plot`."""
    kinds, cells = _cells(s)
    shown = np.isfinite(cells) & (cells > 0)
    norm = LogNorm(cells[shown].min(), cells[shown].max()) if shown.any() else None
    figure = Picture(figsize=(9, 1.2 + len(s.formats) * (0.8 + 0.28 * len(kinds))), layout="constrained")
    panels = figure.subplots(len(s.formats), 1, squeeze=False, sharex=True)[:, 0]
    for axes, form, of in zip(panels, s.formats, cells):
        image = axes.imshow(np.where(of > 0, of, np.nan), norm=norm, aspect="auto")
        axes.set_yticks(range(len(kinds)), kinds, fontsize=7)
        axes.set_title(form, fontsize=8)
    panels[-1].set(xlabel="layer")
    figure.colorbar(image, ax=panels.tolist(), label="KL, nats a token")
    figure.suptitle(s.title, fontsize=8)
    return figure


def _cells(s: Sensitivity) -> tuple[list[str], np.ndarray]:
    """Kinds, and KL `[F, kinds, L]`; what lies outside the layers fills its row, what was not measured is NaN."""
    of = {own[0]: row for own, row in zip(s.matrices, s.kl)}
    kind = {m: "all" if s.by == "layer" and layer_of(m) >= 0 else m.split(".", 2)[-1] for m in of}
    kinds = list(dict.fromkeys(kind.values()))
    cells = np.full((len(s.formats), len(kinds), s.spec.config.layers), np.nan)
    for name, row in of.items():
        layer = layer_of(name)
        at = slice(None) if layer < 0 else slice(layer, layer + 1)
        cells[:, kinds.index(kind[name]), at] = np.array(row)[:, None]
    return kinds, cells
