"""Looking after a store: what is in it, and making it smaller. Methods of ChunkStore."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cacheclip_jax.errors import StoreError
from cacheclip_jax.store import layout, versions
from cacheclip_jax.store.blobs import Blobs
from cacheclip_jax.store.chunkfile import PRELUDE, head_bytes, unpack
from cacheclip_jax.store.pins import pinned_texts
from cacheclip_jax.store.records import Entry, Passage, Space, text_id
from cacheclip_jax.store.tier import TieredBlobs

if TYPE_CHECKING:
    from cacheclip_jax.store.store import ChunkStore


log = logging.getLogger("cacheclip.store")


@dataclass(frozen=True)
class SpaceStats:
    space: Space
    chunks: int
    tokens: int
    nbytes: int

    @property
    def bytes_per_token(self) -> float:
        return self.nbytes / max(1, self.tokens)


@dataclass(frozen=True)
class StoreStats:
    """`spaces` holds those with chunk caches; `nbytes` are those of K and V."""

    passages: int
    documents: int
    spaces: tuple[SpaceStats, ...]

    @property
    def chunks(self) -> int:
        return sum(s.chunks for s in self.spaces)

    @property
    def tokens(self) -> int:
        return sum(s.tokens for s in self.spaces)

    @property
    def nbytes(self) -> int:
        return sum(s.nbytes for s in self.spaces)


@dataclass(frozen=True)
class GCReport:
    orphans: int
    chunks: int
    bytes_freed: int
    bytes_left: int


def spaces(store: ChunkStore) -> dict[str, Space]:
    """The spaces that chunk caches were ever written for, by key; damaged records are left out."""
    return dict(known_spaces(store, store.pool.list("kv/")))


def known_spaces(store: ChunkStore, files: list[str]) -> Iterator[tuple[str, Space]]:
    for file, data in store.pool.read_all(file for file in files if layout.SPACE.fullmatch(file)):
        try:
            space = Space.from_json(data or b"")
        except ValueError:
            continue
        if layout.space_file(space.key) == file:
            yield space.key, space


def explain_miss(store: ChunkStore, space: Space, ignore: Collection[str] = ()) -> str | None:
    """How the store's nearest space differs from this one; None when it has this one, or none but those in `ignore`."""
    try:
        if store.pool.read(layout.space_file(space.key)) is not None:
            return None
        known = {key: other for key, other in spaces(store).items() if key not in ignore}
    except StoreError as e:
        return str(e)
    if not known:
        return None
    differences = min((_differences(space, other) for other in known.values()), key=len)
    return (
        f"{store.url} has no chunk caches for {space.model_name} in {space.dtype} behind this prefix; "
        f"its nearest ones differ in {' and '.join(differences)}."
    )


def _differences(space: Space, other: Space) -> list[str]:
    found = []
    if space.model != other.model:
        names = f"{other.model_name}, not {space.model_name}"
        prints = f"fingerprint {other.model}, not {space.model}"
        found.append(f"the model ({names if space.model_name != other.model_name else prints})")
    if space.dtype != other.dtype:
        found.append(f"the dtype ({other.dtype}, not {space.dtype})")
    if space.kv != other.kv:
        found.append(f"how values are stored ({other.kv}, not {space.kv})")
    if space.prefix_ids != other.prefix_ids:
        ours, theirs = space.prefix_ids, other.prefix_ids
        pairs = zip(ours, theirs, strict=False)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
        found.append(f"the prefix ({len(theirs)} tokens, not {len(ours)}, and different from token {first} on)")
    if space.shape(1) != other.shape(1):
        (l, _, k, _, h), (l2, _, k2, _, h2) = other.shape(1), space.shape(1)
        found.append(f"the shape ({l} layers, {k} KV heads of {h}, not {l2}, {k2} of {h2})")
    if space.layout != other.layout:
        found.append(f"the layout ({other.layout}, not {space.layout})")
    return found


def entries(store: ChunkStore) -> Iterator[Entry]:
    """All committed chunk caches; those with a damaged head are left out."""
    for _, entry in _entries(store, store.pool.list("kv/"), whole_head=True):
        if isinstance(entry, Entry):
            yield entry


