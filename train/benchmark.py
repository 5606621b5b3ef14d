"""Examples from the benchmark's tasks, tuning half only: what is trained on or tuned on is never reported on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cacheclip_jax.errors import BadInput
from eval.tasks import LOCAL, RULER, Sample, Spans, layouts, make
from eval.tasks.split import half
from train.example import Example, Part

# The file of a data folder that each task reads; natural text for the needles comes from HAYSTACK.
FILES = {
    "qa_1": "xquad.en.json", "squad": "xquad.en.json", "qa_2": "hotpot_distractor_70.jsonl",
    "hotpotqa": "hotpot_distractor_70.jsonl", "musique": "musique_s_100.json", "2wikimqa": "wikimqa_s_clean_68.json",
    "nq": "nq_open_oracle_2000.jsonl.gz", "kv": "kv_retrieval_75_keys_300.jsonl.gz",
}
TEXT_TASKS = ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery")
HAYSTACK = "nq_open_oracle_2000.jsonl.gz"
TEMPLATE_TOKENS = 64  # kept free for a chat template


@dataclass(frozen=True)
class Benchmark:
    """Which tasks are trained on and which are held out, whole, and how many examples of each at each length.

    folder: has the files that `FILES` names. lengths: tokens of prompt and answer at most. chunk_tokens: of tasks that
    are cut into token windows; the others come in passages.
    """

    folder: str
    tasks: tuple[str, ...] = ()
    holdout: tuple[str, ...] = ()
    per_task: int = 0
    holdout_per_task: int = 0
    lengths: tuple[int, ...] = (4096,)
    chunk_tokens: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if both := sorted(set(self.tasks) & set(self.holdout)):
            raise BadInput(f"{', '.join(both)}: trained on and held out at once; leave it in one of the two lists")
        for name in (*self.tasks, *self.holdout):
            if name not in (known := {**RULER, **LOCAL}):
                raise BadInput(f"task {name!r} is unknown here: choose from {', '.join(known)}")


def benchmark_examples(wanted: Benchmark, spans: Spans, work: Path) -> list[Example]:
    """The examples of both parts; a file of natural text for needles is written to `work`."""
    out: list[Example] = []
    parts: tuple[tuple[Part, Sequence[str], int], ...] = (
        ("train", wanted.tasks, wanted.per_task), ("holdout", wanted.holdout, wanted.holdout_per_task))
    for part, names, count in parts:
        for name in names:
            for number, length in enumerate(wanted.lengths):
                data = _data(name, Path(wanted.folder), work)
                size = {} if name in FILES else {"chunk_tokens": wanted.chunk_tokens}
                # Another seed for each length, so that no question of a data set comes with the same company twice.
                samples = make(name, tokenizer_spans=spans, length=length, split="tune", data=data,
                               count=_at_most(name, data, count), seed=wanted.seed + number,
                               template_tokens=TEMPLATE_TOKENS, **size)
                out += [_example(sample, part) for sample in samples]
    return out


def _data(name: str, folder: Path, work: Path) -> Path | None:
    if name in TEXT_TASKS:
        return _haystack(folder / HAYSTACK, work)
    return folder / FILES[name] if name in FILES else None


def _haystack(source: Path, work: Path) -> Path:
    """A file of the passages whose questions are in the tuning half."""
    target = work / "haystack.txt"
    if not target.exists():
        work.mkdir(parents=True, exist_ok=True)
        passages = [p for q in layouts.read_ctxs(source) if half(q.text) == "tune" for p in q.passages]
        target.write_text("\n".join(passages), encoding="utf-8")
    return target


def _at_most(name: str, data: Path | None, count: int) -> int:
    """`count`, or as many questions as the tuning half of a data set has."""
    if name not in FILES or data is None:
        return count
    if name == "kv":
        questions = [key for _, key, _ in layouts.read_records(data)]
    else:
        reader = {"qa_1": layouts.read_squad, "squad": layouts.read_squad, "qa_2": layouts.read_hotpot,
                  "hotpotqa": layouts.read_hotpot}.get(name, layouts.read_ctxs)
        questions = [q.text for q in reader(data)]
    return min(count, sum(half(q) == "tune" for q in questions))


def _example(sample: Sample, part: Part) -> Example:
    return Example(sample.id, sample.task, part, sample.instructions, sample.context,
                   sample.question, sample.answer_prefix)
