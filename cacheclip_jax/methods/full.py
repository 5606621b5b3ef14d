"""Full prefill: the quality that everything else is measured against."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cacheclip_jax.plan import Caches, Plan
from cacheclip_jax.request import Request


@dataclass(frozen=True)
class Full:
    """Compute every token of the prompt, reuse nothing."""

    name: ClassVar[str] = "full"
    caches: ClassVar[Caches] = None

    def plan(self, request: Request) -> Plan:
        """Every context token."""
        return Plan(np.ones(request.prompt.context_tokens, bool))
