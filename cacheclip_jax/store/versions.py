"""Which passages a document's current version has: one small record per document, replaced in one atomic write.

A passage whose document has a record that doesn't name it belongs to an older version: it can still be read by its
id, by an answer under way, but it isn't listed any more, and `gc` removes it. A passage of a document without a record
was added by itself and is always listed.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING

from cacheclip_jax.store import layout
from cacheclip_jax.store.records import Passage, Version

if TYPE_CHECKING:
    from cacheclip_jax.store.store import ChunkStore


def publish(store: ChunkStore, passages: Iterable[Passage], *, replace: Collection[str] = ()) -> None:
    """Lists passages whose chunk caches are written, document by document.

    Those of a document in `replace` become its current version: readers see the old version or the new one, never a
    mixture. Those of any other document are added to what it has.
    """
    own: dict[str, list[str]] = {}
    for passage in passages:
        own.setdefault(passage.document, []).append(passage.id)
    for document, ids in own.items():
        if document in replace and document:
            _replace(store, document, ids)
        elif found := _current(store, document):
            _replace(store, document, [*found.passages, *ids])


def withdraw(store: ChunkStore, document: str) -> int:
    """Takes a document out of the store, atomically, then removes its passages; returns how many chunk caches went.

    Its record stays, with no passages, so that a withdrawal that is interrupted is still one.
    """
    every = store.read_passages(store.passage_ids(all=True))
    own = [id for id, passage in every if isinstance(passage, Passage) and passage.document == document]
    if own or document in versions(store):
        _replace(store, document, ())
    return store.remove(*own) if own else 0


def versions(store: ChunkStore) -> dict[str, Version]:
    """The records of all documents that have one, by name; damaged ones are left out."""
    return {version.document: version for _, version in read(store) if isinstance(version, Version)}


def read(store: ChunkStore) -> Iterator[tuple[str, Version | ValueError]]:
    """Every document's record by file, or what is wrong with it."""
    for file, data in store.blobs.read_all(f for f in store.blobs.list("documents/") if layout.DOCUMENT.fullmatch(f)):
        if data is None:
            continue
        try:
            version = Version.from_json(data)
            if layout.document_file(version.document) != file:
                raise ValueError(f"it is the record of {version.document!r}")
            yield file, version
        except ValueError as e:
            yield file, e


def outdated(store: ChunkStore, ids: Iterable[str]) -> dict[str, float]:
    """Those of some passages that belong to an older version, and since when."""
    known = versions(store)
    if not known:
        return {}
    current = {id for version in known.values() for id in version.passages}
    loose = [id for id in ids if id not in current]
    for id, passage in store.read_passages(id for id in loose if id not in store.document_of):
        if isinstance(passage, Passage):
            store.document_of[id] = passage.document
    found = ((id, known.get(store.document_of.get(id, ""))) for id in loose)
    return {id: version.created for id, version in found if version}


def forget(store: ChunkStore, ids: set[str]) -> None:
    """Takes passages that are being removed out of their documents' records."""
    for version in versions(store).values():
        if ids.intersection(version.passages):
            _replace(store, version.document, (id for id in version.passages if id not in ids))


def _replace(store: ChunkStore, document: str, ids: Iterable[str]) -> None:
    wanted, found = tuple(dict.fromkeys(ids)), _current(store, document)
    if found is None or found.passages != wanted:
        store.blobs.write(layout.document_file(document), Version(document, wanted, time.time()).to_json())


def _current(store: ChunkStore, document: str) -> Version | None:
    try:
        return Version.from_json(store.blobs.read(layout.document_file(document)) or b"")
    except ValueError:
        return None
