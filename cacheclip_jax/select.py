"""Scores -> which context tokens to recompute: whole groups from the top, until a budget is spent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from cacheclip_jax.bucket import bucket
from cacheclip_jax.errors import BadInput
from cacheclip_jax.groups import Grouping, Groups, Reduce, Sentences, Windows
from cacheclip_jax.model.tokenizer import Encoded


@dataclass(frozen=True)
class Budget:
    """How many context tokens to recompute: exactly one of a ratio of the context (0..1), a number of tokens, or a
    share of the score mass (0..1, adaptive: a question whose scores are concentrated costs less).

    A mass budget recomputes `at_least` and `at_most` these ratios of the context, whatever share of the mass they hold.
    """

    ratio: float | None = None
    tokens: int | None = None
    mass: float | None = None
    at_least: float = 0.0
    at_most: float = 1.0

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
        if not 0 <= self.at_least <= self.at_most <= 1:
            raise BadInput(f"at_least={self.at_least}, at_most={self.at_most}: they must be 0 to 1, in order")
        if self.mass is None and (self.at_least, self.at_most) != (0, 1):
            raise BadInput(f"at_least={self.at_least}, at_most={self.at_most} bound a mass budget: {given[0]} is exact")

    def target(self, context_tokens: int) -> int:
        """The number of tokens to spend; of a mass budget, the most it may."""
        if self.tokens is not None:
            return min(self.tokens, context_tokens)
        return round((self.at_most if self.ratio is None else self.ratio) * context_tokens)


def select(scores: np.ndarray, chunk_lengths: Sequence[int], budget: Budget,
           grouping: Grouping = Groups(), chunks: Sequence[Encoded] = (), heads_of_chunks: int = 0  # noqa: B008 (frozen)
           ) -> Bool[np.ndarray, "C"]:
    """Which of the context's tokens to recompute, as a boolean mask over them; `select_on_device`, fetched."""
    chosen = select_on_device(scores, chunk_lengths, budget, grouping, chunks, heads_of_chunks)
    return np.asarray(chosen.mask)[: sum(chunk_lengths)]


@dataclass(frozen=True)
class Selected:
    """A selection that may still be under way on the device: a mask over the context, padded with False to a bucket,
    and how many tokens it can hold, where that's known without looking."""

    mask: Bool[Array, "C"]
    at_most: int | None

    def count(self) -> int:
        """Tokens selected, or what bounds them; waits for the device only where nothing does."""
        return int(np.asarray(self.mask).sum()) if self.at_most is None else self.at_most


@struct.dataclass
class Best:
    """Which groups there are and how many tokens of the best are taken: all that `select_groups` needs beside scores.

    Groups have at most `longest` tokens and follow one another; one of 0 tokens is padding. They are taken from the top
    while fewer than `high` tokens are; with `mass`, only until they are `low` tokens and hold this share of all scores
    (1.0 takes every group). Tokens that are `always` taken cost nothing. Where groups are `cut`, the last one's tokens
    above `high` are left out.
    """

    sizes: Int[Any, "C"]
    low: Int[Any, ""]
    high: Int[Any, ""]
    mass: Float[Any, ""] | None
    always: Bool[Any, "C"] | None
    longest: int = struct.field(pytree_node=False)
    reduce: Reduce = struct.field(pytree_node=False)
    cut: bool = struct.field(pytree_node=False)

    @classmethod
    def of(cls, chunk_lengths: Sequence[int], budget: Budget, grouping: Groups | Sentences,
           chunks: Sequence[Encoded] = (), heads_of_chunks: int = 0) -> Best:
        """On the host; see `select_on_device` for the arguments."""
        total = sum(chunk_lengths)
        target, slots = budget.target(total), bucket(total)
        always, spent = _heads(chunk_lengths, heads_of_chunks, target, slots)
        sizes = grouping.sizes(chunk_lengths, chunks).astype(np.int32)
        low, mass = target, None
        if budget.mass is not None:
            low, mass = round(budget.at_least * total), np.float32(budget.mass)
        sizes = np.pad(sizes, (0, slots - len(sizes)))
        return cls(sizes, np.int32(low - spent), np.int32(target - spent), mass, always, grouping.longest,
                   grouping.reduce, isinstance(grouping, Sentences))