def _entries(
    store: ChunkStore, files: list[str], whole_head: bool = False
) -> Iterator[tuple[str, Entry | ValueError]]:
    """Chunk caches by file, without their ids and spans unless `whole_head`; or what is wrong with a head."""
    keys = {file: match.groups() for file in files if (match := layout.CHUNK.fullmatch(file))}
    for file, data in store.pool.read_all(keys, first=PRELUDE):
        if data is None:
            continue  # another process removed it since the listing
        try:
            entry = unpack(data)
            if whole_head:
                ((_, data),) = store.pool.read_all([file], first=head_bytes(entry.shape[0], entry.tokens))
                if data is None:
                    continue
                entry = unpack(data)
            if (entry.space, entry.chunk) != keys[file]:
                raise ValueError(f"it is chunk cache {entry.space}/{entry.chunk}")
            yield file, entry
        except ValueError as e:
            yield file, e


def stats(store: ChunkStore) -> StoreStats:
    """Counts everything; reads the head of every chunk cache and every passage."""
    passages = store.passages()
    chunks, tokens, size = Counter[str](), Counter[str](), Counter[str]()
    files = store.pool.list("kv/")
    for _, entry in _entries(store, files):
        if isinstance(entry, Entry):
            chunks[entry.space] += 1
            tokens[entry.space] += entry.tokens
            size[entry.space] += entry.nbytes
    each = (SpaceStats(s, chunks[k], tokens[k], size[k]) for k, s in known_spaces(store, files) if k in chunks)
    return StoreStats(len(passages), len({p.document for p in passages}), tuple(each))


def unfinished(store: ChunkStore) -> Iterator[tuple[Blobs | TieredBlobs, str]]:
    """Files of writes that were interrupted or are under way."""
    for blobs, prefix in ((store.blobs, "passages/"), (store.blobs, "documents/"), (store.pool, "kv/")):
        yield from ((blobs, file) for file in blobs.unfinished(prefix))


def remove(store: ChunkStore, *passage_ids: str) -> int:
    """Removes passages and their chunk caches; returns how many of these.

    A chunk cache whose text is that of another passage too stays, for that one; so do all where namespaces share
    them, until `gc` needs the space.
    """
    ids = {store.resolve(id) for id in passage_ids}
    # A damaged passage can be removed like any other, but nothing has its text.
    everyone = store.read_passages(store.passage_ids(all=True))
    texts = {id: text_id(p.text) for id, p in everyone if isinstance(p, Passage)}
    kept = {text for id, text in texts.items() if id not in ids}
    gone = {texts[id] for id in ids if id in texts} - kept
    dropped = 0
    for _, entry in _entries(store, [] if store.pool is not store.blobs else store.pool.list("kv/")):
        if isinstance(entry, Entry) and entry.text not in kept and (entry.text in gone or entry.passage in ids):
            store.drop(entry.space, entry.chunk)
            dropped += 1
    versions.forget(store, ids)
    for id in ids:
        store.blobs.delete(layout.passage_file(id))
    return dropped


def gc(store: ChunkStore, max_bytes: int, grace: float = 3600.0) -> GCReport:
    """Removes what nobody can use, then the oldest chunk caches until the rest is within `max_bytes`.

    Unusable are chunk caches with a damaged head or of an older layout, and what killed writers left: a write under
    way holds a lock on its file, and where a file system has no locks it is spared for `grace` seconds. Passages of
    documents' older versions go `grace` seconds after they were replaced, with their chunk caches. All other
    passages stay: a chunk that is asked for later is encoded again.
    """
    outdated = versions.outdated(store, store.passage_ids(all=True))
    if past := [id for id, since in outdated.items() if abs(time.time() - since) > grace]:
        store.remove(*past)
    files = store.pool.list("kv/")
    found = list(_entries(store, files))
    broken = [file for file, entry in found if not isinstance(entry, Entry)]
    old = {match[2]: file for file in files if (match := layout.OLD.fullmatch(file))}
    for file in [*broken, *(file for file in files if layout.OLD.fullmatch(file))]:
        store.pool.delete(file)
    left = sum(blobs.delete_unfinished(file, grace) for blobs, file in unfinished(store))
    kept = sorted((e.created, e.nbytes, e.text, e.space, e.chunk) for _, e in found if isinstance(e, Entry))
    size = sum(nbytes for _, nbytes, *_ in kept)
    before, chunks = size, 0
    protected = pinned_texts(store) if size > max_bytes else set()
    for _, nbytes, text, space, chunk in kept:
        if size <= max_bytes:
            break
        if text in protected:
            continue
        store.drop(space, chunk)
        size -= nbytes
        chunks += 1
    report = GCReport(len(broken) + len(old) + left, chunks, before - size, size)
    log.info("gc", extra=vars(report))
    return report
