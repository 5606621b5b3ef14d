"""Scores -> what groups are ranked by: tokens left out, chunks weighed against each other, the question's own words,
neighbours averaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from cacheclip_jax.bucket import bucket
from cacheclip_jax.errors import BadInput
from cacheclip_jax.model.tokenizer import Encoded
from cacheclip_jax.select import pad_to_bucket

RUN = 3  # tokens in a row that count as said again
BITS = 21  # of a token id: three make a run, in 63


@dataclass(frozen=True)
class Ranking:
    """What happens to token scores before groups are ranked, in this order; nothing by default. The tokens are the
    primary's, also where another tokenizer's were scored.

    skip_first: so many first tokens of every chunk score 0, where attention sinks would be.
    skip_formatting: tokens without a letter or a digit score 0. What is in a group with others is still recomputed
      with them.
    chunk_power: a score is multiplied by its chunk's total to this power: -1 gives every chunk the same total, -0.5
      is half-way there, positive powers prefer the chunks that the question attends to.
    lexical: what the context repeats of the question is added, see `repeated`: each token of a run that occurs once is
      worth this share of the scores' total. Attention looks for what is meant, and may miss an identifier among others
      like it.
    smooth: each score becomes the mean of this odd number of tokens around it, fewer at a chunk's ends.
    """

    skip_first: int = 0
    skip_formatting: bool = False
    chunk_power: float = 0.0
    lexical: float = 0.0
    smooth: int = 1

    def __post_init__(self) -> None:
        if self.skip_first < 0:
            raise BadInput(f"skip_first={self.skip_first} is out of range: it must be 0 (none) or more")
        if self.smooth < 1 or self.smooth % 2 == 0:
            raise BadInput(f"smooth={self.smooth} is out of range: an odd number of tokens, 1 for none but itself")
        if not -4 <= self.chunk_power <= 4:
            raise BadInput(f"chunk_power={self.chunk_power} is out of range: it must be between -4 and 4")
        if not 0 <= self.lexical < float("inf"):
            raise BadInput(f"lexical={self.lexical} is out of range: it must be 0 (none) or more, and finite")


@struct.dataclass
class Ranks:
    """What a ranking needs beside scores, for a context's tokens and their padding; made on the host.

    Scores of tokens to `keep` are multiplied by their chunk's total to a `power` (of `chunks` at most; `chunk` is each
    token's, -1 for padding), then `added` times the sum of them all comes on top, then each becomes the mean of
    `smooth` neighbours in its chunk. None where a ranking leaves a step out.
    """

    keep: Bool[Any, "C"]
    power: Float[Any, ""] | None
    added: Float[Any, "C"] | None
    chunk: Int[Any, "C"] | None
    chunks: int = struct.field(pytree_node=False)
    smooth: int = struct.field(pytree_node=False)

    @classmethod
    def of(cls, chunks: Sequence[Encoded], ranking: Ranking, question: Sequence[int]) -> Ranks | None:
        """For the chunks' tokens, chunks one after another, and the ids of the question's; None for no ranking."""
        if ranking == Ranking():
            return None
        lengths = [len(c.ids) for c in chunks]
        total, slots = sum(lengths), bucket(sum(lengths))
        keep, power, added, chunk = np.zeros(slots, bool), None, None, None
        keep[:total] = np.concatenate([np.arange(n) >= ranking.skip_first for n in lengths])
        if ranking.skip_formatting:
            keep[:total] &= ~np.concatenate([c.formatting for c in chunks])
        if ranking.chunk_power:
            power = np.float32(ranking.chunk_power)
        if ranking.lexical:
            added = np.zeros(slots, np.float32)
            added[:total] = ranking.lexical * repeated(question, chunks)
        if power is not None or ranking.smooth > 1:
            chunk = np.full(slots, -1, np.int32)
            chunk[:total] = np.repeat(np.arange(len(lengths)), lengths)
        return cls(keep, power, added, chunk, bucket(len(chunks), 16), ranking.smooth)


def rank(scores: np.ndarray | jax.Array, chunks: Sequence[Encoded], ranking: Ranking,
         question: Sequence[int]) -> np.ndarray | jax.Array:
    """Scores of the chunks' tokens, chunks one after another, as `ranking` says; on device, followed by zeros to
    their bucket. `question` has its token ids. Doesn't wait for the scores."""
    ranks = Ranks.of(chunks, ranking, question)
    return scores if ranks is None else rank_tokens(pad_to_bucket(scores, sum(len(c.ids) for c in chunks)), ranks)


def repeated(question: Sequence[int], chunks: Sequence[Encoded]) -> Float[np.ndarray, "C"]:
    """How much each context token repeats the question: 1 / n² for the rarest run of three tokens that holds it, lies
    in one chunk and is in the question too, n being how often the context has that run; 0 without one.
    """
    ids = np.concatenate([c.array for c in chunks])
    out = np.zeros(len(ids), np.float32)
    chunk = np.repeat(np.arange(len(chunks)), [len(c.ids) for c in chunks])
    first = np.arange(max(len(ids) - RUN + 1, 0))
    runs = _runs(ids)
    at = first[(chunk[first] == chunk[first + RUN - 1]) & np.isin(runs, _runs(np.asarray(question)))]
    _, kind, times = np.unique(runs[at], return_inverse=True, return_counts=True)
    for later in range(RUN):
        np.maximum.at(out, at + later, 1 / times[kind] ** 2)
    return out


def _runs(ids: Int[np.ndarray, "C"]) -> Int[np.ndarray, "R"]:
    """A number for every run of `ids`, equal for equal runs."""
    count = max(len(ids) - RUN + 1, 0)
    return sum((ids[n : n + count].astype(np.int64) << BITS * n for n in range(RUN)), np.zeros(count, np.int64))


@jax.jit
def rank_tokens(scores: Float[Array, "C"], ranks: Ranks | None) -> Float[Array, "C"]:
    """The scores as `ranks` says, themselves where it says nothing."""
    if ranks is None:
        return scores
    scores = jnp.where(ranks.keep, scores, 0)
    if ranks.chunk is not None and ranks.power is not None:
        totals = jnp.where(ranks.chunk == jnp.arange(ranks.chunks)[:, None], scores, 0).sum(1)
        scores *= jnp.where(totals > 0, totals, 1)[jnp.maximum(ranks.chunk, 0)] ** ranks.power
    if ranks.added is not None:
        scores += ranks.added * scores.sum()
    if ranks.chunk is not None and ranks.smooth > 1:
        scores = _smoothed(scores, ranks.chunk, ranks.smooth)
    return scores


def _smoothed(scores: Float[Array, "C"], chunk: Int[Array, "C"], width: int) -> Float[Array, "C"]:
    reach = width // 2
    near, of = jnp.pad(scores, reach), jnp.pad(chunk, reach, constant_values=-1)
    total, count = jnp.zeros_like(scores), jnp.zeros_like(scores)
    for first in range(width):
        same = of[first : first + len(scores)] == chunk
        total += jnp.where(same, near[first : first + len(scores)], 0)
        count += same
    return total / count
