"""Reading chunk caches in steps: a block is served when it was checked, a whole chunk kept, a damaged one repaired."""

from __future__ import annotations

import gc
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from unittest.mock import Mock

import numpy as np
import pytest

from cacheclip_jax import CacheClip, ChunkStore, Passage, reading
from cacheclip_jax.caches import Fetched
from cacheclip_jax.clock import Clock
from cacheclip_jax.loader import BlockLoader
from cacheclip_jax.pages import HostPages, PageLayout
from cacheclip_jax.reading import Reading, start
from cacheclip_jax.store import PendingKV
from cacheclip_jax.tier import Tier
from tests.engine import TEXTS, as_on_a_gpu, models  # noqa: F401

PASSAGES = [Passage.make(text) for text in TEXTS]


class Sent:
    """A copier that gives the bytes that it sends, of each chunk."""

    def send(self, number, chunks):
        sent = [b"".join(page.layers.tobytes() for page in chunk.blocks[number]) for chunk in chunks]
        return lambda: sent

    def finish(self):
        pass

    computed = finish


@pytest.fixture
def caches(models, tmp_path, monkeypatch):  # noqa: F811
    """The primary's caches of PASSAGES, in a store on the disk, which travel in one piece as on a GPU."""
    as_on_a_gpu(monkeypatch, driver=True)
    CacheClip(*models, ChunkStore.open(tmp_path)).index(PASSAGES)
    caches = CacheClip(*models, ChunkStore.open(tmp_path)).primary
    caches.host = Tier(1 << 30)
    return caches


@pytest.fixture
def gate(monkeypatch):
    """Until it's set, only the first layer of chunks can be read."""
    gate, read = Event(), PendingKV.read_layers_into

    def gated(self, first, buffer):
        assert first == 0 or gate.wait(10)
        read(self, first, buffer)

    monkeypatch.setattr(PendingKV, "read_layers_into", gated)
    yield gate
    gate.set()


@pytest.fixture
def pool():
    """A thread to load in."""
    with ThreadPoolExecutor(1) as pool:
        yield pool


def stored(caches, passage):
    space = caches.space("shared")
    return caches.store.read(space, caches.encoded(passage).ids, passage.id).result()


def file_of(caches, passage):
    key, chunk = caches.key("shared", passage)
    (file,) = caches.store.blobs.directory.glob(f"kv/{key}/*/{chunk}.kv")
    return file


def load(caches, pool):
    """What a request hears of, and a loader of its chunks."""
    found, heard = caches.fetch(PASSAGES, "shared", Clock(pool)), Fetched()
    heard.absorb(found)
    assert heard.hits == len(PASSAGES)
    count = len(caches.pages.layout.blocks)
    return heard, BlockLoader(pool, Sent(), found.sources, count, count,
                              lambda i, e: caches.repair(PASSAGES, "shared", heard, i, e))


def until(condition):
    for _ in range(1000):
        gc.collect()
        if condition():
            return True
        time.sleep(0.01)
    return False


def test_the_first_block_is_served_while_later_ones_are_read_and_only_whole_chunks_are_kept(caches, pool, gate):
    expected = [stored(caches, p) for p in PASSAGES]
    _, loader = load(caches, pool)
    assert loader.take(0) == [kv[0].tobytes() for kv in expected]
    time.sleep(0.05)
    assert not loader._sent[1].is_set() and len(caches.host) == 0
    gate.set()
    for number in range(1, len(expected[0])):
        assert loader.take(number) == [kv[number].tobytes() for kv in expected]
    loader.stop()
    for passage, kv in zip(PASSAGES, expected, strict=True):
        assert caches.host.get(caches.key("shared", passage)).whole.tobytes() == kv.tobytes()


@pytest.mark.parametrize("place", [20, -1, None])
def test_a_chunk_found_damaged_after_its_first_block_was_sent_is_repaired_once(caches, pool, gate, place):
    expected, damaged = [stored(caches, p) for p in PASSAGES], PASSAGES[2]
    file = file_of(caches, damaged)
    data = bytearray(file.read_bytes())
    if place is None:  # cut: nothing but its first layer can be read
        del data[-expected[2][1:].nbytes:]
    else:
        data[place] ^= 1
    file.write_bytes(data)
    heard, loader = load(caches, pool)
    if place == 20:  # its description: nothing of it can be read
        gate.set()
    got = [loader.take(0)]
    assert bool(heard.repaired) == (place == 20)
    gate.set()
    got += [loader.take(number) for number in range(1, len(expected[0]))]
    loader.stop()
    assert got == [[kv[number].tobytes() for kv in expected] for number in range(len(got))]
    assert heard.repaired == [damaged.id] and heard.misses == 1 and len(heard.warnings) == 1
    assert caches.store.metrics.snapshot()["counts"]["damaged"] == {"disk": 2}  # by us, and before it is replaced
    assert caches.host.get(caches.key("shared", damaged)).whole.tobytes() == expected[2].tobytes()
    assert stored(caches, damaged).tobytes() == expected[2].tobytes()


