"""Looking after a store: what is in it, whether it is whole, and making it smaller. Methods of ChunkStore."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from cacheclip_jax.errors import ChunkCorrupt
from cacheclip_jax.store import layout
from cacheclip_jax.store.blobs import FAILURES
from cacheclip_jax.store.records import Entry, Passage, Space

if TYPE_CHECKING:
    from cacheclip_jax.store.store import ChunkStore


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
class Problem:
    """What `verify` found. A harmless one costs space at most: reads don't depend on it.

    `passage` is known for damaged passages and data; `space` and `chunk` are what `drop` takes.
    """

    kind: Literal["passage", "space", "manifest", "data", "metadata", "orphan", "unowned"]
    file: str
    message: str
    passage: str = ""
    space: str = ""
    chunk: str = ""

    @property
    def harmless(self) -> bool:
        return self.kind in ("metadata", "orphan", "unowned")


@dataclass(frozen=True)
class GCReport:
    orphans: int
    chunks: int
    bytes_freed: int
    bytes_left: int


class _Key(NamedTuple):
    space: str
    chunk: str


def spaces(store: ChunkStore) -> dict[str, Space]:
    """The spaces that chunk caches were ever written for, by key; damaged records are left out."""
    return dict(_spaces(store, store.blobs.list("kv/")))


def _spaces(store: ChunkStore, files: list[str]) -> Iterator[tuple[str, Space]]:
    for file, data in store.blobs.read_all(file for file in files if layout.SPACE.fullmatch(file)):
        try:
            space = Space.from_json(data or b"")
        except ValueError:
            continue
        if layout.space_file(space.key) == file:
            yield space.key, space


def explain_miss(store: ChunkStore, space: Space, ignore: Collection[str] = ()) -> str | None:
    """How the store's nearest space differs from this one; None when it has this one, or none but those in `ignore`."""
    if store.blobs.read(layout.space_file(space.key)) is not None:
        return None
    known = {key: other for key, other in spaces(store).items() if key not in ignore}
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
    """The manifests of all committed chunk caches; damaged ones are left out."""
    for _, _, entry in _entries(store, store.blobs.list("kv/")):
        if isinstance(entry, Entry):
            yield entry


def _entries(store: ChunkStore, files: list[str]) -> Iterator[tuple[str, _Key, Entry | ValueError]]:
    keys = {file: _Key(*match.groups()) for file in files if (match := layout.MANIFEST.fullmatch(file))}
    for file, data in store.blobs.read_all(keys):
        if data is None:
            continue  # another process removed it since the listing
        try:
            entry = Entry.from_json(data)
            if (entry.space, entry.chunk) != keys[file]:
                raise ValueError(f"it is the manifest of {entry.space}/{entry.chunk}")
            yield file, keys[file], entry
        except ValueError as e:
            yield file, keys[file], e


def stats(store: ChunkStore) -> StoreStats:
    """Counts everything; reads every manifest and every passage."""
    passages = store.passages()
    chunks, tokens, size = Counter[str](), Counter[str](), Counter[str]()
    for entry in entries(store):
        chunks[entry.space] += 1
        tokens[entry.space] += entry.tokens
        size[entry.space] += entry.nbytes
    each = (SpaceStats(s, chunks[k], tokens[k], size[k]) for k, s in spaces(store).items() if k in chunks)
    return StoreStats(len(passages), len({p.document for p in passages}), tuple(each))


def verify(store: ChunkStore, progress: Callable[[int, int], None] | None = None) -> list[Problem]:
    """Reads every file of the store in full; `progress` hears how many are done, and of how many."""
    problems: list[Problem] = []
    files = store.blobs.list("kv/")
    passages = store.passage_ids()
    manifests = [file for file in files if layout.MANIFEST.fullmatch(file)]
    total = len(passages) + len(manifests)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total)

    for id, passage in store.read_passages(passages):
        if isinstance(passage, ChunkCorrupt):
            problems.append(Problem("passage", layout.passage_file(id), str(passage), passage=id))
        step()

    known = dict(_spaces(store, files))
    owners, committed = set(passages), set()
    for file, key, entry in _entries(store, files):
        committed.add(key)
        if isinstance(entry, ValueError):
            problems.append(Problem("manifest", file, f"The manifest is damaged: {entry}.", "", *key))
        elif key.space in known:
            problems += _check_chunk(store, known[key.space], entry, owners)
        step()
    used = {key.space for key in committed}
    for space in sorted(used - known.keys()):
        message = "What its chunk caches were made for is missing or damaged; the next index run writes it again."
        problems.append(Problem("space", layout.space_file(space), message, space=space))
    for key in sorted(_data(files) - committed):
        message = "Data of a write that didn't finish, or hasn't yet."
        problems.append(Problem("orphan", layout.chunk_folder(*key), message, "", *key))
    return problems


