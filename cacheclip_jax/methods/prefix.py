"""Prefix caching: what serving engines do today."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cacheclip_jax.plan import Caches, Plan
from cacheclip_jax.request import Request


@dataclass(frozen=True)
class Prefix:
    """Reuse only what an unchanged prefix allows, the shared prefix and the first chunk; exact, like full prefill.

    The first chunk's cache saw the shared prefix and nothing else, just as in this prompt; every later chunk would have
    seen other chunks. Where chunks are encoded behind a lead-in too, the prefix alone is reused.
    """

    name: ClassVar[str] = "prefix"
    caches: ClassVar[Caches] = "shared"

    def plan(self, request: Request) -> Plan:
        """Every context token after those whose caches are exact."""
        prompt = request.prompt
        return Plan(np.arange(prompt.context_tokens) >= prompt.exact_tokens("shared") - len(prompt.prefix))
