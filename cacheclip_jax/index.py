"""Documents -> passages -> chunk caches of every model, in the store."""

from __future__ import annotations

import itertools
import operator
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from cacheclip_jax.caches import ChunkCaches
from cacheclip_jax.documents import Document, split
from cacheclip_jax.encode import Fetch, ahead
from cacheclip_jax.errors import BadInput
from cacheclip_jax.store import ChunkStore, Passage

WINDOW = 128  # passages that are published together, at least


@dataclass(frozen=True)
class IndexReport:
    """What `index` did: passages seen, chunk caches made and found, tokens encoded (both models), bytes, seconds."""

    documents: int
    passages: tuple[str, ...]
    encoded: int
    found: int
    tokens: int
    bytes: int
    seconds: float


def index_documents(store: ChunkStore, models: Sequence[ChunkCaches], items: Iterable[str | Document | Passage],
                    chunk_tokens: int, overlap: int, replace: bool, progress: Callable[[str, int], None] | None
                    ) -> IndexReport:
    """What `CacheClip.index` does; passages are split by the first model's tokens.

    This thread starts batches, see `start_batch`; the store's threads wait for each chunk cache and write it, and what
    fails there is raised here. Two batches are under way at a time, and the chunk caches that `ChunkStore.write_async`
    takes: memory for those is what indexing needs. A window's last caches are written while the next one's first are
    computed.
    """
    tell = progress or (lambda kind, n: None)
    started, documents, encoded, found, tokens, size = time.perf_counter(), 0, 0, 0, 0, 0
    ids: list[str] = []
    replaced: set[str] = set()

    unread: list[Exception] = []

    def windows() -> Iterator[_Window]:
        try:
            for passages, count in _windows(items, models[0], chunk_tokens, overlap):
                yield _Window(passages, count)
        except Exception as e:  # a document that can't be read: those before it are published first
            unread.append(e)

    for window, batches in itertools.groupby(ahead(_started(store, models, windows())), operator.itemgetter(0)):
        writes: deque[Future[bool]] = deque()
        made = 0
        for caches, passage, kv in itertools.chain.from_iterable(batch for _, batch in batches):
            writes.append(caches.write(passage, "shared", kv))
            while writes and writes[0].done():
                writes.popleft().result()
            length = len(caches.encoded(passage).ids)
            nbytes = length * caches.model.config.kv_values_per_token * caches.dtype.itemsize
            made, tokens, size = made + 1, tokens + length, size + nbytes
            tell("tokens", length)
            tell("bytes", nbytes)
        for write in writes:
            write.result()
        wanted = sum(len({caches.encoded(p).ids for p in window.passages}) for caches in models)
        documents, encoded, found = documents + window.documents, encoded + made, found + wanted - made
        ids += [p.id for p in window.passages]
        names = {p.document for p in window.passages} - replaced if replace else set()
        store.publish(window.passages, replace=names)
        replaced |= names
        tell("documents", window.documents)
    if unread:
        raise unread[0]
    if not ids:
        raise BadInput("there is nothing to index: every document is empty")
    return IndexReport(documents, tuple(ids), encoded, found, tokens, size, time.perf_counter() - started)


@dataclass(frozen=True, eq=False)
class _Window:
    """Passages of so many documents."""

    passages: list[Passage]
    documents: int


def _started(store: ChunkStore, models: Sequence[ChunkCaches], windows: Iterable[_Window]
             ) -> Iterator[tuple[_Window, list[tuple[ChunkCaches, Passage, Fetch]]]]:
    """Batches of what is missing, each started when it is asked for, in the order of the windows; an empty one first
    for each window."""
    begun: dict[ChunkCaches, set[tuple[int, ...]]] = {caches: set() for caches in models}
    for window in windows:
        store.add_passages(window.passages)
        yield window, []
        for caches in models:
            before, begun[caches] = begun[caches], set()  # the window before this one's may not be written yet
            wanted = [p for p in caches.missing(window.passages) if caches.encoded(p).ids not in before]
            missing = caches.batches(wanted)
            random.shuffle(missing)  # who indexes the same documents beside us is elsewhere, and we find their work
            for number, batch in enumerate(missing):
                for part in caches.batches(caches.missing(batch) if number else batch):
                    begun[caches] |= {caches.encoded(p).ids for p in part}
                    yield window, [(caches, passage, kv) for passage, kv in caches.start(part, "shared")]


def _windows(items: Iterable[str | Document | Passage], primary: ChunkCaches, chunk_tokens: int, overlap: int
             ) -> Iterator[tuple[list[Passage], int]]:
    """Passages of a few documents at a time: bounds memory, and each window is published before the next."""
    passages: list[Passage] = []
    count = 0
    for item in items:
        if isinstance(item, Passage):
            passages.append(item)
        else:
            document = Document(item) if isinstance(item, str) else item
            passages += split(document, primary.model.tokenizer, chunk_tokens, overlap)
        count += 1
        if len(passages) >= WINDOW:
            yield passages, count
            passages, count = [], 0
    if count:
        yield passages, count
