"""The chunk store's speed by config, against `cat` and a file copy with fsync of the same bytes in the same run."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from ml_collections import ConfigDict

from cacheclip_jax.store import ChunkStore, Passage, Space
from cacheclip_jax.version import __version__
from eval import machine
from eval.script import start


def run(config) -> dict[str, Any]:
    """Measure everything; returns the line that is added to `config.out`."""
    with tempfile.TemporaryDirectory(dir=config.directory or None) as scratch:
        root = Path(scratch)
        result = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": machine.command("eval.bench_store"),
            "version": __version__,
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, {_file_system(root)}",
            "read": read(config, root / "big"),
            "write": write(config, root / "written"),
        }
        for kv in ("int8", "fp8"):
            result[f"read {kv}"] = read(config, root / kv, kv)
        if config.small_chunks:
            result["small"] = small(config, root / "small")
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file:
        print(json.dumps(result), file=file)
    return result


def read(config, root: Path, kv: str = "exact") -> dict[str, float]:
    """A document's chunks from a warm page cache: all layers, into warm and new buffers; then the first layer alone."""
    space, chunks = _space(config, kv), _chunks(config)
    store = ChunkStore.open(root)
    for ids, spans, kv_ in chunks:
        store.write(space, "0" * 16, ids, spans, kv_)
    files = sorted(str(p) for p in root.rglob("*.kv"))
    size = sum(Path(f).stat().st_size for f in files)
    buffers = [np.empty_like(kv_) for *_, kv_ in chunks]
    for buffer in buffers:
        buffer.view(np.uint8).fill(1)

    def whole(out: list[np.ndarray | None]) -> None:
        pending = [store.read(space, ids, "", o) for (ids, *_), o in zip(chunks, out, strict=True)]
        for one in pending:
            assert one is not None
            one.result()

    def stream(store: ChunkStore = store) -> None:
        for (ids, *_), buffer in zip(chunks, buffers, strict=True):
            pending = store.read(space, ids, "", eager=False)
            assert pending is not None
            for layer in range(space.num_layers):
                pending.read_layers_into(layer, buffer[layer])

    def cat() -> None:
        subprocess.run(f"cat {' '.join(files)} > /dev/null", shell=True, check=True)

    first = []
    for ids, *_ in chunks:
        started = time.perf_counter()
        pending = store.read(space, ids, "", eager=False)
        assert pending is not None
        pending.read_layers_into(0, buffers[0][0])
        first.append(time.perf_counter() - started)
    times = _interleaved(config.repeats, {
        "cat": cat,
        "warm buffers": lambda: whole(list(buffers)),
        "new buffers": lambda: whole([None] * len(chunks)),
        "streamed by one thread": stream,
        "tensorstore": lambda: _by_tensorstore(files),
    })
    rates = {f"{name}, GB/s": size / seconds / 1e9 for name, seconds in times.items()}
    ratios = {f"{name} / cat": times["cat"] / seconds for name, seconds in times.items() if name != "cat"}
    return rates | ratios | {"first layer, ms": statistics.median(first) * 1e3, "bytes": size}


def write(config, root: Path) -> dict[str, float]:
    """Chunks into a store, and the same bytes by a plain file copy with fsync."""
    space, chunks = _space(config, "exact"), _chunks(config)
    passage = Passage.make("text")
    source = root / "source"
    ChunkStore.open(source).write(space, passage.id, *chunks[0])
    (file,) = source.rglob("*.kv")
    store_seconds, copy_seconds = [], []
    for turn in range(config.repeats):
        store = ChunkStore.open(root / f"s{turn}")
        started = time.perf_counter()
        writes = [store.write_async(space, passage.id, *chunk) for chunk in chunks]
        for one in writes:
            one.result()
        store_seconds.append(time.perf_counter() - started)
        shutil.rmtree(root / f"s{turn}")
        (root / "copies").mkdir()
        started = time.perf_counter()
        for i in range(len(chunks)):
            _copy(file, root / "copies" / str(i))
        copy_seconds.append(time.perf_counter() - started)
        shutil.rmtree(root / "copies")
    size = len(chunks) * file.stat().st_size
    ours, theirs = min(store_seconds), min(copy_seconds)
    return {"store, GB/s": size / ours / 1e9, "copy, GB/s": size / theirs / 1e9, "store / copy": theirs / ours}


