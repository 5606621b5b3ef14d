"""A bucket with a local disk before it: read through, written behind, the disk kept within a size.

Chunk caches, passages and spaces never change, so a local copy is as good as the bucket's. Documents' records do
change: they are read from the bucket while it answers. What is written is on the local disk, with a note under
uploads/, before a write returns; threads bring it to the bucket, also after a crash. While the bucket doesn't
answer, it is left alone for a while: what the disk has is served, the rest raises at once.
"""

from __future__ import annotations

import atexit
import builtins
import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote, unquote

import numpy as np

from cacheclip_jax.errors import StoreError
from cacheclip_jax.store import layout
from cacheclip_jax.store.blobs import Blobs, Source
from cacheclip_jax.store.chunkfile import PRELUDE, unpack
from cacheclip_jax.store.files import FileSource
from cacheclip_jax.store.usage import Usage

log = logging.getLogger("cacheclip.store")

_UPLOADERS, _QUEUE = 2, 256
_REST = 15.0  # seconds that a bucket is left alone after it failed


_RUNNING: weakref.WeakSet[TieredBlobs] = weakref.WeakSet()


class TieredBlobs:
    """The interface of Blobs, over a bucket and a local directory of at most `limit` bytes of chunk caches."""

    directory = None
    files = None
    tier = "tiered"

    def __init__(self, remote: Blobs, local: Blobs, limit: int):
        assert local.directory is not None
        self.remote, self.local, self.limit, self.url = remote, local, limit, remote.url
        self.usage = Usage(Path(local.directory) / "usage.db")
        self.protected: Callable[[], set[str]] = set
        self.on: Callable[[str, str, int], None] = lambda what, tier, n: None
        self._queue: queue.Queue[str] = queue.Queue(_QUEUE)
        self._queued: set[str] = set()
        self._lock, self._threads = threading.Lock(), list[threading.Thread]()
        self._resting_until, self._stopping = 0.0, False
        _RUNNING.add(self)
        self._adopt()
        if self.pending():
            self._wake()

    def below(self, folder: str) -> TieredBlobs:
        return TieredBlobs(self.remote.below(folder), self.local.below(folder), self.limit)

    def where(self, key: str) -> str:
        return self.remote.where(key)

    # ------------------------------------------------------------ reading

    def read(self, key: str) -> bytes | None:
        return next(self.read_all([key]))[1]

    def read_all(self, keys: Iterable[str], first: int | None = None) -> Iterator[tuple[str, bytes | None]]:
        for key in keys:
            own = not self._mutable(key) or self._noted(key)
            data = next(self.local.read_all([key], first))[1] if own else None
            if data is None:
                data = self._read_remote(key, first)
            yield key, data

    def _read_remote(self, key: str, first: int | None) -> bytes | None:
        try:
            ((_, data),) = self._asking(lambda: builtins.list(self.remote.read_all([key], first)))
        except StoreError:
            if self._mutable(key) and (copy := self.local.read(key)) is not None:
                return copy
            raise
        if data is not None and first is None and not key.endswith(".kv"):
            self._keep(key, [data])
        return data

    def source(self, key: str, head: int, size: int | None) -> Source | FetchedSource:
        """The local copy, or the bucket's, which becomes a local copy while it is read."""
        try:
            source = self.local.source(key, head, size)
        except FileNotFoundError:
            self._rested()
            self.on("fetches", "bucket", 1)
            return FetchedSource(self, key)
        self.usage.use(key)
        self.on("local_hits", "disk", 1)
        return source

    def fetched(self, key: str, data: bytes) -> None:
        """Keeps what was read from the bucket."""
        if self._keep(key, [data]):
            self._count(key, data)
            self._evict()

    def list(self, prefix: str) -> list[str]:
        try:
            found = self._asking(lambda: self.remote.list(prefix))
        except StoreError:
            log.warning("the bucket doesn't answer: listing local copies", extra={"prefix": prefix})
            return self.local.list(prefix)
        return sorted({*found, *(key for key in self.pending() if key.startswith(prefix))})

    # ------------------------------------------------------------ writing

    def write(self, key: str, value: bytes) -> None:
        self.write_parts(key, [value])

    def write_all(self, items: Iterable[tuple[str, bytes]]) -> None:
        for key, value in items:
            self.write_parts(key, [value])

    def write_parts(self, key: str, parts: Sequence[bytes | np.ndarray]) -> None:
        """Writes to the local disk and notes the upload; to the bucket at once where the disk can't take it."""
        try:
            self.local.write(self._note(key), b"")
            self.local.write_parts(key, parts)
        except StoreError as e:
            self.local.delete(self._note(key))
            log.warning("the local tier can't be written", extra={"key": key, "reason": str(e)})
            self._asking(lambda: self.remote.write_parts(key, parts))
            return
        if key.endswith(".kv"):
            self._count(key, b"".join(p if isinstance(p, bytes) else b"" for p in parts[:1]), parts)
            self._evict()
        self._enqueue(key)

    def delete(self, key: str) -> None:
        self.local.delete(self._note(key))
        self.local.delete(key)
        self.usage.remove(key)
        self._asking(lambda: self.remote.delete(key))

    def forget(self, key: str) -> None:
        """Removes a local copy, which may be damaged, unless the bucket doesn't have it yet."""
        if not self._noted(key):
            self.local.delete(key)
            self.usage.remove(key)

    def pending(self) -> builtins.list[str]:
        """Keys that the bucket doesn't have yet."""
        return [unquote(note.partition("/")[2]) for note in self.local.list("uploads/")]

    def flush(self, timeout: float = 600.0) -> None:
        """Waits for the uploads; raises StoreError when some are left, which a later process goes on with."""
        deadline = time.monotonic() + timeout
        while left := self.pending():
            if time.monotonic() > deadline:
                raise StoreError(
                    f"{len(left)} objects haven't reached {self.url} after {timeout:.0f} s; they are safe in "
                    f"{self.local.url}, and the next process that opens the store with this local tier goes on."
                )
            for key in left[:_QUEUE]:
                self._enqueue(key)
            time.sleep(0.02)

    def unfinished(self, prefix: str) -> builtins.list[str]:
        return self.local.unfinished(prefix)

    def delete_unfinished(self, key: str, grace: float) -> bool:
        return self.local.delete_unfinished(key, grace)

    # ------------------------------------------------------------ uploads

    def _enqueue(self, key: str) -> None:
        with self._lock:
            if key in self._queued:
                return
            try:
                self._queue.put_nowait(key)
            except queue.Full:
                return  # its note is on the disk: a thread that runs out of work looks there
            self._queued.add(key)
        self._wake()

    def _wake(self) -> None:
        with self._lock:
            while len(self._threads) < _UPLOADERS:
                thread = threading.Thread(target=self._upload_all, name="chunk-uploader", daemon=True)
                self._threads.append(thread)
                thread.start()

    def _upload_all(self) -> None:
        while not self._stopping:
            if time.monotonic() < self._resting_until:
                time.sleep(0.1)
                continue
            try:
                key = self._queue.get(timeout=0.2)
            except queue.Empty:
                for key in self.pending()[:_QUEUE]:
                    self._enqueue(key)
                continue
            try:
                self._upload(key)
            except StoreError as e:
                self.on("upload_failures", "bucket", 1)
                log.warning("an upload failed", extra={"key": key, "reason": str(e)})
            finally:
                with self._lock:
                    self._queued.discard(key)

    def stop(self, seconds: float = 5.0) -> None:
        """Ends the uploading threads; what they haven't brought to the bucket stays noted."""
        self._stopping = True
        for thread in self._threads:
            thread.join(seconds)

    def _upload(self, key: str) -> None:
        if not self._noted(key):
            return
        if (data := self.local.read(key)) is not None:
            self._asking(lambda: self.remote.write_parts(key, [data]))
            self.on("uploads", "bucket", 1)
        if data == self.local.read(key):  # a record may have been replaced meanwhile
            self.local.delete(self._note(key))

    @staticmethod
    def _note(key: str) -> str:
        return f"uploads/{quote(key, safe='')}"

    def _noted(self, key: str) -> bool:
        return self.local.read(self._note(key)) is not None

    # ------------------------------------------------------------ the bucket's health

    def _rested(self) -> None:
        if (left := self._resting_until - time.monotonic()) > 0:
            raise StoreError(f"UNAVAILABLE: {self.url} didn't answer, and is tried again in {left:.0f} s.")

    def _asking[T](self, ask: Callable[[], T]) -> T:
        """Asks the bucket for something, unless it failed a moment ago."""
        self._rested()
        try:
            return ask()
        except StoreError:
            self.failed()
            raise

    def failed(self) -> None:
        self._resting_until = time.monotonic() + _REST

    # ------------------------------------------------------------ the local disk's size

    def _evict(self) -> None:
        if (excess := self.usage.size() - self.limit) <= 0:
            return
        waiting, protected = set(self.pending()), set[str]()
        with suppress(StoreError):
            protected = self.protected()
        for key in self.usage.victims(excess, lambda key, text: key in waiting or text in protected):
            self.local.delete(key)  # who is reading it has it open
            self.usage.remove(key)
            self.on("evictions", "disk", 1)

    def _count(self, key: str, head: bytes, parts: Sequence | None = None) -> None:
        try:
            entry = unpack(head[:PRELUDE])
        except ValueError:
            return
        layers, _, heads, tokens, dim = entry.shape
        size = sum(len(p) if isinstance(p, bytes) else p.nbytes for p in parts) if parts else len(head)
        # Making it again takes a forward pass: tokens * layers * width^2, up to a factor.
        self.usage.add([(key, size, float(tokens * layers * (heads * dim) ** 2), entry.text)])

    def _adopt(self) -> None:
        """Counts what a lost usage file or a killed process left uncounted."""
        known = self.usage.keys()
        there = {key for key in self.local.list("kv/") if layout.CHUNK.fullmatch(key)}
        for key in known - there:
            self.usage.remove(key)
        for key in there - known:
            source = self.local.source(key, 0, None)
            head = (next(self.local.read_all([key], PRELUDE))[1] or b"") if isinstance(source, FileSource) else b""
            self._count(key, head, [bytes(0), np.empty(source.size, np.uint8)])  # type: ignore[union-attr]

    def _keep(self, key: str, parts: Sequence[bytes | np.ndarray]) -> bool:
        """Writes a local copy; a disk that can't take it is no reason to fail."""
        try:
            self.local.write_parts(key, parts)
        except StoreError as e:
            log.warning("no local copy was made", extra={"key": key, "reason": str(e)})
            return False
        return True

    @staticmethod
    def _mutable(key: str) -> bool:
        return key.startswith(("documents/", "pins/", layout.MARKER))


@atexit.register
def _stop_all() -> None:
    """Threads that are inside TensorStore when the interpreter ends would abort the process."""
    for tier in list(_RUNNING):
        tier.stop()


class FetchedSource:
    """A chunk cache that is read from the bucket as a whole; once there it is kept on the local disk."""

    def __init__(self, tier: TieredBlobs, key: str):
        self._tier, self._key, self._lock = tier, key, threading.Lock()
        self._future = tier.remote.start(key)
        self._data: bytes | None = None

    def read_into(self, offset: int, view: np.ndarray) -> None:
        with self._lock:
            if self._data is None:
                try:
                    self._data = self._tier.remote.finish(self._key, self._future)
                except StoreError:
                    self._tier.failed()
                    raise
                if self._data is None:
                    raise FileNotFoundError(f"{self._key} isn't there")
                self._tier.fetched(self._key, self._data)
        part = np.frombuffer(self._data, np.uint8)[offset:][: view.nbytes]
        if part.nbytes != view.nbytes:
            raise EOFError(f"it ends at byte {offset + part.nbytes}")
        view[...] = part

    def release(self) -> None:
        """Nothing: the bytes go with the last reference."""
