"""Scores -> which context tokens to recompute: whole groups from the top, until a budget is spent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from cacheclip_jax.bucket import bucket
from cacheclip_jax.errors import BadInput


@dataclass(frozen=True)
class Budget:
    """How many context tokens to recompute: exactly one of a ratio of the context (0..1), a number of tokens, or a
    share of the score mass (0..1, adaptive: a question whose scores are concentrated costs less)."""

    ratio: float | None = None
    tokens: int | None = None
    mass: float | None = None

    def __post_init__(self) -> None:
        given = [n for n in ("ratio", "tokens", "mass") if getattr(self, n) is not None]
        if len(given) != 1:
            raise BadInput(f"a budget is one of ratio, tokens or mass, not {', '.join(given) or 'nothing'}")
        value = getattr(self, given[0])
        if given[0] == "tokens" and not isinstance(value, int):
            raise BadInput(f"tokens={value} is out of range: it must be a whole number")
        if not value >= 0 or (given[0] != "tokens" and value > 1):
            limits = "0 or more" if given[0] == "tokens" else "between 0 and 1"
            raise BadInput(f"{given[0]}={value} is out of range: it must be {limits}")

    def target(self, context_tokens: int) -> int:
        """The number of tokens to spend (ratio and token budgets)."""
        if self.ratio is not None:
            return round(self.ratio * context_tokens)
        assert self.tokens is not None
        return min(self.tokens, context_tokens)


@dataclass(frozen=True)
class Groups:
    """Fixed groups of `size` consecutive tokens of one chunk, ranked by the sum of their scores."""

    size: int = 8

    def __post_init__(self) -> None:
        if self.size < 1:
            raise BadInput(f"group size {self.size} is out of range: it must be 1 or more")


@dataclass(frozen=True)
class Windows:
    """The sliding window of CacheClip's second version: of the best tokens up to the budget, those `size`-token windows
    that hold at least `density` of them are kept whole, the other tokens are dropped."""

    size: int = 8
    density: int = 5

    def __post_init__(self) -> None:
        if not 1 <= self.density <= self.size:
            raise BadInput(f"density {self.density} is out of range: 1 to the window size {self.size}")


def select(scores: np.ndarray, chunk_lengths: Sequence[int], budget: Budget, grouping: Groups | Windows = Groups()
           ) -> np.ndarray:
    """Which of the context's tokens to recompute, as a boolean mask over them.

    `scores` has one non-negative number per context token, chunks one after another. Groups never cross a chunk. With
    `Groups` the mask holds at most one group more than the budget asks for; with `Windows` it may hold more or less.
    """
    total = len(scores)
    if total != sum(chunk_lengths):
        raise ValueError(f"{total} scores for chunks of {sum(chunk_lengths)} tokens")
    if total == 0:
        return np.zeros(0, bool)
    slots = bucket(total, steps=4)
    padded = np.full(slots, -1, np.float32)
    padded[:total] = scores
    chunk_ends = np.repeat(np.cumsum(chunk_lengths), chunk_lengths)
    if isinstance(grouping, Windows):
        if budget.mass is not None:
            raise BadInput("a mass budget needs Groups: the sliding window counts tokens")
        ends = np.full(slots, total, np.int32)
        ends[:total] = chunk_ends
        mask = select_windows(padded, ends, budget.target(total), grouping.size, grouping.density)
    else:
        group = np.full(slots, slots - 1, np.int32)
        group[:total] = group_ids(chunk_lengths, grouping.size)
        if budget.mass is not None:
            mask = select_groups_by_mass(padded, group, budget.mass, total)
        else:
            mask = select_groups(padded, group, budget.target(total), total)
    return np.asarray(mask)[:total]


def group_ids(chunk_lengths: Sequence[int], size: int) -> np.ndarray:
    """The group of each context token: consecutive runs of `size` tokens that start anew at every chunk."""
    ids, first = [], 0
    for length in chunk_lengths:
        ids.append(first + np.arange(length) // size)
        first += -(-length // size)
    return np.concatenate(ids) if ids else np.zeros(0, np.int64)


@jax.jit
def select_groups(scores: Float[Array, "S"], group: Int[Array, "S"], budget: Int[Array, ""], total: Int[Array, ""]
                  ) -> Bool[Array, "S"]:
    """Whole groups from the top while fewer than `budget` tokens are taken; slots from `total` on are padding."""
    order, before, sizes, _ = _ranked(scores, group, total)
    return _chosen(group, order, (before(sizes) < budget) & (sizes > 0))


@jax.jit
def select_groups_by_mass(scores: Float[Array, "S"], group: Int[Array, "S"], mass: Float[Array, ""],
                          total: Int[Array, ""]) -> Bool[Array, "S"]:
    """Whole groups from the top until they hold the share `mass` of all scores (1.0 takes every group)."""
    order, before, sizes, sums = _ranked(scores, group, total)
    sums = jnp.where(sizes > 0, sums, 0)
    wanted = jnp.where(mass >= 1, jnp.inf, mass * sums.sum())
    return _chosen(group, order, (before(sums) < wanted) & (sizes > 0))


def _ranked(scores, group, total):
    real = jnp.arange(scores.shape[0]) < total
    sizes = jnp.zeros(scores.shape[0], jnp.int32).at[group].add(real)
    sums = jnp.zeros(scores.shape[0], jnp.float32).at[group].add(jnp.where(real, scores, 0))
    order = jnp.argsort(jnp.where(sizes > 0, -sums, jnp.inf), stable=True)  # ties: the earlier group
    return order, lambda x: jnp.cumsum(x) - x, sizes[order], sums[order]


def _chosen(group, order, taken):
    return jnp.zeros(order.shape[0], bool).at[order].set(taken)[group]


@partial(jax.jit, static_argnames=("size", "density"))
def select_windows(scores: Float[Array, "S"], chunk_end: Int[Array, "S"], budget: Int[Array, ""], size: int,
                   density: int) -> Bool[Array, "S"]:
    """Union of the windows [s, s + size), cut at the chunk's end, that start at one of the `budget` best tokens and
    hold at least `density` of them."""
    slots = scores.shape[0]
    index = jnp.arange(slots)
    rank = jnp.zeros(slots, jnp.int32).at[jnp.argsort(-scores, stable=True)].set(index)
    best = rank < budget
    end = jnp.minimum(index + size, chunk_end)
    count = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(best)])
    dense = best & (count[end] - count[index] >= density)
    cover = jnp.zeros(slots + 1, jnp.int32).at[index].add(dense).at[end].add(-dense.astype(jnp.int32))
    return jnp.cumsum(cover)[:slots] > 0
