"""What the command line writes to: rich consoles, a progress bar, JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

out = Console(emoji=False)
err = Console(stderr=True, emoji=False)


@contextmanager
def bar(description: str) -> Iterator[Any]:
    """A function `step(done, total)` that moves a bar on stderr, where that is a terminal."""
    columns = TextColumn(description), BarColumn(), TextColumn("{task.completed}/{task.total}")
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def print_json(value: Any) -> None:
    """A value as JSON on stdout."""
    print(json.dumps(value, ensure_ascii=False, default=str))
