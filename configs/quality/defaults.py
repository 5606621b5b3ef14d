"""What the configs here share: the settings of a run, and the methods side by side. Not a config of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_collections

# Natural text, and the questions of RULER's qa tasks, from files that anyone can fetch (eval/tasks/README.md).
TEXT, SQUAD, HOTPOT = "nq_open_oracle_2000.jsonl.gz", "xquad.en.json", "hotpot_distractor_70.jsonl"


def base() -> ml_collections.ConfigDict:
    """A run on one GPU with the pair that results are reported for."""
    return ml_collections.ConfigDict({
        "run": "",  # what reports call it
        "out": "",  # JSON lines, see eval/rows.py
        "primary": "qwen2.5-coder-1.5b",
        "aux": "qwen2.5-coder-0.5b",  # "": none
        "aux_adapter": "",  # directory that finetuning wrote, for the columns of cacheclip's preset "adapter"
        "dtype": "bfloat16",
        "tasks": (),  # names, or dicts of a name and settings, see eval/samples.py
        "lengths": (),  # tokens of prompt and answer
        "methods": (),  # dicts, see eval/presets.py; full attention is always there
        "count": 50,  # samples a task and length
        "split": "report",
        "seed": 0,
        "data": "",  # folder of the tasks' files
        "judged": 4,  # first tokens of full attention's answer that distributions are compared on
        "examples": 2,  # samples a task whose rows keep their context and selection
        "times": False,  # measure each method alone; slower
        "shard": "0/1",  # the part of the samples that this process does, and how many parts there are
        "columns": "0/1",  # the part of the methods, likewise
        "batch": 32,  # sequences decoded together
        "block": 4,  # samples of a task before the next task's, in turn, so that a stopped run has some of all; 0: all
        "workers": 12,  # processes that make samples ahead
        "budget_seconds": 0.0,  # stop after so long, to be gone on with; 0: never
    })


def of_half(run: str, split: str) -> ml_collections.ConfigDict:
    """`base` for a run on one half of the data; the tuning half's is called after it."""
    config = base()
    config.run = run if split == "report" else f"{run}-{split}"
    config.out, config.split = f"runs/{config.run}.jsonl", split
    return config


RIVALS = ("cacheblend", "epic", "prophetkv", "fusionrag", "a3", "specprefill", "oracle")


def methods(ratios: Sequence[float]) -> tuple[dict[str, Any], ...]:
    """Every method but prefix, which is exact, those that take a ratio at each; of the rivals behind our lead-in the
    one that comes nearest. What shares its chunk caches stands together, since a process may do a part of the list."""
    at = {"ratios": tuple(ratios)}
    return (
        {"method": "naive", "preset": "lead-in"}, {"method": "cacheclip", "preset": "lead-in", "ratios": (0.02,)},
        *({"method": "cacheclip", "preset": preset, **at} for preset in ("lead-in", "no-words")),
        {"method": "prophetkv", "preset": "lead-in", **at},
        *({"method": "cacheclip", "preset": preset, **at} for preset in ("late", "paper")),
        {"method": "naive"}, {"method": "ape"},
        *({"method": name, **at} for name in ("random", *RIVALS)),
    )
