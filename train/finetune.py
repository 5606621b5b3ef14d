"""Finetune an aux model: examples, the primary's verdicts on them, training, the adapter. See docs/finetune.md.

    python -m train.finetune --config configs/train/qwen_coder.py

Each stage keeps its result in the run's folder and is left out when that is there already, so that the same command
resumes an interrupted run.
"""

from __future__ import annotations

import datetime
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

from absl import logging
from ml_collections import ConfigDict
from rich.console import Console

from cacheclip_jax.engine import enable_compilation_cache
from cacheclip_jax.errors import BadInput
from cacheclip_jax.model.adapter import save_adapter
from cacheclip_jax.model.load import load_model, load_tokenizer
from cacheclip_jax.model.pull import MODELS, pull
from eval.machine import command, commit, device
from eval.script import start
from train.benchmark import benchmark_examples
from train.corpus import corpus_examples
from train.dataset import Asked, lessons, read_prompts
from train.devices import data_mesh
from train.example import Example, read_examples, write_examples
from train.holdout import recalls
from train.settings import Settings, settings
from train.student import to_adapter
from train.training import Trained, train
from train.verdicts import judge, read_verdicts

STAGES = ("examples", "verdicts", "adapter")

def finetune(run: Settings, until: str = "adapter", command: str = "") -> Path:
    """Run the stages up to one of STAGES; returns the file or folder that the last one made."""
    if until not in STAGES:
        raise BadInput(f"until={until!r}: choose one of {', '.join(STAGES)}")
    console, began = Console(), time.perf_counter()
    enable_compilation_cache()
    for name in {run.primary, run.aux} & set(MODELS):
        pull(name)
    file = run.data / "examples.jsonl"
    if not file.exists():
        write_examples(file, _examples(run))
    if until == "examples":
        return file
    mesh = data_mesh(run.devices)
    examples = read_examples(file)
    asked = read_prompts(examples, load_tokenizer(run.primary), load_tokenizer(run.aux), run.sizes)
    console.print(f"{len(asked)} of {len(examples)} examples fit: {_counts(asked)}")
    folder = run.data / "verdicts"
    judged = judge([(each.primary, each.slots) for each in asked], lambda: load_model(run.primary, dtype=run.dtype),
                   run.teaching, folder, mesh, rows=run.sizes.rows, batch=run.teacher_batch)
    taught = time.perf_counter() - began
    console.print(f"{judged} verdicts computed in {taught:.0f} s, loading and compiling included")
    if until == "verdicts":
        return folder
    learnt = lessons(asked, read_verdicts(folder), run.target, run.min_kl)
    parts = {part: [each for each in learnt if each.part == part] for part in ("train", "holdout")}
    model = load_model(run.aux, dtype=run.dtype)
    trained = train(run, model, parts["train"], parts["holdout"], mesh, console)
    row = summary(run, trained, {name: len(lot) for name, lot in parts.items()}, mesh.size, command)
    ceiling = recalls([(each, each.target) for each in parts["holdout"]], run.stopping.budgets)
    row |= {"recall_ceiling": _rounded(ceiling), "verdicts": judged, "verdict_seconds": round(taught, 1),
            "seconds": round(time.perf_counter() - began, 1)}
    card = {name: row[name] for name in ("device", "date", "commit", "command", "primary", "target", "examples",
                                         "steps", "recall_before", "recall_after")}
    tasks = {part: dict(Counter(each.task for each in lot)) for part, lot in parts.items()}
    target = save_adapter(to_adapter(trained.student, model, run.design, card | {"tasks": tasks}), run.out / "adapter")
    run.results.parent.mkdir(parents=True, exist_ok=True)
    with run.results.open("a", encoding="utf-8") as out:
        out.write(json.dumps(row) + "\n")
    before, after = trained.before["recall"], trained.after["recall"]
    console.print(f"held-out recall {before:.3f} before, {after:.3f} after: {target}")
    return target


def summary(run: Settings, trained: Trained, examples: dict[str, int], devices: int, command: str) -> dict[str, Any]:
    """A finished run as one row of results: what, on what, at what pace, and held-out recall before and after."""
    done = trained.progress
    seconds, peak = done.seconds, run.peak_flops * devices
    pace = {"tokens_per_s": round(done.tokens / seconds) if seconds else None,
            "mfu": round(done.flops / seconds / peak, 4) if seconds and peak else None}
    return {"device": device(), "devices": devices, "date": datetime.date.today().isoformat(), "commit": commit(),
            "command": command, "primary": run.primary, "aux": run.aux, "dtype": run.dtype, "target": run.target,
            "examples": examples, "lengths": run.sizes.lengths, "batch": run.batch, "steps": done.step,
            "best_step": done.best_step, **pace, "train_seconds": round(done.wall, 1),
            "recall_before": _rounded(trained.before), "recall_after": _rounded(trained.after)}


def _examples(run: Settings) -> list[Example]:
    tokenizer, out = load_tokenizer(run.primary), []
    if run.benchmark.tasks or run.benchmark.holdout:
        out += benchmark_examples(run.benchmark, lambda text: tokenizer.encode(text).spans, run.data)
    if run.corpus.sources:
        out += corpus_examples(run.corpus, tokenizer)
    if not out:
        raise BadInput("there is nothing to learn from: name benchmark.tasks, or the documents in corpus.sources")
    return out


def _counts(asked: list[Asked]) -> str:
    found = Counter((each.example.part, each.example.task) for each in asked)
    return ", ".join(f"{task} {count} ({part})" for (part, task), count in found.items())


def _rounded(recalls: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in recalls.items()}


def main(config: ConfigDict) -> None:
    """The script."""
    logging.set_verbosity(logging.WARNING)  # orbax tells all that it does
    finetune(settings(config.to_dict()), config.until, command("train.finetune"))


if __name__ == "__main__":
    start(main, "What to train, see configs/train/.")
