"""Documents -> passages -> chunk caches of every model, in the store."""

from __future__ import annotations

import itertools
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
    takes: memory for those is what indexing needs.
    """
    tell = progress or (lambda kind, n: None)
    started, documents, encoded, found, tokens, size = time.perf_counter(), 0, 0, 0, 0, 0
    ids: list[str] = []
    replaced: set[str] = set()
    for passages, count in _windows(items, models[0], chunk_tokens, overlap):
        documents += count
        ids += [p.id for p in passages]
        store.add_passages(passages)
        wanted, made = sum(len({caches.encoded(p).ids for p in passages}) for caches in models), 0
        writes: deque[Future[bool]] = deque()
        for caches, passage, kv in itertools.chain.from_iterable(ahead(_started(models, passages))):
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
        encoded, found = encoded + made, found + wanted - made
        names = {p.document for p in passages} - replaced if replace else set()
        store.publish(passages, replace=names)
        replaced |= names
        tell("documents", count)
    if not ids:
        raise BadInput("there is nothing to index: every document is empty")
    return IndexReport(documents, tuple(ids), encoded, found, tokens, size, time.perf_counter() - started)


def _started(models: Sequence[ChunkCaches], passages: Sequence[Passage]
             ) -> Iterator[list[tuple[ChunkCaches, Passage, Fetch]]]:
    """Batches of what is missing, each started when it is asked for."""
    for caches in models:
        missing = caches.batches(caches.missing(passages))
        random.shuffle(missing)  # who indexes the same documents beside us is elsewhere, and we find their work
        for number, batch in enumerate(missing):
            for part in caches.batches(caches.missing(batch) if number else batch):
                yield [(caches, passage, kv) for passage, kv in caches.start(part, "shared")]


def _windows(items: Iterable[str | Document | Passage], primary: ChunkCaches, chunk_tokens: int, overlap: int
             ) -> Iterator[tuple[list[Passage], int]]:
    """Passages of a few documents at a time: bounds memory, and each window is committed before the next."""
    passages: list[Passage] = []
    count = 0
    for item in items:
        if isinstance(item, Passage):
            passages.append(item)
        else:
            document = Document(item) if isinstance(item, str) else item
            passages += split(document, primary.model.tokenizer, chunk_tokens, overlap)
        count += 1
        if len(passages) >= 128:
            yield passages, count
            passages, count = [], 0
    if count:
        yield passages, count
