"""Rows of an evaluation run: one answer of one method to one sample, and what they sum up to."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from cacheclip_jax.errors import BadInput
from eval.statistics import Comparison, Estimate, compare_over, retention, retention_over


@dataclass(frozen=True)
class Row:
    """One answer. `score` is 0 to 1, `times` are seconds by stage with "ttft" among them.

    depth: per cent of the context before the fact, where there is one. context and selected (character spans of the
    joined context that were recomputed) are for example pages. Three compare with full attention, along the first
    tokens of its answer: kl_first_token and kl, KL(full || this) in nats at the first of them and their mean; top1, the
    share of them that this method would choose too.
    """

    run: str
    task: str
    length: int
    method: str
    sample: str
    prediction: str
    references: tuple[str, ...]
    score: float
    preset: str = ""
    ratio: float | None = None
    realised_ratio: float | None = None
    times: dict[str, float] = field(default_factory=dict)
    depth: float | None = None
    kl_first_token: float | None = None
    kl: float | None = None
    top1: float | None = None
    prompt_tokens: int | None = None
    answer_ids: tuple[int, ...] = ()
    question: str = ""
    context: tuple[str, ...] = ()
    selected: tuple[tuple[int, int], ...] = ()
    device: str = ""
    date: str = ""
    commit: str = ""
    primary: str = ""
    aux: str = ""
    aux_adapter: str = ""

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)


@dataclass(frozen=True)
class Cell:
    """All rows of a run, task, length, method, preset and ratio, set against full attention on the same samples.

    answered: retention over the samples that full attention scores above 0 on.
    """

    rows: tuple[Row, ...]
    full: tuple[Row, ...]
    score: float
    full_score: float
    retention: Estimate
    answered: float

    @property
    def first(self) -> Row:
        """Any row: what all have in common is read from it."""
        return self.rows[0]

    @property
    def name(self) -> str:
        """The method with its preset."""
        return f"{self.first.method} {self.first.preset}".strip()

    @property
    def ttft(self) -> float:
        """Median time to first token in seconds; NaN where it wasn't measured."""
        values = [r.times["ttft"] for r in self.rows if "ttft" in r.times]
        return float(np.median(values)) if values else float("nan")

    def mean_of(self, name: str) -> float | None:
        """Mean of a field over the rows that have it; None if none has."""
        values = [float(v) for r in self.rows if (v := getattr(r, name)) is not None]
        return sum(values) / len(values) if values else None

    def to_dict(self) -> dict[str, Any]:
        """The cell's line in results/quality.jsonl; what isn't a number is null."""
        same = ("run", "device", "date", "commit", "primary", "aux", "aux_adapter", "task", "length", "method",
                "preset", "ratio")
        return {**{name: getattr(self.first, name) for name in same},
                "realised_ratio": self.mean_of("realised_ratio"), "n": len(self.rows),
                "score": _number(self.score), "full_score": _number(self.full_score),
                "retention": _number(self.retention.value), "ci_low": _number(self.retention.low),
                "ci_high": _number(self.retention.high),
                "kl_first_token": self.mean_of("kl_first_token"), "kl_first_tokens": self.mean_of("kl"),
                "top1_agreement": self.mean_of("top1")}


def read_rows(paths: Iterable[Path]) -> list[Row]:
    """The rows of JSONL files. Raises BadInput naming file, line and what is wrong with it."""
    known = {f.name for f in fields(Row)}
    out = []
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except OSError as e:
            raise BadInput(f"{path} can't be read: {e.strerror}") from None
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                raw = {k: v for k, v in json.loads(line).items() if k in known}
                row = Row(**{**raw, "references": tuple(raw["references"]), "context": tuple(raw.get("context", ())),
                             "answer_ids": tuple(raw.get("answer_ids", ())),
                             "selected": tuple((a, b) for a, b in raw.get("selected", ()))})
            except (ValueError, TypeError, KeyError, AttributeError) as e:
                raise BadInput(f"{path} line {number} isn't a row of an evaluation: {e!r}") from None
            if not 0 <= row.score <= 1:
                raise BadInput(f"{path} line {number}: score={row.score} is out of range: 0 to 1")
            out.append(row)
    if not out:
        raise BadInput(f"there are no rows in {', '.join(map(str, paths)) or 'no file'}")
    return out


