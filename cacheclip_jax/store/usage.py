"""Which chunk caches of a local tier to give up first: the rarely used, the large, those that are cheap to make again.

A chunk's priority is `clock + uses * cost / size`; the one with the lowest goes, and the clock moves up to its
priority, so that what was popular long ago ages (Cherkasova, "Improving WWW proxies performance with
GreedyDual-Size-Frequency caching policy", 1998, equation 1). No wall clock is involved. Kept in SQLite, which several
processes may share; losing the file loses counts, not chunks.
"""

from __future__ import annotations

import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from pathlib import Path

_BATCH = 64
_TABLES = """
create table if not exists chunk
  (key text primary key, size integer, cost real, uses integer, priority real, text text);
create index if not exists by_priority on chunk (priority);
create table if not exists clock (id integer primary key check (id = 0), value real);
insert or ignore into clock values (0, 0.0);
"""


class Usage:
    """Sizes, costs and uses of what a local tier holds; safe to share between threads and processes."""

    def __init__(self, path: Path):
        self._path, self._lock = path, threading.Lock()
        self._uses: Counter[str] = Counter()
        self._connection: sqlite3.Connection | None = None

    def add(self, items: Iterable[tuple[str, int, float, str]]) -> None:
        """Chunks that the tier now holds: (key, size, cost, text id)."""
        sql = """insert or ignore into chunk select ?1, ?2, ?3, 1, clock.value + ?3 / max(1, ?2), ?4 from clock"""
        self._run(lambda db: db.executemany(sql, items))

    def use(self, key: str) -> None:
        """A chunk was read. Written down some at a time."""
        with self._lock:
            self._uses[key] += 1
            due = sum(self._uses.values()) >= _BATCH
        if due:
            self.flush()

    def flush(self) -> None:
        with self._lock:
            found, self._uses = list(self._uses.items()), Counter()
        sql = """update chunk set uses = uses + ?2, priority = (select value from clock) +
                 (uses + ?2) * cost / max(1, size) where key = ?1"""
        self._run(lambda db: db.executemany(sql, found))

    def remove(self, key: str) -> None:
        self._run(lambda db: db.execute("delete from chunk where key = ?", (key,)))

    def size(self) -> int:
        return self._run(lambda db: db.execute("select coalesce(sum(size), 0) from chunk").fetchone()[0]) or 0

    def keys(self) -> set[str]:
        return {key for (key,) in self._run(lambda db: db.execute("select key from chunk").fetchall()) or ()}

    def victims(self, excess: int, spared: Callable[[str, str], bool]) -> list[str]:
        """The chunks to give up for `excess` bytes, but those that are `spared` (by key and text id)."""
        self.flush()
        chosen, clock = [], None
        for key, size, priority, text in self._run(
            lambda db: db.execute("select key, size, priority, text from chunk order by priority").fetchall()
        ) or ():
            if excess <= 0:
                break
            if not spared(key, text):
                chosen.append(key)
                excess, clock = excess - size, priority
        if clock is not None:
            self._run(lambda db: db.execute("update clock set value = max(value, ?)", (clock,)))
        return chosen

    def _run[T](self, work: Callable[[sqlite3.Connection], T]) -> T | None:
        """Does something in a transaction; a damaged file is begun again, and then None returned."""
        with self._lock:
            try:
                if self._connection is None:
                    self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                    self._connection = sqlite3.connect(self._path, timeout=10, check_same_thread=False)
                    self._path.chmod(0o600)
                    self._connection.executescript(f"pragma synchronous = off; {_TABLES}")
                with self._connection:
                    return work(self._connection)
            except sqlite3.OperationalError:
                return None  # busy, full or read-only: counts are not worth an answer
            except sqlite3.DatabaseError:
                if self._connection is not None:
                    with closing(self._connection):
                        self._connection = None
                with suppress(OSError):
                    self._path.unlink()
                return None
