"""Another pair of models: does the ranking of methods hold? Small enough for a CPU.

    python -m eval.quality --config=configs/quality/pair.py --config.data=DIR
    python -m eval.report runs/pair.jsonl --out runs/pair

Needles in noise and in text, and short questions, at 2k: what a model of 135M parameters can answer with full
attention. `--config.budget_seconds=1200` ends a run after so long, and the same command goes on.
"""

import ml_collections

from configs.quality import defaults


def get_config(split: str = "report") -> ml_collections.ConfigDict:
    """SmolLM2-135M as primary and as its own aux, and rivals that reuse caches, at 10 and 20%."""
    config = defaults.of_half("pair", split)
    at = {"ratios": (0.1, 0.2)}
    config.update({
        "primary": "smollm2-135m",
        "aux": "smollm2-135m",
        "dtype": "float32",
        "tasks": (
            "niah_single_1",
            *({"task": name, "data": defaults.TEXT} for name in ("niah_single_2", "niah_multikey_1")),
            {"task": "squad", "distractors": 10, "data": defaults.SQUAD, "lengths": ()},
        ),
        "lengths": (2048,),
        "methods": (
            *({"method": "naive", "preset": preset} for preset in ("", "lead-in")),
            *({"method": "cacheclip", "preset": preset, **at} for preset in ("lead-in", "late")),
            *({"method": name, **at} for name in ("cacheblend", "epic", "prophetkv")),
            {"method": "prophetkv", "preset": "lead-in", **at},
        ),
        "batch": 15,
        "block": 1,
        "workers": 0,
    })
    return config
