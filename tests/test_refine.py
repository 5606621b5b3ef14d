"""Refined scores: look-ahead and the second pass, each against the same thing done step by step."""

from types import SimpleNamespace

import numpy as np
import pytest

from cacheclip_jax.model import decoder
from cacheclip_jax.model.tokenizer import Encoded
from cacheclip_jax.prompt import Prompt
from cacheclip_jax.refine import look_ahead, refine
from cacheclip_jax.score import Scoring, embed_and_score
from cacheclip_jax.select import Budget, select
from cacheclip_jax.side import bucketed
from tests.conftest import assembled, full_prefill, max_diff, random_prompt, rows, scores_over
from tests.test_score import asked_over_cache, attention_by_hand

PARTS = (5, 30, 20, 9)  # prefix, two chunks, question


def drafted(params, cfg, ids, count):
    """Greedy tokens after a prompt, each from a full prefill."""
    out = []
    for _ in range(count):
        out.append(int(full_prefill(params, cfg, [*ids, *out])[0].argmax()))
    return out


def first_pass(params, cfg, parts, scoring):
    """The question's ids, positions and last row; its rows, their scores and the cache with them in it."""
    *question, cache = asked_over_cache(params, cfg, parts[:-1], parts[-1], 128)
    return question, embed_and_score(params, cfg, scoring, *question, cache, "blocked", scoring.weights(cfg))


def prompt_of(parts) -> Prompt:
    prefix, *chunks, question = (tuple(p.tolist()) for p in parts)
    return Prompt(prefix, tuple(Encoded(c, tuple((i, i + 1) for i in range(len(c))), "x" * len(c)) for c in chunks),
                  question)


def side_of(params, cfg, parts) -> SimpleNamespace:
    """What refining looks at of a model's side."""
    model = SimpleNamespace(params=params, asking=params, config=cfg, attention=SimpleNamespace(name="blocked"),
                            name="tiny", tokenizer=SimpleNamespace(eos_ids=()))
    return SimpleNamespace(model=model, prompt=prompt_of(parts), sharding=params.embed.sharding, rows=bucketed)


@pytest.mark.parametrize("drafts", ["mean", "max"])
def test_look_ahead_is_the_attention_of_greedily_drafted_tokens(qwen2, drafts):
    cfg, params = qwen2
    parts = random_prompt(cfg, (5, 30, 9))  # of one chunk: assembled and full prefill are the same
    ids = np.concatenate(parts)
    scoring = Scoring(layers=(0, 2), look_ahead=3)
    question, (x, _, cache) = first_pass(params, cfg, parts, scoring)
    none = np.zeros(0, np.int32)
    scores = look_ahead(params, cfg, scoring.key, x, question[2], np.int32(len(ids)), cache, np.int32(3), none, drafts)
    whole = [*ids, *drafted(params, cfg, ids, 3)]
    seen = sum(attention_by_hand(params, cfg, whole, index)[-3:].mean(1) for index in (0, 2)) / 2
    assert max_diff(scores[: len(whole)], seen.mean(0) if drafts == "mean" else seen.max(0)) < 1e-5


def test_an_end_token_ends_the_draft(qwen2):
    cfg, params = qwen2
    parts = random_prompt(cfg, (5, 30, 9))
    ids, scoring = np.concatenate(parts), Scoring(layers=(0, 2))
    question, (x, _, cache) = first_pass(params, cfg, parts, Scoring(layers=(0, 2), look_ahead=8))
    tokens = drafted(params, cfg, ids, 8)
    end = next(i for i in range(1, 8) if tokens[i] not in tokens[:i])

    def ahead(steps, ends):
        return look_ahead(params, cfg, scoring, x, question[2], np.int32(len(ids)), cache, np.int32(steps),
                          np.array(ends, np.int32), "mean")

    np.testing.assert_array_equal(ahead(8, [tokens[end]]), ahead(end, [-1]))
    assert not np.asarray(ahead(8, [tokens[0]])).any()


