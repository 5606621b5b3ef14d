"""What finetuning the aux model is worth in answers: the shipped adapter beside the untouched model.

    python -m eval.quality --config=configs/quality/adapter.py:qa --config.data=DIR      # or :ruler
    python -m eval.report runs/adapter-qa.jsonl --out results/adapter

`--config.aux_adapter=OUT/adapter` takes one that was trained here; `--config.primary` and `--config.aux` its models.
"""

from pathlib import Path

import ml_collections

import cacheclip_jax
from configs.quality import qa, ruler

ADAPTER = Path(cacheclip_jax.__file__).with_name("adapters") / "qwen2.5-coder"
RATIOS = (0.02, 0.05, 0.1, 0.2)


def get_config(tasks: str = "qa") -> ml_collections.ConfigDict:
    """The tasks of a config (qa or ruler), reporting half."""
    config = {"qa": qa, "ruler": ruler}[tasks].get_config()
    config.update({
        "run": f"adapter-{tasks}", "out": f"runs/adapter-{tasks}.jsonl", "aux_adapter": str(ADAPTER),
        "methods": ({"method": "naive"},
                    *({"method": "cacheclip", "preset": preset, "ratios": RATIOS}
                      for preset in ("lead-in", "adapter"))),
    })
    return config
