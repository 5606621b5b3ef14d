"""Held-out recall: a student's selections on tasks that it was never trained on, against the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import batched
from statistics import mean

import jax
import numpy as np
from jax.sharding import Mesh

from cacheclip_jax.model.config import ModelConfig
from train.dataset import Lesson, batch_of
from train.devices import spread
from train.forward import Kernel, Stacked
from train.recall import overlap, recall
from train.student import Design, Student, score

_score = jax.jit(score, static_argnames=("cfg", "design", "how"))


def holdout_recall(student: Student, weights: Stacked, cfg: ModelConfig, design: Design, held: Sequence[Lesson], *,
                   budgets: Sequence[float], rows: int, batch: int, mesh: Mesh, how: Kernel) -> dict[str, float]:
    """Recall of the teacher's top tokens by budget ("recall@0.2", the mean over tasks), by budget and task
    ("recall@0.2/vt"), and "recall", the mean over budgets; the same of "overlap"."""
    found: list[tuple[Lesson, np.ndarray]] = []
    run = partial(_score, student, weights, cfg, design, how=how)
    ordered = sorted(held, key=lambda each: each.slots)
    for slots in sorted({each.slots for each in ordered}):
        for group in batched((each for each in ordered if each.slots == slots), batch):
            whole = [*group, *(group[-1] for _ in range(batch - len(group)))]
            scores = np.asarray(run(spread(batch_of(whole, rows), mesh).packed))
            for each, line in zip(group, scores, strict=False):  # what filled the batch up is dropped
                start = len(each.prompt.prefix)
                found.append((each, line[start : each.prompt.question_start]))
    return recalls(found, budgets)


def recalls(scored: Sequence[tuple[Lesson, np.ndarray]], budgets: Sequence[float]) -> dict[str, float]:
    """The recalls of lessons with the scores of their context tokens, named as in `holdout_recall`, and by the same
    names the overlap with what the teacher's scores select. With the teacher's own scores recall is at its ceiling,
    which says what selecting whole groups costs, and overlap is 1."""
    found: dict[tuple[str, str], list[float]] = {}
    for each, scores in scored:
        for budget in budgets:
            for name, measure in (("recall", recall), ("overlap", overlap)):
                value = measure(scores, each.target, each.prompt.chunk_lengths, budget)
                found.setdefault((f"{name}@{budget:g}", each.task), []).append(value)
    by_task = {f"{name}/{task}": mean(values) for (name, task), values in sorted(found.items())}
    by_budget = {name: mean(value for full, value in by_task.items() if full.startswith(f"{name}/"))
                 for name in dict.fromkeys(name for name, _ in found)}
    overall = {kind: mean(value for name, value in by_budget.items() if name.startswith(kind))
               for kind in ("recall", "overlap")}
    return {**overall, **by_budget, **by_task}
