"""ProphetKV (arXiv 2602.02579): the question's attention in the primary itself says what to recompute."""

from dataclasses import dataclass, field
from typing import ClassVar

from cacheclip_jax.methods.method import ByPrefix, best
from cacheclip_jax.plan import Behind, Plan
from cacheclip_jax.request import Request
from cacheclip_jax.score import Scoring
from cacheclip_jax.select import Budget, Groups, Windows


@dataclass(frozen=True)
class ProphetKV(ByPrefix):
    """Push the question through the primary over its chunk caches at their places in the prompt, take its attention in
    all layers (mean over layers, heads and question rows), recompute the best tokens in all layers.

    The paper recomputes 20%, single tokens, of chunks encoded alone; groups and the shared prefix are options. There is
    no released code. Scoring takes a pass of the question through every layer, which needs all caches on the device;
    they stay there for the repair.
    """

    budget: Budget = field(default_factory=lambda: Budget(ratio=0.2))
    grouping: Groups | Windows = field(default_factory=lambda: Groups(1))
    prefix: Behind = "none"
    name: ClassVar[str] = "prophetkv"

    def plan(self, request: Request) -> Plan:
        """The tokens that the question attends to most."""
        scoring = Scoring(layers="all", rows="mean")
        return best(request, lambda: request.primary_scores(scoring, self.prefix), self.budget, self.grouping)
