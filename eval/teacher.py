"""The ceiling of finetuning: recompute what its teacher says, as if an aux model had learned that perfectly."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import jax
import numpy as np

from cacheclip_jax.bucket import bucket
from cacheclip_jax.decode import padded_stop_ids
from cacheclip_jax.errors import BadInput
from cacheclip_jax.groups import Groups
from cacheclip_jax.methods.method import best
from cacheclip_jax.plan import Caches, Plan
from cacheclip_jax.request import Request
from cacheclip_jax.score import context_scores
from cacheclip_jax.select import Budget
from train.forward import kernel, stack_layers
from train.packed import pack, stack
from train.teach import TARGETS, Target, Teaching, Verdict, teach

_stacked = jax.jit(stack_layers)


@dataclass(frozen=True)
class Teacher:
    """Recompute the groups that the teacher's scores rank highest: `target` as in `train/teach.py`.

    For research, like the oracle: the verdict takes full prefill, the primary's own greedy answer and, for "influence",
    gradients through its rows.
    """

    budget: Budget = field(default_factory=lambda: Budget(ratio=0.2))
    target: Target = "influence"
    grouping: Groups = field(default_factory=Groups)
    name: ClassVar[str] = "teacher"
    caches: ClassVar[Caches] = "shared"

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise BadInput(f"target={self.target!r}: choose one of {', '.join(TARGETS)}")

    def plan(self, request: Request) -> Plan:
        """The groups with the highest scores of the teacher."""
        prompt, found = request.prompt, request.once("teacher", lambda: verdict(request))
        scores = context_scores(found.scores[self.target][0], np.int32(len(prompt.prefix)),
                                bucket(prompt.context_tokens))
        return best(request, lambda: scores, self.budget, self.grouping)


def verdict(request: Request, teaching: Teaching = Teaching()) -> Verdict:  # noqa: B008 (frozen)
    """The teacher's verdict on a request's prompt, a batch of one, in the size of the primary's caches. It stacks the
    primary's layers anew, in memory of their size."""
    side, model = request.primary, request.primary.model
    rows = bucket(len(side.prompt.question) + teaching.answer_tokens, 128)
    packed = stack([pack(side.prompt, side.slots, rows, teaching.answer_tokens)])
    return teach(_stacked(model.params), model.config, packed, padded_stop_ids(model), teaching, kernel(model))
