"""APE (arXiv 2502.05431): nothing is recomputed, attention to the parallel chunks is reshaped instead."""

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from cacheclip_jax.methods.method import Caches
from cacheclip_jax.plan import Plan, Reshape
from cacheclip_jax.request import Request


@dataclass(frozen=True)
class Ape:
    """Reuse all chunks, each at the position behind the shared prefix at which it was encoded, and the question behind
    the longest; its rows and every decoded token divide their logits to the context by a temperature, and the context's
    log-sum-exp is scaled where it meets that of prefix, question and answer.

    Temperature and scale are 0.9 and 0.9, the released code's defaults; the paper tunes them for each task.
    """

    reshape: Reshape = field(default_factory=Reshape)
    name: ClassVar[str] = "ape"
    caches: ClassVar[Caches] = "shared"

    def plan(self, request: Request) -> Plan:
        """No context token."""
        return Plan(np.zeros(request.prompt.context_tokens, bool), reshape=self.reshape)
