"""Selection: whole groups, budgets, windows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheclip_jax.errors import BadInput
from cacheclip_jax.select import Budget, Groups, Windows, group_ids, select

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


@pytest.mark.parametrize("wrong", [dict(ratio=1.2), dict(ratio=-0.1), dict(ratio=float("nan")), dict(tokens=-1),
                                   dict(mass=2.0), dict(), dict(ratio=0.1, tokens=3)])
def test_a_budget_out_of_range_is_refused_by_name(wrong):
    with pytest.raises(BadInput, match="ratio|tokens|mass"):
        Budget(**wrong)
