"""The chunk store: passages and chunk caches, written once and read many times."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import BoundedSemaphore
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from cacheclip_jax.errors import BadInput, ChunkCorrupt, ChunkUnreadable, StoreError
from cacheclip_jax.store import archive, audit, layout, maintain, passages, pins, versions
from cacheclip_jax.store.blobs import Blobs, translated
from cacheclip_jax.store.chunkfile import head_bytes, pack, stored_layer_bytes, unpack_for
from cacheclip_jax.store.metrics import Metrics
from cacheclip_jax.store.pending import PendingKV
from cacheclip_jax.store.quantize import KINDS, Kind
from cacheclip_jax.store.records import LAYOUT_VERSION, Entry, Passage, Space, is_chunk_id, text_id
from cacheclip_jax.store.tier import TieredBlobs

if TYPE_CHECKING:
    import jax

log = logging.getLogger("cacheclip.store")

WRITERS = 4
READERS = min(16, max(4, os.cpu_count() or 1))
_NAMESPACE = re.compile(r"[a-z][a-z0-9_-]{0,62}")


class ChunkStore:
    """Passages and chunk caches under one URL; safe to share between threads and processes.

    `blobs` holds passages and documents, `pool` the chunk caches: the same place, unless a namespace shares those.
    `kv` is how chunk caches that are written here keep their values (see Space); `metrics` counts what happens.
    """

    def __init__(
        self, blobs: Blobs | TieredBlobs, kv: Kind = "exact", pool: Blobs | TieredBlobs | None = None
    ):
        self.blobs = blobs
        self.pool = pool or blobs
        self.kv = kv
        self.metrics = Metrics()
        self.readers = ThreadPoolExecutor(READERS, thread_name_prefix="chunk-reader")
        self._pool = ThreadPoolExecutor(WRITERS, thread_name_prefix="chunk-writer")
        self._slots = BoundedSemaphore(2 * WRITERS)
        self._known_spaces: set[str] = set()
        self._pins: tuple[float, set[str]] | None = None
        for place in (self.blobs, self.pool):
            if isinstance(place, TieredBlobs):
                place.protected, place.on = self.pinned_texts, self.metrics.count
        self.document_of: dict[str, str] = {}  # of passages, which never change

    @classmethod
    def open(
        cls,
        url: str | Path,
        *,
        create: bool = True,
        kv: Kind = "exact",
        namespace: str = "",
        share: bool = False,
        local: str | Path | None = None,
        local_bytes: int = 50_000_000_000,
        direct: bool = True,
    ) -> ChunkStore:
        """Opens the store at a directory or a file://, memory://, s3:// or gs:// URL.

        A namespace has passages, documents and chunk caches of its own, and no way to those of others; it doesn't
        learn either, from a hit that comes sooner, what they have stored. With `share` its chunk caches are those of
        the default namespace, so that equal passages are encoded once. `local` names a directory that keeps copies
        of at most `local_bytes` of chunk caches of a bucket, and takes writes before them: `flush` waits until the
        bucket has those. `direct=False` leaves a local directory to
        TensorStore, like every other place.

        Raises BadInput for another kind of URL or a bad name, and StoreError for a place that can't be read or
        written, holds something else or has a newer layout. Chunk caches of an older layout are encoded again when
        they are next wanted.
        """
        if kv not in KINDS:
            raise BadInput(f"kv={kv!r} is unknown: chunk caches are stored as one of {', '.join(KINDS)}.")
        if namespace and not _NAMESPACE.fullmatch(namespace):
            raise BadInput(f"{namespace!r} can't be a namespace: take up to 63 of a-z, 0-9, '-', '_', a letter first.")
        blobs: Blobs | TieredBlobs = Blobs.open(url, direct=direct)
        if local is not None:
            if blobs.tier != "bucket" and blobs.tier != "memory":
                raise BadInput(f"{blobs.url} is local itself: a local tier goes before a bucket.")
            blobs = TieredBlobs(blobs, Blobs.open(local), local_bytes)  # type: ignore[arg-type]
        if blobs.directory and blobs.directory.exists() and not blobs.directory.is_dir():
            raise StoreError(f"{blobs.url} is a file: a chunk store is a directory, so name another --store.")
        marker = blobs.read(layout.MARKER)
        if marker is None and not create:
            raise StoreError(f"There is no chunk store at {blobs.url}: `cacheclip index` makes one.")
        # Where there is something, another process may have made the store by now: its marker comes before all else.
        if marker is None and (found := _content(blobs)) and (marker := blobs.read(layout.MARKER)) is None:
            raise StoreError(
                f"{blobs.url} holds {found!r} but no {layout.MARKER}, so it is no chunk store: "
                "name a new or an empty directory as --store."
            )
        if marker is None:
            blobs.write(layout.MARKER, _marker())
        elif _layout(blobs, marker) < LAYOUT_VERSION and create:
            with suppress(StoreError):  # a store that can't be written can still be read
                blobs.write(layout.MARKER, _marker())
        if not namespace:
            return cls(blobs, kv)
        return cls(blobs.below(layout.namespace_folder(namespace)), kv, blobs if share else None)

    @property
    def url(self) -> str:
        return self.blobs.url

    add_passages = passages.add_passages
    passage_ids = passages.passage_ids
    resolve = passages.resolve
    passage = passages.passage
    read_passages = passages.read_passages
    passages = passages.passages

    def has(self, space: Space, ids: Sequence[int]) -> bool:
        """Whether the chunk cache is committed; one whose head is damaged or can't be read isn't."""
        try:
            return self.entry(space, ids) is not None
        except StoreError:
            return False

    def entry(self, space: Space, ids: Sequence[int]) -> Entry | None:
        """What a chunk cache says of itself, None when there is none; raises ChunkCorrupt."""
        chunk = space.chunk_key(ids)
        file = layout.chunk_file(space.key, chunk)
        ((_, head),) = self.pool.read_all([file], first=head_bytes(space.num_layers, len(ids)))
        if head is None:
            return None
        try:
            return unpack_for(head, space, ids)
        except ValueError as e:
            raise ChunkCorrupt(f"The chunk cache {self.pool.where(file)} is damaged: {e}.", chunk=chunk) from e

    def write(
        self,
        space: Space,
        passage_id: str,
        ids: Sequence[int],
        spans: Sequence[tuple[int, int]],
        kv: Float[np.ndarray | jax.Array, "L 2 K C H"] | Callable[[], np.ndarray],
    ) -> bool:
        """Commits a chunk cache, K before RoPE at index 0 and V at 1; returns False if it was there already.

        A `kv` that is a function is called for the array, by `write_async` in the background.
        Raises BadInput for an array of another shape or dtype than the space's, or with values that aren't
        finite.
        """
        if self.has(space, ids):
            return False
        host = np.asarray(kv() if callable(kv) else kv)
        _check_kv(space, ids, spans, host)
        _check_finite(passage_id, host)
        entry = Entry(
            space=space.key,
            chunk=space.chunk_key(ids),
            passage=passage_id,
            text=self._text(passage_id),
            shape=space.shape(len(ids)),
            kv=space.kv,
            nbytes=space.num_layers * stored_layer_bytes(space, len(ids)),
            created=time.time(),
        )
        self._write_space(space)
        began = time.perf_counter()
        self.pool.write_parts(layout.chunk_file(space.key, entry.chunk), pack(space, entry, ids, spans, host))
        self.metrics.count("writes", self.pool.tier)
        self.metrics.count("bytes_written", self.pool.tier, entry.nbytes)
        self.metrics.time("write", self.pool.tier, time.perf_counter() - began)
        return True

    def _text(self, passage_id: str) -> str:
        """The hash of a passage's text; empty when the store doesn't have it."""
        found = dict(self.read_passages([passage_id] if is_chunk_id(passage_id) else []))
        passage = found.get(passage_id)
        return text_id(passage.text) if isinstance(passage, Passage) else ""

    def write_async(
        self,
        space: Space,
        passage_id: str,
        ids: Sequence[int],
        spans: Sequence[tuple[int, int]],
        kv: Float[np.ndarray | jax.Array, "L 2 K C H"] | Callable[[], np.ndarray],
    ) -> Future[bool]:
        """`write` in the background; blocks while several are under way, so that arrays don't pile up.

        An error shows only in the future's `result()`: wait for all of them before calling an index done.
        """
        self._slots.acquire()
        future = self._pool.submit(self.write, space, passage_id, ids, spans, kv)
        future.add_done_callback(lambda _: self._slots.release())
        return future

    def _write_space(self, space: Space) -> None:
        if space.key in self._known_spaces:
            return
        file = layout.space_file(space.key)
        try:
            known = Space.from_json(self.pool.read(file) or b"").key == space.key
        except ValueError:
            known = False
        if not known:
            self.pool.write(file, space.to_json())
        self._known_spaces.add(space.key)

    def read(
        self,
        space: Space,
        ids: Sequence[int],
        passage_id: str,
        out: Float[np.ndarray, "L 2 K C H"] | None = None,
        *,
        eager: bool = True,
    ) -> PendingKV | None:
        """Starts to read a chunk cache; None when there is none. What is damaged shows in the `result()`.

        `out` is where to: a buffer that was used before is filled faster than a new one. With `eager=False` nothing
        is read before `PendingKV` is asked, nor is the head of a local file checked.
        """
        return PendingKV(self, space, ids, passage_id, out, eager).unless_missing()

    def read_all(
        self, space: Space, chunks: Iterable[tuple[Sequence[int], str]], *, eager: bool = True
    ) -> list[PendingKV | None]:
        """`read` for (ids, passage id) pairs, in one round trip: what counts in a bucket."""
        pending = [PendingKV(self, space, ids, passage_id, None, eager) for ids, passage_id in chunks]
        return [one.unless_missing() for one in pending]

    def discard(self, space: Space, ids: Sequence[int]) -> None:
        """Removes a chunk cache if it is damaged, as before it is written again.

        One that is whole stays: another process may have repaired it meanwhile, or it couldn't be read for a while,
        or a local copy was damaged and the bucket's isn't.
        """
        if isinstance(self.pool, TieredBlobs):
            self.pool.forget(layout.chunk_file(space.key, space.chunk_key(ids)))
        try:
            if (pending := self.read(space, ids, "")) is not None:
                pending.result()
        except ChunkUnreadable:
            return
        except ChunkCorrupt:
            self.drop(space.key, space.chunk_key(ids))

    def drop(self, space: str, chunk: str) -> None:
        """Removes a chunk cache by its keys; who is reading it on a local disk can finish."""
        log.debug("a chunk cache is removed", extra={"space": space, "chunk": chunk})
        self.pool.delete(layout.chunk_file(space, chunk))

    def flush(self, timeout: float = 600.0) -> None:
        """Waits until a bucket behind a local tier has all that was written; raises StoreError when it hasn't."""
        for place in (self.blobs, self.pool):
            if isinstance(place, TieredBlobs):
                place.flush(timeout)

    def pinned_texts(self) -> set[str]:
        """What is pinned, by text; up to a minute old, because every eviction asks."""
        if self._pins is None or time.monotonic() - self._pins[0] > 60:
            self._pins = (time.monotonic(), pins.pinned_texts(self))
        return self._pins[1]

    def forget_pins(self) -> None:
        self._pins = None

    pin = pins.pin
    unpin = pins.unpin
    pinned = pins.pinned
    publish = versions.publish
    withdraw = versions.withdraw
    versions = versions.versions
    spaces = maintain.spaces
    explain_miss = maintain.explain_miss
    entries = maintain.entries
    stats = maintain.stats
    verify = audit.verify
    export_to = archive.export_to
    import_from = archive.import_from
    remove = maintain.remove
    gc = maintain.gc


