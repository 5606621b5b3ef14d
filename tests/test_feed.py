"""Feeds: the same assembled cache from the store, host memory and the device, in any order and size of request."""

from __future__ import annotations

import gc
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from threading import Event
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from cacheclip_jax import CacheClip, ChunkStore, Passage, copies, online, pages, request
from cacheclip_jax.caches import Fetched
from cacheclip_jax.clock import Clock
from cacheclip_jax.errors import StoreError
from cacheclip_jax.loader import BlockLoader, PageCopies, RowCopies
from cacheclip_jax.model.load import load_model
from cacheclip_jax.pages import HostPages, PageLayout
from cacheclip_jax.store_side import StoreSide
from cacheclip_jax.tier import Tier
from tests.conftest import TINY, max_diff, stacked
from tests.engine import QUESTION, TEXTS, CopyOnHost, as_on_a_gpu


@pytest.fixture(scope="module")
def models(pair):
    return tuple(load_model(path, dtype="float32") for path in pair)


@pytest.fixture(scope="module")
def store(models):
    opened = ChunkStore.open("memory://feed")
    CacheClip(*models, opened).index(map(Passage.make, TEXTS))
    return opened


@pytest.fixture(params=["cpu", "gpu", "cuda"])
def way(request, monkeypatch):
    """How caches travel: from pages that are used once, on a GPU again and again, with CUDA straight to their place."""
    if request.param == "cpu":
        monkeypatch.setattr(copies, "driver", lambda: False)
    else:
        as_on_a_gpu(monkeypatch, driver=request.param == "cuda")
    return request.param


def prefilled(clip, chunks, method="cacheclip"):
    done = clip.prefill(QUESTION, chunks, method=method)
    assert not done.fetched.misses and not done.fetched.warnings
    return done


REQUESTS = [TEXTS[:3], TEXTS[:3], TEXTS[2::-1], TEXTS[1:5], [TEXTS[0], TEXTS[0], TEXTS[5]], TEXTS, TEXTS[:1],
            TEXTS[::-1]]


@pytest.mark.parametrize("tokens", [0, 150, 300, 5000], ids=lambda n: f"tier-of-{n}")
@pytest.mark.parametrize("method", ["cacheclip", "prefix", "naive"])
def test_where_a_chunk_comes_from_never_changes_a_bit(models, store, tokens, method, way):
    plain = CacheClip(*models, store, host_bytes=0)
    size = sum(m.config.kv_values_per_token * 4 for m in models)
    tiered = CacheClip(*models, store, device_bytes=tokens * size, host_bytes=1200 * size)
    assert (plain.primary.buffers is not None) == (way == "cuda")
    for chunks in REQUESTS:
        expected, got = (prefilled(c, chunks, method) for c in (plain, tiered))
        assert max_diff(expected.logits, got.logits) == 0
        used = len(expected.prompt.ids)
        for a, b in zip(stacked(expected.cache), stacked(got.cache), strict=True):
            np.testing.assert_array_equal(a[:, :, :used], b[:, :, :used])
        assert got.fetched.hits == expected.fetched.hits


@pytest.mark.parametrize("method", ["prophetkv", "cacheblend", "fusionrag", "ape"])
def test_methods_that_read_caches_twice_or_in_part_get_the_same_from_everywhere(models, store, method, way):
    plain = CacheClip(*models, store, host_bytes=0)
    size = sum(m.config.kv_values_per_token * 4 for m in models)
    tiered = CacheClip(*models, store, device_bytes=300 * size, host_bytes=1200 * size)
    for chunks in REQUESTS[1:5]:
        expected, got = (c.prefill(QUESTION, chunks, method=method) for c in (plain, tiered))
        assert max_diff(expected.logits, got.logits) == 0
        np.testing.assert_array_equal(expected.plan.recompute, got.plan.recompute)


