"""The invariants of assembly and recompute, on a tiny random model of every family."""

import jax
import numpy as np
import pytest

from cacheclip_jax.assemble import empty
from cacheclip_jax.model import decoder
from cacheclip_jax.model.params import init
from tests.conftest import TINY, assembled, full_prefill, max_diff, random_prompt, rows, stacked

SLOTS = 128


def parts(cfg, **kw):
    prefix, *chunks, question = random_prompt(cfg, **kw)
    return prefix, chunks, question, np.concatenate([prefix, *chunks, question])


def repaired(params, cfg, prefix, chunks, question, chosen, pad=0, behind="shared"):
    """Logits after recomputing the context tokens `chosen` and the question."""
    ids = np.concatenate([prefix, *chunks, question])
    context = len(ids) - len(prefix) - len(question)
    asked = len(prefix) + context + np.arange(len(question))
    positions = np.concatenate([len(prefix) + np.asarray(chosen, int), asked])
    return rows(params, cfg, ids[positions], positions, assembled(params, cfg, prefix, chunks, SLOTS, behind), pad)


@pytest.mark.parametrize("behind", ["shared", "none"])
def test_ratio_one_equals_full_prefill(tiny, behind):
    cfg, params = tiny
    prefix, chunks, question, ids = parts(cfg)
    everything = np.arange(sum(map(len, chunks)))
    logits, cache = repaired(params, cfg, prefix, chunks, question, everything, behind=behind)
    expected, full = full_prefill(params, cfg, ids)
    assert max_diff(logits, expected) < 1e-4
    assert max_diff(stacked(cache)[0][:, :, : len(ids)], stacked(full)[0][:, :, : len(ids)]) < 1e-4
    assert max_diff(stacked(cache)[1][:, :, : len(ids)], stacked(full)[1][:, :, : len(ids)]) < 1e-4


def test_one_chunk_at_ratio_zero_equals_full_prefill(tiny):
    cfg, params = tiny
    prefix, chunks, question, ids = parts(cfg, lengths=(5, 40, 9))
    assert max_diff(repaired(params, cfg, prefix, chunks, question, [])[0], full_prefill(params, cfg, ids)[0]) < 1e-4


def test_several_chunks_at_ratio_zero_differ_from_full_prefill(tiny):
    cfg, params = tiny
    prefix, chunks, question, ids = parts(cfg)
    assert max_diff(repaired(params, cfg, prefix, chunks, question, [])[0], full_prefill(params, cfg, ids)[0]) > 1e-2


def test_recomputing_all_but_the_first_chunk_is_exact_because_its_cache_saw_what_it_sees_here(tiny):
    cfg, params = tiny
    prefix, chunks, question, ids = parts(cfg)
    later = np.arange(len(chunks[0]), sum(map(len, chunks)))
    assert max_diff(repaired(params, cfg, prefix, chunks, question, later)[0], full_prefill(params, cfg, ids)[0]) < 1e-4


def test_an_assembled_cache_holds_each_chunk_as_if_it_stood_alone_behind_the_prefix(tiny):
    cfg, params = tiny
    prefix, chunks, question, _ = parts(cfg)
    _, alone = full_prefill(params, cfg, np.concatenate([prefix, chunks[1]]))
    cache = assembled(params, cfg, prefix, chunks, SLOTS)
    here, there = len(prefix) + len(chunks[0]), len(prefix)
    n = len(chunks[1])
    assert max_diff(stacked(cache)[1][:, :, here : here + n], stacked(alone)[1][:, :, there : there + n]) < 1e-4


def test_padding_rows_and_free_slots_never_change_a_result(qwen2):
    cfg, params = qwen2
    prefix, chunks, question, _ = parts(cfg)
    chosen = [3, 4, 20, 33, 60]
    plain, _ = repaired(params, cfg, prefix, chunks, question, chosen)
    padded, cache = repaired(params, cfg, prefix, chunks, question, chosen, pad=7)
    assert max_diff(plain, padded) < 1e-5
    used = sum(map(len, (prefix, *chunks, question)))
    assert np.all(stacked(cache)[0][:, :, used:] == 0) and np.all(stacked(cache)[1][:, :, used:] == 0)


def test_rows_overwrite_only_their_own_slots(qwen2):
    cfg, params = qwen2
    prefix, chunks, question, ids = parts(cfg)
    before = stacked(assembled(params, cfg, prefix, chunks, SLOTS))
    _, after = repaired(params, cfg, prefix, chunks, question, [10, 11, 50])
    touched = np.zeros(SLOTS, bool)
    touched[[len(prefix) + i for i in (10, 11, 50)]] = True
    touched[len(ids) - len(question) : len(ids)] = True
    same = (before[0] == stacked(after)[0]).all(axis=(0, 1, 3))
    np.testing.assert_array_equal(same, ~touched)


def test_a_later_token_never_changes_earlier_rows(qwen2):
    cfg, params = qwen2
    prefix, chunks, question, ids = parts(cfg)
    _, cache = full_prefill(params, cfg, ids)
    ids[60] = (ids[60] + 1) % cfg.vocab_size
    _, changed = full_prefill(params, cfg, ids)
    assert max_diff(stacked(cache)[0][:, :, :60], stacked(changed)[0][:, :, :60]) == 0
    assert max_diff(stacked(cache)[0][:, :, 60:], stacked(changed)[0][:, :, 60:]) > 0


def test_prefill_in_two_halves_equals_one(tiny):
    cfg, params = tiny
    *_, ids = parts(cfg)
    expected, _ = full_prefill(params, cfg, ids)
    _, cache = rows(params, cfg, ids[:40], np.arange(40), empty(cfg, SLOTS, np.float32))
    logits, _ = rows(params, cfg, ids[40:], np.arange(40, len(ids)), cache)
    assert max_diff(logits, expected) < 1e-4


def test_in_bfloat16_ratio_one_is_as_near_to_full_prefill_as_a_prefill_in_another_order():
    import jax
    cfg = TINY["qwen2"]
    params = init(jax.random.key(7), cfg, "bfloat16")
    exact = init(jax.random.key(7), cfg)
    prefix, chunks, question, ids = parts(cfg)
    expected, _ = full_prefill(params, cfg, ids)
    noise = max_diff(expected, full_prefill(jax.tree.map(lambda w: w.astype("float32"), params), cfg, ids)[0])
    everything = np.arange(sum(map(len, chunks)))
    logits, _ = repaired(params, cfg, prefix, chunks, question, everything)
    assert max_diff(logits, expected) <= 2 * noise + 1e-3
    assert max_diff(exact.embed, params.embed) > 0


@pytest.mark.parametrize("count", [1, 4])
def test_a_layer_copies_none_of_its_matrices(count):
    cfg = TINY["qwen2"]
    layer = init(jax.random.key(0), cfg).layers[0]
    x, attended = np.zeros((count, cfg.d_model), np.float32), np.zeros((count, cfg.num_heads, cfg.head_dim), np.float32)
    compiled = jax.jit(decoder.finish, static_argnames="cfg").lower(x, attended, layer, cfg).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < layer.gate_up.nbytes
