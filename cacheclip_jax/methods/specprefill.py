"""SpecPrefill (arXiv 2502.02789): the primary reads only what a small model attends to while it drafts the answer."""

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from cacheclip_jax.errors import BadInput
from cacheclip_jax.methods.method import Caches
from cacheclip_jax.plan import Plan
from cacheclip_jax.request import Request
from cacheclip_jax.select import Budget, Groups, select_on_device


@dataclass(frozen=True)
class SpecPrefill:
    """The aux model prefills the whole prompt and drafts `look_ahead` tokens. Their attention, average-pooled over
    `pool` tokens, its maximum over layers and heads, its mean over steps, ranks chunks of `chunk` tokens by their mean.
    The primary prefills the best of them with prefix and question, at their positions in the whole prompt: what a
    budget recomputes elsewhere is what is kept here, and the rest is gone.

    No chunk cache is used, and none need be stored; the price is a full prefill of the aux model. Look-ahead, pooling
    and chunks are the released configuration's. Chunks run over the whole context and may span passages; prefix and
    question are kept whatever their scores.
    """

    budget: Budget = field(default_factory=lambda: Budget(ratio=0.2))
    look_ahead: int = 8
    pool: int = 13
    chunk: int = 32
    name: ClassVar[str] = "specprefill"
    caches: ClassVar[Caches] = None

    def __post_init__(self) -> None:
        for setting in ("look_ahead", "pool", "chunk"):
            if getattr(self, setting) < 1:
                raise BadInput(f"{setting}={getattr(self, setting)} is out of range: it must be 1 or more")
        if self.pool % 2 == 0:
            raise BadInput(f"pool={self.pool} is even: a window around a token has an odd number of them")

    def plan(self, request: Request) -> Plan:
        """The chunks that the draft attends to most."""
        scores, total = request.aux_lookahead(self.look_ahead, self.pool), request.prompt.context_tokens
        # Chunks are ranked by sums: of tokens divided by their chunk's length these are the means.
        sizes = np.full(len(scores), self.chunk, np.float32)
        sizes[total - total % self.chunk :] = max(total % self.chunk, 1)
        chosen = select_on_device(scores / sizes, (total,), self.budget, Groups(self.chunk))
        return Plan(chosen.mask, scores, chosen.at_most, drop=True)
