"""Speed-up over full prefill by context, from a results file of eval.bench_ttft.

    python -m eval.plot_ttft results/ttft.jsonl results/ttft.svg
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_STYLE = {"device": "-", "pinned": "--", "disk": ":"}


def newest(rows: list[dict[str, Any]], model: str, device: str) -> list[dict[str, Any]]:
    """A model's rows on a kind of device, of those that measured the same cell the last with a speed-up."""
    return list({(r["context"], r["method"], r["ratio"], r["caches"], r["aux"]): r for r in rows
                 if (r["model"], r["device"]) == (model, device) and "speedup" in r}.values())


def draw(rows: list[dict[str, Any]], axes: Axes) -> None:
    """A line for each ratio and place of the caches, and the bound of each ratio."""
    lines = defaultdict(list)
    for r in rows:
        if r["method"] == "cacheclip":
            lines[r["ratio"], r["caches"], r["aux"]].append((r["context"], r["speedup"]))
    ratios = sorted({ratio for ratio, _, _ in lines}, reverse=True)
    for (ratio, caches, aux), points in sorted(lines.items()):
        colour = f"C{ratios.index(ratio)}"
        axes.plot(*zip(*sorted(points), strict=True), _STYLE.get(caches, "-."), color=colour, marker="o", markersize=4,
                  label=f"{ratio:.0%}, {caches}, {aux}")
    for n, ratio in enumerate(ratios):
        axes.axhline(1 / ratio, color=f"C{n}", linewidth=0.5)
    axes.set(xlabel="context tokens", ylabel="times sooner than full prefill", xscale="log", yscale="log")
    axes.set_xticks(contexts := sorted({r["context"] for r in rows}), [f"{c:,}" for c in contexts])
    axes.set_yticks(ticks := [1, 2, 3, 5, 10, 20], [str(t) for t in ticks])
    axes.minorticks_off()
    axes.legend(fontsize="small", title="recomputed, caches, aux (thin: bound)", loc="center left",
                bbox_to_anchor=(1, 0.5))


def main() -> None:
    """Read, draw, write."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("results", type=Path)
    arguments.add_argument("picture", type=Path)
    arguments.add_argument("--model", help="whose rows are drawn, of each cell the last; the first row's by default")
    arguments.add_argument("--device", help="which rows of that model; its first row's by default")
    args = arguments.parse_args()
    measured = [json.loads(line) for line in args.results.read_text(encoding="utf-8").splitlines()]
    models = list(dict.fromkeys(r["model"] for r in measured))
    model = args.model or next(iter(models), "")
    devices = list(dict.fromkeys(r["device"] for r in measured if r["model"] == model))
    device = args.device or next(iter(devices), "")
    rows = newest(measured, model, device)
    if not rows:
        arguments.error(f"{args.results} has no speed-ups of {model or 'any model'} on {device or 'any device'}: its "
                        f"models are {', '.join(models) or 'none'}, this one's devices {', '.join(devices) or 'none'}")
    figure, axes = plt.subplots(figsize=(8, 5))
    draw(rows, axes)
    dates = sorted({r["date"] for r in rows})
    axes.set_title(f"{model} on {device}, {dates[0]} to {dates[-1]}")
    figure.savefig(args.picture, bbox_inches="tight")


if __name__ == "__main__":
    main()
