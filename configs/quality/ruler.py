"""RULER: its thirteen tasks at 4k and 8k, every method at 20, 10 and 5%.

    python -m eval.quality --config=configs/quality/ruler.py --config.data=DIR
    for i in 0 1 2 3; do CUDA_VISIBLE_DEVICES=$i python -m eval.quality --config=configs/quality/ruler.py \\
      --config.data=DIR --config.shard=$i/4 & done; wait
    python -m eval.report runs/ruler*.jsonl --out results/quality

DIR holds the files that `defaults` names. `configs/quality/ruler.py:tune` takes the tuning half instead, for choosing
presets; `--config.lengths="(8192,)"` leaves a length out.
"""

import ml_collections

from configs.quality import defaults

TEXT = ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery")


def get_config(split: str = "report") -> ml_collections.ConfigDict:
    """All of it, 50 samples a task and length."""
    config = defaults.of_half("ruler", split)
    config.update({
        "tasks": (
            "niah_single_1", "niah_multikey_2", "niah_multikey_3",
            *({"task": name, "data": defaults.TEXT} for name in TEXT),
            "vt", "cwe", "fwe",
            {"task": "qa_1", "data": defaults.SQUAD}, {"task": "qa_2", "data": defaults.HOTPOT, "count": 0},
        ),
        "lengths": (4096, 8192),
        "methods": defaults.methods((0.05, 0.1, 0.2)),
    })
    return config
