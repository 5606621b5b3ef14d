"""What methods see of a request, and what plans make of one: each against its definition, computed by hand."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from threading import current_thread
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacheclip_jax import online
from cacheclip_jax.assemble import KVCache
from cacheclip_jax.attention import reshaped, row_attention_reference
from cacheclip_jax.errors import BadInput
from cacheclip_jax.groups import Sentences
from cacheclip_jax.lookahead import average_pool
from cacheclip_jax.methods import AuxGuided
from cacheclip_jax.model import decoder
from cacheclip_jax.model.rope import rotate
from cacheclip_jax.online import execute, parallel_positions
from cacheclip_jax.plan import Context, Discount, Plan, Reshape
from cacheclip_jax.recompute import continuation_logits, rows_over_cached
from cacheclip_jax.request import Request
from cacheclip_jax.score import Scoring
from cacheclip_jax.select import Budget, select
from tests.conftest import TINY, assembled, full_prefill, max_diff, rows, scores_over, stacked
from tests.resident import SLOTS, ResidentFeed, by_hand, of_context, request


def context(prompt) -> slice:
    return slice(len(prompt.prefix), prompt.question_start)


def cache_of(r, behind):
    model = r.primary.model
    return assembled(model.params, model.config, r.prompt.prefix, [c.ids for c in r.prompt.chunks], SLOTS, behind)


def continued(r, done, plan, ids) -> np.ndarray:
    """Logits after each of `ids`, decoded behind a repaired cache."""
    model, slots = r.primary.model, int(done.tail.slot) + np.arange(len(ids), dtype=np.int32)
    tail = None if plan.plain else done.tail
    return np.asarray(continuation_logits(model.params, model.config, np.asarray(ids, np.int32), slots, done.cache,
                                          "blocked", tail))


# -------------------------------------------------------------------- signals

@pytest.mark.parametrize("behind", ["shared", "none"])
def test_cached_scores_of_the_primary_are_the_question_rows_attention_over_its_assembled_cache(qwen2, behind):
    cfg, params = qwen2
    r = request(qwen2)
    scoring = Scoring(layers="all", rows="mean")
    expected = scores_over(params, cfg, scoring, np.array(r.prompt.question, np.int32),
                           np.arange(r.prompt.question_start, len(r.prompt.ids), dtype=np.int32),
                           np.int32(len(r.prompt.question) - 1), cache_of(r, behind))[context(r.prompt)]
    np.testing.assert_allclose(of_context(r, r.primary_scores(scoring, behind)), expected, atol=1e-6)


def test_joint_scores_of_the_primary_are_its_full_prefill_attention(qwen2):
    cfg, params = qwen2
    r = request(qwen2)
    layers, _ = by_hand(params, cfg, r.prompt.ids)
    expected = np.mean([layer.weights[-1].mean(0) for layer in layers], 0)[context(r.prompt)]
    np.testing.assert_allclose(of_context(r, r.primary_scores(Scoring("all", "last", context="joint"), "shared")),
                               expected, atol=1e-5)


@pytest.mark.parametrize("reduce", ["mean", "last", "max"])
def test_alone_scores_hold_queries_that_saw_no_context_against_the_context_keys(qwen2, reduce):
    cfg, params = qwen2
    r = request(qwen2)
    prefix = len(r.prompt.prefix)
    layers, _ = by_hand(params, cfg, [*r.prompt.prefix, *r.prompt.question])
    expected = 0
    for index in (1, cfg.num_layers - 1):
        q = decoder.project(layers[index].x[prefix:], params.layers[index], cfg)[0].swapaxes(0, 1)
        q = rotate(q, jnp.arange(r.prompt.question_start, len(r.prompt.ids)), cfg.rope)
        keys = jnp.repeat(cache_of(r, "shared").k[index][:, context(r.prompt)], cfg.num_heads // cfg.num_kv_heads, 0)
        s = np.asarray(jnp.einsum("nqh,nsh->qns", q, keys, precision="highest")) * cfg.head_dim**-0.5
        p = np.exp(s - s.max(-1, keepdims=True))
        p = (p / p.sum(-1, keepdims=True)).mean(1)
        expected += {"mean": p.mean(0), "last": p[-1], "max": p.max(0)}[reduce] / 2
    scoring = Scoring(layers=(1, -1), rows=reduce, context="alone")
    np.testing.assert_allclose(of_context(r, r.primary_scores(scoring, "shared")), expected, atol=1e-5)


@pytest.mark.parametrize("behind", ["shared", "none"])
def test_value_deviation_is_the_squared_distance_of_fresh_and_cached_values(qwen2, behind):
    cfg, params = qwen2
    r = request(qwen2)
    fresh = by_hand(params, cfg, r.prompt.ids)[0][1].v[context(r.prompt)]
    before = list(r.prompt.prefix) if behind == "shared" else []
    cached = [by_hand(params, cfg, [*before, *c.ids])[0][1].v[len(before):] for c in r.prompt.chunks]
    off = of_context(r, r.value_deviation(1, behind))
    np.testing.assert_allclose(off, ((np.concatenate(cached) - fresh) ** 2).sum((1, 2)), atol=1e-4)
    first = r.prompt.chunk_lengths[0]
    assert (off[:first].max() < 1e-6) == (behind == "shared") and off[first:].min() > 0


def test_early_scores_sum_the_heads_logits_before_one_softmax_a_row(qwen2):
    cfg, params = qwen2
    r = request(qwen2)
    layer = by_hand(params, cfg, r.prompt.ids)[0][1]
    question = np.arange(r.prompt.question_start, len(r.prompt.ids))
    q = np.asarray(layer.q)[question].reshape(len(question), -1)
    k = np.repeat(np.asarray(layer.k), cfg.num_heads // cfg.num_kv_heads, 1).reshape(len(r.prompt.ids), -1)
    s = np.where(np.arange(len(k)) <= question[:, None], q @ k.T / np.sqrt(q.shape[1]), -np.inf)
    p = np.exp(s - s.max(1, keepdims=True))
    expected = (p / p.sum(1, keepdims=True)).sum(0)[context(r.prompt)]
    np.testing.assert_allclose(of_context(r, r.early_scores(1)), expected, atol=1e-4)


def test_look_ahead_scores_are_the_pooled_attention_of_drafted_tokens(qwen2):
    cfg, params = qwen2
    r = request(qwen2)
    ids, steps = list(r.prompt.ids), []
    for _ in range(3):
        ids.append(int(by_hand(params, cfg, ids)[1][-1].argmax()))
        heads = np.concatenate([layer.weights[-1] for layer in by_hand(params, cfg, ids)[0]])
        pooled = [np.convolve(w, np.full(5, 1 / 5), "same") for w in heads[:, context(r.prompt)]]
        steps.append(np.max(pooled, 0))
    np.testing.assert_allclose(of_context(r, r.aux_lookahead(3, 5)), np.mean(steps, 0), atol=1e-5)
    drafted = ids[len(r.prompt.ids) :]
    ended = request(qwen2, stop_ids=(drafted[0],))  # the first token always counts
    np.testing.assert_allclose(of_context(ended, ended.aux_lookahead(3, 5)), steps[0], atol=1e-5)


def test_a_signal_is_computed_once_and_what_it_loaded_serves_what_follows(qwen2, monkeypatch):
    r = request(qwen2)
    loaded, feed = [], r.primary.feed
    monkeypatch.setattr(r.primary, "feed", lambda *args: loaded.append(args) or feed(*args))
    first, again = (r.value_deviation(1, "shared") for _ in range(2))
    scores = r.primary_scores(Scoring(layers="all"), "shared")
    execute(r, Plan(np.zeros(r.prompt.context_tokens, bool)), "shared")
    assert first is again and len(scores) == len(first) and len(loaded) == 1


@pytest.mark.parametrize(("share", "expected"), [
    (0.0, ["question", "primary's caches", 0, 1, "last_span_scores", "primary's caches"]),
    (0.5, ["question", 0, 1, "refine", "primary's caches"]),
])
def test_the_primarys_caches_follow_the_aux_models_and_all_that_scoring_sends(qwen2, monkeypatch, share, expected):
    r, seen, take = request(qwen2, aux=qwen2), [], ResidentFeed.take
    monkeypatch.setattr(ResidentFeed, "take", lambda feed, number: seen.append(number) or take(feed, number))
    for name in ("last_span_scores", "refine"):
        program = getattr(online, name)
        monkeypatch.setattr(online, name, lambda *args, name=name, program=program: seen.append(name) or program(*args))
    monkeypatch.setattr(r.aux, "release", lambda: seen.append("question"), raising=False)
    monkeypatch.setattr(r.primary, "release", lambda: seen.append("primary's caches"), raising=False)
    scoring = Scoring(layers="all", second_pass=share)
    r.ask_aux(scoring)
    assert seen == expected[:1]
    r.aux_scores(scoring)
    assert seen == expected


def test_what_is_made_aside_runs_in_another_thread_where_there_are_any(qwen2):
    inline = request(qwen2)
    assert inline.aside(current_thread)() is current_thread()
    with ThreadPoolExecutor(1) as pool:
        threaded = Request(inline.primary, lambda: inline.aux, pool)
        assert threaded.aside(current_thread)() is not current_thread()
        with pytest.raises(BadInput, match="wrong"):
            threaded.aside(Mock(side_effect=BadInput("wrong")))()


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_that_the_model_lacks_is_refused(qwen2, layer):
    with pytest.raises(BadInput, match=f"layer={layer} .* 0 to 2"):
        request(qwen2).early_scores(layer)


def test_average_pool_counts_what_is_beyond_the_ends_as_zero():
    x = np.array([[1.0, 2, 3, 4], [0, 0, 9, 0]], np.float32)
    np.testing.assert_allclose(average_pool(x, 3), [[1, 2, 3, 7 / 3], [0, 3, 3, 3]], rtol=1e-6)


# -------------------------------------------------------------------- plans

def some(r, *tokens: int) -> np.ndarray:
    return np.isin(np.arange(r.prompt.context_tokens), tokens)


@pytest.mark.parametrize("options", [{"heads_of_chunks": 2}, {"grouping": Sentences(5)}, {"prefix": "none"}], ids=str)
@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_rows_made_together_with_a_selection_are_those_of_its_mask(qwen2, ratio, options):
    r = request(qwen2)
    method = AuxGuided(Budget(ratio=ratio), **options)
    plan = method.plan(r)
    chosen = select(np.asarray(plan.scores), r.prompt.chunk_lengths, method.budget, method.grouping, r.prompt.chunks,
                    method.heads_of_chunks)
    np.testing.assert_array_equal(of_context(r, plan.recompute), chosen)
    assert plan.rows is not None and plan.fetched(r.prompt.context_tokens).rows is None
    one, two = (execute(r, p, method.caches) for p in (dataclasses.replace(plan, rows=None), plan))
    for a, b in zip(*(jax.tree.leaves((done.logits, done.cache)) for done in (one, two)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dense", [0, 1, 2, 3])
def test_dense_layers_have_fresh_keys_and_values_for_every_token(qwen2, dense):
    cfg, params = qwen2
    r = request(qwen2)
    chosen = some(r, 3, 4, 29, 50, 70)
    plan = Plan(chosen, dense_layers=dense)
    done = execute(r, plan, "none")
    cache, (_, full) = cache_of(r, "none"), full_prefill(params, cfg, r.prompt.ids, SLOTS)
    mixed = KVCache((*full.k[:dense], *cache.k[dense:]), (*full.v[:dense], *cache.v[dense:]))
    at = [*(len(r.prompt.prefix) + np.flatnonzero(chosen)), *range(r.prompt.question_start, len(r.prompt.ids))]
    expected, repaired = rows(params, cfg, r.prompt.ids[at], at, mixed)
    assert max_diff(done.logits, expected) < 1e-4
    for ours, theirs in zip(stacked(done.cache), stacked(repaired), strict=True):
        assert max_diff(ours, theirs) < 1e-4
    assert int(done.tail.slot) == int(done.tail.position) == len(r.prompt.ids)


def test_what_a_request_remembers_outlives_a_cache_that_was_given_away(qwen2):
    r = request(qwen2)
    plan = Plan(some(r, 5, 40), dense_layers=2)
    first = execute(r, plan, "none")
    expected = np.asarray(first.logits)
    for layer in (*first.cache.k, *first.cache.v):
        layer.delete()
    assert max_diff(execute(r, plan, "none").logits, expected) == 0


def test_dropped_tokens_leave_no_trace_and_the_others_keep_their_positions(qwen2):
    cfg, params = qwen2
    r = request(qwen2)
    kept = np.arange(r.prompt.context_tokens) % 3 == 1
    plan = Plan(kept, drop=True)
    done = execute(r, plan, None)
    at = [*range(len(r.prompt.prefix)), *(len(r.prompt.prefix) + np.flatnonzero(kept)),
          *range(r.prompt.question_start, len(r.prompt.ids))]
    answer = [7, 8, 9]
    _, logits = by_hand(params, cfg, [*r.prompt.ids[at], *answer], [*at, *(len(r.prompt.ids) + np.arange(3))])
    assert max_diff(done.logits, logits[-4]) < 1e-4
    assert (int(done.tail.slot), int(done.tail.position)) == (len(at), len(r.prompt.ids))
    assert max_diff(continued(r, done, plan, answer), logits[-3:]) < 1e-4


@pytest.mark.parametrize("behind, first_stale", [("shared", 1), ("none", 0)])
def test_a_discount_takes_weight_from_stale_tokens_also_for_every_decoded_token(qwen2, behind, first_stale):
    cfg, params = qwen2
    r = request(qwen2)
    chosen, prefix, answer = some(r, 3, 4, 29, 50, 70), len(r.prompt.prefix), [7, 8, 9]
    plan = Plan(chosen, discount=Discount.of(r.prompt, behind, 1.5))
    done = execute(r, plan, behind)
    stale = ~chosen & (np.arange(len(chosen)) >= sum(r.prompt.chunk_lengths[:first_stale]))
    bias = np.zeros(SLOTS, np.float32)
    bias[context(r.prompt)] = np.where(stale, -1.5, 0)
    cache = cache_of(r, behind)
    asked = range(r.prompt.question_start, len(r.prompt.ids) + len(answer))
    at = np.array([*(prefix + np.flatnonzero(chosen)), *asked], np.int32)
    x = decoder.embed(params, np.array([*r.prompt.ids, *answer])[at])
    for layer, *kv in zip(params.layers, cache.k, cache.v, strict=True):
        q, (k, v) = rows_over_cached(x, layer, cfg, at, kv)
        x = decoder.finish(x, row_attention_reference(q, k, v, at, bias), layer, cfg)
    expected = decoder.logits(params, cfg, x)[-4:]
    assert max_diff(done.logits, expected[0]) < 1e-4
    assert max_diff(continued(r, done, plan, answer), expected[1:]) < 1e-4
    assert max_diff(execute(r, Plan(chosen), behind).logits, expected[0]) > 1e-3


def test_a_discount_of_one_chunk_behind_the_shared_prefix_changes_nothing(qwen2):
    cfg, params = qwen2
    r = request(qwen2, lengths=(5, 40, 9))
    plan = Plan(np.zeros(40, bool), discount=Discount.of(r.prompt, "shared", 2.0))
    assert max_diff(execute(r, plan, "shared").logits, full_prefill(params, cfg, r.prompt.ids, SLOTS)[0]) < 1e-4


def ape_by_hand(r, answer, reshape):
    """Logits of the question's last row and of an answer's, by APE's own formulation: two attentions, merged."""
    cfg, params = r.primary.model.config, r.primary.model.params
    prefix, group = len(r.prompt.prefix), cfg.num_heads // cfg.num_kv_heads
    alone = [by_hand(params, cfg, [*r.prompt.prefix, *c.ids])[0] for c in r.prompt.chunks]
    tokens = [*r.prompt.question, *answer]
    positions = prefix + max(r.prompt.chunk_lengths) + jnp.arange(len(tokens))
    x = decoder.embed(params, jnp.asarray(tokens))
    for index, layer in enumerate(params.layers):
        q, k, v = decoder.project(x, layer, cfg)
        q, k = (rotate(y.swapaxes(0, 1), positions, cfg.rope).swapaxes(0, 1) for y in (q, k))
        first, parts = alone[0][index], []
        chunks = [jnp.concatenate([getattr(a[index], part)[prefix:] for a in alone]) for part in "kv"]
        for keys, values, temperature, causal in (
                (*chunks, reshape.temperature, False),
                (jnp.concatenate([first.k[:prefix], k]), jnp.concatenate([first.v[:prefix], v]), 1.0, True)):
            s = jnp.einsum("tnh,snh->tns", q, jnp.repeat(keys, group, 1), precision="highest")
            s *= cfg.head_dim**-0.5 / temperature
            if causal:
                s = jnp.where(jnp.tri(len(tokens), len(keys), prefix, dtype=bool)[:, None], s, -jnp.inf)
            lse = np.logaddexp.reduce(np.asarray(s), -1)
            parts.append((lse, jnp.einsum("tns,snh->tnh", np.exp(s - lse[..., None]), jnp.repeat(values, group, 1),
                                          precision="highest")))
        (inside, a), (other, b) = parts
        w = np.stack([inside * reshape.scale * reshape.temperature, other])
        w = np.exp(w - np.logaddexp.reduce(w, 0))
        x = decoder.finish(x, w[0][..., None] * a + w[1][..., None] * b, layer, cfg)
    return decoder.logits(params, cfg, x)[len(r.prompt.question) - 1 :]


