"""The methods on tiny models: what each recomputes, that all answer, and that recomputing all of it is full prefill."""

from __future__ import annotations

import numpy as np
import pytest

from cacheclip_jax import Budget, CacheClip, Groups
from cacheclip_jax.errors import BadInput
from cacheclip_jax.methods import METHODS, NEED_AUX, AuxGuided, Epic, Naive, ProphetKV, SpecPrefill, make, takes_budget
from cacheclip_jax.methods.a3 import A3
from cacheclip_jax.methods.ape import Ape
from cacheclip_jax.methods.cacheblend import CacheBlend
from cacheclip_jax.methods.epic import even_heads
from cacheclip_jax.methods.fusionrag import FusionRAG
from cacheclip_jax.methods.oracle import Oracle
from cacheclip_jax.model.load import load_model
from cacheclip_jax.plan import Reshape
from cacheclip_jax.score import Scoring
from cacheclip_jax.select import select
from cacheclip_jax.store import ChunkStore, Passage
from tests.conftest import max_diff
from tests.engine import QUESTION, TEXTS
from tests.resident import of_context, request

RECOMPUTING = ["cacheblend", "epic", "prophetkv", "fusionrag", "a3", "specprefill", "oracle"]
GROUP = {"specprefill": 32, "oracle": 8}


@pytest.fixture(scope="module")
def clip(pair) -> CacheClip:
    """The tiny pair over a store that holds TEXTS."""
    clip = CacheClip(*(load_model(path, dtype="float32") for path in pair), ChunkStore.open("memory://methods"))
    clip.index(map(Passage.make, TEXTS))
    return clip


@pytest.fixture(scope="module")
def full(clip):
    """Full prefill's answer of 6 tokens, and its logits."""
    return ask(clip, "full"), np.asarray(clip.prefill(QUESTION, TEXTS[:4], method="full").logits)


def ask(clip, method, **options):
    return clip.ask(QUESTION, TEXTS[:4], method=method, max_new_tokens=6, **options)


# -------------------------------------------------------------------- through the engine

@pytest.mark.parametrize("method", RECOMPUTING)
def test_recomputing_everything_is_full_prefill(clip, full, method):
    np.testing.assert_allclose(clip.prefill(QUESTION, TEXTS[:4], method=method, ratio=1.0).logits, full[1], atol=1e-4)
    result = ask(clip, method, ratio=1.0)
    assert result.token_ids == full[0].token_ids and result.realised_ratio > 0.6
    assert result.method == method


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("method", RECOMPUTING)
def test_the_realised_ratio_is_the_wanted_one_within_a_group(clip, method, ratio):
    chosen = clip.prefill(QUESTION, TEXTS[:4], method=method, ratio=ratio).plan.recompute
    wanted = round(ratio * len(chosen))
    assert wanted <= chosen.sum() < wanted + GROUP.get(method, 1)


@pytest.mark.parametrize("prefix", ["shared", "none"])
@pytest.mark.parametrize("kind", [AuxGuided, CacheBlend, Epic, ProphetKV, FusionRAG, A3])
def test_at_ratio_zero_what_is_left_is_naive_reuse(clip, kind, prefix):
    budget = Budget(ratio=0.0)
    plain = {"discount": 0.0} if kind is AuxGuided else {}
    bare, naive = (np.asarray(clip.prefill(QUESTION, TEXTS[:4], method=method).logits)
                   for method in (kind(budget, prefix=prefix, **plain), Naive(prefix)))
    assert np.allclose(bare, naive, atol=1e-4) == (kind is not CacheBlend)  # whose second layer is fresh throughout


def test_every_method_answers_twice_the_same_and_compiles_nothing_the_second_time(clip):
    for method in ("ape", *RECOMPUTING):
        first, again = (ask(clip, method) for _ in range(2))
        assert first.token_ids == again.token_ids and again.compiles == 0, method
        np.testing.assert_array_equal(first.selection.recompute, again.selection.recompute)


def test_a_dropped_context_leaves_the_question_at_its_position(clip):
    result = ask(clip, "specprefill", ratio=0.3)
    assert result.reused_tokens == 0 and 0.3 <= result.realised_ratio < 0.5
    prefill = clip.prefill(QUESTION, TEXTS[:4], method="specprefill", ratio=0.3, reserve=6)
    assert int(prefill.tail.position) == len(prefill.prompt.ids)
    dropped = len(prefill.prompt.ids) - int(prefill.tail.slot)
    assert dropped == (~prefill.plan.recompute).sum() == result.context_tokens - result.recomputed_tokens


