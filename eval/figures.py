"""Figures of an evaluation as inline SVG: quality over ratio, quality against TTFT, the needle by depth and length."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np

from eval.rows import Cell, pool, pooled_retention

_DEPTH_BINS = 10


def ratio_curves(cells: Sequence[Cell]) -> str:
    """Retention over tasks, over the realised recompute ratio; one line a method, as far as ratios were asked for. ""
    without a method."""
    from matplotlib import colormaps

    lines: dict[str, list[tuple[float, float]]] = {}
    asked = 0.0
    for (name, ratio), group in pool(cells).items():
        asked = max(asked, ratio or 0)
        realised = [r for c in group if (r := c.mean_of("realised_ratio")) is not None]
        kept = pooled_retention(group, resamples=0).value
        if name != "full" and realised and not math.isnan(kept):
            lines.setdefault(name, []).append((100 * sum(realised) / len(realised), 100 * kept))
    if not lines:
        return ""
    figure, axes = _figure(width=9.0, height=max(3.6, 0.22 * len(lines)))
    for number, (name, points) in enumerate(lines.items()):
        axes.plot(*zip(*sorted(points), strict=True), color=colormaps["tab20"](number % 20), label=name,
                  marker="osD^"[number // 20 % 4], markersize=4)
    axes.axhline(100, color="#888", linewidth=0.8, linestyle="--")
    axes.set(xlabel="context tokens recomputed (%)", ylabel="score / full attention's (%)")
    if asked:
        axes.set_xlim(-1, 110 * asked)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return _svg(figure)


def quality_over_ttft(cells: Sequence[Cell]) -> str:
    """Mean score against median TTFT; one point a method and ratio. "" where no time was measured."""
    points = []
    for (name, ratio), group in pool(cells).items():
        times = [c.ttft for c in group if not math.isnan(c.ttft)]
        if times:
            points.append((1000 * sum(times) / len(times), 100 * sum(c.score for c in group) / len(group),
                           name if ratio is None else f"{name} {100 * ratio:.0f}%"))
    if not points:
        return ""
    figure, axes = _figure()
    for x, y, name in points:
        axes.plot([x], [y], marker="o", linestyle="")
        axes.annotate(name, (x, y), textcoords="offset points", xytext=(5, 3), fontsize=7)
    axes.set(xlabel="time to first token (ms, median)", ylabel="score (%, mean over tasks)")
    axes.margins(x=0.15, y=0.1)  # room for the names
    axes.set_xlim(left=0)
    return _svg(figure)


def needle_heatmap(cells: Sequence[Cell]) -> str:
    """Mean score of the samples that have a depth, in tenths of the context, by length. "" without any."""
    rows = [r for c in cells for r in c.rows if r.depth is not None]
    if not rows:
        return ""
    lengths = sorted({r.length for r in rows})
    total, number = (np.zeros((_DEPTH_BINS, len(lengths))) for _ in range(2))
    for r in rows:
        at = min(int((r.depth or 0) / 100 * _DEPTH_BINS), _DEPTH_BINS - 1), lengths.index(r.length)
        total[at] += 100 * r.score
        number[at] += 1
    grid = np.divide(total, number, out=np.full_like(total, np.nan), where=number > 0)
    figure, axes = _figure(width=1.6 + 0.8 * len(lengths))
    axes.imshow(grid, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto", alpha=0.7)
    for (y, x), value in np.ndenumerate(grid):
        if not math.isnan(value):
            axes.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=7)
    axes.set_xticks(range(len(lengths)), [str(n) for n in lengths])
    axes.set_yticks(range(_DEPTH_BINS), [f"{100 * i // _DEPTH_BINS}-{100 * (i + 1) // _DEPTH_BINS}"
                                         for i in range(_DEPTH_BINS)])
    axes.set(xlabel="tokens", ylabel="depth (%)")
    return _svg(figure)


def _figure(width: float = 6.0, height: float = 3.6):
    # Not pyplot: figures without a global state, a window or a backend to choose.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _svg(figure) -> str:
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "cacheclip", "svg.fonttype": "none"}):  # the same bytes every time
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