@pytest.mark.parametrize("reshape", [Reshape(0.9, 0.9), Reshape(0.5, 1.4), Reshape(1.0, 1.0)], ids=str)
def test_reshaped_attention_is_apes_also_for_every_decoded_token(qwen2, reshape):
    r = request(qwen2)
    plan = Plan(np.zeros(r.prompt.context_tokens, bool), reshape=reshape)
    done, answer = execute(r, plan, "shared"), [7, 8, 9]
    expected = ape_by_hand(r, answer, reshape)
    assert max_diff(done.logits, expected[0]) < 1e-4
    assert max_diff(continued(r, done, plan, answer), expected[1:]) < 1e-4


def test_a_plain_reshape_of_one_chunk_is_full_prefill(qwen2):
    cfg, params = qwen2
    r = request(qwen2, lengths=(5, 40, 9))
    plan = Plan(np.zeros(40, bool), reshape=Reshape(1.0, 1.0))
    assert max_diff(execute(r, plan, "shared").logits, full_prefill(params, cfg, r.prompt.ids, SLOTS)[0]) < 1e-4


def test_parallel_chunks_share_their_positions_and_the_question_follows_the_longest(qwen2):
    r = request(qwen2, lengths=(2, 3, 5, 4, 6))
    np.testing.assert_array_equal(parallel_positions(r.prompt, 22), [
        0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12, 13, 14])


