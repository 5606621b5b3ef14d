"""TTFT of one model by context, ratio and place of the caches, random weights at real shapes, on a GPU.

    python -m eval.bench_ttft --config=configs/bench/ttft.py                    # Qwen2.5-7B, 4k to 64k
    python -m eval.bench_ttft --config=configs/bench/ttft.py:llama-3.1-8b       # or qwen2.5-14b, ...

Needs a GPU of 80 GB and, for caches on disk, 5 GB of disk. docs/performance.md says what to expect.
"""

import ml_collections


def get_config(primary: str = "qwen2.5-7b") -> ml_collections.ConfigDict:
    """The whole grid; narrow it with --config.contexts='(8192,)' and the like."""
    return ml_collections.ConfigDict({
        "primary": primary,
        "auxes": ("qwen2.5-0.5b", "qwen2.5-0.5b@joint", "qwen2.5-0.5b@cpu"),
        "dtype": "bfloat16",
        "scoring": "late",
        "contexts": (4096, 8192, 16384, 32768, 65536),
        "chunk_tokens": 512,
        "question_tokens": 32,
        "ratios": (0.3, 0.2, 0.1, 0.05),
        "methods": ("full", "prefix", "naive", "cacheclip"),
        "caches": ("pinned", "device", "disk"),
        "device_bytes": 12 << 30,
        "warmups": 2,
        "repeats": 7,
        "torch": True,
        "store": "",  # a directory to keep the caches in; empty: a temporary one
        "out": "results/ttft.jsonl",
        "append": False,
    })
