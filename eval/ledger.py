"""The ledger: an evaluation's rows on disk, written as they come, read again after an interruption; and the same for
scripts that don't go on after one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from cacheclip_jax.errors import BadInput
from eval.rows import Row, read_rows

Key = tuple[str, int, str, str, float | None, str]


def key_of(row: Row) -> Key:
    """What a row answers: no two rows of a run share it."""
    return row.task, row.length, row.method, row.preset, row.ratio, row.sample


class Ledger:
    """Rows in `path` with .part behind it until `finish`; beside it, in .config.json, what was asked for.

        with Ledger(path, config) as ledger:
            if key not in ledger.done:
                ledger.add([row])
            ledger.finish()
    """

    def __init__(self, path: Path, config: Mapping[str, Any]):
        """Begin, or go on where the rows end; a line that was cut off is dropped.

        Raises BadInput when the run is finished, or was begun with another config.
        """
        if path.exists():
            raise BadInput(f"{path} is a finished run: name another --config.out, or delete it")
        self._path, self._part = path, path.with_name(path.name + ".part")
        self.done: set[Key] = set()
        about, asked = path.with_name(path.name + ".config.json"), json.loads(json.dumps(dict(config)))
        path.parent.mkdir(parents=True, exist_ok=True)
        if self._part.exists():
            begun = json.loads(about.read_text(encoding="utf-8"))
            changed = sorted(k for k in {*begun, *asked} if begun.get(k) != asked.get(k))
            if changed:
                raise BadInput(f"{self._part} was begun with another {changed[0]} ({begun.get(changed[0])!r}, now "
                               f"{asked.get(changed[0])!r}): ask for the same, name another --config.out, or delete it")
            self._drop_torn_line()
            if self._part.stat().st_size:
                self.done = {key_of(row) for row in read_rows([self._part])}
        else:
            about.write_text(json.dumps(asked, indent=1) + "\n", encoding="utf-8")
        self._file = self._part.open("a", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def add(self, rows: Iterable[Row]) -> None:
        """Write rows down."""
        for row in rows:
            self.done.add(key_of(row))
            self._file.write(row.to_json() + "\n")
        self._file.flush()

    def finish(self) -> Path:
        """Give the file its name: nothing is missing."""
        self._file.close()
        self._part.replace(self._path)
        return self._path

    def _drop_torn_line(self) -> None:
        whole = self._part.read_bytes()
        end = whole.rfind(b"\n") + 1
        if end < len(whole):
            with self._part.open("r+b") as file:
                file.truncate(end)


@contextmanager
def rows_into(target: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Gives a function that writes a row as a line of JSON, on disk at once: into `target` with .part behind it, which
    gets its name when all are there. Raises BadInput where a run that was killed has left rows."""
    part = target.with_name(target.name + ".part")
    if part.exists() and part.stat().st_size:
        raise BadInput(f"{part} has the rows of a run that didn't finish: move it away, or delete it")
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("w", encoding="utf-8") as file:
        def write(row: Mapping[str, Any]) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()

        yield write
    part.replace(target)
