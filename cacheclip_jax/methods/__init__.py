"""Methods behind one interface: each says which context tokens to recompute, over which caches."""

from __future__ import annotations

from typing import Any

from cacheclip_jax.errors import BadInput
from cacheclip_jax.methods.cacheclip import AuxGuided
from cacheclip_jax.methods.full import Full
from cacheclip_jax.methods.given import Given
from cacheclip_jax.methods.method import Method
from cacheclip_jax.methods.naive import Naive
from cacheclip_jax.methods.prefix import Prefix
from cacheclip_jax.methods.random import Random
from cacheclip_jax.plan import Plan
from cacheclip_jax.request import Request
from cacheclip_jax.select import Budget

METHODS: dict[str, Any] = {
    "full": Full,
    "prefix": Prefix,
    "naive": Naive,
    "random": Random,
    "cacheclip": AuxGuided,
}

__all__ = ["METHODS", "AuxGuided", "Full", "Given", "Method", "Naive", "Plan", "Prefix", "Random", "Request", "make",
           "takes_budget"]


def make(name: str, budget: Budget | None = None, **settings: Any) -> Method:
    """A method by name; "naive-none" is naive reuse without the shared prefix.

    Raises BadInput for an unknown name, and for a budget where the method's share of recomputed tokens is fixed.
    """
    if name == "naive-none":
        name, settings = "naive", {"prefix": "none", **settings}
    if name not in METHODS:
        raise BadInput(f"method {name!r} is unknown: choose one of {', '.join(METHODS)}, naive-none")
    kind = METHODS[name]
    if budget is not None:
        if not takes_budget(name):
            raise BadInput(f"the method {name} recomputes a fixed share of the context: leave ratio and budget out")
        settings = {"budget": budget, **settings}
    return kind(**settings)


def takes_budget(name: str) -> bool:
    """Whether the named method recomputes as much as a budget says."""
    return name in METHODS and "budget" in METHODS[name].__dataclass_fields__
