"""The chunk store against the plain tools on the same files: reading, streaming, writing, and 1e5 small chunks.

    python -m eval.bench_store --config=configs/bench/store.py

On 2 cores it takes about 4 minutes. What to expect: reads at 70 % of `cat`'s bytes per second or more, the first layer
within 5 ms, writes at 60 % of a file copy with fsync; lookups under 1 ms, stats of 1e5 chunks under 10 s. Ratios hold
within one run; bytes per second are the machine's. One line is added to `out` for every run.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Chunk caches as of a 7B model with 4 KV heads of 128 in 28 layers, 512 tokens each."""
    return ml_collections.ConfigDict({
        "directory": "",
        "layers": 28,
        "kv_heads": 4,
        "head_dim": 128,
        "tokens": 512,
        "chunks": 16,
        "repeats": 15,
        "small_chunks": 100_000,
        "lookups": 2000,
        "out": "results/store.jsonl",
    })