def _check_chunk(store: ChunkStore, space: Space, entry: Entry, owners: set[str]) -> Iterator[Problem]:
    key = _Key(entry.space, entry.chunk)
    try:
        Entry.parse(entry.to_json(), space, entry.ids)
    except ValueError as e:
        message = f"The manifest is damaged: {e}."
        yield Problem("manifest", layout.manifest_file(*key), message, entry.passage, *key)
        return
    try:
        store.array(space, entry.chunk, entry.tokens).read().result()
    except FAILURES as e:
        yield Problem("data", layout.chunk_folder(*key), f"The data is damaged: {e}", entry.passage, *key)
    if _zarr(store, key) != layout.metadata(space, entry.tokens):
        message = "The array's description is missing or damaged; only other zarr readers would notice."
        yield Problem("metadata", layout.metadata_file(*key), message, entry.passage, *key)
    if entry.passage not in owners:
        message = f"Its passage {entry.passage} isn't in the store."
        yield Problem("unowned", layout.manifest_file(*key), message, entry.passage, *key)


def remove(store: ChunkStore, *passage_ids: str) -> int:
    """Removes passages and their chunk caches; returns how many of these.

    A chunk cache whose text is that of another passage too stays, as that one's.
    """
    ids = {store.resolve(id) for id in passage_ids}
    # A damaged passage can be removed like any other, but nothing has its text.
    everyone = store.read_passages(store.passage_ids())
    texts: dict[str, str | None] = {id: p.text for id, p in everyone if isinstance(p, Passage)}
    heirs = {text: id for id, text in texts.items() if id not in ids}
    dropped = 0
    for entry in entries(store):
        if entry.passage not in ids:
            continue
        if heir := heirs.get(texts.get(entry.passage)):
            store.blobs.write(layout.manifest_file(entry.space, entry.chunk), entry.inherited(heir).to_json())
        else:
            store.drop(entry.space, entry.chunk)
            dropped += 1
    for id in ids:
        store.blobs.delete(layout.passage_file(id))
    return dropped


def gc(store: ChunkStore, max_bytes: int, grace: float = 3600.0) -> GCReport:
    """Removes what unfinished writes left, then the oldest chunk caches until the rest is within `max_bytes`.

    A write that began in the last `grace` seconds may be under way, so it is left alone. Passages stay: a
    chunk that is asked for later is encoded again.
    """
    files = store.blobs.list("kv/")
    kept = sorted((e.created, e.nbytes, key) for _, key, e in _entries(store, files) if isinstance(e, Entry))
    broken = {_Key(*m.groups()) for file in files if (m := layout.MANIFEST.fullmatch(file))} | _data(files)
    broken -= {key for _, _, key in kept}
    orphans = [key for key in broken if _began(store, key) < time.time() - grace]
    for key in orphans:
        store.drop(*key)
    size = sum(nbytes for _, nbytes, _ in kept)
    before, chunks = size, 0
    for _, nbytes, key in kept:
        if size <= max_bytes:
            break
        store.drop(*key)
        size -= nbytes
        chunks += 1
    return GCReport(len(orphans), chunks, before - size, size)


def _data(files: list[str]) -> set[_Key]:
    return {_Key(*match.groups()) for file in files if (match := layout.DATA.fullmatch(file))}


def _zarr(store: ChunkStore, key: _Key) -> dict | None:
    """The array's description without our attributes; None when it is missing or damaged."""
    try:
        zarr = json.loads(store.blobs.read(layout.metadata_file(*key)) or b"")
        return {name: value for name, value in zarr.items() if name != "attributes"}
    except (ValueError, AttributeError):
        return None


def _began(store: ChunkStore, key: _Key) -> float:
    """When the write of an array began. Data without a description was being removed."""
    try:
        return float(json.loads(store.blobs.read(layout.metadata_file(*key)) or b"")["attributes"]["created"])
    except (ValueError, KeyError, TypeError):
        return 0.0
