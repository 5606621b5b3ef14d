"""A bounded tier of chunk caches: those used lately stay where the next request finds them."""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock


class Tier[T]:
    """Chunk caches by key, bounded in bytes; the least recently used leave first. Threads may share it.

    What leaves is forgotten here and lives on with whoever holds it.
    """

    def __init__(self, limit_bytes: int):
        self.limit_bytes, self.nbytes = limit_bytes, 0
        self._kept: OrderedDict[tuple[str, ...], tuple[T, int]] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: tuple[str, ...]) -> T | None:
        """The chunk cache of a key, None where it isn't here."""
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key][0]

    def put(self, key: tuple[str, ...], chunk: T, nbytes: int) -> None:
        """Keep a chunk cache of so many bytes, unless it's here or larger than the tier."""
        with self._lock:
            if key in self._kept or nbytes > self.limit_bytes:
                return
            while self.nbytes + nbytes > self.limit_bytes:
                self.nbytes -= self._kept.popitem(last=False)[1][1]
            self._kept[key] = chunk, nbytes
            self.nbytes += nbytes
