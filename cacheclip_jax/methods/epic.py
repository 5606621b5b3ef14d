"""EPIC (arXiv 2410.15332), LegoLink: recompute the first tokens of every chunk, which are its attention sink."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cacheclip_jax.errors import BadInput
from cacheclip_jax.methods.method import ByPrefix
from cacheclip_jax.plan import Behind, Plan
from cacheclip_jax.request import Request
from cacheclip_jax.select import Budget


@dataclass(frozen=True)
class Epic(ByPrefix):
    """Recompute the first `tokens` (32, the most that the paper takes) of each chunk; with a budget, as many of each as
    spend it evenly. Which ones is known before the question.

    A chunk whose cache saw what it sees in this prompt needs no repair and is left out: the first one, where it is
    encoded behind the shared prefix, or where there is no prefix. By default chunks are encoded alone: each then has a
    sink of its own, which is what the method repairs.
    """

    budget: Budget | None = None
    tokens: int = 32
    prefix: Behind = "none"
    name: ClassVar[str] = "epic"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens < 0:
            raise BadInput(f"tokens={self.tokens} is out of range: it must be 0 or more")
        if self.budget is not None and self.budget.mass is not None:
            raise BadInput("EPIC has no scores that a mass budget could share out: give a ratio or tokens")

    def plan(self, request: Request) -> Plan:
        """The heads of the chunks."""
        prompt = request.prompt
        lengths = np.array(prompt.chunk_lengths)
        open_to_repair = lengths.copy()
        if prompt.exact_tokens(self.prefix) > len(prompt.prefix):
            open_to_repair[0] = 0
        if self.budget is None:
            heads = np.minimum(open_to_repair, self.tokens)
        else:
            heads = even_heads(open_to_repair, self.budget.target(prompt.context_tokens))
        return Plan(np.concatenate([np.arange(n) < head for n, head in zip(lengths, heads, strict=True)]))


def even_heads(lengths: np.ndarray, total: int) -> np.ndarray:
    """How many first tokens of each chunk make `total` together (or are all there are): equally many of each as far as
    it has them, and what is left over goes to the first chunks."""
    level = max(k for k in range(lengths.max() + 1) if np.minimum(lengths, k).sum() <= total)
    heads = np.minimum(lengths, level)
    heads[np.flatnonzero(lengths > level)[: total - heads.sum()]] += 1
    return heads
