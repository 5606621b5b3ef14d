"""Scores: attention of the question's rows, its reductions, and the map between tokenisations."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheclip_jax.assemble import KVCache
from cacheclip_jax.errors import BadInput
from cacheclip_jax.model import decoder
from cacheclip_jax.model.rope import rotate
from cacheclip_jax.online import ask
from cacheclip_jax.recompute import embed_rows
from cacheclip_jax.score import (
    SCORINGS,
    Scoring,
    context_scores,
    last_span_scores,
    layer_mean,
    map_scores,
    score_span,
)
from tests.conftest import assembled, full_prefill, max_diff, random_prompt, scores_over
from tests.resident import ResidentSide


@jax.default_matmul_precision("highest")
def attention_by_hand(params, cfg, ids, layer_index):
    """[T, N, T] attention of a whole prompt at one layer, written with dense masks."""
    positions = jnp.arange(len(ids))
    x = decoder.embed(params, jnp.asarray(ids))
    for index in range(layer_index + 1):
        layer = params.layers[index]
        q, k, v = decoder.project(x, layer, cfg)
        q = rotate(q.swapaxes(0, 1), positions, cfg.rope)
        k = jnp.repeat(rotate(k.swapaxes(0, 1), positions, cfg.rope), cfg.num_heads // cfg.num_kv_heads, 0)
        v = jnp.repeat(v.swapaxes(0, 1), cfg.num_heads // cfg.num_kv_heads, 0)
        s = jnp.einsum("nth,nsh->nts", q, k) * cfg.head_dim**-0.5
        weights = jnp.exp(s - s.max(-1, keepdims=True)) * (positions <= positions[:, None])
        weights = weights / weights.sum(-1, keepdims=True)
        x = decoder.finish(x, jnp.einsum("nts,nsh->tnh", weights, v), layer, cfg)
    return weights.swapaxes(0, 1)


def asked_over_cache(params, cfg, chunks, question, slots=64, pad=4):
    """What `score` takes of a question behind prefix and chunks: ids, positions, last row, cache."""
    start = sum(map(len, chunks))
    cache = assembled(params, cfg, chunks[0], chunks[1:], slots)
    ids = np.concatenate([question, np.zeros(pad, np.int32)])
    positions = np.concatenate([start + np.arange(len(question)), np.full(pad, -1)]).astype(np.int32)
    return ids, positions, np.int32(len(question) - 1), cache


@pytest.mark.parametrize("scored", [(True, True), (False, True)])
@pytest.mark.parametrize("rows", ["last", "mean"])
def test_the_last_span_scores_as_a_whole_one_and_computes_nothing_behind_its_last_weights(qwen2, scored, rows):
    cfg, params = qwen2
    side, scoring = ResidentSide(qwen2), Scoring(layers=(0, 1), rows=rows)
    feed = side.feed("shared", 2)
    asked = ask(side, scoring, feed)

    def given():
        return (embed_rows(params, asked.ids), params.layers[:2], cfg, scoring.span_key, scored, asked.positions,
                asked.known, feed.take(0), feed.where, asked.total, "blocked", None)

    end = asked.count, asked.prefix, 128
    expected = context_scores(layer_mean(score_span(*given())[1], None, 2), asked.prefix, 128)
    np.testing.assert_array_equal(last_span_scores(*given(), *end), expected)
    whole, last = (f.lower(*args).compile().cost_analysis()["flops"]
                   for f, args in ((score_span, given()), (last_span_scores, (*given(), *end))))
    finish = 2 * len(asked.ids) * cfg.d_model * (cfg.num_heads * cfg.head_dim + 3 * cfg.d_mlp)
    assert last < whole - finish


@pytest.mark.parametrize("how", ["blocked", "mosaic_gpu"])  # the second leaves so few rows to `dense`, on a CPU too
@pytest.mark.parametrize("rows", ["mean", "max", "last", 4, 40])
@pytest.mark.parametrize("heads", ["mean", "max"])
def test_scores_are_the_question_rows_attention_reduced_over_rows_heads_and_layers(qwen2, rows, heads, how):
    cfg, params = qwen2
    prefix, chunk, question = random_prompt(cfg, (5, 30, 9))
    ids = np.concatenate([prefix, chunk, question])
    asked = slice(len(ids) - len(question), len(ids))
    expected = 0
    for index in (0, 2):
        seen = attention_by_hand(params, cfg, ids, index)[asked]
        seen = seen.mean(1) if heads == "mean" else seen.max(1)
        last = {"last": 1, "mean": 9, "max": 9}.get(rows, rows)
        expected += (seen.max(0) if rows == "max" else seen[-last:].mean(0)) / 2
    scoring = Scoring(layers=(0, -1), rows=rows, heads=heads)
    scores = scores_over(params, cfg, scoring, *asked_over_cache(params, cfg, [prefix, chunk], question), how)
    assert max_diff(scores[: len(ids)], expected) < 1e-5
    assert np.all(np.asarray(scores[len(ids) :]) == 0)


def test_value_norms_weigh_each_head_s_attention(qwen2):
    cfg, params = qwen2
    prefix, chunk, question = random_prompt(cfg, (5, 30, 9))
    ids = np.concatenate([prefix, chunk, question])
    *rest, cache = asked_over_cache(params, cfg, [prefix, chunk], question)
    scores = scores_over(params, cfg, Scoring(layers=(1,), rows="last", values=True), *rest, cache)
    norms = np.repeat(np.linalg.norm(np.asarray(cache.v[1]), axis=-1), cfg.num_heads // cfg.num_kv_heads, 0)
    expected = (attention_by_hand(params, cfg, ids, 1)[-1, :, :35] * norms[:, :35]).mean(0)
    assert max_diff(scores[:35], expected) < 1e-5


def test_head_weights_replace_the_mean_over_layers_and_heads(qwen2):
    cfg, params = qwen2
    prefix, chunk, question = random_prompt(cfg, (5, 30, 9))
    ids = np.concatenate([prefix, chunk, question])
    given = np.random.default_rng(0).random((2, cfg.num_heads))
    scoring = Scoring(layers=(0, 2), rows="last", head_weights=tuple(map(tuple, given.tolist())))
    parts = asked_over_cache(params, cfg, [prefix, chunk], question)
    scores = scores_over(params, cfg, scoring, *parts)
    seen = [attention_by_hand(params, cfg, ids, index)[-1] for index in (0, 2)]
    assert max_diff(scores[: len(ids)], sum(w @ s for w, s in zip(given, seen, strict=True))) < 1e-5
    even = Scoring(layers=(0, 2), head_weights=((1 / 8,) * 4,) * 2)
    by_mean = scores_over(params, cfg, Scoring(layers=(0, 2)), *parts)
    assert max_diff(scores_over(params, cfg, even, *parts), by_mean) < 1e-6


def test_head_weights_that_do_not_fit_the_model_are_refused(qwen2):
    with pytest.raises(BadInput, match=r"1 layers of \[3\]: with layers='late' this model takes 1 layers of 4"):
        Scoring(head_weights=((0.1, 0.2, 0.3),)).weights(qwen2[0])


def test_settings_that_only_choose_programs_share_them():
    plain = Scoring(rows=4, values=True)
    assert replace(plain, look_ahead=8, drafts="max", second_pass=0.1, head_weights=((1.0,),)).key == plain.key
    assert replace(plain, context="joint").key == plain.key != replace(plain, rows=2).key
    assert replace(plain, layers="last").span_key == plain.span_key != replace(plain, rows=2).span_key


def test_a_token_whose_key_matches_the_question_gets_the_highest_score(qwen2):
    cfg, params = qwen2
    prefix, chunk, question = random_prompt(cfg, (5, 30, 9))
    ids = np.concatenate([prefix, chunk, question])
    _, cache = full_prefill(params, cfg, ids, 64)
    layer = params.layers[0]
    last = len(ids) - 1
    q = rotate(decoder.project(decoder.embed(params, jnp.asarray(ids)), layer, cfg)[0].swapaxes(0, 1),
               jnp.arange(len(ids)), cfg.rope)
    group = cfg.num_heads // cfg.num_kv_heads
    planted = cache.k[0].at[:, 17].set(20 * q.reshape(cfg.num_kv_heads, group, len(ids), -1).mean(1)[:, last])
    scores = scores_over(params, cfg, Scoring(layers=(0,)), question, np.arange(len(prefix) + len(chunk), len(ids)),
                   np.int32(len(question) - 1), KVCache((planted, *cache.k[1:]), cache.v))
    assert int(np.argmax(scores)) == 17


def test_layer_names_resolve_as_documented():
    assert Scoring(layers="late").layer_indices(24) == tuple(range(12, 23))
    assert Scoring(layers="last").layer_indices(24) == (23,)
    assert Scoring(layers=(-1, 3)).layer_indices(24) == (3, 23)
    assert Scoring(layers="late").layer_indices(1) == (0,)
    assert SCORINGS["paper"] == Scoring(layers="last", rows="mean", heads="mean", context="cached")


@pytest.mark.parametrize("wrong", [{"rows": "median"}, {"heads": "sum"}, {"context": "none"}, {"layers": "early"},
                                   {"rows": 0}, {"drafts": "last"}, {"look_ahead": -1}, {"second_pass": 1.5},
                                   {"second_pass": 0.1, "context": "joint"}, {"look_ahead": 2, "context": "alone"},
                                   {"rows": 2, "context": "alone"}, {"head_weights": ((-1.0,),)},
                                   {"heads": "max", "head_weights": ((1.0,),)}])
def test_an_unknown_setting_is_refused_by_name(wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(BadInput, match=f"{name}.*{re.escape(str(value).strip('(,)'))}"):
        Scoring(**wrong)


def test_a_layer_that_the_model_lacks_is_refused():
    with pytest.raises(BadInput, match="layers 0 to 23"):
        Scoring(layers=(24,)).layer_indices(24)


@st.composite
def tilings(draw):
    length = draw(st.integers(1, 40))
    def tiling():
        cuts = sorted(draw(st.sets(st.integers(1, length - 1)))) if length > 1 else []
        return tuple(zip([0, *cuts], [*cuts, length], strict=True))
    return tiling(), tiling()


@given(tilings(), st.integers(0, 99))
def test_mapping_keeps_the_mass_and_gives_it_to_overlapping_tokens_only(spans, seed):
    source, target = spans
    scores = np.random.default_rng(seed).random(len(source))
    mapped = map_scores(scores, source, target)
    assert np.isclose(mapped.sum(), scores.sum(), rtol=1e-5)
    one = np.zeros(len(source))
    one[seed % len(source)] = 1
    start, end = source[seed % len(source)]
    for (a, b), value in zip(target, map_scores(one, source, target), strict=True):
        assert (value > 1e-9) == (a < end and start < b)


def test_a_character_of_several_tokens_shares_its_score_among_them():
    np.testing.assert_allclose(map_scores(np.array([1.0]), ((0, 1),), ((0, 1), (0, 1))), [0.5, 0.5])
    np.testing.assert_allclose(map_scores(np.array([0.2, 0.4, 1.0]), ((0, 1), (0, 1), (1, 3)), ((0, 3),)), [1.6])
    mapped = map_scores(np.array([0.3, 0.9]), ((0, 2), (2, 3)), ((0, 2), (1, 2), (1, 3)))
    np.testing.assert_allclose(mapped, [0.2, 0.05, 0.95], atol=1e-6)


def test_mapping_between_equal_tokenisations_is_the_identity():
    scores = np.array([0.3, 0.1, 0.6], np.float32)
    assert map_scores(scores, ((0, 2), (2, 3), (3, 9)), ((0, 2), (2, 3), (3, 9))) is scores