def select_on_device(scores: np.ndarray | jax.Array, chunk_lengths: Sequence[int], budget: Budget,
                     grouping: Grouping = Groups(), chunks: Sequence[Encoded] = (),  # noqa: B008 (frozen)
                     heads_of_chunks: int = 0) -> Selected:
    """Which of the context's tokens to recompute, without waiting for the scores.

    `scores` has one non-negative number per context token, chunks one after another; on device they are followed by
    anything up to `bucket(context tokens)`, so that what follows compiles once for it. Groups never cross a chunk. With
    `Groups` the mask holds at most one group more than the budget asks for. With `Sentences`, which need the `chunks`
    that the scores are of, it holds what is asked for: the last one may be cut short. With `Windows` it may hold more
    or less.

    The first `heads_of_chunks` tokens of every chunk are taken before anything else and count as spent; where all of
    them would exceed the budget, so many of each as it pays for. A mass budget counts them only against its bounds.
    """
    total = sum(chunk_lengths)
    if len(scores) < total:
        raise ValueError(f"{len(scores)} scores for chunks of {total} tokens")
    padded = pad_to_bucket(scores, total)
    if not isinstance(grouping, Windows):
        mask = select_groups(padded, Best.of(chunk_lengths, budget, grouping, chunks, heads_of_chunks))
        return Selected(mask, at_most(total, budget, grouping))
    if budget.mass is not None:
        raise BadInput("a mass budget needs Groups or Sentences: the sliding window counts tokens")
    slots, target = len(padded), budget.target(total)
    always, spent = _heads(chunk_lengths, heads_of_chunks, target, slots)
    ends = np.full(slots, total, np.int32)
    ends[:total] = np.repeat(np.cumsum(chunk_lengths), chunk_lengths)
    mask = select_windows(padded, ends, np.int32(total), np.int32(target - spent), grouping.size, grouping.density)
    return Selected(mask if always is None else mask | always, None)


def at_most(total: int, budget: Budget, grouping: Grouping) -> int | None:
    """How many of `total` tokens a selection can hold; None where only the scores know."""
    if isinstance(grouping, Windows) or budget.mass is not None:
        return None
    target = budget.target(total)
    return min(total, target + grouping.longest - 1) if target and isinstance(grouping, Groups) else target


def pad_to_bucket(scores: np.ndarray | jax.Array, total: int) -> np.ndarray | jax.Array:
    """Scores of `total` context tokens, padded with zeros to their bucket; scores on device have that size already."""
    slots = bucket(total)
    if len(scores) == slots:
        return scores
    padded = np.zeros(slots, np.float32)
    padded[:total] = np.asarray(scores)[:total]
    return padded


def _heads(chunk_lengths: Sequence[int], count: int, target: int, slots: int) -> tuple[np.ndarray | None, int]:
    """A mask of each chunk's first `count` tokens, fewer where they exceed the `target`, and how many they are; None
    where there are none."""
    count = min(count, target // max(len(chunk_lengths), 1))
    if not count:
        return None, 0
    within = np.concatenate([np.arange(length) for length in chunk_lengths])
    mask = np.pad(within < count, (0, slots - len(within)))
    return mask, int(mask.sum())


@jax.jit
def select_groups(scores: Float[Array, "C"], best: Best) -> Bool[Array, "C"]:
    """Whole groups from the top, as `best` says: a mask over the context."""
    # Gathered, not scattered: sums come out the same every time, also where a scatter adds in any order.
    sizes, within = best.sizes, jnp.arange(best.longest)
    starts = jnp.cumsum(sizes) - sizes
    tokens = jnp.minimum(starts[:, None] + within, len(scores) - 1)
    belongs = within < sizes[:, None]
    values = jnp.where(belongs, scores[tokens], 0)
    sums, costs = values.sum(1), belongs
    rank = {"sum": sums, "mean": sums / jnp.maximum(sizes, 1), "max": values.max(1)}[best.reduce]
    if best.always is not None:
        costs = belongs & ~best.always[tokens]
    order = jnp.argsort(jnp.where(sizes > 0, -rank, jnp.inf), stable=True)  # ties: the earlier group
    cost = costs.sum(1)[order]
    before = jnp.cumsum(cost) - cost
    taken = sizes[order] > 0
    if best.mass is not None:
        held = jnp.cumsum(sums[order]) - sums[order]
        taken &= (before < best.low) | (held < jnp.where(best.mass >= 1, jnp.inf, best.mass * sums.sum()))
    taken &= before < best.high
    left = jnp.zeros_like(before).at[order].set(jnp.where(taken, best.high - before, 0))  # what each group may cost
    chosen = belongs & (left > 0)[:, None]
    if best.cut:
        chosen &= jnp.cumsum(costs, 1) - costs < left[:, None]
    mask = jnp.zeros(len(scores), bool).at[jnp.where(chosen, tokens, len(scores)).reshape(-1)].set(True, mode="drop")
    return mask if best.always is None else mask | best.always


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
