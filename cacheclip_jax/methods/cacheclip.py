"""CacheClip (arXiv 2510.10129): the aux model scores tokens, the best groups are recomputed."""

from dataclasses import dataclass, field
from typing import ClassVar

from cacheclip_jax.plan import Caches, Plan
from cacheclip_jax.request import Request
from cacheclip_jax.score import Scoring
from cacheclip_jax.select import Budget, Groups, Windows, select_on_device


@dataclass(frozen=True)
class AuxGuided:
    """Recompute the groups of tokens that the aux model's attention ranks highest for the question."""

    budget: Budget = field(default_factory=lambda: Budget(ratio=0.2))
    scoring: Scoring = field(default_factory=Scoring)
    grouping: Groups | Windows = field(default_factory=Groups)
    name: ClassVar[str] = "cacheclip"
    caches: ClassVar[Caches] = "shared"

    def plan(self, request: Request) -> Plan:
        """The best groups by aux score, until the budget is spent."""
        scores = request.aux_scores(self.scoring)
        chosen = select_on_device(scores, request.prompt.chunk_lengths, self.budget, self.grouping)
        return Plan(chosen.mask, scores, chosen.at_most)
