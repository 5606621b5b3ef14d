"""What a method is: given a request, which context tokens to recompute, over which chunk caches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import numpy as np

from cacheclip_jax.errors import BadInput
from cacheclip_jax.prompt import Prompt
from cacheclip_jax.score import Scoring

Caches = Literal["shared", "none"] | None


def check_prefix(prefix: str) -> None:
    """Raises BadInput unless `prefix` names a way in which chunks are encoded."""
    if prefix not in ("shared", "none"):
        raise BadInput(f"prefix={prefix!r}: choose shared or none")


@dataclass(frozen=True)
class Request:
    """What a method may look at: the primary's prompt, and the aux model's scores, computed when asked for.

    `aux_scores(scoring)` returns one score per context token of `prompt`.
    """

    prompt: Prompt
    aux_scores: Callable[[Scoring], np.ndarray]


@dataclass(frozen=True)
class Plan:
    """Which context tokens are recomputed (boolean, one per context token), and the scores behind it, if any."""

    recompute: np.ndarray
    scores: np.ndarray | None = None


class Method(Protocol):
    """A way to answer from cached chunks.

    `caches` says which chunk caches are reused: "shared" (encoded behind the shared prefix), "none" (encoded behind
    nothing: each carries its own attention sink), or None (nothing is reused, the prefix neither).
    """

    name: ClassVar[str]

    @property
    def caches(self) -> Caches: ...

    def plan(self, request: Request) -> Plan: ...
