"""Naive reuse: concatenate chunk caches, repair nothing."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cacheclip_jax.methods.method import ByPrefix
from cacheclip_jax.plan import Behind, Plan
from cacheclip_jax.request import Request


@dataclass(frozen=True)
class Naive(ByPrefix):
    """Reuse all, recompute nothing; with chunks encoded behind the shared prefix, or (prefix="none") each alone."""

    prefix: Behind = "shared"
    name: ClassVar[str] = "naive"

    def plan(self, request: Request) -> Plan:
        """No context token."""
        return Plan(np.zeros(request.prompt.context_tokens, bool))