def test_memory_is_used_again_when_nobody_reads_into_it_any_more(caches, pool, gate):
    _, loader = load(caches, pool)
    loader.take(0)
    loader.stop()
    del loader
    gc.collect()
    free = caches.pages._free
    assert not any(free.values())
    gate.set()
    assert until(lambda: len(caches.host) == len(PASSAGES))
    caches.host = None
    assert until(lambda: sum(map(len, free.values())) == len(PASSAGES))


def test_what_was_sent_is_held_by_nobody_but_the_tier(caches, pool):
    caches.host = None
    _, loader = load(caches, pool)
    for number in range(len(caches.pages.layout.blocks)):
        loader.take(number)
    given_back = until(lambda: sum(map(len, caches.pages._free.values())) == len(PASSAGES))
    loader.stop()
    assert given_back


class Pending:
    """A chunk cache that is nowhere; `seen` hears what is read of it."""

    def __init__(self, name, seen, in_file=True):
        self.name, self.seen, self.in_file = name, seen, in_file

    def read_layers_into(self, first, buffer):
        self.seen.append((self.name, first, len(buffer)))
        buffer[...] = first

    def read_scattered(self, layers):
        self.seen.append((self.name, 0, len(layers)))


@pytest.fixture
def host_pages(models):  # noqa: F811
    """Pages of a model of 7 blocks of 2 layers."""
    cfg, blocks = models[0].config, tuple(range(n, n + 2) for n in range(0, 14, 2))
    layout = PageLayout(blocks, 2 * cfg.num_kv_heads, cfg.head_dim, np.dtype("float32"))
    return HostPages(layout, models[0].params.embed.sharding)


def test_first_blocks_of_all_chunks_are_read_before_second_ones_and_small_ones_together(host_pages, monkeypatch):
    layout, kept = host_pages.layout, []
    token_bytes = layout.token_rows * layout.head_dim * 4
    monkeypatch.setattr(reading, "STEP_BYTES", 2 * 10 * token_bytes)  # a block of 10 tokens
    seen: list = []
    cases = [("a", 10, True, True), ("b", 4, True, True), ("c", 10, True, False), ("d", 10, False, True),
             ("e", 300, True, True)]
    readings = [Reading(Pending(name, seen, in_file), host_pages, tokens, whole, kept.append)
                for name, tokens, whole, in_file in cases]
    with ThreadPoolExecutor(1) as readers:
        start(readings[:4], readers)
        start(readings[4:], readers)  # another request, and fewer threads than either would have
        for one in readings:
            for block in range(len(layout.blocks)):
                chunk = one.wait(block)
                if one.steps[1:]:
                    assert chunk.whole[layout.blocks[block].start, 0] in [step.start for step in one.steps]
    assert seen == [("a", 0, 2), ("b", 0, 6), ("c", 0, 14), ("d", 0, 14), ("a", 2, 2), ("a", 4, 2), ("a", 6, 2),
                    ("b", 6, 6), ("a", 8, 2), ("a", 10, 2), ("a", 12, 2), ("b", 12, 2),
                    *[("e", first, 2) for first in range(0, 14, 2)]]
    assert len(kept) == len(readings)


@pytest.mark.parametrize("in_file, threads", [(True, 8), (False, reading.READERS)])
def test_few_threads_read_local_files_and_more_a_bucket(host_pages, in_file, threads):
    readings = [Reading(Pending(str(n), [], in_file), host_pages, 10, True, list.append) for n in range(40)]
    submitted = Mock()
    start(readings, submitted)
    assert submitted.submit.call_count == threads


def test_threads_that_read_one_chunk_share_its_memory(host_pages, monkeypatch):
    monkeypatch.setattr(reading, "STEP_BYTES", 1)
    with ThreadPoolExecutor(8) as readers:
        for _ in range(20):
            kept: list = []
            one = Reading(Pending("a", []), host_pages, 30, True, kept.append)
            start([one], readers)
            chunks = {id(one.wait(block)) for block in range(7)}
            assert chunks == {id(kept[0])} and len(kept) == 1
            np.testing.assert_array_equal(kept[0].whole[:, 0], np.repeat(np.arange(0, 14, 2), 2))


def test_what_goes_wrong_in_a_reading_thread_is_raised_by_whoever_waits(host_pages, monkeypatch):
    monkeypatch.setattr(host_pages, "empty", lambda tokens, whole: 1 / 0)
    one = Reading(Pending("a", []), host_pages, 30, True, list.append)
    with ThreadPoolExecutor(2) as readers:
        start([one], readers)
    for block in range(7):
        with pytest.raises(ZeroDivisionError):
            one.wait(block)
