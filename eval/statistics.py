"""What the numbers say: retention and its confidence interval, whether two methods differ, how far logits moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from cacheclip_jax.errors import BadInput

Scores = Sequence[float] | np.ndarray


@dataclass(frozen=True)
class Estimate:
    """A statistic of n samples with its confidence interval; NaN where the samples don't define it."""

    value: float
    low: float
    high: float
    n: int


def retention(method: Scores, full: Scores, *, answered: bool = False, level: float = 0.95, resamples: int = 2000,
              seed: int = 0) -> Estimate:
    """Mean score of a method over mean score of full attention on the same samples; see `retention_over`.

    answered: over the samples only that full attention scores above 0 on, which says what reuse loses of what there
    was to lose. NaN without such a sample.
    """
    m, f = _paired(method, full)
    if answered:
        m, f = m[f > 0], f[f > 0]
    return retention_over([(m, f)], level=level, resamples=resamples, seed=seed)


def retention_over(tasks: Sequence[tuple[Scores, Scores]], *, level: float = 0.95, resamples: int = 2000, seed: int = 0
                   ) -> Estimate:
    """Retention over tasks that weigh the same, each with a method's scores and full attention's: the sum of the
    method's means over the sum of full attention's, so that a task which full attention hardly solves counts for
    little.

    The percentile bootstrap draws samples within each task, both scores together; a draw without any point for full
    attention is left out (resamples=0, or fewer than 2 samples: no interval). NaN without a point for full attention.
    """
    pairs = [_paired(method, full) for method, full in tasks]
    n = sum(len(f) for _, f in pairs)
    if not any(f.sum() > 0 for _, f in pairs):
        return Estimate(float("nan"), float("nan"), float("nan"), n)
    value = float(sum(m.mean() for m, _ in pairs) / sum(f.mean() for _, f in pairs))
    if n < 2 or not resamples:
        return Estimate(value, float("nan"), float("nan"), n)
    rng, above, below = np.random.default_rng(seed), np.zeros(resamples), np.zeros(resamples)
    for m, f in pairs:
        drawn = rng.integers(0, len(m), (resamples, len(m)))
        above, below = above + m[drawn].mean(1), below + f[drawn].mean(1)
    low, high = np.quantile(above[below > 0] / below[below > 0], [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high), n)


@dataclass(frozen=True)
class Comparison:
    """Mean difference of two methods on the same n samples and the two-sided p-value of "there is none"."""

    difference: float
    p_value: float
    n: int


def compare(first: Scores, second: Scores, *, test: Literal["sign-flip", "bootstrap"] = "sign-flip",
            resamples: int = 9999, seed: int = 0) -> Comparison:
    """Whether `first` scores higher than `second` on the same samples of one task; see `compare_over`."""
    return compare_over([(first, second)], test=test, resamples=resamples, seed=seed)


def compare_over(tasks: Sequence[tuple[Scores, Scores]], *, test: Literal["sign-flip", "bootstrap"] = "sign-flip",
                 resamples: int = 9999, seed: int = 0) -> Comparison:
    """Whether one method scores higher than another over tasks that weigh the same, each with both methods' scores: a
    paired test of the mean over tasks of the mean difference. A task without a sample doesn't count; NaN without any.

    sign-flip: each sample's difference keeps or changes its sign at random (exact where 2**n is small enough).
    bootstrap: how often the mean over tasks, of samples drawn within each, lies on the other side of 0.
    """
    if test not in ("sign-flip", "bootstrap"):
        raise BadInput(f"test={test!r}: choose sign-flip or bootstrap")
    differences = [d for first, second in tasks if len(d := np.subtract(*_paired(first, second)))]
    n = sum(map(len, differences))
    if not n:
        return Comparison(float("nan"), float("nan"), 0)
    ends = np.cumsum([len(d) for d in differences])[:-1]

    def mean_over_tasks(d, axis=-1):
        return np.mean([task.mean(axis=axis) for task in np.split(d, ends, axis=axis)], axis=0)

    value = float(mean_over_tasks(np.concatenate(differences)))
    if not any(d.any() for d in differences):
        return Comparison(value, 1.0, n)
    rng = np.random.default_rng(seed)
    if test == "bootstrap":
        means = np.mean([d[rng.integers(0, len(d), (resamples, len(d)))].mean(axis=1) for d in differences], axis=0)
        tail = 1 + min((means <= 0).sum(), (means >= 0).sum())
        return Comparison(value, min(1.0, 2 * float(tail) / (resamples + 1)), n)
    if n == 1:  # which SciPy refuses: either sign is as extreme
        return Comparison(value, 1.0, n)
    from scipy.stats import permutation_test

    result = permutation_test((np.concatenate(differences),), mean_over_tasks, permutation_type="samples",
                              vectorized=True, n_resamples=resamples, rng=rng)
    return Comparison(value, float(result.pvalue), n)


def kl_divergence(full: Float[np.ndarray, "*B V"], other: Float[np.ndarray, "*B V"]) -> Float[np.ndarray, "*B"]:
    """KL(full || other) in nats, from logits, computed in float64: how much the reference distribution is missed."""
    p, q = _log_softmax(full), _log_softmax(other)
    if p.shape != q.shape:
        raise BadInput(f"logits of shapes {p.shape} and {q.shape} don't compare: they must be of the same rows")
    seen = np.isfinite(p)  # what the reference never says costs nothing
    with np.errstate(invalid="ignore"):
        terms = np.where(seen, np.exp(p) * (p - q), 0.0)
    return np.maximum(terms.sum(-1), 0.0)


def top1_agreement(full: Float[np.ndarray, "*B V"], other: Float[np.ndarray, "*B V"]) -> float:
    """Share of rows whose most likely token is the same."""
    a, b = np.asarray(full), np.asarray(other)
    if a.shape != b.shape:
        raise BadInput(f"logits of shapes {a.shape} and {b.shape} don't compare: they must be of the same rows")
    return float((a.argmax(-1) == b.argmax(-1)).mean())


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    from scipy.special import log_softmax

    values = np.asarray(logits, np.float64)
    if np.isnan(values).any() or np.isposinf(values).any():
        raise BadInput("logits hold NaN or infinity: a model that computes them is broken")
    return log_softmax(values, axis=-1)


def _paired(first: Scores, second: Scores) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(first, float), np.asarray(second, float)
    if a.shape != b.shape or a.ndim != 1:
        raise BadInput(f"{len(a)} and {len(b)} scores aren't pairs: give one score a sample, in the same order")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise BadInput("what is compared must be finite numbers")
    return a, b
