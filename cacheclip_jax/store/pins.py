"""Documents whose chunk caches stay where they are, whatever eviction needs."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from cacheclip_jax.store.records import Passage, seal, text_id, unseal

if TYPE_CHECKING:
    from cacheclip_jax.store.store import ChunkStore


def pin(store: ChunkStore, document: str) -> None:
    """Keeps a document's chunk caches from `gc` by size and from eviction off the local tier."""
    store.blobs.write(_file(document), seal({"document": document}))
    store.forget_pins()


def unpin(store: ChunkStore, document: str) -> None:
    store.blobs.delete(_file(document))
    store.forget_pins()


def pinned(store: ChunkStore) -> list[str]:
    """The pinned documents' names."""
    found = []
    for _, data in store.blobs.read_all(store.blobs.list("pins/")):
        try:
            found.append(str(unseal(data or b"")["document"]))
        except (ValueError, KeyError, json.JSONDecodeError):
            continue
    return sorted(found)


def pinned_texts(store: ChunkStore) -> set[str]:
    """Hashes of the texts of pinned documents' passages: what their chunk caches are known by."""
    documents = set(pinned(store))
    passages = store.read_passages(store.passage_ids() if documents else [])
    return {text_id(p.text) for _, p in passages if isinstance(p, Passage) and p.document in documents}


def _file(document: str) -> str:
    return f"pins/{hashlib.sha256(document.encode('utf-8', 'surrogatepass')).hexdigest()[:32]}.json"
