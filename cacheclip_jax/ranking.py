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
BLOCK = 256  # of the question's tokens that the context is compared with at once: bounds memory


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
class Words:
    """What `repeated` compares: the context's ids, their padding anything, and the question's, padded with -1; and what
    a token that repeats it is worth, as a share of all scores."""

    context: Int[Any, "C"]
    question: Int[Any, "Q"]
    weight: Float[Any, ""]


@struct.dataclass
class Ranks:
    """What a ranking needs beside scores, for a context's tokens and their padding; made on the host, by little more
    than copying, since a request waits for it.

    `chunk` is each token's, below `chunks`, and -1 for padding. The others are None where the ranking has no such step:
    tokens to `keep`, the `power` of a chunk's total, the `words` of context and question. `smooth` is 1 for none.
    """

    chunk: Int[Any, "C"]
    keep: Bool[Any, "C"] | None
    power: Float[Any, ""] | None
    words: Words | None
    chunks: int = struct.field(pytree_node=False)
    smooth: int = struct.field(pytree_node=False)

    @classmethod
    def of(cls, chunks: Sequence[Encoded], ranking: Ranking, question: Sequence[int]) -> Ranks | None:
        """For the chunks' tokens, chunks one after another, and the ids of the question's; None for no ranking."""
        if ranking == Ranking():
            return None
        lengths = [len(c.ids) for c in chunks]
        total, slots = sum(lengths), bucket(sum(lengths))
        keep = power = words = None
        chunk = np.full(slots, -1, np.int32)
        chunk[:total] = np.repeat(np.arange(len(lengths)), lengths)
        if ranking.skip_first or ranking.skip_formatting:
            keep = np.zeros(slots, bool)
            keep[:total] = np.concatenate([np.arange(n) >= ranking.skip_first for n in lengths])
            if ranking.skip_formatting:
                keep[:total] &= ~np.concatenate([c.formatting for c in chunks])
        if ranking.chunk_power:
            power = np.float32(ranking.chunk_power)
        if ranking.lexical:
            room = bucket(len(question), 32 if len(question) <= BLOCK else BLOCK)
            words = Words(np.zeros(slots, np.int32), np.full(room, -1, np.int32), np.float32(ranking.lexical))
            np.concatenate([c.array for c in chunks], out=words.context[:total])
            words.question[: len(question)] = question
        return cls(chunk, keep, power, words, bucket(len(chunks), 16), ranking.smooth)


def rank(scores: np.ndarray | jax.Array, chunks: Sequence[Encoded], ranking: Ranking,
         question: Sequence[int]) -> np.ndarray | jax.Array:
    """Scores of the chunks' tokens, chunks one after another, as `ranking` says; on device, followed by zeros to
    their bucket. `question` has its token ids. Doesn't wait for the scores."""
    ranks = Ranks.of(chunks, ranking, question)
    return scores if ranks is None else rank_tokens(pad_to_bucket(scores, sum(len(c.ids) for c in chunks)), ranks)


@jax.jit
def rank_tokens(scores: Float[Array, "C"], ranks: Ranks | None) -> Float[Array, "C"]:
    """The scores as `ranks` says, themselves where it says nothing."""
    if ranks is None:
        return scores
    scores = jnp.where((ranks.chunk >= 0) & (True if ranks.keep is None else ranks.keep), scores, 0)
    if ranks.power is not None:
        totals = jnp.where(ranks.chunk == jnp.arange(ranks.chunks)[:, None], scores, 0).sum(1)
        scores *= jnp.where(totals > 0, totals, 1)[jnp.maximum(ranks.chunk, 0)] ** ranks.power
    if ranks.words is not None:
        worth = ranks.words.weight * repeated(ranks.words.context, ranks.chunk, ranks.words.question)
        scores += worth * scores.sum()
    return scores if ranks.smooth == 1 else _smoothed(scores, ranks.chunk, ranks.smooth)


def repeated(context: Int[Array, "C"], chunk: Int[Array, "C"], question: Int[Array, "Q"]) -> Float[Array, "C"]:
    """How much each context token repeats the question: 1 / n² for the rarest run of three tokens that holds it, lies
    in one chunk and is in the question too, n being how often the context has that run; 0 without one. `chunk` is -1
    for padding of the context's ids, and the question's are padded with -1, to a multiple of BLOCK where they are more.
    """
    runs, size = _runs(context), min(len(question), BLOCK)
    whole = (chunk >= 0) & (chunk == jnp.roll(chunk, 1 - RUN)) & (jnp.arange(len(chunk)) <= len(chunk) - RUN)
    valid = (question >= 0) & (jnp.roll(question, 1 - RUN) >= 0) & (jnp.arange(len(question)) <= len(question) - RUN)

    def compare(worth, asked):
        its_runs, real = asked
        same = (runs[:, None] == its_runs).all(-1) & whole[:, None] & real
        times = jnp.maximum(same.sum(0), 1).astype(jnp.float32)
        return jnp.maximum(worth, jnp.where(same, times**-2, 0).max(1)), None

    blocks = _runs(question).reshape(-1, size, RUN), valid.reshape(-1, size)
    worth, _ = jax.lax.scan(compare, jnp.zeros(len(chunk)), blocks)  # of the run that begins at a token
    return jnp.stack([jnp.roll(worth, later) for later in range(RUN)]).max(0)  # the last runs are 0: none comes around


def _runs(ids: Int[Array, "C"]) -> Int[Array, "C 3"]:
    """The run that begins at each token; the last ones' go on at the beginning."""
    return jnp.stack([jnp.roll(ids, -later) for later in range(RUN)], -1)


def _smoothed(scores: Float[Array, "C"], chunk: Int[Array, "C"], width: int) -> Float[Array, "C"]:
    reach = width // 2
    near, of = jnp.pad(scores, reach), jnp.pad(chunk, reach, constant_values=-1)
    total, count = jnp.zeros_like(scores), jnp.zeros_like(scores)
    for first in range(width):
        same = of[first : first + len(scores)] == chunk
        total += jnp.where(same, near[first : first + len(scores)], 0)
        count += same
    return total / count
