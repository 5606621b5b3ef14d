"""What a method is: given a request, which context tokens to recompute, over which chunk caches."""

from __future__ import annotations

from typing import ClassVar, Protocol

from cacheclip_jax.errors import BadInput
from cacheclip_jax.plan import Caches, Plan
from cacheclip_jax.request import Request


def check_prefix(prefix: str) -> None:
    """Raises BadInput unless `prefix` names a way in which chunks are encoded."""
    if prefix not in ("shared", "none"):
        raise BadInput(f"prefix={prefix!r}: choose shared or none")


class Method(Protocol):
    """A way to answer from cached chunks.

    `caches` says which chunk caches are reused: "shared" (encoded behind the shared prefix), "none" (encoded behind
    nothing: each carries its own attention sink), or None (nothing is reused, the prefix neither).
    """

    name: ClassVar[str]

    @property
    def caches(self) -> Caches: ...

    def plan(self, request: Request) -> Plan: ...
