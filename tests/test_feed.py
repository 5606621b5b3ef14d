"""Feeds: the same assembled cache from the store, host memory and the device, in any order and size of request."""

from __future__ import annotations

import time
from unittest import mock

import numpy as np
import pytest

from cacheclip_jax import CacheClip, ChunkStore, Passage, device, feed, host, online
from cacheclip_jax.device import DeviceTier
from cacheclip_jax.errors import StoreError
from cacheclip_jax.host import PAGE_ROWS, HostTier
from cacheclip_jax.loader import _shares
from cacheclip_jax.model.load import load_model
from tests.conftest import max_diff, stacked
from tests.test_engine import QUESTION, TEXTS


@pytest.fixture(scope="module")
def models(pair):
    return tuple(load_model(path, dtype="float32") for path in pair)


@pytest.fixture(scope="module")
def store(models):
    opened = ChunkStore.open("memory://feed")
    CacheClip(*models, opened).index(map(Passage.make, TEXTS))
    return opened


@pytest.fixture(params=["cpu", "gpu"])
def way(request, monkeypatch):
    """How a CPU's or a GPU's caches travel: all layers in one program, or spans behind a ring of pinned buffers."""
    if request.param == "gpu":
        for module in (host, feed):
            monkeypatch.setattr(module, "platform_of", lambda sharding: "gpu")
        monkeypatch.setattr(feed, "BLOCK_BYTES", 1)
        monkeypatch.setattr(device, "BLOCK_LAYERS", 1)
        monkeypatch.setattr(online, "SPAN", 1)
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


def test_what_lies_on_the_device_is_read_from_nowhere_else(models, store, monkeypatch):
    clip = CacheClip(*models, store, host_bytes=0, device_bytes=1 << 24)
    first = prefilled(clip, TEXTS)

    def unreadable(*args, **kwargs):
        raise StoreError("nothing may be read")

    monkeypatch.setattr(clip.store, "read_all", unreadable)
    assert max_diff(prefilled(clip, TEXTS).logits, first.logits) == 0
    with pytest.raises(StoreError, match="nothing may be read"):
        prefilled(clip, [*TEXTS, "the dog sat on another mat"])


def test_a_request_that_fails_lets_go_of_what_it_held_in_host_memory(models, store, monkeypatch):
    clip = CacheClip(*models, store)
    prefilled(clip, TEXTS)
    tier = clip.primary.host
    for _ in range(500):  # what was read is kept after the answer, by a thread of its own
        if len(tier) == len(TEXTS) + 1:
            break
        time.sleep(0.01)
    assert len(tier) == len(TEXTS) + 1 and not tier._held
    with monkeypatch.context() as patch:
        patch.setattr(clip.store, "read_all", mock.Mock(side_effect=StoreError("broken")))
        with pytest.raises(StoreError, match="broken"):
            clip.prefill(QUESTION, [*TEXTS, "another text"])
        prefilled(clip, TEXTS)  # from host memory alone
    assert not tier._held


def gathered(tier: HostTier, key, layers: int) -> np.ndarray | None:
    pages = tier.hold(key)
    if pages is None:
        return None
    out = np.zeros((layers, len(pages) * tier.page_bytes), np.uint8)
    for layer in range(layers):
        tier.gather(layer, pages, out[layer])
    tier.release([key])
    return out


def test_the_host_tier_keeps_bytes_in_its_bound_drops_the_least_recent_and_never_what_is_held():
    rng = np.random.default_rng(0)
    row, layers = 8, 3
    tier = HostTier(layers, row, 10 * layers * PAGE_ROWS * row)
    assert tier.pages == 10
    held, kept = ("s", "held"), {}
    for n in range(80):
        key = held if n == 0 else ("s", str(n))
        kv = rng.integers(0, 255, (layers, 2, 1, int(rng.integers(1, 3 * PAGE_ROWS // 2)), row)).astype(np.uint8)
        tier.put(key, kv)
        kept[key] = kv
        if n == 0:
            assert tier.hold(held) is not None
        found = [k for k in kept if (got := gathered(tier, k, layers)) is not None and np.array_equal(
            got[:, : kept[k][0].size], kept[k].reshape(layers, -1))]
        assert held in found and key in found and len(found) == len(tier)
        if n % 3 == 0 and n:  # used again: it outlives one that was not
            gathered(tier, key, layers)
    tier.release([held])
    tier.put(("s", "large"), np.zeros((layers, 2, 1, 5 * PAGE_ROWS, row), np.uint8))
    assert len(tier) == 1 and tier.hold(held) is None
    tier.put(("s", "too large"), np.zeros((layers, 2, 1, 5 * PAGE_ROWS + 1, row), np.uint8))
    assert tier.hold(("s", "too large")) is None


def test_a_device_tier_never_finds_what_a_later_block_lies_on(models):
    cfg = models[0].config
    tier = DeviceTier(cfg, 100 * cfg.num_layers * cfg.head_dim * 4, "float32", models[0].params.final_norm.sharding)
    assert tier.capacity == 100 and tier.reserve(101) is None
    rng, lies = np.random.default_rng(0), {}
    for n in range(60):
        size = int(rng.integers(1, 45))
        at = tier.reserve(size)
        lies = {k: (first, count) for k, (first, count) in lies.items() if first + count <= at or first >= at + size}
        key = ("space", str(n))
        tier.keep(key, at, size)
        lies[key] = (at, size)
        assert at + size <= 100
        assert tier.find([("space", str(i)) for i in range(n + 1)]) == [
            lies.get(("space", str(i)), (None,))[0] for i in range(n + 1)]


def test_workers_share_parts_about_equally():
    sizes = np.random.default_rng(0).integers(1, 1000, 50)
    shares = _shares(sizes, 8)
    assert sorted(i for share in shares for i in share) == list(range(50))
    loads = [sizes[share].sum() for share in shares]
    assert max(loads) - min(loads) <= sizes.max()
