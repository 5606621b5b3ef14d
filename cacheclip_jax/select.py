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
    """Which of the context's tokens to recompute, as a boolean mask over them; `select_on_device`, fetched."""
    return np.asarray(select_on_device(scores, chunk_lengths, budget, grouping).mask)[: sum(chunk_lengths)]


@dataclass(frozen=True)
class Selected:
    """A selection that may still be under way on the device: a mask over the context, padded with False to a bucket,
    and how many tokens it can hold, where that's known without looking."""

    mask: Bool[Array, "C"]
    at_most: int | None

    def count(self) -> int:
        """Tokens selected, or what bounds them; waits for the device only where nothing does."""
        return int(np.asarray(self.mask).sum()) if self.at_most is None else self.at_most


def select_on_device(scores: np.ndarray | jax.Array, chunk_lengths: Sequence[int], budget: Budget,
                     grouping: Groups | Windows = Groups()) -> Selected:
    """Which of the context's tokens to recompute, without waiting for the scores.

    `scores` has one non-negative number per context token, chunks one after another; on device they are followed by
    anything up to `bucket(context tokens)`, so that what follows compiles once for it. Groups never cross a chunk. With
    `Groups` the mask holds at most one group more than the budget asks for; with `Windows` it may hold more or less.
    """
    total = sum(chunk_lengths)
    if len(scores) < total:
        raise ValueError(f"{len(scores)} scores for chunks of {total} tokens")
    slots = bucket(total)
    padded = scores
    if len(scores) != slots:
        padded = np.zeros(slots, np.float32)
        padded[:total] = np.asarray(scores)[:total]
    if isinstance(grouping, Windows):
        if budget.mass is not None:
            raise BadInput("a mass budget needs Groups: the sliding window counts tokens")
        ends = np.full(slots, total, np.int32)
        ends[:total] = np.repeat(np.cumsum(chunk_lengths), chunk_lengths)
        target = budget.target(total)
        mask = select_windows(padded, ends, np.int32(total), np.int32(target), grouping.size, grouping.density)
        return Selected(mask, None)
    starts, sizes = _groups(chunk_lengths, grouping.size, slots)
    if budget.mass is not None:
        return Selected(select_groups_by_mass(padded, starts, sizes, np.float32(budget.mass), grouping.size), None)
    target = budget.target(total)
    mask = select_groups(padded, starts, sizes, np.int32(target), grouping.size)
    return Selected(mask, min(total, target + grouping.size - 1) if target else 0)


def _groups(chunk_lengths: Sequence[int], size: int, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """First token and number of tokens of each group, padded with empty ones to `slots`: a group has at least one."""
    ids = group_ids(chunk_lengths, size)
    starts, sizes = np.zeros(slots, np.int32), np.zeros(slots, np.int32)
    first = np.flatnonzero(np.diff(ids, prepend=-1))
    starts[: len(first)], sizes[: len(first)] = first, np.diff(first, append=len(ids))
    return starts, sizes


def group_ids(chunk_lengths: Sequence[int], size: int) -> np.ndarray:
    """The group of each context token: consecutive runs of `size` tokens that start anew at every chunk."""
    ids, first = [], 0
    for length in chunk_lengths:
        ids.append(first + np.arange(length) // size)
        first += -(-length // size)
    return np.concatenate(ids) if ids else np.zeros(0, np.int64)


@partial(jax.jit, static_argnames="size")
def select_groups(scores: Float[Array, "C"], starts: Int[Array, "C"], sizes: Int[Array, "C"], budget: Int[Array, ""],
                  size: int) -> Bool[Array, "C"]:
    """Whole groups from the top while fewer than `budget` tokens are taken; a group of 0 tokens is padding."""
    order, _ = _ranked(scores, starts, sizes, size)
    taken = sizes[order]
    return _chosen(starts, sizes, order, jnp.cumsum(taken) - taken < budget, size)


@partial(jax.jit, static_argnames="size")
def select_groups_by_mass(scores: Float[Array, "C"], starts: Int[Array, "C"], sizes: Int[Array, "C"],
                          mass: Float[Array, ""], size: int) -> Bool[Array, "C"]:
    """Whole groups from the top until they hold the share `mass` of all scores (1.0 takes every group)."""
    order, sums = _ranked(scores, starts, sizes, size)
    taken = sums[order]
    wanted = jnp.where(mass >= 1, jnp.inf, mass * sums.sum())
    return _chosen(starts, sizes, order, jnp.cumsum(taken) - taken < wanted, size)


def _ranked(scores, starts, sizes, size):
    # Gathered, not scattered: sums come out the same every time, also where a scatter adds in any order.
    within = jnp.arange(size)
    values = scores[jnp.minimum(starts[:, None] + within, scores.shape[0] - 1)]
    sums = jnp.where(within < sizes[:, None], values, 0).sum(1)
    return jnp.argsort(jnp.where(sizes > 0, -sums, jnp.inf), stable=True), sums  # ties: the earlier group


def _chosen(starts, sizes, order, taken, size):
    taken = jnp.zeros_like(taken).at[order].set(taken) & (sizes > 0)
    within = jnp.arange(size)
    tokens = jnp.where(taken[:, None] & (within < sizes[:, None]), starts[:, None] + within, starts.shape[0])
    return jnp.zeros(starts.shape[0], bool).at[tokens.reshape(-1)].set(True, mode="drop")


@partial(jax.jit, static_argnames=("size", "density"))
def select_windows(scores: Float[Array, "C"], chunk_end: Int[Array, "C"], total: Int[Array, ""],
                   budget: Int[Array, ""], size: int, density: int) -> Bool[Array, "C"]:
    """Union of the windows [s, s + size), cut at the chunk's end, that start at one of the `budget` best of the first
    `total` tokens and hold at least `density` of them."""
    slots = scores.shape[0]
    index = jnp.arange(slots)
    order = jnp.argsort(jnp.where(index < total, -scores, jnp.inf), stable=True)
    best = (jnp.zeros(slots, jnp.int32).at[order].set(index) < budget) & (index < total)
    end = jnp.minimum(index + size, chunk_end)
    count = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(best)])
    dense = best & (count[end] - count[index] >= density)
    cover = jnp.zeros(slots + 1, jnp.int32).at[index].add(dense).at[end].add(-dense.astype(jnp.int32))
    return jnp.cumsum(cover)[:slots] > 0