@pytest.mark.parametrize("method", ["ape", "specprefill"])
def test_tokens_decoded_one_by_one_are_those_that_a_continuation_predicts(clip, method):
    ids = ask(clip, method).token_ids
    prefill = clip.prefill(QUESTION, TEXTS[:4], method=method, reserve=6)
    predicted = np.stack([np.asarray(prefill.logits), *clip.continuation(prefill, ids[:-1])]).argmax(-1)
    np.testing.assert_array_equal(predicted, ids)


def test_ape_without_reshaping_reads_one_chunk_like_full_prefill_and_differs_with_it(clip):
    plain, reshaped, full = (np.asarray(clip.prefill(QUESTION, TEXTS[:1], method=method).logits)
                             for method in (Ape(Reshape(1.0, 1.0)), Ape(), "full"))
    np.testing.assert_allclose(plain, full, atol=1e-4)
    assert np.abs(reshaped - full).max() > 1e-3


@pytest.mark.parametrize("dtype, near", [("float32", 1e-4), ("bfloat16", 0.3)])
def test_ape_and_specprefill_answer_in_any_dtype_and_change_nothing_where_there_is_nothing_to_change(pair, dtype, near):
    clip = CacheClip(*(load_model(path, dtype=dtype) for path in pair), ChunkStore.open(f"memory://methods-{dtype}"))
    full = clip.prefill(QUESTION, TEXTS[:1], method="full").logits
    for method in (Ape(Reshape(1.0, 1.0)), SpecPrefill(Budget(ratio=1.0))):
        assert max_diff(clip.prefill(QUESTION, TEXTS[:1], method=method).logits, full) < near
        assert ask(clip, method.name).token_ids


@pytest.mark.parametrize("method", sorted(set(METHODS) - set(NEED_AUX)))
def test_methods_that_ask_no_aux_model_need_none(clip, method):
    alone = CacheClip(clip.primary.model, None, clip.store)
    assert alone.prefill(QUESTION, TEXTS[:2], method=method).logits.ndim == 1


def test_a_method_that_asks_the_aux_model_is_refused_without_one(clip):
    with pytest.raises(BadInput, match="specprefill needs an aux model"):
        CacheClip(clip.primary.model, None, clip.store).prefill(QUESTION, TEXTS[:2], method="specprefill")


# -------------------------------------------------------------------- what each selects

def test_cacheblend_takes_the_highest_deviations_and_computes_two_layers_for_all(qwen2):
    r = request(qwen2)
    plan = CacheBlend(Budget(tokens=20)).plan(r)
    off = of_context(r, r.value_deviation(1, "none"))
    np.testing.assert_array_equal(np.flatnonzero(of_context(r, plan.recompute)), np.sort(np.argsort(-off)[:20]))
    assert plan.dense_layers == 2


def test_prophetkv_takes_single_tokens_by_mean_attention_in_all_layers_or_groups(qwen2):
    r = request(qwen2)
    scores = of_context(r, r.primary_scores(Scoring(layers="all", rows="mean"), "none"))
    single, grouped = (of_context(r, ProphetKV(Budget(tokens=16), g).plan(r).recompute) for g in (Groups(1), Groups(8)))
    np.testing.assert_array_equal(np.flatnonzero(single), np.sort(np.argsort(-scores)[:16]))
    np.testing.assert_array_equal(grouped, select(scores, r.prompt.chunk_lengths, Budget(tokens=16), Groups(8)))


def test_fusionrag_takes_single_tokens_by_last_layer_queries_of_the_question_alone(qwen2):
    r = request(qwen2)
    scores = of_context(r, r.primary_scores(Scoring(layers="last", rows="mean", context="alone"), "shared"))
    chosen = of_context(r, FusionRAG(Budget(tokens=9)).plan(r).recompute)
    np.testing.assert_array_equal(np.flatnonzero(chosen), np.sort(np.argsort(-scores)[:9]))