def test_what_lies_on_the_disk_travels_bit_for_bit_and_is_encoded_anew_where_damaged(models, store, tmp_path, way):
    pages_alone = CacheClip(*models, store, host_bytes=0)
    pages_alone.primary.buffers = pages_alone.aux.buffers = None
    expected = prefilled(pages_alone, TEXTS).logits
    clip = CacheClip(*models, ChunkStore.open(tmp_path), host_bytes=0)
    clip.index(map(Passage.make, TEXTS))
    assert max_diff(prefilled(clip, TEXTS).logits, expected) == 0
    caches, passage = clip.primary, Passage.make(TEXTS[2])
    space = caches.space("shared")
    (file,) = tmp_path.glob(f"kv/{space.key}/*/{space.chunk_key(caches.encoded(passage).ids)}.kv")
    for place in (20, 1100, -1):  # its description, its tokens, its last layer
        data = bytearray(file.read_bytes())
        data[place] ^= 1
        file.write_bytes(data)
        done = clip.prefill(QUESTION, TEXTS)
        assert done.fetched.repaired == [passage.id] and max_diff(done.logits, expected) == 0
        assert max_diff(prefilled(clip, TEXTS).logits, expected) == 0


def test_what_lies_on_the_device_is_read_from_nowhere_else(models, store, monkeypatch):
    clip = CacheClip(*models, store, host_bytes=0, device_bytes=1 << 24)
    first = prefilled(clip, TEXTS)

    def unreadable(*args, **kwargs):
        raise StoreError("nothing may be read")

    monkeypatch.setattr(clip.store, "read_all", unreadable)
    assert max_diff(prefilled(clip, TEXTS).logits, first.logits) == 0
    with pytest.raises(StoreError, match="nothing may be read"):
        prefilled(clip, [*TEXTS, "the dog sat on another mat"])


@pytest.mark.parametrize("method", ["cacheclip", "naive"])
def test_the_first_block_is_launched_in_smaller_programs_that_change_nothing(models, store, method, monkeypatch):
    expected = CacheClip(*models, store).prefill(QUESTION, TEXTS, method=method)
    monkeypatch.setattr(online, "SPAN", 1)
    launched, span = [], online.reuse_span
    monkeypatch.setattr(online, "reuse_span", lambda *args: launched.append(len(args[1])) or span(*args))
    got = CacheClip(*models, store).prefill(QUESTION, TEXTS, method=method)
    assert launched[:1] == [1]  # of a block of two
    assert max_diff(got.logits, expected.logits) < 1e-5
    for a, b in zip(stacked(got.cache), stacked(expected.cache), strict=True):
        assert max_diff(a, b) < 1e-5


def test_a_buffer_is_lent_to_one_request_at_a_time_and_few_sizes_are_kept(models):
    cfg, sharding = models[0].config, models[0].params.embed.sharding
    buffers = copies.RowBuffers(PageLayout.of(cfg, np.dtype("float32"), 1), sharding, CopyOnHost(None))
    first, second = buffers.borrow(8, 2), buffers.borrow(8, 2)
    assert len({b.unsafe_buffer_pointer() for b in (*first, *second)}) == 4
    buffers.give_back(first)
    again = buffers.borrow(8, 3)
    assert {id(b) for b in first} < {id(b) for b in again} and len(again) == 3
    for size in (16, 24, 8):
        buffers.give_back(buffers.borrow(size, 1))
    assert list(buffers._free) == [24, 8]


def test_a_block_is_copied_when_the_one_before_it_is_there_and_handed_out_when_it_is(models):
    log = []

    class Watched(CopyOnHost):
        def mark(self):
            name = f"copy {sum(line.startswith('copy') for line in log)}"
            log.append(name)
            return SimpleNamespace(reach=lambda: log.append(f"wait for {name}"))

        def wait(self):
            log.append("wait for all")

    layout = PageLayout.of(models[0].config, np.dtype("float32"), 1)
    copier = RowCopies(copies.RowBuffers(layout, models[0].params.embed.sharding, Watched(None)), 8, 3, [], [])
    arrived = [copier.send(number, []) for number in range(3)]
    assert log == ["wait for all", "copy 0", "wait for all", "copy 1", "wait for all", "copy 2"]
    buffers = [arrive() for arrive in arrived]
    assert log[6:] == [f"wait for copy {n}" for n in range(3)]
    assert len({b.unsafe_buffer_pointer() for b in buffers}) == 3


