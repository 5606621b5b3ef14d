"""Indexing: every chunk cache is its own passage's, whole or not there, and what fails in the background is raised."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest

from cacheclip_jax import index
from cacheclip_jax.caches import ChunkCaches
from cacheclip_jax.documents import Document
from cacheclip_jax.encode import ahead
from cacheclip_jax.errors import BadInput, StoreError
from cacheclip_jax.store import ChunkStore, Passage, files
from tests.conftest import max_diff
from tests.engine import TEXTS, engine, fresh, models

PASSAGES = [Passage.make(" ".join(TEXTS[: 1 + n % 6]) + f" Page {n}.") for n in range(40)]  # of several widths


def test_every_passage_gets_its_own_cache_whatever_it_is_encoded_and_written_with(fresh):
    report = fresh.index(PASSAGES)
    assert (report.encoded, report.found) == (2 * len(PASSAGES), 0)
    for caches in (fresh.primary, fresh.aux):
        for passage in PASSAGES:
            pending = fresh.store.read(caches.space("shared"), caches.encoded(passage).ids, passage.id)
            (_, alone), = caches.encode([passage], "shared")
            assert max_diff(pending.result(), alone) < 1e-5
    sizes = [len(c.encoded(p).ids) * c.model.config.kv_values_per_token * 4 for p in PASSAGES
             for c in (fresh.primary, fresh.aux)]
    assert report.bytes == sum(sizes)


@pytest.mark.parametrize("nth", [1, 30, 2 * len(PASSAGES)])
def test_a_write_that_fails_is_raised_and_nothing_is_published_or_left_half_written(fresh, models, tmp_path,
                                                                                    monkeypatch, nth):
    write, large = files._write_all, iter(range(1, 1 << 30))

    def full_at_nth(fd, part):
        if isinstance(part, np.ndarray) and next(large) == nth:
            os.write(fd, part.reshape(-1).view(np.uint8)[: part.nbytes // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(fd, part)

    monkeypatch.setattr(files, "_write_all", full_at_nth)
    documents = [Document(p.text, f"{n}.txt") for n, p in enumerate(PASSAGES)]
    with pytest.raises(StoreError, match="No space left"):
        fresh.index(documents, replace=True)
    monkeypatch.undo()
    again = whole(fresh, models, tmp_path)
    assert not again.store.versions()
    report = again.index(documents, replace=True)
    assert report.encoded >= 1 and report.encoded + report.found == 2 * len(PASSAGES)
    assert len(again.store.versions()) == len(documents)


@pytest.mark.parametrize("nth", [1, 30])
def test_an_interrupted_index_leaves_whole_chunk_caches_and_resumes(fresh, models, tmp_path, nth):
    told = iter(range(1, 1 << 30))

    def stop(kind: str, n: int) -> None:
        if kind == "tokens" and next(told) == nth:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fresh.index(PASSAGES, progress=stop)
    again = whole(fresh, models, tmp_path)
    report = again.index(PASSAGES)
    assert (report.encoded, report.found) == (2 * len(PASSAGES) - nth, nth)
    assert not again.store.verify()


def test_a_window_begins_before_the_last_one_is_published_and_what_both_have_is_encoded_once(fresh, monkeypatch):
    monkeypatch.setattr(index, "WINDOW", 8)
    begun, published, start, publish = [], [], ChunkCaches.start, fresh.store.publish

    def starts(caches, passages, behind):
        begun.extend(p.id for p in passages)
        return start(caches, passages, behind)

    def publishes(passages, replace):
        published.append((tuple(p.id for p in passages), set(begun)))
        for caches in (fresh.primary, fresh.aux):
            assert all(fresh.store.has(caches.space("shared"), caches.encoded(p).ids) for p in passages)
        publish(passages, replace=replace)

    monkeypatch.setattr(ChunkCaches, "start", starts)
    monkeypatch.setattr(fresh.store, "publish", publishes)
    report = fresh.index([*PASSAGES[:16], *PASSAGES[8:24], *PASSAGES[:3]])
    assert (report.encoded, report.found) == (2 * 24, 2 * 11)
    ids = [p.id for p in (*PASSAGES[:16], *PASSAGES[8:24], *PASSAGES[:3])]
    windows = [tuple(ids[i : i + 8]) for i in range(0, len(ids), 8)]
    assert [passages for passages, _ in published] == windows and report.passages == tuple(ids)
    assert set(windows[0]) < published[0][1] <= {*windows[0], *windows[1]}


def test_what_comes_before_a_document_that_cannot_be_read_is_published(fresh, monkeypatch):
    monkeypatch.setattr(index, "WINDOW", 8)

    def documents():
        yield from (Document(p.text, f"{n}.txt") for n, p in enumerate(PASSAGES[:20]))
        raise BadInput("20.txt isn't text")

    with pytest.raises(BadInput, match="20.txt"):
        fresh.index(documents(), replace=True)
    assert len(fresh.store.versions()) == 16
    assert fresh.index(PASSAGES[:16]).encoded == 0


def test_the_next_batch_is_started_before_the_last_is_handed_out():
    seen: list[str] = []

    def started():
        for n in range(3):
            seen.append(f"start {n}")
            yield n

    for n in ahead(started()):
        seen.append(f"use {n}")
    assert seen == ["start 0", "start 1", "use 0", "start 2", "use 1", "use 2"]


def whole(clip, models, tmp_path):
    """The engine over the same store, opened again when the writes under way have ended; what it holds is whole."""
    clip.store._pool.shutdown()
    again = engine(models, ChunkStore.open(tmp_path / "store"))
    assert not again.store.verify() and not again.store.blobs.unfinished("kv/")
    return again
