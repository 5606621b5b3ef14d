"""CacheClip's own options on the engine: what each selects, what stays on the device, and what compiles."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from cacheclip_jax import Budget, CacheClip, Groups, Passage, Ranking, Scoring, Sentences
from cacheclip_jax.errors import BadInput, ContextTooLong
from cacheclip_jax.methods import AuxGuided, make
from cacheclip_jax.model.load import Model, load_model
from cacheclip_jax.ranking import rank
from cacheclip_jax.select import select
from cacheclip_jax.store import ChunkStore
from tests.engine import OTHER, QUESTION, TEXTS

EVERYTHING = AuxGuided(
    Budget(ratio=0.3), Scoring(rows=4, values=True, second_pass=0.2, look_ahead=3), Sentences(longest=12),
    Ranking(skip_first=1, skip_formatting=True, chunk_power=-0.5, smooth=3), heads_of_chunks=2)


@pytest.fixture(scope="module")
def models(pair) -> tuple[Model, ...]:
    return tuple(load_model(path, dtype="float32") for path in pair)


@pytest.fixture(scope="module")
def same(models) -> CacheClip:
    """A model that scores for itself, over a store that holds TEXTS."""
    clip = CacheClip(models[0], models[0], ChunkStore.open("memory://cacheclip-same"))
    clip.index(map(Passage.make, TEXTS))
    return clip


@pytest.fixture(scope="module", params=["another tokenizer", "the same model"])
def clip(request, models, same) -> CacheClip:
    """With another tokenizer, scores go to the primary's tokens on the host."""
    if request.param == "the same model":
        return same
    clip = CacheClip(*models, ChunkStore.open("memory://cacheclip-pair"))
    clip.index(map(Passage.make, TEXTS))
    return clip


@pytest.mark.parametrize("method", [
    AuxGuided(Budget(ratio=0.3), grouping=Sentences(longest=16)), AuxGuided(Budget(tokens=40), heads_of_chunks=3),
    AuxGuided(ranking=Ranking(chunk_power=-1, smooth=5, lexical=0.1)), AuxGuided(ranking=Ranking()),
    AuxGuided(Budget(mass=0.5, at_least=0.2, at_most=0.4)), AuxGuided(grouping=Groups(4, "max")), EVERYTHING],
    ids=lambda m: f"{m.grouping}{m.ranking}{m.heads_of_chunks}")
def test_a_plan_is_the_scores_ranked_and_selected(clip, method):
    prefill = clip.prefill(QUESTION, TEXTS[:4], method=method)
    plan, prompt = prefill.plan, prefill.prompt
    ranks = np.asarray(rank(plan.scores, prompt.chunks, method.ranking, prompt.question))
    wanted = select(ranks, prompt.chunk_lengths, method.budget, method.grouping, prompt.chunks, method.heads_of_chunks)
    np.testing.assert_array_equal(plan.recompute, wanted)
    np.testing.assert_allclose(plan.ranked, ranks[: prompt.context_tokens], rtol=1e-6)
    target = method.budget.target(prompt.context_tokens)
    assert plan.recompute.sum() < target + method.grouping.longest


def test_nothing_waits_for_scores_where_the_tokenizers_agree(same):
    planned = same.prefill(QUESTION, TEXTS[:4], method=EVERYTHING).planned
    assert isinstance(planned.recompute, jax.Array) and planned.at_most is not None
    assert planned.at_most >= np.asarray(planned.recompute).sum()
    assert isinstance(planned.scores, jax.Array)


def test_all_that_a_request_sends_to_the_device_is_sent_explicitly(same):
    """Not as a program's argument, where it would wait behind caches that are under way."""
    for method in (AuxGuided(), AuxGuided(heads_of_chunks=2, prefix="none"), AuxGuided(scoring=weighted(same))):
        expected = same.prefill(QUESTION, TEXTS[:4], method=method)
        with jax.transfer_guard_host_to_device("disallow"):
            got = same.prefill(QUESTION, TEXTS[:4], method=method)
        np.testing.assert_array_equal(got.logits, expected.logits)


