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


Said = tuple[Int[Any, "C"], Int[Any, "Q"]]  # ids of context and question, as `repeated` takes them


@struct.dataclass
class Ranks:
    """What a ranking needs beside scores, for a context's tokens and their padding; made on the host, by little more
    than copying, since a request waits for it.

    `ends` has where each chunk ends, and the context's end as often as it takes. The others are None where the ranking
    has no such step: tokens to `keep`, the `power` of a chunk's total, and what a token is `worth` that says again
    what the question says, as a share of all scores. `asked` is the question's length, padding included. `smooth` is 1
    for none.
    """

    ends: Int[Any, "N"]
    keep: Bool[Any, "C"] | None
    power: Float[Any, ""] | None
    worth: Float[Any, ""] | None
    asked: int = struct.field(pytree_node=False)
    smooth: int = struct.field(pytree_node=False)

    @classmethod
    def of(cls, chunks: Sequence[Encoded], ranking: Ranking, question_tokens: int) -> Ranks | None:
        """For the chunks' tokens, chunks one after another, and a question of so many; None for no ranking."""
        if ranking == Ranking():
            return None
        lengths = [len(c.ids) for c in chunks]
        total, keep, power, worth, asked = sum(lengths), None, None, None, 0
        ends = np.full(bucket(len(chunks), 16), total, np.int32)
        np.cumsum(lengths, out=ends[: len(chunks)])
        if ranking.skip_first or ranking.skip_formatting:
            keep = np.zeros(bucket(total), bool)
            keep[:total] = np.concatenate([np.arange(n) >= ranking.skip_first for n in lengths])
            if ranking.skip_formatting:
                keep[:total] &= ~np.concatenate([c.formatting for c in chunks])
        if ranking.chunk_power:
            power = np.float32(ranking.chunk_power)
        if ranking.lexical:
            worth = np.float32(ranking.lexical)
            asked = bucket(question_tokens, 32 if question_tokens <= BLOCK else BLOCK)
        return cls(ends, keep, power, worth, asked, ranking.smooth)

    def said(self, ids: Int[Array, "S"], bounds: Int[Array, "3"], size: int) -> Said:
        """The ids of a context of `size` tokens with its padding, and the question's, out of a prompt's; see
        `Prompt.in_slots`."""
        prefix, question, end = bounds
        at = question + jnp.arange(self.asked)
        return ids[prefix + jnp.arange(size)], jnp.where(at < end, ids[at], -1)


def rank(scores: np.ndarray | jax.Array, chunks: Sequence[Encoded], ranking: Ranking,
         question: Sequence[int]) -> np.ndarray | jax.Array:
    """Scores of the chunks' tokens, chunks one after another, as `ranking` says; on device, followed by zeros to
    their bucket. `question` has its token ids. Doesn't wait for the scores."""
    ranks = Ranks.of(chunks, ranking, len(question))
    if ranks is None:
        return scores
    padded = pad_to_bucket(scores, sum(len(c.ids) for c in chunks))
    context, asked = np.zeros(len(padded), np.int32), np.full(ranks.asked, -1, np.int32)
    if ranks.worth is not None:
        context[: ranks.ends[-1]] = np.concatenate([c.array for c in chunks])
        asked[: len(question)] = question
    return rank_tokens(padded, ranks, (context, asked))


@jax.jit
def rank_tokens(scores: Float[Array, "C"], ranks: Ranks, said: Said) -> Float[Array, "C"]:
    """The scores as `ranks` says; `said` is read only where what the question says counts."""
    ends, at = ranks.ends, jnp.arange(len(scores))
    chunk = jnp.where(at < ends[-1], (at >= ends[:, None]).sum(0), -1)
    scores = jnp.where((chunk >= 0) & (True if ranks.keep is None else ranks.keep), scores, 0)
    if ranks.power is not None:
        totals = jnp.where(chunk == jnp.arange(len(ends))[:, None], scores, 0).sum(1)
        scores *= jnp.where(totals > 0, totals, 1)[jnp.maximum(chunk, 0)] ** ranks.power
    if ranks.worth is not None:
        scores += ranks.worth * scores.sum() * repeated(said[0], chunk, said[1])
    return scores if ranks.smooth == 1 else _smoothed(scores, chunk, ranks.smooth)


def repeated(context: Int[Array, "C"], chunk: Int[Array, "C"], question: Int[Array, "Q"]) -> Float[Array, "C"]:
    """How much each context token repeats the question: 1 / n² for the rarest run of three tokens that holds it, lies
    in one chunk and is in the question too, n being how often the context has that run; 0 without one. `chunk` is -1
    for padding of the context's ids, and the question's are padded with -1, to a multiple of BLOCK where they are more.
    """
    runs = _runs(context)
    whole = (chunk >= 0) & (chunk == jnp.roll(chunk, 1 - RUN)) & (jnp.arange(len(chunk)) <= len(chunk) - RUN)
    valid = (question >= 0) & (jnp.roll(question, 1 - RUN) >= 0) & (jnp.arange(len(question)) <= len(question) - RUN)

    def compare(worth, asked):
        its_runs, real = asked
        same = whole & real[:, None]
        for token, its in zip(runs, its_runs, strict=True):
            same &= token == its[:, None]
        times = jnp.maximum(same.sum(1), 1).astype(jnp.float32)
        return jnp.maximum(worth, jnp.where(same, times[:, None] ** -2, 0).max(0)), None

    worth = jnp.zeros(len(chunk))  # of the run that begins at a token
    if len(question) <= BLOCK:  # a loop of one step, too, would be a launch of its own
        worth, _ = compare(worth, (_runs(question), valid))
    else:
        blocks = _runs(question).reshape(RUN, -1, BLOCK).swapaxes(0, 1), valid.reshape(-1, BLOCK)
        worth, _ = jax.lax.scan(compare, worth, blocks)
    return jnp.stack([jnp.roll(worth, later) for later in range(RUN)]).max(0)  # the last runs are 0: none comes around


def _runs(ids: Int[Array, "C"]) -> Int[Array, "3 C"]:
    """The run that begins at each token, token by token; the last ones' go on at the beginning."""
    return jnp.stack([jnp.roll(ids, -later) for later in range(RUN)])


def _smoothed(scores: Float[Array, "C"], chunk: Int[Array, "C"], width: int) -> Float[Array, "C"]:
    reach = width // 2
    near, of = jnp.pad(scores, reach), jnp.pad(chunk, reach, constant_values=-1)
    total, count = jnp.zeros_like(scores), jnp.zeros_like(scores)
    for first in range(width):
        same = of[first : first + len(scores)] == chunk
        total += jnp.where(same, near[first : first + len(scores)], 0)
        count += same
    return total / count
