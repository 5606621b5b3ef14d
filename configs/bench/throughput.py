"""Indexing and decoding in tokens per second, random weights at real shapes.

    python -m eval.bench_throughput --config=configs/bench/throughput.py                 # Qwen2.5-7B, a GPU of 80 GB
    python -m eval.bench_throughput --config=configs/bench/throughput.py:qwen2.5-0.5b    # less: also a CPU, with
                                                                                          # --config.context=1024
"""

import ml_collections


def get_config(primary: str = "qwen2.5-7b") -> ml_collections.ConfigDict:
    """Rows are added to index.jsonl and decode.jsonl in the folder `out`."""
    return ml_collections.ConfigDict({
        "primary": primary,
        "measured": ("index", "decode"),
        "dtype": "bfloat16",
        "chunk_tokens": 512,
        "index_tokens": 98304,
        "context": 8192,
        "new_tokens": 128,
        "bandwidth": 2.5e12,  # bytes per second of the decode floor; 0 takes a copy's, measured in the run
        "repeats": 3,
        "store": "",  # a folder on the disk to index to; empty: the system's temporary one
        "out": "results",
    })