def weighted(clip) -> Scoring:
    """The default scoring with random weights of heads."""
    cfg = clip.aux.model.config
    weights = np.random.default_rng(0).random((len(Scoring().layer_indices(cfg.num_layers)), cfg.num_heads))
    return Scoring(head_weights=tuple(map(tuple, weights.tolist())))


def test_a_second_request_with_every_option_compiles_nothing(clip):
    clip.ask(QUESTION, TEXTS[:4], method=EVERYTHING, max_new_tokens=4)
    assert clip.ask(OTHER, TEXTS[3::-1], method=EVERYTHING, max_new_tokens=4).compiles == 0


@pytest.mark.parametrize("options", [dict(look_ahead=3), dict(second_pass=0.5)], ids=str)
def test_refined_scores_of_one_chunk_are_those_of_a_prefill_of_all(same, options):
    """One chunk's cache is exact: a second pass changes nothing, and the draft is the joint one."""
    def scores(chunks, **settings):
        return same.prefill(QUESTION, chunks, method=AuxGuided(scoring=Scoring(**settings))).plan.scores

    joint = {"context": "joint", **{k: v for k, v in options.items() if k != "second_pass"}}
    np.testing.assert_allclose(scores(TEXTS[:1], **options), scores(TEXTS[:1], **joint), atol=1e-5)
    assert np.abs(scores(TEXTS[:4], **options) - scores(TEXTS[:4])).max() > 1e-5


def test_even_head_weights_score_as_the_mean(same):
    heads, layers = same.aux.model.config.num_heads, Scoring().layer_indices(same.aux.model.config.num_layers)
    even = Scoring(head_weights=((1 / heads / len(layers),) * heads,) * len(layers))
    weighted, mean = (same.prefill(QUESTION, TEXTS[:4], method=AuxGuided(scoring=s)).plan.scores
                      for s in (even, Scoring()))
    np.testing.assert_allclose(weighted, mean, atol=1e-6)


def test_drafted_tokens_count_against_the_aux_model_s_positions(models):
    clip = CacheClip(models[0], models[0], ChunkStore.open("memory://cacheclip-long"))
    limit = models[0].config.max_positions
    with pytest.raises(ContextTooLong, match=f"look_ahead={limit}.*the limit is {limit}"):
        clip.prefill(QUESTION, TEXTS[:1], method=AuxGuided(scoring=Scoring(look_ahead=limit)))


def test_a_negative_number_of_heads_is_refused_and_random_groups_may_be_sentences(same):
    with pytest.raises(BadInput, match="heads_of_chunks=-1"):
        AuxGuided(heads_of_chunks=-1)
    plan = same.prefill(QUESTION, TEXTS[:4], method=make("random", Budget(ratio=0.3), grouping=Sentences())).plan
    assert round(0.3 * len(plan.recompute)) <= plan.recompute.sum() < len(plan.recompute)


def test_chunks_encoded_alone_are_repaired_to_full_prefill_by_the_same_scores(clip):
    shared, alone = (AuxGuided(Budget(ratio=0.3), prefix=prefix) for prefix in ("shared", "none"))
    first, second = (clip.prefill(QUESTION, TEXTS[:4], method=method) for method in (shared, alone))
    np.testing.assert_array_equal(first.plan.recompute, second.plan.recompute)
    assert np.abs(np.asarray(first.logits) - np.asarray(second.logits)).max() > 1e-3
    whole, full = (np.asarray(clip.prefill(QUESTION, TEXTS[:4], method=method).logits)
                   for method in (AuxGuided(Budget(ratio=1.0), prefix="none"), "full"))
    np.testing.assert_allclose(whole, full, atol=1e-4)
    with pytest.raises(BadInput, match="prefix='mine'"):
        AuxGuided(prefix="mine")
