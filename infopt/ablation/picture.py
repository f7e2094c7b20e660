"""A table as a picture: quality against bytes with intervals, and speed beside it where it was measured."""

from __future__ import annotations

import io
import math
from typing import Any

from matplotlib.figure import Figure

from infopt.ablation.table import Row, Table
from infopt.evaluate import METRICS as QUALITY

MARKERS = "osD^v<>PX*h"
"""With ten colours, a hundred and ten rows that look different."""


class Picture(Figure):
    """A matplotlib figure that a notebook shows, whatever its backend."""

    def png(self) -> bytes:
        """Equal figures, equal bytes."""
        data = io.BytesIO()
        self.savefig(data, format="png", dpi=120, metadata={"Software": None})
        return data.getvalue()

    def _repr_png_(self) -> bytes:
        return self.png()


def draw(table: Table, metric: str) -> Picture:
    """See `Table.plot`."""
    fast = [row for row in table.rows if row.speed]
    figure = Picture(figsize=(12 if fast else 7, 4.8), layout="constrained")
    left, *right = figure.subplots(1, 2 if fast else 1, squeeze=False)[0]
    divergence = metric in ("kl", "kl99")
    for row in table.rows[divergence:]:  # of the base it is 0, which no axis of orders of magnitude has
        _point(left, table, row, metric)
    if divergence and any(row.estimate(metric).value > 0 for row in table.rows[1:]):
        left.set_yscale("log")
    left.set(xlabel="bytes a weight, scales and dense weights included", ylabel=QUALITY[metric])
    if len(table.rows) > divergence:
        left.legend(fontsize=7)
    if fast:
        colors = [_look(table, row)["color"] for row in fast]
        right[0].barh([row.name for row in fast], [row.faster for row in fast], color=colors)
        right[0].axvline(1, color="grey", linewidth=0.8)
        right[0].invert_yaxis()
        right[0].set(xlabel=f"decoding speed, times that of {table.rows[0].name}")
    figure.suptitle(table.title, fontsize=8)
    return figure


def _point(axes: Any, table: Table, row: Row, metric: str) -> None:
    e = row.estimate(metric, table.seed)
    reach = [[e.value - e.low], [e.high - e.value]] if math.isfinite(e.low) else None
    axes.errorbar([row.bytes_per_weight], [e.value], reach, capsize=3, label=row.name, **_look(table, row))


def _look(table: Table, row: Row) -> dict[str, str]:
    i = table.rows.index(row)
    return {"color": f"C{i % 10}", "fmt": MARKERS[i % len(MARKERS)]}