def small(config, root: Path) -> dict[str, float]:
    """Many small chunks: open, look up, count, collect."""
    space = Space("small", "small", "bfloat16", (1,), num_layers=1, num_kv_heads=1, head_dim=8)
    n, result = config.small_chunks, {}
    store = ChunkStore.open(root)
    passages = [Passage.make(f"text {i}", f"document {i // 100}", i) for i in range(n)]
    spans, kv = [(0, 1)] * 4, np.zeros(space.shape(4), space.numpy_dtype)
    started = time.perf_counter()
    with _no_fsync():
        store.add_passages(passages)
        for i, passage in enumerate(passages):
            store.write(space, passage.id, [i, 1, 2, 3], spans, kv)
    result["write without fsync, s"] = time.perf_counter() - started
    result["open, ms"] = _time(lambda: ChunkStore.open(root, create=False)) * 1e3
    rng = np.random.default_rng(0)
    looked_up = rng.integers(0, 2 * n, config.lookups).tolist()
    each = [_time(partial(store.has, space, [i, 1, 2, 3])) for i in looked_up]
    result["lookup median, ms"] = statistics.median(each) * 1e3
    result["lookup 99th, ms"] = sorted(each)[int(0.99 * len(each))] * 1e3
    result["passage ids, s"] = _time(store.passage_ids)
    result["stats, s"] = _time(store.stats)
    with _no_fsync():
        result["gc of nothing, s"] = _time(lambda: store.gc(1 << 60))
        result["gc of a tenth, s"] = _time(lambda: store.gc(int(0.9 * n) * kv.nbytes))
        result["gc of the rest, s"] = _time(lambda: store.gc(0))
    return result


def _space(config, kv: str) -> Space:
    return Space("b", "b", "bfloat16", (1,), config.layers, config.kv_heads, config.head_dim, kv)  # type: ignore


def _chunks(config) -> list[tuple[list[int], list[tuple[int, int]], np.ndarray]]:
    space, spans = _space(config, "exact"), [(i, i + 1) for i in range(config.tokens)]
    kv = np.random.default_rng(0).standard_normal(space.shape(config.tokens), np.float32).astype(space.numpy_dtype)
    return [([i, *range(config.tokens - 1)], spans, kv) for i in range(config.chunks)]


def _interleaved(repeats: int, runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The best seconds of each, taken in turns: what the machine can do when nobody else uses it."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, one in runs.items():
            seconds = _time(one)
            if turn:
                times[name].append(seconds)
    return {name: min(found) for name, found in times.items()}


def _by_tensorstore(files: list[str]) -> None:
    kv = ts.KvStore.open("file:///").result()
    for future in [kv.read(file[1:]) for file in files]:
        future.result()


def _copy(source: Path, target: Path) -> None:
    """What cp and sync do: 1 MiB at a time."""
    with source.open("rb") as a, target.open("wb") as b:
        while block := a.read(1 << 20):
            b.write(block)
        b.flush()
        os.fsync(b.fileno())


class _no_fsync:
    """Spares a benchmark of lookups the hours of 1e5 synchronous writes."""

    def __enter__(self) -> None:
        self._real, os.fsync = os.fsync, lambda fd: None

    def __exit__(self, *_: object) -> None:
        os.fsync = self._real


def _time(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _file_system(path: Path) -> str:
    found = subprocess.run(["stat", "-f", "-c", "%T", path], capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def main(config: ConfigDict) -> None:
    print(json.dumps(run(config), indent=1))


if __name__ == "__main__":
    start(main, "What to measure, see configs/bench.")
