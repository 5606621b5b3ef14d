"""What a method is: given a request, which context tokens to recompute, over which chunk caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Protocol

import jax
import numpy as np

from cacheclip_jax.errors import BadInput
from cacheclip_jax.groups import Grouping, Windows
from cacheclip_jax.packed import pack
from cacheclip_jax.plan import Behind, Caches, Discount, Plan, Scores
from cacheclip_jax.ranking import Ranking, Ranks, rank
from cacheclip_jax.recompute import best_rows
from cacheclip_jax.request import Request
from cacheclip_jax.select import Best, Budget, at_most, pad_to_bucket, select_on_device


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


def best(request: Request, signal: Callable[[], Scores], budget: Budget, grouping: Grouping, dense_layers: int = 0,
         ranking: Ranking = Ranking(), heads_of_chunks: int = 0,  # noqa: B008 (frozen)
         discount: Discount | None = None) -> Plan:
    """A plan that recomputes the groups which a signal ranks highest, until the budget is spent.

    Where that bounds the number of rows, one program goes from the scores to the rows, and what it needs beside them is
    sent to the device before the signal is computed.
    """
    side, prompt = request.primary, request.prompt
    most = at_most(prompt.context_tokens, budget, grouping)
    if most is None or isinstance(grouping, Windows):
        discount = jax.device_put(discount, side.sharding)
        scores = signal()
        ranked = rank(scores, prompt.chunks, ranking, prompt.question)
        chosen = select_on_device(ranked, prompt.chunk_lengths, budget, grouping, prompt.chunks, heads_of_chunks)
        return Plan(chosen.mask, scores, dense_layers=dense_layers, discount=discount, ranked=ranked)
    sent = jax.device_put(pack((
        *prompt.in_slots(side.slots), Ranks.of(prompt.chunks, ranking, len(prompt.question)),
        Best.of(prompt.chunk_lengths, budget, grouping, prompt.chunks, heads_of_chunks), discount)), side.sharding)
    scores = signal()
    padded = pad_to_bucket(scores, prompt.context_tokens)
    if isinstance(padded, np.ndarray) or padded.sharding != side.sharding:
        padded = jax.device_put(padded, side.sharding)
    mask, ranked, rows, discount = best_rows(side.model.params.outer, sent, padded,
                                             side.rows(most + len(prompt.question), "repair"))
    return Plan(mask, scores, most, dense_layers, discount=discount, rows=rows, ranked=ranked)
