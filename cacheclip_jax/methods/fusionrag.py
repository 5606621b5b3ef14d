"""FusionRAG's online selection (arXiv 2601.12904): last-layer queries of the question, read alone, over chunk keys."""

from dataclasses import dataclass, field
from typing import ClassVar

from cacheclip_jax.methods.method import ByPrefix, best
from cacheclip_jax.plan import Behind, Plan
from cacheclip_jax.request import Request
from cacheclip_jax.score import Scoring
from cacheclip_jax.select import Budget, Groups


@dataclass(frozen=True)
class FusionRAG(ByPrefix):
    """Prefill prefix and question without the context, hold the question's queries of the primary's last layer against
    the chunk caches' keys there (one softmax over the context, mean over heads, sum over question rows), recompute the
    best tokens.

    The paper recomputes at most 15%, single tokens. Its other half, chunk caches that have attended to similar chunks
    when they were made, is not part of this: it would change what is stored.
    """

    budget: Budget = field(default_factory=lambda: Budget(ratio=0.2))
    prefix: Behind = "shared"
    name: ClassVar[str] = "fusionrag"

    def plan(self, request: Request) -> Plan:
        """The tokens whose last-layer keys the question matches best; a mean over rows ranks as the sum does."""
        scoring = Scoring(layers="last", rows="mean", context="alone")
        return best(request, lambda: request.primary_scores(scoring, self.prefix), self.budget, Groups(1))