def test_a3_pools_over_neighbours_in_the_context(qwen2):
    r = request(qwen2)
    pooled = np.convolve(of_context(r, r.early_scores(1)), np.full(5, 0.2), "same")
    plan = A3(Budget(tokens=13)).plan(r)
    np.testing.assert_array_equal(np.flatnonzero(of_context(r, plan.recompute)), np.sort(np.argsort(-pooled)[:13]))
    assert plan.dense_layers == 1


def test_specprefill_keeps_chunks_of_the_context_by_their_mean(qwen2):
    r = request(qwen2)
    scores = of_context(r, r.aux_lookahead(4, 3))
    chunks = np.array_split(np.arange(len(scores)), range(16, len(scores), 16))
    assert len(chunks[-1]) == 7  # a sum would rank the last chunk too low
    ranked = sorted(range(len(chunks)), key=lambda i: -scores[chunks[i]].mean())
    plan = SpecPrefill(Budget(tokens=20), look_ahead=4, pool=3, chunk=16).plan(r)
    kept = np.flatnonzero(of_context(r, plan.recompute))
    expected, taken = [], 0
    for i in ranked:
        if taken < 20:
            expected, taken = [*expected, *chunks[i]], taken + len(chunks[i])
    np.testing.assert_array_equal(kept, np.sort(expected))
    assert plan.drop and SpecPrefill().caches is None


def test_the_oracle_takes_groups_by_full_prefill_attention_of_the_last_row(qwen2):
    r = request(qwen2)
    scores = of_context(r, r.primary_scores(Scoring(layers="all", rows="last", context="joint"), "shared"))
    np.testing.assert_array_equal(of_context(r, Oracle(Budget(tokens=24)).plan(r).recompute),
                                  select(scores, r.prompt.chunk_lengths, Budget(tokens=24), Groups(8)))


def heads(plan, lengths) -> list[int]:
    parts = np.split(plan.recompute, np.cumsum(lengths)[:-1])
    assert all(part[: part.sum()].all() for part in parts), "not the first tokens"
    return [int(part.sum()) for part in parts]


@pytest.mark.parametrize("method, lengths, expected", [
    (Epic(), (5, 40, 3, 50, 9), [32, 3, 32]),
    (Epic(prefix="shared"), (5, 40, 3, 50, 9), [0, 3, 32]),
    (Epic(), (0, 40, 3, 50, 9), [0, 3, 32]),
    (Epic(tokens=2), (5, 40, 3, 50, 9), [2, 2, 2]),
    (Epic(Budget(tokens=20)), (5, 40, 3, 50, 9), [9, 3, 8]),
    (Epic(Budget(tokens=20), prefix="shared"), (5, 40, 3, 50, 9), [0, 3, 17]),
    (Epic(Budget(ratio=1.0)), (5, 40, 3, 50, 9), [40, 3, 50]),
], ids=str)
def test_epic_recomputes_the_first_tokens_of_every_chunk_whose_cache_is_not_exact(qwen2, method, lengths, expected):
    r = request(qwen2, lengths=lengths)
    assert heads(method.plan(r), r.prompt.chunk_lengths) == expected


@pytest.mark.parametrize("total", [0, 1, 7, 30, 93, 200])
def test_even_heads_spend_the_budget_and_differ_by_one_at_most(total):
    lengths = np.array([40, 0, 3, 50, 12])
    heads = even_heads(lengths, total)
    assert heads.sum() == min(total, lengths.sum()) and (heads <= lengths).all()
    unfinished = heads[heads < lengths]
    assert not len(unfinished) or heads.max() - unfinished.min() <= 1


@pytest.mark.parametrize("wrong, says", [
    (lambda: Epic(tokens=-1), "tokens=-1"), (lambda: Epic(Budget(mass=0.5)), "no scores"),
    (lambda: A3(pool=4), "pool=4"), (lambda: SpecPrefill(pool=2), "pool=2"), (lambda: SpecPrefill(chunk=0), "chunk=0"),
    (lambda: CacheBlend(prefix="system"), "prefix='system'"),
    (lambda: make("ape", Budget(ratio=0.1)), "ape recomputes a fixed share")])
def test_a_setting_out_of_range_is_refused_by_name(wrong, says):
    with pytest.raises(BadInput, match=says):
        wrong()


def test_every_recomputing_method_takes_the_same_budget():
    assert [name for name in METHODS if not takes_budget(name)] == ["full", "prefix", "naive", "ape"]
