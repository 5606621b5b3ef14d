"""Selection: whole groups, budgets, windows."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheclip_jax.errors import BadInput
from cacheclip_jax.groups import Groups, Sentences, Windows, group_ids
from cacheclip_jax.model.tokenizer import Encoded
from cacheclip_jax.select import Budget, select

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=6)


def scores_for(lens, seed):
    return np.random.default_rng(seed).random(sum(lens)).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(lens=lengths, ratio=st.floats(0, 1), size=st.sampled_from([1, 4, 8, 16]), seed=st.integers(0, 9))
def test_a_ratio_selects_whole_groups_and_at_most_one_group_more_than_asked(lens, ratio, size, seed):
    mask = select(scores_for(lens, seed), lens, Budget(ratio=ratio), Groups(size))
    groups = group_ids(lens, size)
    for g in np.unique(groups):
        assert mask[groups == g].all() or not mask[groups == g].any()
    target = round(ratio * sum(lens))
    assert target <= mask.sum() < target + size or mask.sum() == target


@settings(max_examples=30, deadline=None)
@given(lens=lengths, seed=st.integers(0, 9))
def test_selected_groups_are_the_ones_with_the_largest_sums(lens, seed):
    scores = scores_for(lens, seed)
    groups = group_ids(lens, 8)
    mask = select(scores, lens, Budget(tokens=sum(lens) // 3), Groups(8))
    sums = np.array([scores[groups == g].sum() for g in range(groups.max() + 1)])
    taken = np.array([mask[groups == g].all() for g in range(groups.max() + 1)])
    if taken.any() and not taken.all():
        assert sums[taken].min() >= sums[~taken].max() - 1e-6


@given(lens=lengths)
def test_groups_never_cross_a_chunk(lens):
    groups = group_ids(lens, 8)
    starts = np.cumsum([0, *lens])[:-1]
    assert all(i == 0 or groups[i] != groups[i - 1] for i in starts)
    assert np.bincount(groups).max() <= 8


def test_ratio_zero_selects_nothing_and_ratio_one_everything():
    scores = scores_for([30, 21], 0)
    assert not select(scores, [30, 21], Budget(ratio=0.0)).any()
    assert select(scores, [30, 21], Budget(ratio=1.0)).all()
    assert select(np.zeros(51, np.float32), [30, 21], Budget(ratio=1.0)).all()


@settings(max_examples=30, deadline=None)
@given(lens=lengths, mass=st.floats(0.05, 1), seed=st.integers(0, 9))
def test_a_mass_budget_takes_the_fewest_top_groups_that_hold_the_share(lens, mass, seed):
    scores = scores_for(lens, seed)
    mask = select(scores, lens, Budget(mass=mass))
    groups = group_ids(lens, 8)
    assert scores[mask].sum() >= mass * scores.sum() * (1 - 1e-5)
    weakest = min((scores[groups == g].sum(), g) for g in np.unique(groups[mask]))[0]
    assert mass == 1 or scores[mask].sum() - weakest < mass * scores.sum() * (1 + 1e-5)


def windows_by_hand(scores, lens, budget, size, density):
    best = np.zeros(len(scores), bool)
    best[np.argsort(-scores, kind="stable")[:budget]] = True
    out, ends = np.zeros(len(scores), bool), np.repeat(np.cumsum(lens), lens)
    for s in np.flatnonzero(best):
        end = min(s + size, ends[s])
        if best[s:end].sum() >= density:
            out[s:end] = True
    return out


@settings(max_examples=40, deadline=None)
@given(lens=lengths, ratio=st.floats(0, 1), density=st.integers(1, 8), seed=st.integers(0, 9))
def test_windows_follow_their_definition(lens, ratio, density, seed):
    scores = np.repeat(scores_for(lens, seed)[::3], 3)[: sum(lens)]  # runs, so that dense windows occur
    expected = windows_by_hand(scores, lens, round(ratio * sum(lens)), 8, density)
    np.testing.assert_array_equal(select(scores, lens, Budget(ratio=ratio), Windows(8, density)), expected)


@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
def test_groups_are_ranked_by_the_reduction_asked_for(reduce):
    lens = [19, 8, 30]
    scores, groups = scores_for(lens, 3), group_ids(lens, 8)
    values = np.array([getattr(scores[groups == g], reduce)() for g in range(groups.max() + 1)])
    for count in range(1, len(values)):
        best = np.argsort(-values)[:count]
        mask = select(scores, lens, Budget(tokens=int(np.isin(groups, best[:-1]).sum()) + 1), Groups(8, reduce))
        np.testing.assert_array_equal(mask, np.isin(groups, best))


@settings(max_examples=40, deadline=None)
@given(lens=lengths, mass=st.floats(0, 1), bounds=st.tuples(st.floats(0, 1), st.floats(0, 1)), seed=st.integers(0, 9))
def test_a_mass_budget_is_cut_to_its_bounds(lens, mass, bounds, seed):
    scores, (low, high) = scores_for(lens, seed), sorted(bounds)
    free = select(scores, lens, Budget(mass=mass)).sum()
    bounded = select(scores, lens, Budget(mass=mass, at_least=low, at_most=high)).sum()
    total = sum(lens)
    assert min(free, round(high * total)) <= bounded <= max(min(free, round(high * total) + 7), round(low * total) + 7)
    assert bounded >= round(low * total)


@settings(max_examples=60, deadline=None)
@given(lens=lengths, ratio=st.floats(0, 1), heads=st.integers(1, 12), seed=st.integers(0, 9))
def test_the_heads_of_chunks_are_taken_first_and_count_as_spent(lens, ratio, heads, seed):
    scores, target = scores_for(lens, seed), round(ratio * sum(lens))
    within = np.concatenate([np.arange(n) for n in lens])
    always = within < min(heads, target // len(lens))
    mask = select(scores, lens, Budget(ratio=ratio), Groups(8), heads_of_chunks=heads)
    assert mask[always].all() and (target <= mask.sum() < target + 8 or mask.sum() == target)
    groups = group_ids(lens, 8)
    rest = [scores[groups == g].sum() for g in np.unique(groups) if not mask[groups == g].all()]
    taken = [scores[groups == g].sum() for g in np.unique(groups[mask & ~always])]
    assert not rest or not taken or min(taken) >= max(rest) - 1e-6


def test_windows_take_the_heads_of_chunks_too():
    scores = np.zeros(40, np.float32)
    scores[10:20] = 1
    mask = select(scores, [25, 15], Budget(tokens=14), Windows(), heads_of_chunks=2)
    np.testing.assert_array_equal(np.flatnonzero(mask), [0, 1, *range(10, 23), 25, 26])  # 15 to 22 holds 5 of the best


def words(text: str) -> Encoded:
    """A token for each word with the space before it."""
    starts = [0, *(i for i, c in enumerate(text) if c == " "), len(text)]
    spans = tuple((a, b) for a, b in pairwise(starts) if b > a)
    return Encoded(tuple(range(len(spans))), spans, text)


def test_sentences_are_taken_whole_and_long_ones_in_even_parts():
    chunks = [words("One two three. Four five! Six"), words("a b c d e f g. h")]
    lens = [len(c.ids) for c in chunks]
    assert Sentences(longest=4).sizes(lens, chunks).tolist() == [3, 2, 1, 3, 4, 1]
    assert Sentences().sizes(lens, chunks).tolist() == [3, 2, 1, 7, 1]
    scores = np.array([0, 0, 0, 0, 5, 1, *[2] * 7, 0], np.float32)
    def picked(tokens, **settings):
        return np.flatnonzero(select(scores, lens, Budget(tokens=tokens), Sentences(**settings), chunks)).tolist()

    for reduce, first in (("sum", list(range(6, 13))), ("mean", [3, 4]), ("max", [3, 4])):
        assert picked(len(first), reduce=reduce) == first
    assert picked(4) == [3, 4, 6, 7]  # the second best is cut to what is left


@settings(max_examples=60, deadline=None)
@given(lens=lengths, ratio=st.floats(0, 1), heads=st.integers(0, 5), seed=st.integers(0, 9))
def test_sentences_take_exactly_the_budget_and_cut_one_of_them_at_most(lens, ratio, heads, seed):
    chunks = [words(" ".join("a." if i % 5 == 4 else "a" for i in range(n))) for n in lens]
    sizes = Sentences(4).sizes(lens, chunks)
    mask = select(scores_for(lens, seed), lens, Budget(ratio=ratio), Sentences(4), chunks, heads_of_chunks=heads)
    assert mask.sum() == round(ratio * sum(lens))
    if not heads:
        parts = np.split(mask, np.cumsum(sizes)[:-1])
        cut = [p for p in parts if p.any() and not p.all()]
        assert len(cut) <= 1 and all((np.diff(p.astype(int)) <= 0).all() for p in cut)


def test_sentences_without_their_text_are_refused():
    with pytest.raises(ValueError, match="texts"):
        select(np.ones(5, np.float32), [5], Budget(ratio=0.5), Sentences())


@pytest.mark.parametrize("wrong", [lambda: Groups(reduce="median"), lambda: Sentences(reduce="median"),
                                   lambda: Sentences(longest=0), lambda: Budget(mass=0.5, at_least=0.3, at_most=0.2),
                                   lambda: Budget(ratio=0.1, at_most=0.2)])
def test_a_setting_out_of_range_is_refused_by_name(wrong):
    with pytest.raises(BadInput, match="reduce|longest|at_least|at_most"):
        wrong()


@pytest.mark.parametrize("wrong", [dict(ratio=1.2), dict(ratio=-0.1), dict(ratio=float("nan")), dict(tokens=-1),
                                   dict(mass=2.0), dict(), dict(ratio=0.1, tokens=3)])
def test_a_budget_out_of_range_is_refused_by_name(wrong):
    with pytest.raises(BadInput, match="ratio|tokens|mass"):
        Budget(**wrong)
