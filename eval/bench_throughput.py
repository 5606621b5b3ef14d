"""Tokens per second of indexing and of decoding, by config, beside what the hardware allows.

    python -m eval.bench_throughput --config=configs/bench/throughput.py
"""

from __future__ import annotations

import datetime
import json
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console

from cacheclip_jax import CacheClip
from cacheclip_jax.errors import BadInput
from cacheclip_jax.methods import Naive
from cacheclip_jax.online import full_prefill
from cacheclip_jax.store import ChunkStore
from cacheclip_jax.store.store import WRITERS
from eval import synthetic
from eval.machine import command, commit, device, versions
from eval.script import start


def copy_rate() -> float:
    """Bytes per second of a large copy on the device, read and written counted."""
    x = jnp.ones((256 if jax.devices()[0].platform == "cpu" else 4096, 1 << 20), jnp.uint8)
    copy = jax.jit(lambda x: x + jnp.uint8(1))
    copy(x).block_until_ready()
    started = time.perf_counter()
    jax.block_until_ready([copy(x) for _ in range(3)])
    return 6 * x.nbytes / (time.perf_counter() - started)


def write_rate(folder: Path, size: int, files: int) -> float:
    """Bytes per second of so many files of `size` bytes written to a folder's disk, each synced, several at a time as
    a store does."""
    data = np.random.default_rng(0).bytes(size)

    def write(number: int) -> None:
        with (folder / f"rate-{number}").open("wb") as file:
            file.write(data)
            os.fsync(file.fileno())

    started = time.perf_counter()
    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(write, range(files)))
    seconds = time.perf_counter() - started
    for number in range(files):
        (folder / f"rate-{number}").unlink()
    return files * size / seconds


def index(clip: CacheClip, config: Any, folder: Path) -> dict[str, Any]:
    """Index passages, each never seen before; what the disk takes; and full prefill of prompts as long as a chunk, and
    of one as long as a batch of them."""
    warm = synthetic.passages(config.index_tokens, config.chunk_tokens, seed=1)
    clip.index(warm)
    reports = []
    for repeat in range(config.repeats):
        reports.append(clip.index(synthetic.passages(config.index_tokens, config.chunk_tokens, seed=2 + repeat)))
    rate = statistics.median(r.tokens / r.seconds for r in reports)
    size = reports[0].bytes / reports[0].tokens
    disk = write_rate(folder, round(config.chunk_tokens * size), reports[0].tokens // config.chunk_tokens)
    out: dict[str, Any] = {"tokens_per_s": rate, "bytes_per_s": rate * size, "chunk_tokens": config.chunk_tokens,
                           "tokens": reports[0].tokens, "disk_bytes_per_s": disk, "share_of_disk": rate * size / disk}
    model = clip.primary.model
    for name, tokens in (("chunk", config.chunk_tokens), ("batch", 8192)):
        ids = np.arange(tokens, dtype=np.int32) % 4096
        seconds = []
        for _ in range(config.repeats + 2):
            started = time.perf_counter()
            jax.block_until_ready(full_prefill(model, ids, tokens + 256)[0])
            seconds.append(time.perf_counter() - started)
        full = tokens / statistics.median(seconds[2:])
        out |= {f"full_prefill_{name}_tokens_per_s": full, f"share_of_full_prefill_{name}": rate / full}
    return out


def decode(clip: CacheClip, config: Any) -> dict[str, Any]:
    """Decode an answer over a reused context; the floor is weights and cache read once a token."""
    chunks, question = synthetic.passages(config.context, config.chunk_tokens, seed=1), synthetic.text(32, 7)
    options: dict[str, Any] = dict(method=Naive(), max_new_tokens=config.new_tokens)
    results = [clip.ask(question, chunks, **options) for _ in range(config.repeats + 1)][1:]
    rate = statistics.median(r.decode_tokens_per_second for r in results)
    cfg, item = clip.primary.model.config, jnp.dtype(config.dtype).itemsize
    weights = (cfg.num_params - (0 if cfg.tied else cfg.vocab_size * cfg.d_model)) * item
    cache = cfg.kv_values_per_token * (results[0].context_tokens + 32) * item
    bandwidth = config.bandwidth or copy_rate()
    return {"tokens_per_s": rate, "ms_per_token": 1e3 / rate, "context": config.context,
            "new_tokens": config.new_tokens, "floor_tokens_per_s": bandwidth / (weights + cache),
            "share_of_floor": rate * (weights + cache) / bandwidth, "bandwidth": bandwidth,
            "copy_bandwidth": copy_rate()}


def main(config: ConfigDict) -> None:
    """The script."""
    if unknown := [name for name in config.measured if name not in ("index", "decode")]:
        raise BadInput(f"measured={unknown[0]!r} is unknown: choose index, decode or both")
    console = Console()
    about = {"device": device(), "date": datetime.date.today().isoformat(), "commit": commit(), "versions": versions(),
             "command": command("eval.bench_throughput"), "model": config.primary,
             "dtype": config.dtype}
    with tempfile.TemporaryDirectory(dir=config.store or None) as store:
        clip = CacheClip(synthetic.random_model(config.primary, config.dtype), None, ChunkStore.open(store),
                         prompt_format=synthetic.FORMAT)
        measures = {"index": lambda: index(clip, config, Path(store)), "decode": lambda: decode(clip, config)}
        for name in config.measured:
            row = {**about, **measures[name]()}
            target = Path(config.out) / f"{name}.jsonl"
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            console.print(name, {k: v for k, v in row.items() if k not in about}, soft_wrap=True)


if __name__ == "__main__":
    start(main, "What to measure, see configs/bench.")
