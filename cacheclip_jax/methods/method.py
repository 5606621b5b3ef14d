"""What a method is: given a request, which context tokens to recompute, over which chunk caches."""

from __future__ import annotations

from typing import ClassVar, Protocol

from cacheclip_jax.errors import BadInput
from cacheclip_jax.plan import Behind, Caches, Plan, Scores
from cacheclip_jax.request import Request
from cacheclip_jax.select import Budget, Groups, Windows, select_on_device


class Method(Protocol):
    """A way to answer from cached chunks.

    `caches` says which chunk caches are reused: "shared" (encoded behind the shared prefix), "none" (encoded behind
    nothing: each carries its own attention sink), or None (nothing is reused, the prefix neither).
    """

    name: ClassVar[str]

    @property
    def caches(self) -> Caches: ...

    def plan(self, request: Request) -> Plan: ...


class ByPrefix:
    """What methods with a field `prefix` share: it says behind what the chunks that they reuse were encoded."""

    prefix: Behind

    def __post_init__(self) -> None:
        if self.prefix not in ("shared", "none"):
            raise BadInput(f"prefix={self.prefix!r}: choose shared or none")

    @property
    def caches(self) -> Behind:
        """As `prefix` says."""
        return self.prefix


def best(request: Request, scores: Scores, budget: Budget, grouping: Groups | Windows, dense_layers: int = 0) -> Plan:
    """A plan that recomputes the groups with the highest scores, until the budget is spent."""
    chosen = select_on_device(scores, request.prompt.chunk_lengths, budget, grouping)
    return Plan(chosen.mask, scores, chosen.at_most, dense_layers)
