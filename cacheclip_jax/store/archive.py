"""A store as one tar stream, and back: every member is checked before it is let in. Methods of ChunkStore."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING

from cacheclip_jax.errors import StoreError
from cacheclip_jax.store import layout
from cacheclip_jax.store.audit import check_object
from cacheclip_jax.store.records import LAYOUT_VERSION, Passage, Space, Version

if TYPE_CHECKING:
    from cacheclip_jax.store.store import ChunkStore

_BEGIN, _END = "cacheclip-export.json", "cacheclip-export-end.json"


@dataclass
class Transfer:
    """What went over; `damaged` names what didn't because it is damaged, `found` counts what was there already."""

    passages: int = 0
    documents: int = 0
    chunks: int = 0
    found: int = 0
    damaged: list[str] = field(default_factory=list)


def export_to(store: ChunkStore, out: IO[bytes], progress: Callable[[int, int], None] | None = None) -> Transfer:
    """Writes a tar stream of passages, spaces, chunk caches and, last, documents; what is damaged is left out."""
    done, files = Transfer(), list(_files(store))
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        _add(tar, _BEGIN, json.dumps({"layout": LAYOUT_VERSION}).encode())
        for number, (blobs, file) in enumerate(files, 1):
            data = blobs.read(file)
            if data is not None and _checked(file, data, done):
                _add(tar, file, data)
            if progress:
                progress(number, len(files))
        _add(tar, _END, json.dumps({"members": done.passages + done.documents + done.chunks}).encode())
    return done


def import_from(store: ChunkStore, source: IO[bytes], progress: Callable[[int, int], None] | None = None) -> Transfer:
    """Reads what `export_to` wrote; passages are added to documents that are there already.

    Raises StoreError for a stream that is something else, of a newer layout, or cut short: what came before that
    point is in the store and whole, and importing again finds it.
    """
    done, ended = Transfer(), False
    try:
        with tarfile.open(fileobj=source, mode="r|") as tar:
            for number, member in enumerate(tar):
                stream = tar.extractfile(member) if member.isreg() else None
                if stream is None:
                    raise StoreError(f"The stream holds {member.name!r}, which is no file: it is no store's export.")
                data = stream.read()
                if number == 0:
                    _check_begin(member.name, data)
                elif member.name == _END:
                    ended = True
                elif _checked(member.name, data, done):
                    _put(store, member.name, data, done)
                if progress:
                    progress(number, 0)
    except (tarfile.TarError, EOFError, OSError) as e:
        raise StoreError(f"The stream is no store's export, or is cut short: {e}.") from e
    if not ended:
        raise StoreError("The stream is cut short. What came is in the store: import the whole stream to complete it.")
    return done


def _files(store: ChunkStore) -> Iterator[tuple]:
    """Everything that an export holds, in an order in which each part can be used as soon as it is there."""
    yield from ((store.blobs, file) for file in store.blobs.list("passages/") if layout.PASSAGE.fullmatch(file))
    kv = store.pool.list("kv/")
    yield from ((store.pool, file) for file in kv if layout.SPACE.fullmatch(file))
    yield from ((store.pool, file) for file in kv if layout.CHUNK.fullmatch(file))
    yield from ((store.blobs, file) for file in store.blobs.list("documents/") if layout.DOCUMENT.fullmatch(file))


def _checked(file: str, data: bytes, done: Transfer) -> bool:
    """Counts a member; False, and noted as damaged, unless its bytes are what its name says."""
    try:
        if match := layout.PASSAGE.fullmatch(file):
            good = Passage.from_json(data).id == match[1] and file == layout.passage_file(match[1])
            done.passages += good
        elif layout.SPACE.fullmatch(file):
            good = layout.space_file(Space.from_json(data).key) == file
        elif match := layout.CHUNK.fullmatch(file):
            good = layout.chunk_file(*match.groups()) == file
            check_object(data, match[1], match[2])
            done.chunks += good
        elif layout.DOCUMENT.fullmatch(file):
            good = layout.document_file(Version.from_json(data).document) == file
            done.documents += good
        else:
            good = False
    except ValueError:
        good = False
    if not good:
        done.damaged.append(file)
    return good


def _put(store: ChunkStore, file: str, data: bytes, done: Transfer) -> None:
    if layout.DOCUMENT.fullmatch(file):
        version = Version.from_json(data)
        if theirs := store.versions().get(version.document):
            both = tuple(dict.fromkeys([*theirs.passages, *version.passages]))
            version = Version(version.document, both, version.created)
        store.blobs.write(file, version.to_json())
        return
    blobs = store.pool if file.startswith("kv/") else store.blobs
    if next(blobs.read_all([file], first=1))[1] is not None:
        done.found += 1
    else:
        blobs.write(file, data)


def _check_begin(name: str, data: bytes) -> None:
    try:
        version = int(json.loads(data)["layout"]) if name == _BEGIN else None
    except (ValueError, KeyError, TypeError):
        version = None
    if version is None:
        raise StoreError("The stream is no store's export: make one with `cacheclip store export`.")
    if version != LAYOUT_VERSION:
        raise StoreError(
            f"The export has layout {version}, and this cacheclip-jax imports {LAYOUT_VERSION}: "
            "export with the version that imports."
        )


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o600
    tar.addfile(info, io.BytesIO(data))
