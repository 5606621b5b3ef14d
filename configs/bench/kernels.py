"""Row attention alone: every implementation that runs here, by context, share of rows and model shape.

    python -m eval.bench_kernels --config=configs/bench/kernels.py                      # a GPU or TPU
    python -m eval.bench_kernels --config=configs/bench/kernels.py --config.sweep=True  # block sizes of the GPU kernel
    python -m eval.bench_kernels --config=configs/bench/kernels.py:cpu                  # anywhere, in a minute

Shapes are "query heads/kv heads/head dim". A time is the median over `repeats` of `calls` calls chained on the device;
TFLOP/s count what is needed (slots at or before each row), so that an implementation that skips less gets fewer.
"""

import ml_collections


def get_config(size: str = "full") -> ml_collections.ConfigDict:
    """The full grid, or a small one for a CPU."""
    cpu = size == "cpu"
    return ml_collections.ConfigDict({
        "contexts": (1024, 2048) if cpu else (4096, 8192, 16384, 32768, 65536),
        "ratios": (0.2,) if cpu else (0.05, 0.1, 0.2),
        "shapes": ("14/2/64",) if cpu else ("28/4/128", "32/8/128", "12/2/128", "14/2/64"),
        "dtype": "float32" if cpu else "bfloat16",
        "biased": (False, True),  # without and with a number added to every slot's logits, as a discount has it
        "implementations": (),  # empty: all that run here
        "ceiling": True,  # also causal attention of all rows by the library, which no row attention is expected to beat
        "sweep": False,  # instead: every variant of the GPU kernel at `swept` (context, ratio), for the first shape
        "swept": ((8192, 0.2), (32768, 0.2)),
        "group": 8,  # rows come in groups of neighbours, as selected tokens do
        "calls": 2 if cpu else 10,
        "repeats": 3 if cpu else 5,
        "checked_rows": 256,
        "dense_bytes": 8 * 2**30,  # logits that dense may take
        "out": "results/kernels_cpu.jsonl" if cpu else "results/kernels.jsonl",
    })
