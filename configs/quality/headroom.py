"""How much better could a selection be? The default's against a greedy search that knows full attention's answer.

    python -m eval.headroom --config=configs/quality/headroom.py --config.data=DIR

`--config.budget_seconds=2700` ends it after so long. DIR holds the files that `defaults` names.
"""

import ml_collections

from configs.quality import similarity

RATIOS = (0.05, 0.1, 0.2)


def get_config() -> ml_collections.ConfigDict:
    """Two samples each of the tasks that `similarity` compares attention on: on two CPU cores about ten minutes a
    sample."""
    config, at = similarity.get_config(), {"ratios": RATIOS}
    config.update({
        "run": "headroom",
        "out": "results/headroom",  # .jsonl and .md
        "count": 2,
        "search": {"method": "cacheclip", "preset": "lead-in"},  # whose chunk caches, groups and discount
        "ratios": RATIOS,
        "width": 8,  # groups tried in each round but the first
        "judged": 4,  # first tokens of full attention's answer that distributions are compared on
        "methods": (
            {"method": "naive", "preset": "lead-in"},
            {"method": "cacheclip", "preset": "lead-in", **at},
            {"method": "cacheclip", "preset": "lead-in", "label": "joint", "scoring": {"context": "joint"}, **at},
            {"method": "prophetkv", "preset": "lead-in", **at},
            {"method": "specprefill", **at},
            *({"method": name, "label": "sentences", "lead_in": True, "grouping": {"longest": 96}, **at}
              for name in ("oracle", "random")),
        ),
        "budget_seconds": 0.0,  # stop after so long; 0: never
    })
    return config
