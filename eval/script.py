"""How the scripts with a config start, `python -m eval.NAME --config=FILE [--config.field=value ...]`, and how they
write rows."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from cacheclip_jax.errors import CacheClipError


def start(main: Callable[[ConfigDict], None], what: str) -> None:
    """Run `main` with the command line's config; `what` is its help. What is wrong with the input becomes one line.

    The flag is defined here, not where a script is imported, so that several can be.
    """
    config = config_flags.DEFINE_config_file("config", None, what, lock_config=True)
    flags.mark_flag_as_required("config")

    def run(argv: list[str]) -> None:
        del argv
        try:
            main(config.value)
        except CacheClipError as e:
            sys.exit(f"error: {e}")

    app.run(run)


@contextmanager
def rows_into(target: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Gives a function that writes a row as a line of JSON, on disk at once: into `target` with .part behind it, which
    gets its name when all are there. A run that is killed leaves its rows; the next one writes them over."""
    part = target.with_name(target.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("w", encoding="utf-8") as file:
        def write(row: Mapping[str, Any]) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()

        yield write
    part.replace(target)
