"""TTFT on a CPU: full prefill, reuse and CacheClip over 2,000 context tokens of a real small model; torch beside it.

    python -m eval.bench_ttft --config=configs/bench/cpu.py

On 2 cores it takes about 3 minutes. What to expect: CacheClip at 20 % at least 2.5 times sooner than full prefill, and
full prefill no slower than 1.3 times transformers + torch on the same cores (skipped, and said so, without torch).
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The small pair, and the primary as its own aux."""
    return ml_collections.ConfigDict({
        "primary": "qwen2.5-coder-0.5b",
        "auxes": ("qwen2.5-coder-0.5b", "smollm2-135m"),
        "dtype": "bfloat16",
        "scoring": "late",
        "contexts": (2000,),
        "chunk_tokens": 128,
        "question_tokens": 32,
        "ratios": (0.2, 0.1),
        "methods": ("full", "prefix", "naive", "cacheclip"),
        "caches": ("pinned", "disk"),
        "device_bytes": 0,
        "warmups": 2,
        "repeats": 5,
        "torch": True,
        "store": "",
        "out": "results/ttft_cpu.jsonl",
        "append": False,
    })
