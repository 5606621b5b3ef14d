"""Curves: a run's numbers as they come, on the terminal, as JSON lines and for TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from tensorboardX import SummaryWriter


class Curves:
    """Writes `metrics.jsonl` and `tensorboard/` in a run's folder. A run that resumes after step `after` drops what it
    had written beyond."""

    def __init__(self, folder: Path, after: int, console: Console):
        folder.mkdir(parents=True, exist_ok=True)
        self._file, self._console = folder / "metrics.jsonl", console
        kept = [row for row in read_curves(folder) if row["step"] <= after]
        self._file.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=after + 1)

    def add(self, step: int, kind: str, values: dict[str, float]) -> None:
        """Add numbers of one kind, "train" or "holdout", at a step."""
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}".replace("@", "_"), value, step)
        shown = "  ".join(f"{name} {value:,.0f}" if value >= 1000 else f"{name} {value:.4g}"
                          for name, value in values.items() if "/" not in name)
        self._console.print(f"step {step:5} {kind:8} {shown}", highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Finish TensorBoard's file."""
        self._board.close()


def read_curves(folder: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl."""
    file = folder / "metrics.jsonl"
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