@pytest.mark.parametrize("whole", [False, True])
def test_memory_of_what_left_the_host_tier_is_used_again_and_never_while_somebody_holds_it(models, monkeypatch, whole):
    monkeypatch.setattr(pages, "platform_of", lambda sharding: "gpu")
    monkeypatch.setattr(pages, "PAGE_TOKENS", 8)
    cfg, rng = models[0].config, np.random.default_rng(0)
    layout = PageLayout.of(cfg, np.dtype("float32"), 1)
    made, tier = HostPages(layout, models[0].params.embed.sharding), Tier(12 * len(layout.blocks) * layout.nbytes(
        layout.blocks[0]))
    held: dict[int, tuple] = {}
    used, taken = set(), 0
    for n in range(60):
        kv = rng.standard_normal((cfg.num_layers, 2, cfg.num_kv_heads, int(rng.integers(1, 30)), cfg.head_dim),
                                 np.float32)
        chunk = made.filled(kv, whole)
        assert (chunk.whole is not None) == whole
        tier.put((str(n),), chunk, chunk.nbytes)
        used |= {page.layers.ctypes.data for page in chunk.blocks[0]}
        taken += len(chunk.blocks[0])
        if n % 7 == 0:
            held[n] = chunk, kv
        assert tier.nbytes <= tier.limit_bytes
        for one, expected in [*held.values(), (chunk, kv)]:
            np.testing.assert_array_equal(stored_layers(one, expected), expected.reshape(cfg.num_layers, -1))
        if len(held) > 3:
            held.pop(min(held))
        del chunk
    gc.collect()
    assert len(used) < taken / 2


def test_memory_that_chunks_of_other_lengths_left_is_let_go_where_it_is_much(models, monkeypatch):
    monkeypatch.setattr(pages, "platform_of", lambda sharding: "gpu")
    monkeypatch.setattr(pages, "PAGE_TOKENS", 8)
    made = HostPages(PageLayout.of(models[0].config, np.dtype("float32")), models[0].params.embed.sharding)
    one, limit = made.empty(8, whole=True).nbytes, 6
    monkeypatch.setattr(pages, "SPARE_BYTES", limit * one)
    for size in (1, 2, 3, 4):
        places = []
        for _ in range(2):
            held = [made.empty(8 * size, whole=True) for _ in range(10)]
            places.append({chunk.whole.ctypes.data for chunk in held})
            assert sum(page.layers.nbytes for free in made._free.values() for page in free) <= limit * one
            del held
            gc.collect()
        assert places[0] == places[1]


def stored_layers(chunk, like):
    rows = 2 * like.shape[2] * like.shape[3]
    return np.stack([np.concatenate(pieces).view(np.float32) for pieces in chunk.buffers(rows)])


def test_a_tier_keeps_its_bound_and_drops_the_least_recent():
    rng, tier, kept = np.random.default_rng(0), Tier(100), {}
    for n in range(200):
        size = int(rng.integers(1, 45))
        tier.put((str(n),), n, size)
        kept[n] = size
        if n % 3 == 0 and n > 1 and tier.get((str(n - 1),)) is not None:
            kept[n - 1] = kept.pop(n - 1)  # used again: it outlives one that was not
        while sum(kept.values()) > 100:
            del kept[next(iter(kept))]
        assert len(tier) == len(kept) and tier.nbytes == sum(kept.values())
    assert [tier.get((str(n),)) for n in kept] == list(kept)
    tier.put(("large",), -1, 101)
    tier.put((str(n),), -1, 1)
    assert tier.get(("large",)) is None and tier.get((str(n),)) == n


def test_what_was_read_lies_in_host_memory_for_the_next_request(models, store, monkeypatch):
    clip = CacheClip(*models, store)
    first = prefilled(clip, TEXTS)
    for _ in range(500):  # what was read is kept by a thread of its own
        if len(clip.primary.host) == 2 * len(TEXTS):
            break
        time.sleep(0.01)
    monkeypatch.setattr(clip.store, "read_all", None)
    assert max_diff(prefilled(clip, TEXTS).logits, first.logits) == 0


def test_pages_are_made_for_copies_worth_their_call(models):

    cfg = replace(TINY["qwen2"], num_layers=28, num_kv_heads=4, head_dim=128)
    layout = PageLayout.of(cfg, np.dtype(jnp.bfloat16))
    assert [len(block) for block in layout.blocks] == [4] * 7
    assert layout.nbytes(layout.blocks[0]) == 2 << 20 and layout.pages(257) == 2


