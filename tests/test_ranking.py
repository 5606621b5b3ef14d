"""Ranking: what happens to scores before groups are ranked, each step against a few lines of numpy."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheclip_jax.errors import BadInput
from cacheclip_jax.ranking import BLOCK, Ranking, rank
from tests.test_select import lengths, scores_for, words

TEXTS = ["One two, three. - Four", "five 6 *** seven", "... eight"]


def alike(text):
    """`words`, equal ones with equal ids."""
    return replace(words(text), ids=tuple(sum(ord(c) << 8 * i for i, c in enumerate(word)) for word in text.split()))


def repeated_by_hand(question, texts):
    def runs(ids):
        return [ids[i : i + 3] for i in range(len(ids) - 2)]

    asked, everywhere = runs(question), [run for ids in texts for run in runs(ids)]
    out = []
    for ids in texts:
        own = [0.0] * len(ids)
        for i, run in enumerate(runs(ids)):
            if run in asked:
                own[i : i + 3] = [max(was, everywhere.count(run) ** -2) for was in own[i : i + 3]]
        out += own
    return np.array(out)


def by_hand(scores, lens, ranking, formatting, said):
    powered = weighed(scores, lens, ranking, formatting)
    powered = powered + ranking.lexical * powered.sum() * said
    out, first = [], 0
    for n in lens:
        own = powered[first : first + n]
        reach = ranking.smooth // 2
        out += [own[max(i - reach, 0) : i + reach + 1].mean() for i in range(n)]
        first += n
    return np.array(out)


def weighed(scores, lens, ranking, formatting):
    out, first = [], 0
    for n in lens:
        own = scores[first : first + n].astype(float)
        own[formatting[first : first + n] & ranking.skip_formatting] = 0
        own[: ranking.skip_first] = 0
        own *= own.sum() ** ranking.chunk_power if own.sum() > 0 else 1
        out.append(own)
        first += n
    return np.concatenate(out)


@settings(max_examples=60, deadline=None)
@given(lens=lengths, skip=st.integers(0, 5), power=st.sampled_from([-1.0, -0.5, 0.0, 0.5]),
       smooth=st.sampled_from([1, 3, 5, 13]), formatting=st.booleans(), lexical=st.sampled_from([0.0, 0.5, 3.0]),
       seed=st.integers(0, 9))
def test_ranks_follow_their_definition(lens, skip, power, smooth, formatting, lexical, seed):
    random = np.random.default_rng(seed)
    chunks = [alike(" ".join(random.choice(["w", "v", "-"], n))) for n in lens]
    question = alike(" ".join(random.choice(["w", "v", "-"], seed))).ids
    ranking = Ranking(skip, formatting, power, lexical, smooth)
    scores = scores_for(lens, seed)
    ranks = np.asarray(rank(scores, chunks, ranking, question))
    marks = np.concatenate([c.formatting for c in chunks])
    said = repeated_by_hand(list(question), [list(c.ids) for c in chunks])
    np.testing.assert_allclose(ranks[: sum(lens)], by_hand(scores, lens, ranking, marks, said), rtol=1e-4, atol=1e-6)
    if ranking != Ranking():
        assert not ranks[sum(lens) :].any()


def test_what_follows_the_scores_on_device_changes_nothing():
    chunks = [words(text) for text in TEXTS]
    lens = [len(c.ids) for c in chunks]
    scores, ranking = scores_for(lens, 1), Ranking(chunk_power=-1, smooth=3)
    followed = np.concatenate([scores, np.full(64 - len(scores), 9, np.float32)])
    np.testing.assert_array_equal(rank(followed, chunks, ranking, ()), rank(scores, chunks, ranking, ()))


def test_every_chunk_has_the_same_total_at_power_minus_one():
    chunks = [words(text) for text in TEXTS]
    ranks = np.asarray(rank(scores_for([len(c.ids) for c in chunks], 2), chunks, Ranking(chunk_power=-1), ()))
    ends = np.cumsum([len(c.ids) for c in chunks])
    np.testing.assert_allclose([part.sum() for part in np.split(ranks, ends)[:3]], 1, rtol=1e-5)


def test_no_ranking_leaves_the_scores_themselves():
    scores = np.ones(4, np.float32)
    assert rank(scores, [words("a b c d")], Ranking(), ()) is scores


def test_all_of_a_long_question_counts():
    """Also what lies across two of the blocks that it is compared in."""
    ids = np.random.default_rng(0).permutation(5000)[: 2 * BLOCK + 9].tolist()
    chunks = [replace(words(" ".join("w" * 9)), ids=(*ids[at : at + 4], 9001, 9002, *ids[at + 7 : at + 10]))
              for at in (0, BLOCK - 2, 2 * BLOCK - 1)]
    ranks = np.asarray(rank(np.ones(27, np.float32), chunks, Ranking(lexical=1.0), ids))
    said = np.array(repeated_by_hand(ids, [list(c.ids) for c in chunks]))
    assert said.astype(bool).tolist() == [True, True, True, True, False, False, True, True, True] * 3
    np.testing.assert_allclose(ranks[:27], 1 + 27 * said, rtol=1e-6)


def test_a_name_in_the_question_is_ranked_first_where_it_stands_once():
    chunks = [alike("at p q r is d"), alike("at p q s is e")]
    ranks = np.asarray(rank(np.ones(12, np.float32), chunks, Ranking(lexical=1.0), alike("is it at p q s ?").ids))
    assert set(np.argsort(-ranks, stable=True)[:3]) == {7, 8, 9}  # p q s


@pytest.mark.parametrize("wrong", [dict(skip_first=-1), dict(smooth=4), dict(smooth=0), dict(chunk_power=float("nan")),
                                   dict(lexical=-1.0), dict(lexical=float("inf"))])
def test_a_ranking_out_of_range_is_refused_by_name(wrong):
    with pytest.raises(BadInput, match=next(iter(wrong))):
        Ranking(**wrong)
