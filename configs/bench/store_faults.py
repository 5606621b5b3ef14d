"""Faults against the chunk store, each many times: kills, flipped bits, torn files, full disks, failing disks, clocks.

    python -m eval.fault_store --config=configs/bench/store_faults.py

On 2 cores it takes about 3 minutes. What to expect: nothing lost, no wrong bytes served, every flip detected and
healed, and a store that verifies clean; the run exits with 1 otherwise. A full disk is a tmpfs of its own where this
user may mount one, else an injected ENOSPC; the result says which.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Every fault; `seed` chooses the moments and places."""
    return ml_collections.ConfigDict({
        "seed": 0,
        "kills": 200,
        "flips": 1000,
        "torn": 200,
        "full_disks": 20,
        "io_errors": 500,
        "clock_jumps": 100,
        "out": "results/store_faults.json",
    })
