"""Does a method answer as well as full attention? A grid of tasks, lengths, methods and ratios, by config.

    python -m eval.quality --config=configs/quality/smoke.py
    python -m eval.report runs/smoke.jsonl --out runs/smoke

Every answer is a row (eval/rows.py) of the file `out`. A run that was stopped goes on where it stopped when it is
started again. `--config.shard=3/8` does the fourth of eight parts of the samples, a process for each GPU;
`--config.columns=0/3` the first of three parts of the methods, since one GPU has room for several processes and each
compiles what its own methods need. Each writes a file of its own, and eval.report reads them all.
"""

from __future__ import annotations

import datetime
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from cacheclip_jax.engine import enable_compilation_cache
from cacheclip_jax.errors import BadInput
from cacheclip_jax.methods import Full
from cacheclip_jax.model.adapter import Adapter
from cacheclip_jax.online import Repaired, execute
from cacheclip_jax.plan import Plan
from cacheclip_jax.prompt import Prompt
from cacheclip_jax.request import Request
from eval import machine
from eval.batch_decode import first_tokens
from eval.lab import Lab, adapter_of, load_lab, located, request
from eval.ledger import Key, Ledger
from eval.pool import Answer, Pool
from eval.presets import Entry, columns
from eval.rows import Row
from eval.samples import Job, heads_first, jobs, part_of, prepared, rounds, shard
from eval.script import start
from eval.tasks import Sample

FULL = Entry(Full(), "", None)
# What a run may be gone on with after a change: it doesn't change what is asked.
FREE = ("out", "batch", "block", "workers", "budget_seconds")


@dataclass(frozen=True)
class Tag:
    """What an answer in the pool belongs to."""

    job: Job
    sample: Sample
    entry: Entry
    prompt: Prompt
    times: dict[str, float]
    example: bool


class Rate(ProgressColumn):
    """Answers a second."""

    def render(self, task: Task) -> Text:
        """The speed, once there is one."""
        return Text(f"{task.speed or 0:.1f}/s")


class Evaluation:
    """The models, and where answers go."""

    def __init__(self, config: ConfigDict, ledger: Ledger, lab: Lab, columns: Sequence[Entry], progress: Progress):
        self._config, self._ledger, self._columns, self._progress = config, ledger, columns, progress
        self._lab = lab
        self._bar = progress.add_task("answers", total=None)
        self._pool: Pool[Tag] = Pool(lab.primary, config.batch, self._report)
        self._about = {"run": config.run, "device": machine.device(), "commit": machine.commit(),
                       "date": datetime.date.today().isoformat(), "primary": Path(config.primary).name,
                       "aux": Path(config.aux).name}

    def run(self, asked: Sequence[tuple[Job, slice]], tokenizer: str, until: float) -> bool:
        """Answer every sample that isn't answered yet; False where the time `until` came first."""
        total = len(self._columns) * sum(part.stop - part.start for _, part in asked)
        self._progress.update(self._bar, total=total, completed=len(self._ledger.done))
        samples = prepared(asked, tokenizer, self._config.judged, self._config.workers)
        for made in rounds(samples, self._config.block):
            self._progress.update(self._bar, description=f"{made.job.name} {made.job.length or ''}")
            for number, sample in enumerate(made.samples, made.first):
                if time.monotonic() > until:
                    self._pool.finish()
                    return False
                self._answer(made.job, sample, made.slots, number < self._config.examples)
        self._pool.finish()
        return True

    def _answer(self, job: Job, sample: Sample, slots: int, example: bool) -> None:
        """One sample by all methods, one after another; full attention first, which they are judged on."""
        missing = [e for e in self._columns if _key(job, sample, e) not in self._ledger.done]
        if not missing:
            return
        sides = self._lab.sides(sample, slots, max(sample.max_new_tokens, self._config.judged))
        led = {"": sides} | {e.lead_in: sides.behind(e.lead_in) for e in missing if e.lead_in}
        shared = {(e.adapted, e.lead_in): request(led[e.lead_in], e.adapted) for e in (FULL, *missing)}
        prompt = sides.primary.prompt
        plan, repaired, times = self._first_logits(FULL, shared[False, ""])
        reference = first_tokens(self._lab.primary, repaired.logits, len(prompt.ids), repaired.cache,
                                 self._config.judged)
        for entry in missing:
            if entry is not FULL:
                try:
                    over = shared[entry.adapted, entry.lead_in]
                    if self._config.times:
                        over = request(led[entry.lead_in], entry.adapted)
                    plan, repaired, times = self._first_logits(entry, over)
                except Exception as e:
                    e.add_note(f"while {entry} answered {sample.id} of {job.name}")
                    raise
            self._pool.add(Tag(job, sample, entry, prompt, times, example), repaired, sample.max_new_tokens, reference,
                           plan.recompute)

    def _first_logits(self, entry: Entry, over: Request) -> tuple[Plan, Repaired, dict[str, float]]:
        """What a method does up to the first token's logits. Where times are asked for, it runs alone."""
        if self._config.times:
            self._pool.wait()
        started = time.perf_counter()
        plan = entry.method.plan(over)
        repaired = execute(over, plan, entry.method.caches)
        if not self._config.times:
            return plan, repaired, {}
        repaired.logits.block_until_ready()
        return plan, repaired, {"ttft": time.perf_counter() - started}

    def _report(self, tag: Tag, answer: Answer) -> None:
        sample, entry = tag.sample, tag.entry
        mask = answer.mask[: tag.prompt.context_tokens]
        text = self._lab.primary.tokenizer.decode(answer.ids)
        pages: dict[str, Any] = {"context": sample.context, "selected": selected(tag.prompt, sample.context, mask),
                                 "question": sample.question} if tag.example else {}
        self._ledger.add([Row(
            task=tag.job.name, length=tag.job.length or 0, method=entry.method.name, preset=entry.preset,
            ratio=entry.ratio, sample=sample.id, prediction=text, references=sample.references,
            score=sample.score(text), realised_ratio=float(mask.mean()), times=tag.times,
            depth=sample.meta.get("depth"), kl_first_token=answer.kl_first_token, kl=answer.kl, top1=answer.top1,
            prompt_tokens=len(tag.prompt.ids), answer_ids=answer.ids,
            aux_adapter=Path(self._config.aux_adapter).name if entry.adapted else "", **pages, **self._about)])
        self._progress.advance(self._bar)


