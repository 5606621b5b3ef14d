"""The picture of eval.similarity: overlap by pair of layers, and by the primary's layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Row = dict[str, Any]


def draw(rows: Sequence[Row], aux_layers: int, primary_layers: int) -> Figure:
    """A column for each reduction over rows: heatmaps of the aux model's later layers over chunk caches and of the
    primary's early layers, and curves over the primary's layers."""
    reductions = sorted({r["rows"] for r in rows})
    figure, grid = plt.subplots(3, len(reductions), figsize=(7 * len(reductions), 12), squeeze=False,
                                layout="constrained")
    for column, reduction in zip(grid.T, reductions, strict=True):
        of = [r for r in rows if r["rows"] == reduction]
        _heatmap(figure, column[0], [r for r in of if (r["scorer"], r["context"]) == ("aux", "cached")],
                 "aux layer (over chunk caches)", f"question rows: {reduction}")
        _heatmap(figure, column[1], [r for r in of if r["scorer"] == "primary"], "the primary's own early layer", "")
        _curves(column[2], of, aux_layers - 1, primary_layers)
    return figure


def _heatmap(figure: Figure, axes: Axes, rows: Sequence[Row], label: str, title: str) -> None:
    ours, theirs = (sorted({r[key] for r in rows if r[key] != "late"}) for key in ("primary_layer", "aux_layer"))
    values = [[_recall(rows, aux_layer=a, primary_layer=p) for p in ours] for a in theirs]
    edges = (ours[0] - 0.5, ours[-1] + 0.5, theirs[0] - 0.5, theirs[-1] + 0.5)
    image = axes.imshow(values, origin="lower", aspect="auto", extent=edges, vmin=0, vmax=1)
    axes.set(xlabel="primary layer (full prefill)", ylabel=label, title=title)
    figure.colorbar(image, ax=axes, label="recall of the top 20%")


def _curves(axes: Axes, rows: Sequence[Row], last: int, primary_layers: int) -> None:
    lines = {f"aux, {name}, {context}": [r for r in rows if r["scorer"] == "aux" and r["aux_layer"] == layer
                                         and r["context"] == context]
             for name, layer in (("last layer", last), ("late layers", "late")) for context in ("cached", "joint")}
    early = [r for r in rows if r["scorer"] == "primary"]
    half = primary_layers // 2
    chosen = sorted({0, 1, half // 2, half - 1} & {r["aux_layer"] for r in early})
    lines |= {f"primary, layer {n}": [r for r in early if r["aux_layer"] == n] for n in chosen}
    for name, of in lines.items():
        ours = sorted({r["primary_layer"] for r in of})
        style = "--" if name.startswith("primary") else "-"
        axes.plot(ours, [_recall(of, primary_layer=p) for p in ours], style, marker="o", markersize=3, label=name)
    axes.axhline(0.2, color="#888", linewidth=0.8, label="random")
    axes.set(xlabel="primary layer (full prefill)", ylabel="recall of the top 20%", ylim=(0, 1))
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def _recall(rows: Sequence[Row], **fields: int) -> float:
    """The mean over rows that have these fields."""
    return float(np.mean([r["recall20"] for r in rows if fields.items() <= r.items()]))