class Sent:
    """A copier that only notes what it sends."""

    def __init__(self):
        self.blocks = []

    def send(self, number, chunks):
        self.blocks.append(number)
        return lambda: number

    def finish(self):
        pass

    computed = finish


@pytest.fixture
def loading():
    """A loader of three blocks; at the end its thread must have ended."""
    pool, sent = ThreadPoolExecutor(1), Sent()
    loader = BlockLoader(pool, sent, [], 3, 2, lambda index, error: None)
    yield loader, sent
    loader.stop()
    done = Event()
    pool.submit(done.set)
    assert done.wait(10)


def test_nothing_is_copied_before_a_release_or_the_first_take(loading):
    loader, sent = loading
    time.sleep(0.05)
    assert not sent.blocks
    loader.release()
    assert loader.take(0) == 0 and sent.blocks[0] == 0


def test_a_mark_is_reached_when_the_driver_says_so_and_what_it_refuses_is_named(monkeypatch):
    called, codes = [], {}

    class Driver:
        def __getattr__(self, name):
            return lambda *args: called.append(name) or codes.get(name, 0)

    monkeypatch.setattr(copies, "driver", lambda keep_lock=False: Driver())
    mark = copies.Stream(SimpleNamespace(local_hardware_id=0)).mark()
    assert called[-2:] == ["cuEventCreate", "cuEventRecord"]
    mark.reach()
    assert called[-2:] == ["cuCtxSetCurrent", "cuEventSynchronize"]
    codes["cuEventSynchronize"] = 700
    with pytest.raises(RuntimeError, match="says 700 to cuEventSynchronize"):
        mark.reach()
    del mark
    assert called[-1] == "cuEventDestroy_v2"


@pytest.mark.parametrize("copied", [False, True])
def test_what_follows_a_feed_is_done_when_its_last_copy_is_there(copied):
    there, done = Event(), Event()

    class Slow(Sent):
        def finish(self):
            assert there.wait(10)

    with ThreadPoolExecutor(1) as pool:
        loader = BlockLoader(pool, Slow(), [], 3, 3, lambda index, error: None)
        loader.release()
        assert loader.take(2) == 2
        if copied:
            there.set()
            wait([loader._copied], 10)
        loader.then(done.set)
        assert done.is_set() == copied
        there.set()
        assert done.wait(10)
        loader.stop()


def test_nothing_follows_a_feed_that_was_stopped(loading):
    loader, _ = loading
    done = Event()
    loader.then(done.set)
    loader.stop()
    assert not done.wait(0.05)


@pytest.mark.parametrize("first", ["release", "begin"])
def test_a_feed_that_is_begun_may_copy_whether_it_was_released_before_or_after(models, store, monkeypatch, first):
    clip = CacheClip(*models, store)
    clip.index(map(Passage.make, TEXTS[:3]))
    passages = [Passage.make(t) for t in TEXTS[:3]]
    sent, send = Event(), PageCopies.send
    monkeypatch.setattr(PageCopies, "send", lambda *args: sent.set() or send(*args))
    side = StoreSide(clip.primary, passages, clip.primary.prompt(passages, QUESTION), 1024, clip._pool,
                     Clock(clip._pool), Fetched(), "shared")
    for step in ("release", "begin") if first == "release" else ("begin", "release"):
        assert not sent.wait(0.05)
        getattr(side, step)()
    assert sent.wait(10)
    side.stop()


def test_the_first_take_releases_too(loading):
    loader, _ = loading
    assert [loader.take(n) for n in range(2)] == [0, 1]


def test_stopping_before_a_release_copies_nothing_and_ends_the_thread(loading):
    loader, sent = loading
    loader.stop()
    with pytest.raises(RuntimeError, match="stopped"):
        loader.take(0)
    assert not sent.blocks


def test_a_request_that_fails_between_begin_and_release_leaves_no_thread_behind(models, store, monkeypatch):
    clip = CacheClip(*models, store)
    expected = prefilled(clip, TEXTS[:3])

    def broken(*args):
        raise StoreError("no scores")

    with monkeypatch.context() as patch:
        patch.setattr(request, "question_scores", broken)
        for _ in range(80):  # more than the pool has threads
            with pytest.raises(StoreError, match="no scores"):
                clip.prefill(QUESTION, TEXTS[:3])
    assert max_diff(prefilled(clip, TEXTS[:3]).logits, expected.logits) == 0
