"""Whether a store is whole: every file read in full, every checksum checked. Methods of ChunkStore."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from cacheclip_jax.errors import BadInput, StoreError
from cacheclip_jax.store import layout, maintain, versions
from cacheclip_jax.store.chunkfile import PRELUDE, checksum, head_bytes, stored_layer_bytes, unpack, unpack_for
from cacheclip_jax.store.records import Entry, Passage, Space, text_id

if TYPE_CHECKING:
    from cacheclip_jax.store.store import ChunkStore

_AHEAD = 64


@dataclass(frozen=True)
class Problem:
    """What `verify` found. A harmless one costs space at most: reads don't depend on it.

    `passage` is known for damaged passages and data; `space` and `chunk` are what `drop` takes.
    """

    kind: Literal["passage", "document", "space", "data", "unfinished", "old", "unowned"]
    file: str
    message: str
    passage: str = ""
    space: str = ""
    chunk: str = ""

    @property
    def harmless(self) -> bool:
        return self.kind in ("unfinished", "old", "unowned")


def verify(
    store: ChunkStore,
    progress: Callable[[int, int], None] | None = None,
    *,
    workers: int = 2,
    resume: str | Path | None = None,
) -> list[Problem]:
    """Reads every file of the store in full, `workers` at a time; `progress` hears how many are done, and of how many.

    `resume` names a file that notes which chunk caches were found whole, so that a run that was interrupted goes on
    where it stopped; a run that completes removes it. Raises BadInput where it can't be written.
    """
    passages, files = store.passage_ids(all=True), store.pool.list("kv/")
    chunks = [file for file in files if layout.CHUNK.fullmatch(file)]
    total, done = len(passages) + len(chunks), 0
    problems: list[Problem] = []

    def step() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total)

    texts = set()
    for id, passage in store.read_passages(passages):
        if isinstance(passage, Passage):
            texts.add(text_id(passage.text))
        else:
            problems.append(Problem("passage", layout.passage_file(id), str(passage), passage=id))
        step()
    for file, version in versions.read(store):
        if isinstance(version, ValueError):
            message = f"A document's record is damaged ({version}): index the document again with --replace."
            problems.append(Problem("document", file, message))
    known = dict(maintain.known_spaces(store, files))
    with _Notes(resume) as notes, ThreadPoolExecutor(workers) as pool:
        left = [file for file in chunks if file not in notes.whole]
        for _ in range(len(chunks) - len(left)):
            step()
        for file, found in _ahead(pool, lambda file: _check(store, known, file, set(passages), texts), left):
            problems += found
            if not found:
                notes.add(file)
            step()
        notes.finish()
    for space in sorted({layout.CHUNK.fullmatch(file)[1] for file in chunks} - known.keys()):  # type: ignore[index]
        message = "What its chunk caches were made for is missing or damaged; the next index run writes it again."
        problems.append(Problem("space", layout.space_file(space), message, space=space))
    old = sorted({(m[1], m[2]) for m in map(layout.OLD.fullmatch, files) if m})
    message = "A chunk cache of an older version, encoded again when it is wanted; `store gc` removes this one."
    problems += [Problem("old", layout.chunk_file(*key), message, "", *key) for key in old]
    message = "A write that didn't finish, or hasn't yet; `store gc` removes the former."
    problems += [Problem("unfinished", file, message) for _, file in maintain.unfinished(store)]
    return problems


def _check(
    store: ChunkStore, known: dict[str, Space], file: str, owners: set[str], texts: set[str]
) -> list[Problem]:
    """What is wrong with one chunk cache."""
    match = layout.CHUNK.fullmatch(file)
    assert match
    passage = ""
    try:
        if (data := store.pool.read(file)) is None:
            return []  # removed since the listing
        passage = unpack(data[:PRELUDE]).passage
        entry = check_object(data, match[1], match[2], known.get(match[1]))
    except (ValueError, StoreError) as e:
        return [Problem("data", file, f"The chunk cache is damaged: {e}.", passage, *match.groups())]
    if passage in owners or entry.text in texts or store.pool is not store.blobs:
        return []
    message = f"Its passage {passage} isn't in the store."
    return [Problem("unowned", file, message, passage, *match.groups())]


def check_object(data: bytes, space_key: str, chunk: str, space: Space | None = None) -> Entry:
    """The entry of a chunk cache's object; raises ValueError unless every byte is as it was written, for this chunk."""
    shape = unpack(data[:PRELUDE]).shape
    head = head_bytes(shape[0], shape[3])
    entry = unpack(data[:head])
    if (entry.space, entry.chunk) != (space_key, chunk):
        raise ValueError(f"it is chunk cache {entry.space}/{entry.chunk}")
    if len(data) != head + entry.nbytes or entry.nbytes % shape[0]:
        raise ValueError(f"it has {len(data)} bytes, not {head + entry.nbytes}")
    each, stored = entry.nbytes // shape[0], np.frombuffer(data, np.uint8)[head:]
    for layer, crc in enumerate(entry.crcs):
        if checksum(stored[layer * each : (layer + 1) * each]) != crc:
            raise ValueError(f"layer {layer} fails its checksum")
    if space:
        unpack_for(data[:head], space, entry.ids)
        if each != stored_layer_bytes(space, entry.tokens):
            raise ValueError("its layers have another size than its space's")
    return entry


def _ahead(pool: ThreadPoolExecutor, check: Callable, files: list[str]) -> Iterator[tuple[str, list[Problem]]]:
    """Results in order, with a bounded number of checks under way."""
    futures = [(file, pool.submit(check, file)) for file in files[:_AHEAD]]
    for i in range(len(files)):
        file, future = futures[i]
        yield file, future.result()
        futures[i] = None  # type: ignore[call-overload]
        if i + _AHEAD < len(files):
            futures.append((files[i + _AHEAD], pool.submit(check, files[i + _AHEAD])))


class _Notes:
    """The chunk caches that an interrupted `verify` found whole, a line each."""

    def __init__(self, path: str | Path | None):
        self._path = Path(path) if path else None
        self.whole: set[str] = set()

    def __enter__(self) -> _Notes:
        self._file = None
        if self._path:
            try:
                self._file = self._path.open("a+")
            except OSError as e:
                what = f"{self._path} can't be written ({e.strerror})"
                raise BadInput(f"{what}: name another file to resume from.") from e
            self._file.seek(0)
            # The last line may be half of one.
            self.whole = {line[:-1] for line in self._file if line.endswith("\n")}
            self._file.write("\n")
        return self

    def add(self, file: str) -> None:
        if self._file:
            print(file, file=self._file, flush=True)

    def finish(self) -> None:
        if self._path:
            self._path.unlink()

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