@pytest.mark.parametrize("look_ahead_tokens", [0, 2])
def test_a_second_pass_scores_over_the_cache_that_the_aux_repaired(qwen2, look_ahead_tokens):
    cfg, params = qwen2
    parts = random_prompt(cfg, PARTS)
    prefix, *chunks, question = parts
    # More than the first chunk's tokens, whose caches are those of a full prefill already.
    scoring = Scoring(second_pass=0.8, look_ahead=look_ahead_tokens)
    asked, (x, scores, cache) = first_pass(params, cfg, parts, scoring)
    first = np.asarray(scores)
    refined = refine(side_of(params, cfg, parts), scoring, tuple(asked), x, scores, cache)

    mask = select(first[5:55], [30, 20], Budget(ratio=0.8))
    chosen = 5 + np.flatnonzero(mask)
    _, repaired = rows(params, cfg, np.concatenate(parts)[chosen], chosen, assembled(params, cfg, prefix, chunks, 128))
    again = scores_over(params, cfg, scoring, *asked, repaired)
    if look_ahead_tokens:
        x, _, cache = embed_and_score(params, cfg, scoring, *asked, repaired)
        again += look_ahead(params, cfg, scoring.key, x, asked[2], np.int32(64), cache, np.int32(2),
                            np.zeros(0, np.int32), "mean")
    assert max_diff(refined, again) < 1e-5
    assert max_diff(refined[5:55], first[5:55]) > 1e-4


def test_a_second_pass_of_the_whole_context_scores_as_a_prefill_of_all_does(qwen2):
    cfg, params = qwen2
    parts = random_prompt(cfg, PARTS)
    scoring = Scoring(second_pass=1.0)
    asked, (x, scores, cache) = first_pass(params, cfg, parts, scoring)
    refined = refine(side_of(params, cfg, parts), scoring, tuple(asked), x, scores, cache)
    ids = np.concatenate(parts)
    late = attention_by_hand(params, cfg, ids, scoring.layer_indices(cfg.num_layers)[0])[-1].mean(0)
    assert max_diff(refined[: len(ids)], late) < 1e-5


def test_drafted_tokens_find_room_where_the_cache_has_none_left(qwen2):
    cfg, params = qwen2
    parts = random_prompt(cfg, (5, 30, 9))
    scoring = Scoring(look_ahead=6)

    def refined(slots):
        *asked, cache = asked_over_cache(params, cfg, parts[:-1], parts[-1], slots)
        x, scores, cache = embed_and_score(params, cfg, scoring, *asked, cache)
        return refine(side_of(params, cfg, parts), scoring, tuple(asked), x, scores, cache)

    assert len(refined(45)) == 45
    assert max_diff(refined(45)[:44], refined(128)[:44]) < 1e-6


def test_look_ahead_needs_all_layers_and_other_scorings_only_those_scored():
    assert Scoring(layers=(3,)).depth(24) == 4 and Scoring(layers=(3,), second_pass=0.1).depth(24) == 4
    assert Scoring(layers=(3,), look_ahead=1).depth(24) == 24
    assert [Scoring(layers=(n,)).layers_run(25) for n in (0, 1, 2, 24)] == [1, 2, 3, 25]
    for assembled_first in ({"context": "joint"}, {"second_pass": 0.1}):
        assert [Scoring(layers=(n,), **assembled_first).layers_run(25) for n in (0, 1, 2, 24)] == [2, 2, 4, 25]


def test_the_first_drafted_token_is_the_one_that_the_question_predicts(qwen2):
    cfg, params = qwen2
    parts = random_prompt(cfg, (5, 30, 9))
    question, (x, *_) = first_pass(params, cfg, parts, Scoring(look_ahead=1))
    logits = decoder.logits(params, cfg, x)[int(question[2])]
    assert max_diff(logits, full_prefill(params, cfg, np.concatenate(parts))[0]) < 1e-3
