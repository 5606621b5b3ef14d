"""Encoding: chunk caches don't depend on what they are batched with, nor on padding."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheclip_jax import encode
from cacheclip_jax.bucket import bucket
from cacheclip_jax.encode import BATCH_TOKENS, batches, encode_many, encode_prefix, no_prefix
from cacheclip_jax.model.rope import rotate
from tests.conftest import full_prefill, max_diff, random_prompt, stacked


def test_a_chunk_cache_does_not_depend_on_its_batch(qwen2):
    cfg, params = qwen2
    prefix, *chunks = random_prompt(cfg, (5, 30, 70, 30, 12, 33))
    prefix_kv = encode_prefix(params, cfg, list(prefix))
    together = dict(encode_many(params, cfg, chunks, prefix_kv))
    assert sorted(together) == list(range(len(chunks)))
    for i, chunk in enumerate(chunks):
        (_, alone), = encode_many(params, cfg, [chunk], prefix_kv)
        assert alone.shape == (cfg.num_layers, 2, cfg.num_kv_heads, len(chunk), cfg.head_dim)
        assert max_diff(alone, together[i]) < 1e-5


def test_a_chunk_cache_is_the_same_by_way_of_pinned_memory(qwen2, monkeypatch):
    cfg, params = qwen2
    prefix, *chunks = random_prompt(cfg, (5, 30, 64))
    prefix_kv = encode_prefix(params, cfg, list(prefix))
    monkeypatch.setattr(encode, "uses_pinned", lambda sharding: False)
    straight = dict(encode_many(params, cfg, chunks, prefix_kv))
    monkeypatch.setattr(encode, "uses_pinned", lambda sharding: True)
    (kv,) = encode.to_host((jax.device_put(straight[0]),))
    assert kv.sharding.memory_kind == "pinned_host" and np.array_equal(np.asarray(kv), straight[0])
    for i, kv in encode_many(params, cfg, chunks, prefix_kv):
        assert np.array_equal(kv, straight[i])


def test_keys_are_stored_before_rope_and_values_as_they_are(tiny):
    cfg, params = tiny
    prefix, chunk = random_prompt(cfg, (5, 20))
    (_, kv), = encode_many(params, cfg, [chunk], encode_prefix(params, cfg, list(prefix)))
    _, cache = full_prefill(params, cfg, np.concatenate([prefix, chunk]))
    positions = np.arange(5, 25)
    assert max_diff(rotate(kv[:, 0], positions, cfg.rope), stacked(cache)[0][:, :, 5:25]) < 1e-4
    assert max_diff(kv[:, 1], stacked(cache)[1][:, :, 5:25]) < 1e-4


def test_the_shared_prefix_changes_a_chunk_and_no_prefix_is_encoding_alone(qwen2):
    cfg, params = qwen2
    prefix, chunk = random_prompt(cfg, (5, 20))
    (_, behind), = encode_many(params, cfg, [chunk], encode_prefix(params, cfg, list(prefix)))
    (_, alone), = encode_many(params, cfg, [chunk], no_prefix(params, cfg))
    _, cache = full_prefill(params, cfg, chunk)
    assert max_diff(alone[:, 1], stacked(cache)[1][:, :, :20]) < 1e-4
    assert max_diff(alone, behind) > 1e-2


@given(st.lists(st.integers(1, 3000), max_size=60))
def test_batches_hold_every_chunk_once_in_one_width_and_within_the_token_limit(lengths):
    done = batches(lengths)
    assert sorted(i for b in done for i in b) == list(range(len(lengths)))
    for batch in done:
        widths = {bucket(lengths[i]) for i in batch}
        assert len(widths) == 1
        assert len(batch) == 1 or len(batch) * widths.pop() <= BATCH_TOKENS


@given(st.integers(1, 100_000))
def test_buckets_hold_their_size_with_bounded_padding_and_few_distinct_values(n):
    size = bucket(n)
    assert size >= n and size % 64 == 0 and bucket(size) == size
    assert size - n < max(64, n / 8 + 1)


@pytest.mark.parametrize("behind", [0, 5])
def test_encoding_compiles_once_per_shape(qwen2, behind):
    cfg, params = qwen2
    prefix, *chunks = random_prompt(cfg, (max(behind, 1), 20, 40))
    anchor = encode_prefix(params, cfg, list(prefix)) if behind else no_prefix(params, cfg)
    from cacheclip_jax import compiles
    list(encode_many(params, cfg, chunks[:1], anchor))
    before = compiles.count()
    list(encode_many(params, cfg, chunks[1:], anchor))
    assert compiles.count() == before
