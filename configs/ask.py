"""Index the handbook that ships with the package and answer its questions with several methods.

    python -m eval.ask --config=configs/ask.py --config.ratio=0.1 --config.out=runs/ask.jsonl

One JSON object per question and method goes to `out`: answer, whether it's right, realised ratio, stage times.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """A pair of small models that a laptop can run."""
    return ml_collections.ConfigDict({
        "primary": "qwen2.5-coder-0.5b",
        "aux": "smollm2-135m",
        "dtype": "bfloat16",
        "store": "runs/ask-store",
        "documents": ("demo",),  # files, folders, .jsonl; "demo" is the package's handbook
        "questions": "demo",  # a .json list of {"question", "answer": [accepted strings]}
        "chunk_tokens": 192,
        "passages": 12,
        "methods": ("full", "prefix", "naive", "random", "cacheclip"),
        "ratio": 0.2,
        "scoring": ml_collections.ConfigDict({"layers": "late", "rows": "last", "heads": "mean", "context": "cached"}),
        "max_new_tokens": 40,
        "out": "runs/ask.jsonl",
    })