def selected(prompt: Prompt, context: Sequence[str], mask: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Character ranges of the joined context that the tokens in `mask` cover, neighbours together."""
    out: list[tuple[int, int]] = []
    token = start = 0
    for chunk, text in zip(prompt.chunks, context, strict=True):
        for first, last in (chunk.spans[i] for i in np.flatnonzero(mask[token : token + len(chunk.ids)])):
            if out and out[-1][1] >= start + first:
                out[-1] = (out[-1][0], start + last)
            else:
                out.append((start + first, start + last))
        token, start = token + len(chunk.ids), start + len(text)
    return tuple(out)


def _key(job: Job, sample: Sample, entry: Entry) -> Key:
    return job.name, job.length or 0, entry.method.name, entry.preset, entry.ratio, sample.id


def columns_of(config: ConfigDict, adapter: Adapter | None = None) -> list[Entry]:
    """The methods of a config, full attention first, or its part of them. Raises BadInput for two that reports couldn't
    tell apart, and for a part without any."""
    named = columns(config.methods, adapter)
    out = [FULL, *(e for e in named if e.method != FULL.method)]
    twice = [e for i, e in enumerate(out) if str(e) in map(str, out[:i])]
    if twice:
        raise BadInput(f"two methods are called {twice[0]}: give one of them another label")
    part = out[part_of("columns", config.columns, len(out))]
    if not part:
        raise BadInput(f"columns={config.columns!r} is a part without a method: there are {len(out)}")
    return part


def run(config: ConfigDict) -> Path | None:
    """Run an evaluation; its file of rows, or None where `budget_seconds` were over before. Raises BadInput for what a
    config can't ask, and for a run that is finished."""
    until = time.monotonic() + config.budget_seconds if config.budget_seconds else float("inf")
    if config.judged < 1:
        raise BadInput(f"judged={config.judged} is out of range: 1 or more tokens")
    if config.block < 0:
        raise BadInput(f"block={config.block} is out of range: 1 or more samples, or 0 for all of a task at once")
    asked = jobs(config.tasks, config.lengths, config.data or None, count=config.count, split=config.split,
                 seed=config.seed)
    adapter = adapter_of(config.aux_adapter, config.aux)
    methods, tokenizer = columns_of(config, adapter), located(config.primary)
    parts = heads_first(shard(asked, config.shard, tokenizer, config.judged), config.block)
    question = {k: v for k, v in config.to_dict().items() if k not in FREE}
    if adapter is not None:
        question["aux_adapter"] = f"{config.aux_adapter} ({fingerprint(adapter)})"
    with Ledger(target(config), question) as ledger:
        enable_compilation_cache()
        lab = load_lab(config.primary, config.aux, config.dtype, adapter)
        with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeElapsedColumn(),
                      TimeRemainingColumn()) as progress:
            evaluation = Evaluation(config, ledger, lab, methods, progress)
            return ledger.finish() if evaluation.run(parts, tokenizer, until) else None


def fingerprint(adapter: Adapter) -> str:
    """What an adapter is: two with the same directory, trained one after the other, differ in it."""
    return hashlib.sha256(f"{adapter.digest()} {adapter.scoring} {adapter.rows}".encode()).hexdigest()[:16]


def target(config: ConfigDict) -> Path:
    """The run's file; a part of several has its own."""
    out = Path(config.out)
    for kind, part in (("", config.shard), ("columns-", config.columns)):
        number, _, of = part.partition("/")
        if of != "1":
            out = out.with_name(f"{out.stem}.{kind}{number}of{of}{out.suffix}")
    return out


def main(config: ConfigDict) -> None:
    """The script."""
    done = run(config)
    print(done if done else f"{config.budget_seconds} seconds are over: run the same command again to go on")


if __name__ == "__main__":
    start(main, "What to run, see configs/quality/.")
