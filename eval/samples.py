"""Samples by the list: what an evaluation asks, and which part of it, made ahead in processes of their own."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from cacheclip_jax.bucket import bucket
from cacheclip_jax.errors import BadInput
from cacheclip_jax.model.load import load_tokenizer
from eval.lab import frame_tokens
from eval.tasks import Sample, Split, make

FREE_SLOTS = 8192  # caches of samples without a length have multiples of it: every size takes minutes to compile


@dataclass(frozen=True)
class Job:
    """A task at a length: `count` samples of it (None: all of the split).

    name: what reports call it. settings: the task's own. length: None where samples are as long as they are.
    """

    name: str
    task: str
    length: int | None
    count: int | None
    split: Split
    seed: int
    data: Path | None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def in_order(self) -> bool:
        """Whether its first samples can be made without the others: these don't say how many there are, nor slots."""
        return bool(self.length and self.count)


@dataclass(frozen=True)
class Made:
    """A job's samples, or those from number `first` on, and how many cache slots each of them gets."""

    job: Job
    samples: tuple[Sample, ...]
    slots: int
    first: int = 0


def jobs(tasks: Sequence[str | Mapping[str, Any]], lengths: Sequence[int], folder: str | None, *, count: int,
         split: Split, seed: int) -> list[Job]:
    """The jobs of a config's tasks: names, or names with settings.

    A task's entry may say for itself `name`, `lengths` (() for as long as they are), `count` (0: all), and `data`, a
    file in `folder`; the rest are settings of the task. Raises BadInput for two entries of one name.
    """
    out = []
    for entry in tasks:
        given: dict[str, Any] = {"task": entry} if isinstance(entry, str) else dict(entry)
        task, name, data = given.pop("task"), given.pop("name", None), given.pop("data", None)
        if data is not None and folder is None:
            raise BadInput(f"{task} reads {data}: say with --config.data in which folder it is")
        path = Path(folder) / data if data is not None and folder is not None else None
        own, number = given.pop("lengths", lengths), given.pop("count", count)
        out += [Job(name or task, task, length, number or None, split, seed, path, given) for length in own or (None,)]
    twice = [j for i, j in enumerate(out) if (j.name, j.length) in {(k.name, k.length) for k in out[:i]}]
    if twice:
        raise BadInput(f"two tasks are called {twice[0].name} at {twice[0].length}: give one another name")
    return out


def made(job: Job, tokenizer: str, judged: int) -> Made:
    """A job's samples in the tokens of the model at the path `tokenizer`; `judged` slots at least are for the answer.

    All samples of a length have as many slots; without a length, as many as the job's longest needs, in few sizes.
    """
    words = _tokenizer(tokenizer)

    def spans(text: str) -> Sequence[tuple[int, int]]:
        return words.encode(text).spans

    frame = frame_tokens(words)
    samples = make(job.task, tokenizer_spans=spans, length=job.length, count=job.count, split=job.split, seed=job.seed,
                   data=job.data, template_tokens=frame, **job.settings)
    if not samples:
        raise BadInput(f"{job.name} has no samples in split {job.split!r}: choose another, or leave the task out")
    needed = job.length or max(s.tokens(spans) + frame for s in samples)
    return Made(job, tuple(samples), bucket(needed + judged, FREE_SLOTS) if job.length is None else bucket(needed, 256))


@lru_cache(maxsize=1)
def _tokenizer(source: str):
    return load_tokenizer(source)


def shard(asked: Sequence[Job], part: str, tokenizer: str, judged: int) -> list[tuple[Job, slice]]:
    """The `part` ("0/8": the first of eight) of the list of all jobs' samples, as slices of jobs.

    Parts are runs of the list, so that a part has few tasks and compiles little. Raises BadInput for a part that isn't
    one.
    """
    part_of("shard", part, 0)  # refused before any sample is made
    counts = [job.count or len(made(job, tokenizer, judged).samples) for job in asked]
    mine, out, at = part_of("shard", part, sum(counts)), [], 0
    for job, count in zip(asked, counts, strict=True):
        low, high = max(mine.start - at, 0), min(mine.stop - at, count)
        if low < high:
            out.append((job, slice(low, high)))
        at += count
    return out


def part_of(name: str, part: str, total: int) -> slice:
    """The `part` ("0/8": the first of eight) of `total` things, one after another. Raises BadInput, with the setting's
    `name`, for a part that isn't one."""
    number, _, of = part.partition("/")
    if not (number.isdecimal() and of.isdecimal() and int(number) < int(of)):
        raise BadInput(f"{name}={part!r}: write the part and how many there are, like 0/8")
    return slice(total * int(number) // int(of), total * (int(number) + 1) // int(of))


def heads_first(asked: Sequence[tuple[Job, slice]], block: int) -> list[tuple[Job, slice]]:
    """The same parts of jobs, of each its first `block` samples before the rest of any (0: as they are): a task makes
    samples one after another, so the first of `rounds` would wait for the last sample of the slowest. Where the first
    can't be made alone, parts stay whole."""
    heads, rest = [], []
    for job, part in asked:
        middle = min(part.start + block, part.stop) if block and job.in_order else part.stop
        heads.append((job, slice(part.start, middle)))
        if middle < part.stop:
            rest.append((job, slice(middle, part.stop)))
    return heads + rest


def prepared(asked: Sequence[tuple[Job, slice]], tokenizer: str, judged: int, workers: int) -> Iterator[Made]:
    """The samples of parts of jobs, in order, made by `workers` processes ahead of their use (0: when they're used)."""
    # A task makes its samples one after another: those behind a part are left out, where they don't say how many slots.
    asked = [(dataclasses.replace(job, count=part.stop) if job.in_order else job, part)
             for job, part in asked]
    if not workers:
        for job, part in asked:
            yield _cut(made(job, tokenizer, judged), part)
        return
    # Spawned, not forked: threads of the device's runtime don't survive a fork.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as processes:
        with starting_on_cpu():
            futures: list[Future[Made]] = [processes.submit(made, job, tokenizer, judged) for job, _ in asked]
        try:
            for future, (_, part) in zip(futures, asked, strict=True):
                yield _cut(future.result(), part)
        finally:
            processes.shutdown(cancel_futures=True)


def rounds(whole: Iterable[Made], block: int) -> Iterator[Made]:
    """`block` samples of each job, then the next ones of each, until none is left; 0: all of a job at once.

    So a run that stops early has answered as many of one job as of another.
    """
    if not block:
        yield from whole
        return
    begun: list[Made] = []
    for one in whole:  # the first round, while the samples of the next jobs are made
        begun.append(one)
        yield _cut(one, slice(0, block))
    for start in range(block, max((len(one.samples) for one in begun), default=0), block):
        yield from (_cut(one, slice(start, start + block)) for one in begun if len(one.samples) > start)


@contextmanager
def starting_on_cpu() -> Iterator[None]:
    """Processes that start meanwhile leave the accelerator alone: each that touched it would take memory of its own.

    They are told by the environment, since some packages touch a device as soon as they are imported.
    """
    before = os.environ.get("JAX_PLATFORMS")
    os.environ["JAX_PLATFORMS"] = "cpu"
    try:
        yield
    finally:
        if before is None:
            del os.environ["JAX_PLATFORMS"]
        else:
            os.environ["JAX_PLATFORMS"] = before


def _cut(whole: Made, part: slice) -> Made:
    return dataclasses.replace(whole, samples=whole.samples[part], first=whole.first + part.start)
