"""What an answer carries: text, what was reused and recomputed, and the time of every stage."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from cacheclip_jax.store import Passage


@dataclass(frozen=True)
class Times:
    """Seconds of each stage of one request.

    ttft runs from the call to the first token on the host and holds all the others but decode. Loading runs beside
    scoring and recompute, so the stages don't add up: `load` is how long after the call the primary's last layer had
    arrived on its device, `score` includes loading the aux model's caches, `recompute` placing the primary's and
    waiting for those that are late. `encode` is what chunks missing from the store cost.
    """

    retrieve: float = 0.0
    score: float = 0.0
    select: float = 0.0
    load: float = 0.0
    encode: float = 0.0
    recompute: float = 0.0
    ttft: float = 0.0
    decode: float = 0.0


@dataclass(frozen=True)
class Selection:
    """Which context tokens were recomputed (boolean), the aux scores behind it, where the method has any, and what
    groups were ranked by: these scores, with the question's own words and whatever else the method's ranking adds."""

    recompute: np.ndarray
    scores: np.ndarray | None
    ranked: np.ndarray | None


@dataclass(frozen=True)
class Result:
    """An answer and its accounting. Ratios count context tokens: prefix and question are not among them."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "stop_string", "length"]
    method: str
    realised_ratio: float
    context_tokens: int
    prefix_tokens: int
    question_tokens: int
    reused_tokens: int
    recomputed_tokens: int
    hits: int  # chunk caches found in the store, of both models
    misses: int  # chunk caches that had to be made
    encoded: tuple[str, ...]  # ids of chunks that weren't in the store and were encoded on the fly
    repaired: tuple[str, ...]  # ids of chunks whose stored bytes failed their checksum and were encoded anew
    warnings: tuple[str, ...]
    compiles: int  # programs compiled during this request; not 0 means that the times hold compilation
    times: Times
    passages: tuple[Passage, ...] = field(repr=False)
    selection: Selection = field(repr=False)

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first, over the time they took; 0 where there were none."""
        return (len(self.token_ids) - 1) / self.times.decode if len(self.token_ids) > 1 and self.times.decode else 0.0

    def to_dict(self) -> dict[str, Any]:
        """What scripts read: everything but the passages' texts and the per-token selection."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)
               if f.name not in ("passages", "selection", "times")}
        out["chunks"] = [p.id for p in self.passages]
        out["times"] = dataclasses.asdict(self.times)
        out["decode_tokens_per_second"] = self.decode_tokens_per_second
        return out
