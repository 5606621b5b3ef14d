"""How the context is cut into what is recomputed together: fixed groups, whole sentences, sliding windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int

from cacheclip_jax.errors import BadInput
from cacheclip_jax.model.tokenizer import Encoded

Reduce = Literal["sum", "mean", "max"]


@dataclass(frozen=True)
class Groups:
    """Fixed groups of `size` consecutive tokens of one chunk, ranked by the sum, mean or maximum of their scores. They
    differ in a chunk's last group, which may be shorter, and in how much one high score counts."""

    size: int = 8
    reduce: Reduce = "sum"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise BadInput(f"group size {self.size} is out of range: it must be 1 or more")
        _check_reduce(self.reduce)

    @property
    def longest(self) -> int:
        """Tokens of the largest group there can be."""
        return self.size

    def sizes(self, chunk_lengths: Sequence[int], chunks: Sequence[Encoded]) -> Int[np.ndarray, "M"]:
        """Tokens of each group, in order of the context."""
        del chunks  # only lengths matter
        lengths = np.asarray(chunk_lengths, np.int64)
        groups = -(-lengths // self.size)
        sizes = np.full(groups.sum(), self.size, np.int64)
        sizes[np.cumsum(groups)[groups > 0] - 1] = (lengths - (groups - 1) * self.size)[groups > 0]
        return sizes


@dataclass(frozen=True)
class Sentences:
    """Whole sentences of one chunk; those of more than `longest` tokens are cut into parts of about equally many.

    A sentence ends at . ! ? with white space behind, at their full-width forms, and at line ends; the token that holds
    the next one's first character begins it. By default they are ranked by the mean of their scores, the most score for
    each token that it costs to recompute; the sum would prefer long sentences, the maximum ignores all tokens but one.
    """

    longest: int = 32
    reduce: Reduce = "mean"

    def __post_init__(self) -> None:
        if self.longest < 1:
            raise BadInput(f"longest={self.longest} is out of range: a sentence's part has 1 token or more")
        _check_reduce(self.reduce)

    def sizes(self, chunk_lengths: Sequence[int], chunks: Sequence[Encoded]) -> Int[np.ndarray, "M"]:
        """Tokens of each group, in order of the context."""
        if [len(c.ids) for c in chunks] != list(chunk_lengths):
            raise ValueError(f"sentences of chunks of {list(chunk_lengths)} tokens need these chunks' texts")
        lengths = np.concatenate([c.sentence_lengths for c in chunks])
        parts = -(-lengths // self.longest)
        part = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
        length, parts = np.repeat(lengths, parts), np.repeat(parts, parts)
        return length * (part + 1) // parts - length * part // parts


@dataclass(frozen=True)
class Windows:
    """The sliding window of CacheClip's second version: of the best tokens up to the budget, those `size`-token windows
    that hold at least `density` of them are kept whole, the other tokens are dropped."""

    size: int = 8
    density: int = 5

    def __post_init__(self) -> None:
        if not 1 <= self.density <= self.size:
            raise BadInput(f"density {self.density} is out of range: 1 to the window size {self.size}")


Grouping = Groups | Sentences | Windows


def group_ids(chunk_lengths: Sequence[int], size: int) -> Int[np.ndarray, "C"]:
    """The group of each context token: consecutive runs of `size` tokens that start anew at every chunk."""
    sizes = Groups(size).sizes(chunk_lengths, ())
    return np.repeat(np.arange(len(sizes)), sizes)


def _check_reduce(reduce: str) -> None:
    if reduce not in ("sum", "mean", "max"):
        raise BadInput(f"reduce={reduce!r}: choose sum, mean or max")