@pytest.mark.parametrize("dtype, near", [(jnp.float32, 1e-5), (jnp.bfloat16, 0.03)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("T", [1, 5, 70])
def test_reshaping_by_one_and_one_is_row_attention(T, dtype, near):
    cfg, rng = TINY["qwen2"], np.random.default_rng(T)
    q = jnp.asarray(rng.standard_normal((T, cfg.num_heads, cfg.head_dim)), dtype)
    k, v = jnp.asarray(rng.standard_normal((2, cfg.num_kv_heads, 90, cfg.head_dim)), dtype)
    slots = np.append(np.arange(20, 20 + T - T // 5), np.full(T // 5, -1)).astype(np.int32)
    for between in ((0, 0), (3, 17)):
        context = Context.of(*between, Reshape(1.0, 1.0))
        for bias in (None, np.linspace(-3, 1, 90, dtype=np.float32)):
            expected = row_attention_reference(q, k, v, slots, bias)
            assert max_diff(reshaped(q, k, v, slots, context, bias), expected) < near


@pytest.mark.parametrize("wrong", [dict(temperature=0.0), dict(scale=-1.0), dict(scale=float("inf"))], ids=str)
def test_a_reshape_out_of_range_is_refused(wrong):
    with pytest.raises(BadInput, match=next(iter(wrong))):
        Reshape(**wrong)


def test_a_plan_does_one_thing():
    with pytest.raises(ValueError, match="one of"):
        Plan(np.zeros(3, bool), drop=True, dense_layers=1)
