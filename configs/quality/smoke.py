"""The evaluation in small: two tasks, a few samples, every method, on a CPU in minutes.

    python -m eval.quality --config=configs/quality/smoke.py
    python -m eval.report runs/smoke.jsonl --out runs/smoke

It shows that everything runs; four samples a task are no result.
"""

import ml_collections

from configs.quality import defaults


def get_config() -> ml_collections.ConfigDict:
    """SmolLM2-135M as primary and as its own aux."""
    config = defaults.base()
    config.update({
        "run": "smoke",
        "out": "runs/smoke.jsonl",
        "primary": "smollm2-135m",
        "aux": "smollm2-135m",
        "dtype": "float32",
        "tasks": ({"task": "niah_single_1", "chunk_tokens": 96}, {"task": "niah_multikey_2", "chunk_tokens": 96}),
        "lengths": (768,),
        "methods": defaults.methods((0.1, 0.2)),
        "count": 4,
        "batch": 8,
        "workers": 0,
    })
    return config
