"""Which settings CacheClip's default preset should have: candidates at 5, 10 and 20%, on the tuning half, at 8k.

    python -m eval.quality --config=configs/quality/presets.py --config.data=DIR
    python -m eval.quality --config=configs/quality/presets.py:discounts --config.data=DIR  # without a lead-in
    python -m eval.report runs/presets*.jsonl --out results/presets

SpecPrefill, which drops tokens, and the oracle, which knows full prefill's attention, say what else there is to reach.
"""

from typing import Any

import ml_collections

from configs.quality import ablations, defaults, qa, ruler

RATIOS = (0.05, 0.1, 0.2)
DISCOUNTS = (0.35, 0.7, 1.4)  # nats; stale tokens count 0.7, 0.5 and 0.25 times
LED = {"lead_in": True, "discount": 0.7}
SETTINGS: dict[str, dict[str, Any]] = {
    "late": {},
    **{f"discount {nats}": {"discount": nats} for nats in (*DISCOUNTS, 2.8)},
    "lead-in, no discount": {"lead_in": True},
    **{f"lead-in, discount {nats}": {"lead_in": True, "discount": nats} for nats in DISCOUNTS},
    "lead-in, discount 0.7, rows 4": {**LED, "scoring": {"rows": 4}},
    "lead-in, discount 0.7, sentences": {**LED, "grouping": {"longest": 64}},
    "lead-in, discount 0.7, smooth groups of 32": {**LED, "grouping": {"size": 32}, "ranking": {"smooth": 13}},
    "lead-in, discount 0.7, heads of chunks 8": {**LED, "heads_of_chunks": 8},
}
TEXT = {"data": defaults.TEXT}


def get_config(which: str = "candidates") -> ml_collections.ConfigDict:
    """Ten samples of each of eleven tasks; `discounts`: twenty of each of fifteen, by few methods."""
    if which == "discounts":
        return discounts()
    config = defaults.base()
    config.update({
        "run": "presets", "out": "runs/presets.jsonl", "split": "tune", "lengths": (8192,), "count": 10,
        "tasks": ("niah_multikey_2", "niah_multikey_3", {"task": "niah_multivalue", **TEXT},
                  {"task": "niah_multiquery", **TEXT}, "vt", "cwe", "fwe", {"task": "qa_1", "data": defaults.SQUAD},
                  {"task": "qa_2", "data": defaults.HOTPOT},
                  {"task": "nq", "name": "nq_20", "distractors": 20, "lengths": (), **TEXT},
                  {"task": "hotpotqa", "data": defaults.HOTPOT, "lengths": ()}),
        "methods": ({"method": "naive"}, {"method": "naive", "preset": "lead-in"},
                    *({**ablations.variant(label, **settings), "ratios": RATIOS}
                      for label, settings in SETTINGS.items()),
                    *({"method": name, "ratios": RATIOS} for name in ("specprefill", "oracle"))),
    })
    return config


def discounts() -> ml_collections.ConfigDict:
    """How much stale tokens should count where there is no lead-in."""
    config, other = ruler.get_config("tune"), qa.get_config("tune")

    def named(task):
        return task if isinstance(task, str) else task.get("name", task["task"])

    config.update({
        "run": "presets-discounts", "out": "runs/presets-discounts.jsonl", "lengths": (8192,), "count": 20,
        "tasks": (*(task for task in config.tasks if named(task) not in ("niah_single_1", "niah_single_2", "cwe")),
                  *({**task, "lengths": (), "count": 20} for task in other.tasks
                    if named(task) not in ("kv", "nq_10"))),
        "methods": ({"method": "naive"}, {**ablations.variant("late"), "ratios": RATIOS},
                    *({**ablations.variant(f"discount {nats:g}", discount=nats), "ratios": RATIOS}
                      for nats in (0.5, 1.0, 2.0, 4.0, 60.0)),
                    *({"method": name, "ratios": RATIOS} for name in ("specprefill", "oracle"))),
    })
    return config
