"""Which layers of aux and primary look at the same context: CacheClip's figure 2, for the pair that results are for.

    python -m eval.similarity --config=configs/quality/similarity.py --config.data=DIR

DIR holds the files that `defaults` names. Needs 10 GB of memory; on two CPU cores a sample takes about two minutes.
results/similarity.md has what to expect.
"""

import ml_collections

from configs.quality import defaults


def get_config() -> ml_collections.ConfigDict:
    """One sample each of four tasks of 1,024 tokens, of the half that is for tuning."""
    return ml_collections.ConfigDict({
        "run": "similarity",
        "out": "results/similarity",  # .jsonl, .md and .svg
        "primary": "qwen2.5-coder-1.5b",
        "aux": "qwen2.5-coder-0.5b",
        "dtype": "float32",
        "tasks": (
            {"task": "niah_multikey_1", "data": defaults.TEXT, "chunk_tokens": 128},
            {"task": "niah_multikey_2", "chunk_tokens": 128},
            {"task": "vt", "chunk_tokens": 128},
            {"task": "qa_1", "data": defaults.SQUAD},
        ),
        "lengths": (1024,),
        "count": 1,
        "split": "tune",
        "seed": 0,
        "data": "",  # folder of the tasks' files
    })
