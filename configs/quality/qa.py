"""Real questions over passages, as long as they are: NQ among distractors, key-value retrieval, SQuAD, multi-hop sets.

    python -m eval.quality --config=configs/quality/qa.py --config.data=DIR
    python -m eval.report runs/qa.jsonl --out results/quality

DIR holds the files named here and in `defaults` (eval/tasks/README.md says where each comes from). The multi-hop sets
are small: all that the half holds.
"""

import ml_collections

from configs.quality import defaults


def get_config(split: str = "report") -> ml_collections.ConfigDict:
    """All of it, 100 samples a task where there are so many."""
    config = defaults.of_half("qa", split)
    config.update({
        "tasks": (
            *({"task": "nq", "name": f"nq_{n}", "distractors": n, "data": defaults.TEXT} for n in (10, 20)),
            {"task": "kv", "data": "kv_retrieval_75_keys_300.jsonl.gz"},
            {"task": "squad", "distractors": 10, "data": defaults.SQUAD},
            {"task": "hotpotqa", "data": defaults.HOTPOT, "count": 0},
            {"task": "2wikimqa", "data": "wikimqa_s_clean_68.json", "count": 0},
            {"task": "musique", "data": "musique_s_100.json", "count": 0},
        ),
        "lengths": (),
        "count": 100,
        "methods": defaults.methods((0.05, 0.1, 0.2)),
    })
    return config
