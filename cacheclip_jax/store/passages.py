"""Texts: the passages that chunk caches are made from. Methods of ChunkStore."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from cacheclip_jax.errors import BadInput, ChunkCorrupt
from cacheclip_jax.store import layout, versions
from cacheclip_jax.store.records import ID_DIGITS, Passage, is_chunk_id

if TYPE_CHECKING:
    from cacheclip_jax.store.store import ChunkStore

_LIST = "`cacheclip store ls` lists the ids."


def add_passages(store: ChunkStore, passages: Iterable[Passage]) -> None:
    """Writes the passages that aren't there yet, and again those whose file is damaged."""
    new = {layout.passage_file(p.id): p.to_json() for p in passages}
    store.blobs.write_all((file, new[file]) for file, old in store.blobs.read_all(new) if old != new[file])


def passage_ids(store: ChunkStore, prefix: str = "", *, all: bool = False) -> list[str]:
    """Ids that begin with `prefix`, without those of documents' older versions unless `all`."""
    files = store.blobs.list(layout.passage_stem(prefix))
    ids = [match[1] for match in map(layout.PASSAGE.fullmatch, files) if match]
    old = {} if all else versions.outdated(store, ids)
    return [id for id in ids if id not in old] if old else ids


def resolve(store: ChunkStore, prefix: str) -> str:
    """The one passage id that begins with `prefix`; raises BadInput when there is none or several."""
    if not is_chunk_id(prefix):
        raise BadInput(f"{prefix!r} is no passage id, which is {ID_DIGITS} digits of 0-9 and a-f: {_LIST}")
    found = store.passage_ids(prefix, all=True)
    if not found:
        raise BadInput(f"{store.url} has no passage {prefix}: {_LIST}")
    if len(found) > 1:
        raise BadInput(f"{prefix} begins {len(found)} ids ({', '.join(found[:3])}, ...): give more digits.")
    return found[0]


def passage(store: ChunkStore, id: str) -> Passage:
    """The passage with this id, or unique beginning of one; raises BadInput or ChunkCorrupt."""
    for _, passage in store.read_passages([store.resolve(id)]):
        if isinstance(passage, ChunkCorrupt):
            raise passage
        return passage
    raise BadInput(f"{store.url} has no passage {id} any more: {_LIST}")


def passages(store: ChunkStore) -> list[Passage]:
    """Every passage, by document and place in it; raises ChunkCorrupt."""
    found = []
    for _, passage in store.read_passages(store.passage_ids()):
        if isinstance(passage, ChunkCorrupt):
            raise passage
        found.append(passage)
    return sorted(found, key=lambda p: (p.document, p.start, p.end, p.id))


def read_passages(store: ChunkStore, ids: Iterable[str]) -> Iterator[tuple[str, Passage | ChunkCorrupt]]:
    """Passages by their full ids, or what is wrong with them; those that aren't there are left out."""
    files = {layout.passage_file(id): id for id in ids}
    for file, data in store.blobs.read_all(files):
        if data is None:
            continue
        id = files[file]
        try:
            passage = Passage.from_json(data)
            if passage.id != id:
                raise ValueError(f"it holds passage {passage.id}")
            yield id, passage
        except ValueError as e:
            what = f"Passage {id} is damaged ({store.blobs.where(file)}: {e})."
            way_out = f"Run `cacheclip store rm {id}` and index its document again."
            yield id, ChunkCorrupt(f"{what} {way_out}", chunk=id)
