"""Scores: attention of the question's rows, its reductions, and the map between tokenisations."""

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
from cacheclip_jax.score import SCORINGS, Scoring, map_scores, score
from tests.conftest import assembled, full_prefill, max_diff, random_prompt


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


@pytest.mark.parametrize("rows", ["mean", "max", "last"])
@pytest.mark.parametrize("heads", ["mean", "max"])
def test_scores_are_the_question_rows_attention_reduced_over_rows_heads_and_layers(qwen2, rows, heads):
    cfg, params = qwen2
    prefix, chunk, question = random_prompt(cfg, (5, 30, 9))
    ids = np.concatenate([prefix, chunk, question])
    asked = slice(len(ids) - len(question), len(ids))
    expected = 0
    for index in (0, 2):
        seen = attention_by_hand(params, cfg, ids, index)[asked]
        seen = seen.mean(1) if heads == "mean" else seen.max(1)
        expected += (seen[-1] if rows == "last" else seen.mean(0) if rows == "mean" else seen.max(0)) / 2
    cache = assembled(params, cfg, prefix, [chunk], 64)
    padded = np.concatenate([question, np.zeros(4, np.int32)])
    positions = np.concatenate([np.arange(len(ids))[asked], np.full(4, -1)]).astype(np.int32)
    scoring = Scoring(layers=(0, -1), rows=rows, heads=heads)
    scores = score(params, cfg, scoring, padded, positions, np.int32(len(question) - 1), cache)
    assert max_diff(scores[: len(ids)], expected) < 1e-5
    assert np.all(np.asarray(scores[len(ids) :]) == 0)


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
    scores = score(params, cfg, Scoring(layers=(0,)), question, np.arange(len(prefix) + len(chunk), len(ids)),
                   np.int32(len(question) - 1), KVCache((planted, *cache.k[1:]), cache.v))
    assert int(np.argmax(scores)) == 17


def test_layer_names_resolve_as_documented():
    assert Scoring(layers="late").layer_indices(24) == tuple(range(12, 23))
    assert Scoring(layers="last").layer_indices(24) == (23,)
    assert Scoring(layers=(-1, 3)).layer_indices(24) == (3, 23)
    assert Scoring(layers="late").layer_indices(1) == (0,)
    assert SCORINGS["paper"] == Scoring(layers="last", rows="mean", heads="mean", context="cached")


@pytest.mark.parametrize("wrong", [{"rows": "median"}, {"heads": "sum"}, {"context": "none"}, {"layers": "early"}])
def test_an_unknown_setting_is_refused_by_name(wrong):
    with pytest.raises(BadInput, match=next(iter(wrong.values()))):
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
