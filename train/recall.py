"""Recall: how much of what matters most to the teacher a selection of the same size holds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from cacheclip_jax.select import Budget, select


def top_tokens(target: Float[np.ndarray, "C"], ratio: float) -> Bool[np.ndarray, "C"]:
    """The share `ratio` of tokens with the highest scores, of equal ones the earlier; never a token that scores 0."""
    best = np.argsort(-target, kind="stable")[: round(ratio * len(target))]
    out = np.zeros(len(target), bool)
    out[best] = target[best] > 0
    return out


def overlap(scores: Float[np.ndarray, "C"], target: Float[np.ndarray, "C"], chunk_lengths: Sequence[int], ratio: float
            ) -> float:
    """The share of what `select` takes by the target's scores that it also takes by `scores`."""
    wanted = select(target, chunk_lengths, Budget(ratio=ratio))
    return float(select(scores, chunk_lengths, Budget(ratio=ratio))[wanted].mean()) if wanted.any() else 1.0


def recall(scores: Float[np.ndarray, "C"], target: Float[np.ndarray, "C"], chunk_lengths: Sequence[int], ratio: float
           ) -> float:
    """The share of the target's top tokens that `select` takes by `scores` within the same budget."""
    wanted = top_tokens(target, ratio)
    return float(select(scores, chunk_lengths, Budget(ratio=ratio))[wanted].mean()) if wanted.any() else 1.0
