"""Which settings CacheClip's default preset should have: candidates at 5, 10 and 20%, on the tuning half, at 8k.

    python -m eval.quality --config=configs/quality/presets.py --config.data=DIR            # texts of the lead-in
    python -m eval.quality --config=configs/quality/presets.py:discounts --config.data=DIR  # without a lead-in
    python -m eval.quality --config=configs/quality/presets.py:selections --config.data=DIR # layers, words, discount
    python -m eval.report runs/presets*.jsonl --out results/presets

Full attention says what there is to reach.
"""

from typing import Any

import ml_collections

from configs.quality import qa, ruler
from configs.quality.lead_ins import LEAD_INS

RATIOS = (0.05, 0.1, 0.2)
WEIGHTS = (0.0, 0.005, 0.01, 0.02)


def get_config(which: str = "lead-ins") -> ml_collections.ConfigDict:
    """`which`: lead-ins, ten samples of every task; discounts, twenty of each of fifteen; or selections, likewise."""
    return {"lead-ins": lead_ins, "discounts": discounts, "selections": selections}[which]()


def lead_ins() -> ml_collections.ConfigDict:
    """What chunks should be encoded behind, the other settings being the default's."""
    config, other = ruler.get_config("tune"), qa.get_config("tune")
    config.update({
        "run": "presets-lead-ins", "out": "runs/presets-lead-ins.jsonl", "lengths": (8192,), "count": 10,
        "tasks": (*config.tasks, *({**task, "lengths": (), "count": 10} for task in other.tasks)),
        "methods": (*(candidate(label, lead_in=text) for label, text in LEAD_INS.items()),
                    candidate("no lead-in", lead_in=""), late()),
    })
    return config


def selections() -> ml_collections.ConfigDict:
    """Which of the aux's 24 layers should score, how much repeating the question should count, and the discount."""
    config = discounts()
    kv, = (task for task in qa.get_config("tune").tasks if task["task"] == "kv")
    middle, outer = {"scoring": {"layers": tuple(range(12, 18))}}, {"scoring": {"layers": tuple(range(12, 20))}}

    def words(weight):
        return {"ranking": {"lexical": weight}}

    config.update({
        "run": "presets-selections", "out": "runs/presets-selections.jsonl",
        "tasks": (*config.tasks, {**kv, "lengths": (), "count": 20}),
        "methods": (*(candidate(f"words {weight:g}", **words(weight)) for weight in WEIGHTS),
                    *(candidate(f"layers 12-17, words {weight:g}", **middle, **words(weight)) for weight in WEIGHTS),
                    candidate("layers 12-19, words 0.01", **outer, **words(0.01)),
                    *(candidate(f"words 0.01, discount {nats:g}", discount=nats, **words(0.01)) for nats in (1.0, 1.4)),
                    candidate("layers 12-17, words 0.01, discount 1", discount=1.0, **middle, **words(0.01)),
                    *({"method": "prophetkv", "preset": "lead-in", "ratios": RATIOS},
                      {"method": "specprefill", "ratios": RATIOS})),
    })
    return config


def candidate(label: str, **settings: Any) -> dict[str, Any]:
    """A column: the default preset with other settings."""
    return {"method": "cacheclip", "preset": "lead-in", "label": label, "ratios": RATIOS, **settings}


def late() -> dict[str, Any]:
    """A column: no lead-in, no discount, groups of 8."""
    return {"method": "cacheclip", "preset": "late", "ratios": RATIOS}


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
        "methods": ({"method": "naive"}, late(),
                    *({**late(), "label": f"discount {nats:g}", "discount": nats}
                      for nats in (0.5, 1.0, 2.0, 4.0, 60.0)),
                    *({"method": name, "ratios": RATIOS} for name in ("specprefill", "oracle"))),
    })
    return config