def complete(rows: Sequence[Row]) -> list[Row]:
    """The rows of samples that every column of their run and length has answered: where processes that share a run were
    stopped by time, one may be ahead of another. Raises BadInput for a run without such a sample."""
    def sample(row: Row) -> tuple[str, int, str, str]:
        return row.run, row.length, row.task, row.sample

    def column(row: Row) -> tuple[str, str, float | None]:
        return row.method, row.preset, row.ratio

    columns, answered = defaultdict(set), defaultdict(set)
    for row in rows:
        columns[sample(row)[:2]].add(column(row))
        answered[sample(row)].add(column(row))
    out = [row for row in rows if answered[sample(row)] == columns[sample(row)[:2]]]
    for run, length in columns:
        if not any((row.run, row.length) == (run, length) for row in out):
            raise BadInput(f"no sample of run {run!r} at {length} was answered by all of its "
                           f"{len(columns[run, length])} columns: let it run on, or leave out the file of rows that "
                           "has too few")
    return out


def cells(rows: Sequence[Row]) -> list[Cell]:
    """One cell per run, task, length, method, preset and ratio, in the order of first appearance.

    Raises BadInput when full attention hasn't answered a sample that a method has, or a sample was answered twice.
    """
    full: dict[tuple, Row] = {(r.run, r.task, r.length, r.sample): r for r in rows if r.method == "full"}
    groups: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.run, row.task, row.length, row.method, row.preset, row.ratio].append(row)
    out = []
    for (run, task, length, method, *_), group in groups.items():
        missing = [r.sample for r in group if (run, task, length, r.sample) not in full]
        if missing:
            raise BadInput(f"full attention hasn't answered {len(missing)} of the {len(group)} samples of {method} on "
                           f"{task} at {length} in run {run!r}, {missing[0]!r} for one: run the method full too")
        if len({r.sample for r in group}) < len(group):
            raise BadInput(f"{method} answered a sample of {task} at {length} in run {run!r} more than once: keep one")
        beside = [full[run, task, length, r.sample] for r in group]
        a, b = [r.score for r in group], [r.score for r in beside]
        out.append(Cell(tuple(group), tuple(beside), sum(a) / len(a), sum(b) / len(b), retention(a, b),
                        retention(a, b, answered=True, resamples=0).value))
    return out


def parts(some: Sequence[Cell]) -> dict[tuple[str, int], list[Cell]]:
    """Cells by run and length, which never mix: runs in their order, lengths ascending."""
    runs = list(dict.fromkeys(c.first.run for c in some))
    out: dict[tuple[str, int], list[Cell]] = defaultdict(list)
    for cell in sorted(some, key=lambda c: (runs.index(c.first.run), c.first.length)):
        out[cell.first.run, cell.first.length].append(cell)
    return dict(out)


def pool(some: Sequence[Cell]) -> dict[tuple[str, float | None], list[Cell]]:
    """Cells of all tasks by method with preset, and ratio."""
    out: dict[tuple[str, float | None], list[Cell]] = defaultdict(list)
    for cell in some:
        out[cell.name, cell.first.ratio].append(cell)
    return dict(out)


def rival(some: Sequence[Cell], reference: str, ratio: float | None) -> list[Cell]:
    """The cells of a method, named with or without its preset, at a ratio; at its largest one where ratio is None."""
    theirs = {at: group for (name, at), group in reversed(pool(some).items())
              if reference in (name, group[0].first.method)}
    return theirs.get(ratio, theirs[max(theirs, key=lambda at: at or 0)] if theirs and ratio is None else [])


def pooled_retention(some: Sequence[Cell], resamples: int = 2000) -> Estimate:
    """Retention over the cells of one method on several tasks, which weigh the same."""
    return retention_over([([r.score for r in c.rows], [r.score for r in c.full]) for c in some], resamples=resamples)


def against(first: Sequence[Cell], second: Sequence[Cell], name: str = "score") -> Comparison:
    """Paired test of two methods by a field of their rows, over the samples that both have it of, tasks weighing the
    same; NaN where there are none."""
    ours, theirs = ({(r.run, r.task, r.sample): float(value) for c in some for r in c.rows
                     if (value := getattr(r, name)) is not None} for some in (first, second))
    both = [key for key in ours if key in theirs]
    tasks = [[key for key in both if key[:2] == task] for task in dict.fromkeys(key[:2] for key in both)]
    return compare_over([([ours[k] for k in task], [theirs[k] for k in task]) for task in tasks])


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)
