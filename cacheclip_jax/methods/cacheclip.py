"""CacheClip (arXiv 2510.10129): the aux model scores tokens, the best groups are recomputed."""

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from cacheclip_jax.errors import BadInput
from cacheclip_jax.groups import Grouping, Groups
from cacheclip_jax.methods.method import ByPrefix, best
from cacheclip_jax.plan import Behind, Plan
from cacheclip_jax.ranking import Ranking, best_chunks, rank
from cacheclip_jax.request import Request
from cacheclip_jax.score import Scoring
from cacheclip_jax.select import Budget, at_most, select


@dataclass(frozen=True)
class AuxGuided(ByPrefix):
    """Recompute the groups of tokens that the aux model's attention ranks highest for the question.

    `heads_of_chunks` first tokens of every chunk are recomputed in any case, out of the same budget.
    With `keep` below 1, whole chunks stay in the prompt only until they hold this share of the context's tokens, those
    that the aux model attends to most; the others are left out as if nobody had retrieved them. The budget still counts
    tokens of the whole context. What is loaded then depends on the scores, so it starts after them.
    `prefix` says behind what the primary's chunks were encoded; the aux model reads its own behind the shared prefix.
    """

    budget: Budget = field(default_factory=lambda: Budget(ratio=0.2))
    scoring: Scoring = field(default_factory=Scoring)
    grouping: Grouping = field(default_factory=Groups)
    ranking: Ranking = field(default_factory=Ranking)
    heads_of_chunks: int = 0
    keep: float = 1.0
    prefix: Behind = "shared"
    name: ClassVar[str] = "cacheclip"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads_of_chunks < 0:
            raise BadInput(f"heads_of_chunks={self.heads_of_chunks} is out of range: it must be 0 (none) or more")
        if not 0 < self.keep <= 1:
            raise BadInput(f"keep={self.keep} is out of range: it must be above 0 (the best chunk) and up to 1 (all)")

    def plan(self, request: Request) -> Plan:
        """The best groups by aux score, until the budget is spent."""
        if self.keep < 1:
            return self._plan_of_best_chunks(request)
        return best(request, lambda: request.aux_scores(self.scoring), self.budget, self.grouping,
                    ranking=self.ranking, heads_of_chunks=self.heads_of_chunks)

    def _plan_of_best_chunks(self, request: Request) -> Plan:
        prompt = request.prompt
        total, lengths = prompt.context_tokens, prompt.chunk_lengths
        scores = np.asarray(request.aux_scores(self.scoring, ahead=False))[:total]
        stays = best_chunks(scores, lengths, self.keep)
        left, of = prompt.narrowed(stays), np.repeat(stays, lengths)
        budget = self.budget if self.budget.mass is not None else Budget(tokens=self.budget.target(total))
        mask = np.zeros(total, bool)
        ranks = np.asarray(rank(scores[of], left.chunks, self.ranking))
        mask[of] = select(ranks, left.chunk_lengths, budget, self.grouping, left.chunks, self.heads_of_chunks)
        return Plan(mask, scores, at_most(left.context_tokens, budget, self.grouping), chunks=stays)
