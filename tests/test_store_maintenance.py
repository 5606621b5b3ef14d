"""The chunk store: stats, verify, removal, garbage collection."""

import fcntl
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cacheclip_jax.errors import BadInput
from cacheclip_jax.store import ChunkStore, Passage
from tests.chunks import SPACE, chunk, put, same_bits


def test_stats_count_what_was_written(store):
    other = replace(SPACE, model="beef", model_name="aux", head_dim=4)
    for seed in range(3):
        put(store, seed)
    put(store, 0, other)
    store.add_passages([Passage.make("elsewhere", "doc 2")])
    stats = store.stats()
    assert (stats.passages, stats.documents, stats.chunks, stats.tokens) == (4, 2, 4, 64)
    by_name = {s.space.model_name: s for s in stats.spaces}
    assert by_name["tiny"].chunks == 3 and by_name["tiny"].bytes_per_token == 3 * 2 * 2 * 8 * 2
    assert stats.nbytes == sum(e.nbytes for e in store.entries()) == sum(s.nbytes for s in stats.spaces)


def test_verify_reports_its_progress_and_separates_the_harmless(store):
    put(store, 0)
    put(store, 1)
    store.blobs.delete(f"passages/{chunk(0)[0].id[:2]}/{chunk(0)[0].id}.json")
    (Path(store.url) / "passages/.tmp-1").write_bytes(b"?")
    seen = []
    problems = store.verify(lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert {p.kind for p in problems} == {"unfinished", "unowned"} and all(p.harmless for p in problems)


def test_removing_a_passage_keeps_the_chunk_cache_of_its_twin(store):
    passage, ids, spans, kv = chunk(0)
    twin, other = Passage.make(passage.text, "copy"), put(store, 1)
    store.add_passages([passage, twin])
    store.write(SPACE, passage.id, ids, spans, kv)
    assert store.remove(passage.id[:8]) == 0
    assert same_bits(store.read(SPACE, ids, twin.id).result(), kv)
    assert store.remove(twin.id) == 1
    assert not store.has(SPACE, ids) and store.verify() == []
    assert store.passages() == [other[0]] and store.has(SPACE, other[1])


def test_removing_reaches_every_space_and_several_passages_at_once(store):
    spaces = (SPACE, replace(SPACE, dtype="float32"))
    for space in spaces:
        for seed in range(3):
            put(store, seed, space)
    assert store.remove(chunk(0)[0].id, chunk(1)[0].id) == 4
    assert {e.passage for e in store.entries()} == {chunk(2)[0].id} and len(store.passages()) == 1
    with pytest.raises(BadInput, match="store ls"):
        store.remove(chunk(0)[0].id)


def test_gc_drops_the_oldest_first_and_keeps_every_text(store):
    for seed in range(5):
        put(store, seed)
    each = next(store.entries()).nbytes
    report = store.gc(max_bytes=2 * each + 1)
    assert (report.chunks, report.bytes_freed, report.bytes_left) == (3, 3 * each, 2 * each)
    assert [store.has(SPACE, chunk(seed)[1]) for seed in range(5)] == [False] * 3 + [True] * 2
    assert len(store.passages()) == 5 and store.verify() == []


def test_gc_spares_a_write_under_way_whatever_the_clock_says(store, tmp_path, monkeypatch):
    passage, ids, spans, kv = chunk(0)
    reports, real = [], os.fsync

    def collect(fd):
        real(fd)
        if not reports:
            for clock in (0.0, time.time(), 1e12):
                with monkeypatch.context() as patch:
                    patch.setattr(time, "time", lambda clock=clock: clock)
                    reports.append(ChunkStore.open(store.url).gc(1 << 40, grace=-1.0))

    store.write(SPACE, passage.id, ids[1:], spans[1:], kv[..., 1:, :])
    monkeypatch.setattr(os, "fsync", collect)
    store.write(SPACE, passage.id, ids, spans, kv)
    assert [r.orphans for r in reports] == [0, 0, 0]
    assert same_bits(store.read(SPACE, ids, passage.id).result(), kv)


def test_gc_between_a_files_creation_and_its_lock_costs_the_writer_nothing(store, monkeypatch):
    reports, real = [], fcntl.flock

    def lock(fd, how):
        if not reports and not how & fcntl.LOCK_NB:
            reports.append(ChunkStore.open(store.url).gc(1 << 40))
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", lock)
    passage, ids, kv = put(store, 0)
    assert [r.orphans for r in reports] == [1] and not store.blobs.unfinished("kv/")
    assert same_bits(store.read(SPACE, ids, passage.id).result(), kv) and store.verify() == []


def test_what_is_being_read_can_be_removed_and_is_still_read(store):
    passage, ids, kv = put(store, 0)
    lazy, eager = (store.read(SPACE, ids, passage.id, eager=eager) for eager in (False, True))
    assert store.gc(0).chunks == 1 and not store.has(SPACE, ids)
    assert same_bits(lazy.layer(1), kv[1]) and same_bits(lazy.result(), kv) and same_bits(eager.result(), kv)
