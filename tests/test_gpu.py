"""The invariants on a GPU in bfloat16, with the kernels that run there; skipped without one."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacheclip_jax import CacheClip, ChunkStore, Passage
from cacheclip_jax.assemble import KVCache, empty
from cacheclip_jax.attention import choose, for_rows, row_attention
from cacheclip_jax.model.load import load_model
from cacheclip_jax.model.params import init
from cacheclip_jax.recompute import embed_rows, last_fresh_span, recompute
from tests.conftest import TINY, assembled, max_diff, random_prompt
from tests.test_attention import REFERENCE, inputs

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")


@pytest.fixture(scope="module", params=[64, 128])
def model(request):
    cfg = replace(TINY["qwen2"], d_model=256, d_mlp=512, num_heads=14, num_kv_heads=2, head_dim=request.param)
    how = choose("gpu", jax.devices()[0].compute_capability, cfg.head_dim, jnp.bfloat16).name
    return cfg, init(jax.random.key(7), cfg, "bfloat16"), how


def full(params, cfg, ids, how, slots=1024):
    positions = np.arange(len(ids), dtype=np.int32)
    x, last = embed_rows(params, ids), np.int32(len(ids) - 1)
    logits, layers = last_fresh_span(params, last, x, params.layers, cfg, positions, slots, how)
    return np.asarray(logits), KVCache(*zip(*layers, strict=True))


def rows(params, cfg, ids, positions, cache, how):
    return np.asarray(recompute(params, cfg, ids, positions.astype(np.int32), np.int32(len(ids) - 1), cache, how)[0])


def noise(params, cfg, ids, expected):
    """How far full prefills in another arithmetic lie from the expected one: blocked attention, and float32."""
    exact = full(jax.tree.map(lambda w: w.astype("float32"), params), cfg, ids, "blocked")[0]
    return max(max_diff(exact, expected), max_diff(full(params, cfg, ids, "blocked")[0], expected))


def test_ratio_one_and_one_chunk_at_ratio_zero_equal_full_prefill(model):
    cfg, params, how = model
    prefix, *chunks, question = random_prompt(cfg, (21, 200, 133, 64, 300, 30))
    ids = np.concatenate([prefix, *chunks, question])
    expected, _ = full(params, cfg, ids, how)
    limit = 2 * noise(params, cfg, ids, expected) + 1e-3
    everything = np.arange(len(prefix), len(ids))
    cache = assembled(params, cfg, prefix, chunks, 1024)
    assert max_diff(rows(params, cfg, ids[everything], everything, cache, how), expected) <= limit
    fresh = empty(cfg, 1024, jnp.bfloat16)
    assert max_diff(rows(params, cfg, ids, np.arange(len(ids)), fresh, how), expected) <= limit
    one = np.concatenate([prefix, chunks[0], question])
    asked = np.arange(len(prefix) + len(chunks[0]), len(one))
    reused = rows(params, cfg, one[asked], asked, assembled(params, cfg, prefix, chunks[:1], 1024), how)
    assert max_diff(reused, full(params, cfg, one, how)[0]) <= limit
    nothing = np.arange(len(ids) - len(question), len(ids))
    stale = rows(params, cfg, ids[nothing], nothing, assembled(params, cfg, prefix, chunks, 1024), how)
    assert max_diff(stale, expected) > limit


@pytest.mark.parametrize("rows, slots", [(1, 300), (37, 1001), (900, 8192)])
def test_row_attention_equals_the_reference_with_and_without_a_bias(model, rows, slots):
    cfg, _, how = model
    for pad in (0, rows // 3):
        args = inputs(rows, slots, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, pad, jnp.bfloat16)
        for bias in (None, jnp.where(jnp.arange(slots) % 3 == 0, -2.0, 0.5)):
            assert max_diff(row_attention(*args, for_rows(how, rows), bias), REFERENCE(*args, bias)) < 0.02
            assert max_diff(row_attention(*args, "cudnn", bias), REFERENCE(*args, bias)) < 0.02


@pytest.mark.parametrize("device_bytes, host_bytes", [(0, 1 << 30), (0, 0), (1 << 26, 1 << 30)])
@pytest.mark.parametrize("where", ["file", "memory"])
def test_caches_reach_the_gpu_bit_for_bit_however_they_travel(long_pair, tmp_path, where, device_bytes, host_bytes):
    models = tuple(load_model(path, dtype="bfloat16") for path in long_pair)
    store = ChunkStore.open(tmp_path if where == "file" else f"memory://gpu-{device_bytes}-{host_bytes}")
    texts = [f"{n} " + "the cat sat on the mat and looked at the moon " * (4 * (n % 3) + 1) for n in range(6)]
    clip = CacheClip(*models, store, device_bytes=device_bytes, host_bytes=host_bytes)
    clip.index(map(Passage.make, texts))
    assert clip.primary.buffers is not None
    bare = CacheClip(*models, store, host_bytes=0)
    bare.primary.buffers = bare.aux.buffers = None
    for chunks in (texts, texts[::-1], texts[:1], texts[2:5], texts, texts[::-1]):
        expected, got = (c.prefill("what did the cat look at?", chunks) for c in (bare, clip))
        np.testing.assert_array_equal(np.asarray(expected.logits), np.asarray(got.logits))
        used = len(expected.prompt.ids)
        for a, b in zip(expected.cache.k + expected.cache.v, got.cache.k + got.cache.v, strict=True):
            np.testing.assert_array_equal(np.asarray(a)[:, :used], np.asarray(b)[:, :used])
    kept = [] if clip.primary.host is None else [chunk for chunk, _ in clip.primary.host._kept.values()]
    assert bool(kept) == (host_bytes > 0)
    assert all((chunk.whole is None) == (device_bytes > 0) for chunk in kept)
