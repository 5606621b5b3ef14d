"""Which settings CacheClip's default preset should have: candidates at 5 and 10%, on the tuning half, at 8k.

    python -m eval.quality --config=configs/quality/presets.py --config.data=DIR
    python -m eval.report runs/presets*.jsonl --out results/presets

The two ProphetKV columns, which use the primary's own attention, and the oracles, which know full prefill, say what
there is to reach.
"""

from typing import Any

import ml_collections

from configs.quality import ablations, defaults

RATIOS = (0.05, 0.1)
SETTINGS: dict[str, dict[str, Any]] = {
    "late": {},
    "look-ahead": {"scoring": {"look_ahead": 8}},
    "look-ahead max": {"scoring": {"look_ahead": 8, "drafts": "max"}},
    "values": {"scoring": {"values": True}},
    "rows 4": {"scoring": {"rows": 4}},
    "layers all": {"scoring": {"layers": "all"}},
    "joint": {"scoring": {"context": "joint"}},
    "smooth 5": {"ranking": {"smooth": 5}},
    "smooth 13": {"ranking": {"smooth": 13}},
    "chunk power 0.5": {"ranking": {"chunk_power": 0.5}},
    "groups 16": {"grouping": {"size": 16}},
    "sentences": {"grouping": {"longest": 32}},
    **{f"heads of chunks {tokens}": {"heads_of_chunks": tokens} for tokens in (4, 8)},
    "prefix none": {"prefix": "none"},
    "heads of chunks 8, prefix none": {"heads_of_chunks": 8, "prefix": "none"},
}
TEXT = {"data": defaults.TEXT}


def get_config() -> ml_collections.ConfigDict:
    """Ten samples of each of eleven tasks."""
    config = defaults.base()
    config.update({
        "run": "presets", "out": "runs/presets.jsonl", "split": "tune", "lengths": (8192,), "count": 10,
        "tasks": ("niah_multikey_2", "niah_multikey_3", {"task": "niah_multivalue", **TEXT},
                  {"task": "niah_multiquery", **TEXT}, "vt", "cwe", "fwe", {"task": "qa_1", "data": defaults.SQUAD},
                  {"task": "qa_2", "data": defaults.HOTPOT},
                  {"task": "nq", "name": "nq_20", "distractors": 20, "lengths": (), **TEXT},
                  {"task": "hotpotqa", "data": defaults.HOTPOT, "lengths": ()}),
        "methods": ({"method": "naive"}, {"method": "naive", "preset": "none"},
                    *({**ablations.variant(label, **settings), "ratios": RATIOS}
                      for label, settings in SETTINGS.items()),
                    *({"method": "prophetkv", "preset": preset, "ratios": RATIOS} for preset in ("", "shared")),
                    *({"method": "teacher", "label": target, "target": target, "ratios": RATIOS}
                      for target in ("attention", "deviation")),  # "influence" takes gradients through every row
                    {"method": "oracle", "ratios": RATIOS}, {"method": "random", "ratios": RATIOS}),
    })
    return config
