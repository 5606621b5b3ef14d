"""Naive reuse: concatenate chunk caches, repair nothing."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from cacheclip_jax.methods.method import check_prefix
from cacheclip_jax.plan import Plan
from cacheclip_jax.request import Request


@dataclass(frozen=True)
class Naive:
    """Reuse all, recompute nothing; with chunks encoded behind the shared prefix, or (prefix="none") each alone."""

    prefix: Literal["shared", "none"] = "shared"
    name: ClassVar[str] = "naive"

    def __post_init__(self) -> None:
        check_prefix(self.prefix)

    @property
    def caches(self) -> Literal["shared", "none"]:
        """As `prefix` says."""
        return self.prefix

    def plan(self, request: Request) -> Plan:
        """No context token."""
        return Plan(np.zeros(request.prompt.context_tokens, bool))
