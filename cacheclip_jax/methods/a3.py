"""A3 (arXiv 2511.17560): the question's attention in the primary's second layer says what to recompute."""

from dataclasses import dataclass, field
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from cacheclip_jax.errors import BadInput
from cacheclip_jax.lookahead import average_pool
from cacheclip_jax.methods.method import ByPrefix, best
from cacheclip_jax.plan import Behind, Plan
from cacheclip_jax.request import Request
from cacheclip_jax.select import Budget, Groups


@dataclass(frozen=True)
class A3(ByPrefix):
    """All tokens run through the layers before `layer` (1); there the question's queries meet all keys, the heads'
    logits summed before the softmax, and the weights are summed over question rows and average-pooled over `pool`
    tokens. The best tokens are recomputed in all layers.

    In the layers before, K and V of every token are fresh; in the first layer cached ones are no different. Chunks are
    encoded alone; `prefix="shared"` is an option. The rule follows KVBench's implementation, the paper's own being
    unreleased.
    """

    budget: Budget = field(default_factory=lambda: Budget(ratio=0.2))
    layer: int = 1
    pool: int = 5
    prefix: Behind = "none"
    name: ClassVar[str] = "a3"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool < 1 or self.pool % 2 == 0:
            raise BadInput(f"pool={self.pool} is out of range: it must be odd and 1 or more")

    def plan(self, request: Request) -> Plan:
        """The tokens that the question attends to most in that layer."""
        scores = jnp.asarray(request.early_scores(self.layer))
        context = np.arange(len(scores)) < request.prompt.context_tokens
        pooled = average_pool(jnp.where(context, scores, 0), self.pool)
        return best(request, lambda: pooled, self.budget, Groups(1), dense_layers=self.layer)
