"""CacheClip (arXiv 2510.10129): the aux model scores tokens, the best groups are recomputed."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

from cacheclip_jax.errors import BadInput
from cacheclip_jax.groups import Grouping, Sentences
from cacheclip_jax.methods.method import ByPrefix, best
from cacheclip_jax.plan import Behind, Discount, Plan
from cacheclip_jax.ranking import Ranking
from cacheclip_jax.request import Request
from cacheclip_jax.score import Scoring
from cacheclip_jax.select import Budget


@dataclass(frozen=True)
class AuxGuided(ByPrefix):
    """Recompute the groups of tokens that the aux model's attention ranks highest for the question: whole sentences or
    lines, up to 96 tokens, so that no name or number is fresh in part. Tokens that repeat the question's own words rank
    higher, so that an identifier is found among others like it.

    `heads_of_chunks` first tokens of every chunk are recomputed in any case, out of the same budget.
    `discount` nats are subtracted from attention to context tokens whose cache is stale: log 2, the default, lets them
    count half.
    `prefix` says behind what the primary's chunks were encoded; the aux model reads its own behind the shared prefix.
    """

    budget: Budget = field(default_factory=lambda: Budget(ratio=0.2))
    scoring: Scoring = field(default_factory=Scoring)
    grouping: Grouping = field(default_factory=lambda: Sentences(96))
    ranking: Ranking = field(default_factory=lambda: Ranking(lexical=0.005))
    heads_of_chunks: int = 0
    discount: float = math.log(2)
    prefix: Behind = "shared"
    name: ClassVar[str] = "cacheclip"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads_of_chunks < 0:
            raise BadInput(f"heads_of_chunks={self.heads_of_chunks} is out of range: it must be 0 (none) or more")

        if not 0 <= self.discount < float("inf"):
            raise BadInput(f"discount={self.discount} is out of range: it must be 0 (none) or more, and finite")

    def plan(self, request: Request) -> Plan:
        """The best groups by aux score, until the budget is spent."""
        request.ask_aux(self.scoring)
        return best(request, lambda: request.aux_scores(self.scoring), self.budget, self.grouping,
                    ranking=self.ranking, heads_of_chunks=self.heads_of_chunks,
                    discount=Discount.of(request.prompt, self.prefix, self.discount))
