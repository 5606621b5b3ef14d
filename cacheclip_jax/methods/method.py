"""What a method is: given a request, which context tokens to recompute, over which chunk caches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import jax
import numpy as np

from cacheclip_jax.errors import BadInput
from cacheclip_jax.prompt import Prompt
from cacheclip_jax.score import Scoring

Caches = Literal["shared", "none"] | None


def check_prefix(prefix: str) -> None:
    """Raises BadInput unless `prefix` names a way in which chunks are encoded."""
    if prefix not in ("shared", "none"):
        raise BadInput(f"prefix={prefix!r}: choose shared or none")


Scores = np.ndarray | jax.Array


@dataclass(frozen=True)
class Request:
    """What a method may look at: the primary's prompt, and the aux model's scores, computed when asked for.

    `aux_scores(scoring)` returns one score per context token of `prompt`; on device there may be more after them. The
    first call also starts to load the primary's caches: a plan without it loads only what it leaves something of.
    """

    prompt: Prompt
    aux_scores: Callable[[Scoring], Scores]


@dataclass(frozen=True)
class Plan:
    """Which context tokens are recomputed (boolean, one per context token; on device more may follow, all False), and
    the scores behind it, if any. `at_most` bounds how many, where the device knows the selection and the host not yet.
    """

    recompute: np.ndarray | jax.Array
    scores: Scores | None = None
    at_most: int | None = None

    def count(self) -> int:
        """Tokens to recompute, or what bounds them; waits for the device only where nothing does."""
        return int(np.asarray(self.recompute).sum()) if self.at_most is None else self.at_most

    def fetched(self, context_tokens: int) -> Plan:
        """The plan on the host, one entry per context token."""
        scores = None if self.scores is None else np.asarray(self.scores)[:context_tokens]
        return Plan(np.asarray(self.recompute)[:context_tokens], scores)


class Method(Protocol):
    """A way to answer from cached chunks.

    `caches` says which chunk caches are reused: "shared" (encoded behind the shared prefix), "none" (encoded behind
    nothing: each carries its own attention sink), or None (nothing is reused, the prefix neither).
    """

    name: ClassVar[str]

    @property
    def caches(self) -> Caches: ...

    def plan(self, request: Request) -> Plan: ...
