"""Given positions: recompute just what the caller says, for research and for tests."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from cacheclip_jax.errors import BadInput
from cacheclip_jax.methods.method import check_prefix
from cacheclip_jax.plan import Plan
from cacheclip_jax.request import Request


@dataclass(frozen=True)
class Given:
    """Recompute the context tokens with these indices (0 is the first token of the first chunk)."""

    tokens: tuple[int, ...] = ()
    prefix: Literal["shared", "none"] = "shared"
    name: ClassVar[str] = "given"

    def __post_init__(self) -> None:
        check_prefix(self.prefix)

    @property
    def caches(self) -> Literal["shared", "none"]:
        """As `prefix` says."""
        return self.prefix

    def plan(self, request: Request) -> Plan:
        """The given tokens. Raises BadInput for an index outside the context."""
        total = request.prompt.context_tokens
        outside = [t for t in self.tokens if not 0 <= t < total]
        if outside:
            raise BadInput(f"token {outside[0]} is outside the context of {total} tokens")
        mask = np.zeros(total, bool)
        mask[list(self.tokens)] = True
        return Plan(mask)
