"""Oracle: the primary's own attention in a full prefill; what perfect knowledge of attention would recompute."""

from dataclasses import dataclass, field
from typing import ClassVar

from cacheclip_jax.methods.method import Caches, best
from cacheclip_jax.plan import Plan
from cacheclip_jax.request import Request
from cacheclip_jax.score import Scoring
from cacheclip_jax.select import Budget, Groups, Windows


@dataclass(frozen=True)
class Oracle:
    """Prefill the whole prompt with the primary, recompute the groups that its question attends to most: its last row,
    in all layers, unless `scoring` says otherwise.

    For research: it costs a full prefill and saves nothing. It isn't an upper bound either: what a question attends to
    isn't quite what must be recomputed for it.
    """

    budget: Budget = field(default_factory=lambda: Budget(ratio=0.2))
    scoring: Scoring = field(default_factory=lambda: Scoring(layers="all", context="joint"))
    grouping: Groups | Windows = field(default_factory=Groups)
    name: ClassVar[str] = "oracle"
    caches: ClassVar[Caches] = "shared"

    def plan(self, request: Request) -> Plan:
        """The groups of highest attention."""
        return best(request, lambda: request.primary_scores(self.scoring, "shared"), self.budget, self.grouping)
