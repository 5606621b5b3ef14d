"""Documents -> passages -> chunk caches of every model, in the store."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from cacheclip_jax.caches import ChunkCaches
from cacheclip_jax.documents import Document, split
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
    """What `CacheClip.index` does; passages are split by the first model's tokens."""
    tell = progress or (lambda kind, n: None)
    started, documents, encoded, found, tokens, size = time.perf_counter(), 0, 0, 0, 0, 0
    ids: list[str] = []
    replaced: set[str] = set()
    for passages, count in _windows(items, models[0], chunk_tokens, overlap):
        documents += count
        ids += [p.id for p in passages]
        store.add_passages(passages)
        for caches in models:
            missing = caches.missing(passages)
            found += len({caches.encoded(p).ids for p in passages}) - len(missing)
            groups, writes = list(itertools.batched(missing, 32)), []
            random.shuffle(groups)  # who indexes the same documents beside us is elsewhere, and we find their work
            for number, group in enumerate(groups):
                still_missing = caches.missing(group) if number else group
                found += len(group) - len(still_missing)
                for passage, kv in caches.encode(still_missing, "shared"):
                    writes.append(caches.write(passage, "shared", kv))
                    encoded, tokens, size = encoded + 1, tokens + kv.shape[3], size + kv.nbytes
                    tell("tokens", kv.shape[3])
                    tell("bytes", kv.nbytes)
            for write in writes:
                write.result()
        names = {p.document for p in passages} - replaced if replace else set()
        store.publish(passages, replace=names)
        replaced |= names
        tell("documents", count)
    if not ids:
        raise BadInput("there is nothing to index: every document is empty")
    return IndexReport(documents, tuple(ids), encoded, found, tokens, size, time.perf_counter() - started)


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