def _marker() -> bytes:
    return json.dumps({"layout": LAYOUT_VERSION}).encode()


def _layout(blobs: Blobs | TieredBlobs, marker: bytes) -> int:
    """The store's layout; raises StoreError for one that this version doesn't know."""
    try:
        version = int(json.loads(marker)["layout"])
    except (ValueError, KeyError, TypeError) as e:
        way_out = f'If this is a chunk store, write {{"layout": {LAYOUT_VERSION}}} into it.'
        raise StoreError(f"{blobs.where(layout.MARKER)} is damaged. {way_out}") from e
    if version > LAYOUT_VERSION:
        raise StoreError(
            f"{blobs.url} has layout {version}, and this cacheclip-jax reads up to {LAYOUT_VERSION}: "
            "upgrade it, or name another --store."
        )
    return version


def _content(blobs: Blobs | TieredBlobs) -> str | None:
    """Something that is in a local directory, if anything; a marker whose write was interrupted is our own."""
    if (root := blobs.directory) is None or not root.exists():
        return None
    with translated("open", blobs.url):
        return next((path.name for path in root.iterdir() if layout.MARKER not in path.name), None)


def _check_kv(space: Space, ids: Sequence, spans: Sequence, kv: np.ndarray | jax.Array) -> None:
    shape = space.shape(len(ids))
    if kv.shape != shape or kv.dtype != space.numpy_dtype:
        wanted = f"{space.dtype}{list(shape)}"
        raise BadInput(f"The chunk cache is {kv.dtype}{list(kv.shape)}; {len(ids)} tokens in its space are {wanted}.")
    if len(spans) != len(ids):
        raise BadInput(f"The chunk has {len(ids)} tokens but {len(spans)} spans: give one for every token.")


def _check_finite(passage_id: str, kv: np.ndarray) -> None:
    # Bit patterns, because isfinite is slow for bfloat16.
    bits = np.dtype(f"u{kv.dtype.itemsize}").type
    infinity = np.array(np.inf, kv.dtype).view(bits)
    for number, layer in enumerate(kv):
        if (layer.view(bits) & (np.iinfo(bits).max >> 1)).max() >= infinity:
            raise BadInput(
                f"The chunk cache of passage {passage_id} has values in layer {number} that aren't finite: "
                "check the model's weights, and prefer bfloat16 to float16."
            )
