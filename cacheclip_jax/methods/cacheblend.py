"""CacheBlend (arXiv 2405.16444): recompute the tokens whose values in an early layer are farthest from cached ones."""

from dataclasses import dataclass, field
from typing import ClassVar

from cacheclip_jax.methods.method import ByPrefix, best
from cacheclip_jax.plan import Behind, Plan
from cacheclip_jax.request import Request
from cacheclip_jax.select import Budget, Groups


@dataclass(frozen=True)
class CacheBlend(ByPrefix):
    """All tokens run through the layers before `layer` (1) and get fresh K and V there too; those whose values are
    farthest from the cached ones (squared L2, over heads) go on through the rest. It doesn't look at the question.

    The paper recomputes 15%, beside the first layers. Its chunks are encoded without a prefix; `prefix="shared"` is an
    option. The released code masks the recomputed rows as if they were the prompt's last ones, so that they see later
    tokens, and in two of its three examples leaves all of the question but its last token to the selection. Here rows
    see just what is before them, and the question is always computed.
    """

    budget: Budget = field(default_factory=lambda: Budget(ratio=0.2))
    layer: int = 1
    prefix: Behind = "none"
    name: ClassVar[str] = "cacheblend"

    def plan(self, request: Request) -> Plan:
        """The tokens of highest deviation, until the budget is spent."""
        return best(request, lambda: request.value_deviation(self.layer, self.prefix), self.budget, Groups(1),
                    dense_layers=self.layer + 1)
