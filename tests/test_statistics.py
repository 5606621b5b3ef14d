"""Statistics: against exact values where there are some, by their properties where not."""

import numpy as np
import pytest

from cacheclip_jax.errors import BadInput
from eval.statistics import compare, compare_over, kl_divergence, retention, retention_over, top1_agreement


def test_retention_is_the_ratio_of_means_not_the_mean_of_ratios():
    got = retention([1, 0, 0.5, 1], [1, 0.5, 0.5, 0])
    assert got.value == pytest.approx(2.5 / 2) and got.n == 4
    assert got.low <= got.value <= got.high


def test_retention_over_the_answered_leaves_out_what_full_attention_misses():
    got = retention([1, 0, 0.5, 1], [1, 0.5, 0.5, 0], answered=True)
    assert got.value == pytest.approx(1.5 / 2) and got.n == 3


def test_retention_over_tasks_weighs_tasks_the_same_and_hard_ones_by_what_there_is_to_score():
    easy, hard = ([1, 0, 1, 0], [1, 1, 1, 1]), ([1.0], [0.25])
    got = retention_over([easy, hard])
    assert got.value == pytest.approx((0.5 + 1) / (1 + 0.25)) and got.n == 5
    assert got.low < got.value < got.high
    assert retention_over([easy]) == retention(*easy)
    assert retention_over([easy, hard], resamples=0).value == got.value
    assert np.isnan(retention_over([([1, 0], [0, 0])]).value)


def test_retention_of_equal_scores_is_1_with_an_interval_of_no_width():
    got = retention([1, 0, 0.5], [1, 0, 0.5])
    assert (got.value, got.low, got.high) == (1, 1, 1)


@pytest.mark.parametrize("full", [[0, 0], []])
def test_retention_without_a_point_for_full_attention_is_no_number(full):
    assert np.isnan(retention([0] * len(full), full).value)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    drawn = ([(rng.random(40), np.ones(40)) for _ in range(tasks)] for tasks in (1, 3) for _ in range(100))
    hits = [e.low <= 0.5 <= e.high for e in (retention_over(tasks, resamples=300) for tasks in drawn)]
    assert 85 <= sum(hits[:100]) <= 100 and 85 <= sum(hits[100:]) <= 100


def test_the_same_seed_gives_the_same_interval():
    scores = np.random.default_rng(0).random((2, 30))
    assert retention(*scores) == retention(*scores)


@pytest.mark.parametrize("test", ["sign-flip", "bootstrap"])
def test_a_clear_difference_is_found_and_none_is_not(test):
    rng = np.random.default_rng(2)
    noise = rng.normal(0, 0.1, 60)
    base = rng.random(60)
    clear = compare(base + 0.2 + noise, base, test=test)
    assert clear.difference == pytest.approx(0.2, abs=0.05) and clear.p_value < 0.01
    assert compare(base + noise - noise.mean(), base, test=test).p_value > 0.5
    same = compare(base, base, test=test)
    assert (same.difference, same.p_value) == (0, 1)


def test_the_sign_flip_test_is_exact_for_few_samples():
    # Of the 2**3 signs of (1, 1, 1) only +++ and --- are as extreme.
    assert compare([1, 1, 1], [0, 0, 0]).p_value == pytest.approx(2 / 8)
    assert compare([1], [0]).p_value == 1


@pytest.mark.parametrize("test", ["sign-flip", "bootstrap"])
def test_a_comparison_over_tasks_weighs_tasks_the_same_however_many_samples_they_have(test):
    large = np.random.default_rng(3).normal(0.3, 0.4, 300), np.zeros(300)
    small = np.tile([-0.7, 0.1], 5), np.zeros(10)
    large_alone, both = (compare_over(tasks, test=test) for tasks in ([large], [large, small]))
    means = [np.mean(a - b) for a, b in (large, small)]
    assert both.difference == pytest.approx(np.mean(means), abs=1e-12) and both.n == 310
    assert large_alone == compare(*large, test=test) and large_alone.p_value < 0.01
    pooled = compare(*map(np.concatenate, zip(large, small, strict=True)), test=test)
    assert pooled.difference > 0.2 and pooled.p_value < 0.01 and both.p_value > 0.5
    assert compare_over([large, ([], [])], test=test) == large_alone
    assert np.isnan(compare_over([([], [])], test=test).p_value)


def test_a_comparison_over_tasks_is_exact_for_few_samples():
    # Only the mean of means of ++++ ++ is 1, and of ---- -- is -1: 2 of 2**6 signs. In a task of one sample, the signs
    # of the other's differences of 1/4 never reach its own: half of all are as high.
    assert compare_over([([1] * 4, [0] * 4), ([1] * 2, [0] * 2)]).p_value == pytest.approx(2 / 64)
    assert compare_over([([0.25] * 4, [0] * 4), ([1], [0.5])]).p_value == pytest.approx(2 / 32)
    assert compare_over([([0.25] * 4, [0.5] * 4), ([1], [0.5])]).p_value == pytest.approx(1)


def test_kl_is_the_textbook_sum_and_zero_for_a_shift_of_the_logits():
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.25, 0.5])
    expected = float((p * np.log(p / q)).sum())
    assert kl_divergence(np.log(p), np.log(q) + 3) == pytest.approx(expected)
    assert kl_divergence(np.log(p), np.log(p) - 7) == pytest.approx(0)
    assert kl_divergence(np.log([p, p]), np.log([p, q])).shape == (2,)


def test_kl_takes_tokens_that_the_reference_rules_out():
    assert kl_divergence(np.array([0.0, 0.0, -np.inf]), np.zeros(3)) == pytest.approx(np.log(3 / 2))
    assert np.isinf(kl_divergence(np.zeros(3), np.array([0.0, 0.0, -np.inf])))


def test_top1_agreement_is_the_share_of_rows():
    a = np.eye(4)
    assert top1_agreement(a, a[[0, 1, 2, 0]]) == 0.75
    assert top1_agreement(a[0], a[0]) == 1


def test_what_is_no_pair_is_refused():
    with pytest.raises(BadInput, match="pairs"):
        retention([1], [1, 0])
    with pytest.raises(BadInput, match="finite"):
        compare([np.nan], [0])
    with pytest.raises(BadInput, match="shapes"):
        kl_divergence(np.zeros(3), np.zeros(4))
    with pytest.raises(BadInput, match="NaN"):
        kl_divergence(np.array([np.nan, 0]), np.zeros(2))
    with pytest.raises(BadInput, match="sign-flip"):
        compare([1], [0], test="t")
