"""Random groups: how much of a method's quality comes from recomputing anything at all."""

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from cacheclip_jax.groups import Grouping, Groups
from cacheclip_jax.plan import Caches, Plan
from cacheclip_jax.request import Request
from cacheclip_jax.select import Budget, select


@dataclass(frozen=True)
class Random:
    """Recompute groups drawn at random, as many as CacheClip would."""

    budget: Budget = field(default_factory=lambda: Budget(ratio=0.2))
    grouping: Grouping = field(default_factory=Groups)
    seed: int = 0
    name: ClassVar[str] = "random"
    caches: ClassVar[Caches] = "shared"

    def plan(self, request: Request) -> Plan:
        """Groups ranked by uniform noise."""
        noise = np.random.default_rng(self.seed).random(request.prompt.context_tokens, np.float32)
        return Plan(select(noise, request.prompt.chunk_lengths, self.budget, self.grouping, request.prompt.chunks))
