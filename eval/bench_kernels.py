"""Row attention timed and checked, an implementation and a size at a time; a JSON line for each as it is measured."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from cacheclip_jax.attention import causal_attention, choose, row_attention, row_attention_reference
from cacheclip_jax.attention.mosaic_gpu import SMEM, Blocks, blocks_for, mosaic_gpu
from eval.machine import command, commit, device, versions
from eval.script import start


@dataclasses.dataclass(frozen=True)
class Cell:
    """One measurement: an implementation at one size."""

    kernel: str
    implementation: str
    rows: int
    context: int
    heads: int
    kv_heads: int
    head_dim: int
    blocks: Blocks | None = None
    biased: bool = False

    @property
    def attend(self) -> Callable[..., jax.Array]:
        """The function (q, k, v, positions, bias=) that is measured."""
        if self.kernel == "causal":
            return lambda q, k, v, *_, bias: causal_attention(q[None], k[None], v[None], self.implementation)[0]
        if self.blocks is not None:
            return partial(mosaic_gpu, blocks=self.blocks)
        return partial(row_attention, how=self.implementation)


def cells(config) -> Iterator[Cell]:
    """What the config asks for, in order."""
    for shape in config.shapes[:1] if config.sweep else config.shapes:
        N, K, H = map(int, shape.split("/"))
        for context, ratio in config.swept if config.sweep else itertools.product(config.contexts, config.ratios):
            rows = max(1, int(ratio * context))
            cell = partial(Cell, "row", rows=rows, context=context, heads=N, kv_heads=K, head_dim=H)
            if config.sweep:
                yield from (cell("mosaic_gpu", blocks=blocks, biased=biased) for blocks in variants(H)
                            for biased in config.biased if blocks.smem(H, biased=biased) <= SMEM)
                continue
            for name in config.implementations or available(H, config.dtype):
                if name == "dense" and 4 * rows * N * context > config.dense_bytes:
                    continue
                for biased in config.biased:
                    blocks = blocks_for(H, rows * N // K, context, K, biased) if name == "mosaic_gpu" else None
                    yield cell(name, blocks=blocks, biased=biased)
        if config.ceiling and not config.sweep:
            half = jax.default_backend() == "gpu" and config.dtype != "float32"
            for context in config.contexts:
                yield Cell("causal", "cudnn" if half else "blocked", context, context, N, K, H)


def available(H: int, dtype: str) -> list[str]:
    """The implementations that run on this machine, the chosen one first."""
    d = jax.devices()[0]
    chosen = choose(d.platform, getattr(d, "compute_capability", None), H, dtype).name
    half_on_gpu = d.platform == "gpu" and dtype in ("bfloat16", "float16")
    return list(dict.fromkeys([chosen, *(["cudnn"] if half_on_gpu and H % 8 == 0 and H <= 256 else []), "blocked",
                               "dense"]))


def variants(H: int) -> Iterator[Blocks]:
    """Variants of the GPU kernel that fit shared memory at head dim H."""
    for (consumers, slots), stages in itertools.product(((2, 128), (2, 192), (3, 128)), (2, 3, 4)):
        blocks = Blocks(consumers=consumers, slots=slots, stages=stages, turns=consumers == 2)
        if blocks.smem(H) <= SMEM:
            yield blocks
    yield from (Blocks(slots=64, stages=4), Blocks(splits=2), Blocks(splits=4))
    yield from (Blocks(consumers=1, turns=False, splits=splits) for splits in (1, 2))


def positions(rows: int, context: int, group: int) -> np.ndarray:
    """Sorted positions of `rows` rows in groups of neighbours at random places; the last position is among them."""
    if rows == context:
        return np.arange(context, dtype=np.int32)
    groups = np.random.default_rng(0).permutation(context // group - 1)[: -(-rows // group) - 1]
    chosen = np.concatenate([(groups[:, None] * group + np.arange(group)).reshape(-1), np.arange(context)[-group:]])
    return np.sort(chosen)[-rows:].astype(np.int32)


def measure(cell: Cell, config) -> dict[str, Any]:
    """Milliseconds of a call, the rate of needed FLOPs, and the largest error on a sample of rows."""
    keys = jax.random.split(jax.random.key(0), 3)
    cache = (cell.kv_heads, cell.context, cell.head_dim)
    q, k, v = (jax.random.normal(key, shape, config.dtype) for key, shape in
               zip(keys, ((cell.rows, cell.heads, cell.head_dim), cache, cache), strict=True))
    pos = positions(cell.rows, cell.context, config.group)
    bias = None
    if cell.biased:  # what wasn't recomputed counts half
        bias = jnp.full(cell.context, -math.log(2), jnp.float32).at[pos].set(0)

    @jax.jit
    def chained(q, k, v, pos, bias):
        # Through the barrier each call depends on the one before: none is hoisted, merged or dropped. What follows from
        # positions alone may be hoisted, as in a model, whose layers share them.
        def call(_, out):
            return cell.attend(*lax.optimization_barrier((q, k, v, out))[:3], pos, bias=bias)

        return lax.fori_loop(0, config.calls, call, jnp.zeros_like(q))

    args = (q, k, v, jnp.asarray(pos), bias)
    out = chained(*args).block_until_ready()
    seconds = []
    for _ in range(config.repeats):
        started = time.perf_counter()
        chained(*args).block_until_ready()
        seconds.append((time.perf_counter() - started) / config.calls)
    sample = np.unique(np.linspace(0, cell.rows - 1, config.checked_rows).astype(int))
    expected = jax.jit(row_attention_reference)(q[sample], k, v, args[3][sample], bias)
    error = jnp.abs(out[sample].astype(jnp.float32) - expected.astype(jnp.float32)).max()
    flops = 4 * cell.heads * cell.head_dim * int(np.sum(pos.astype(np.int64) + 1))
    median = statistics.median(seconds)
    return {"ms": 1e3 * median, "ms_min": 1e3 * min(seconds), "ms_max": 1e3 * max(seconds),
            "tflops": 1e-12 * flops / median, "max_abs_err": float(error)}


def run(config) -> list[dict[str, Any]]:
    """Measure every cell; a cell that fails is a row with its error."""
    console = Console(stderr=True)
    about = {"device": device(), "date": datetime.date.today().isoformat(), "commit": commit(), "versions": versions(),
             "command": command("eval.bench_kernels")}
    target, out = Path(config.out), []
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", encoding="utf-8") as file:
        for cell in cells(config):
            row = {**about, **dataclasses.asdict(cell), "dtype": config.dtype}
            try:
                row |= measure(cell, config)
                console.print(f"{describe(row)}: {row['ms']:.3f} ms, {row['tflops']:.3g} TFLOP/s")
            except Exception as e:  # a sweep outlives any one variant
                row["error"] = f"{type(e).__name__}: {e}"[:500]
                console.print(f"{describe(row)}: {row['error']}", markup=False)
            file.write(json.dumps(row) + "\n")
            file.flush()
            out.append(row)
    return out


def describe(row: dict[str, Any]) -> str:
    """A cell in words."""
    blocks = f" {variant(row)}" if row["blocks"] else ""
    biased = ", biased" if row["biased"] else ""
    return (f"{row['kernel']} {row['implementation']}{blocks}{biased}, {row['rows']} rows of {row['context']}, "
            f"{row['heads']}/{row['kv_heads']}/{row['head_dim']}")


def variant(row: dict[str, Any]) -> str:
    """Blocks in short."""
    if not (b := row["blocks"]):
        return ""
    turns = ", turns" if b["turns"] else ""
    splits = f", {b['splits']} splits" if b.get("splits", 1) > 1 else ""  # older results don't say
    return f"{b['consumers']}x{b['rows_per_group']} rows, {b['slots']} slots, {b['stages']} stages{turns}{splits}"


def table(rows: list[dict[str, Any]]) -> Table:
    """Measured cells in order; for a sweep the fastest of a size first."""
    out = Table("kernel", "implementation", "blocks", "bias", "rows", "context", "heads", "ms", "TFLOP/s", "error",
                title=rows[0]["device"])
    for r in sorted((r for r in rows if "ms" in r), key=lambda r: (r["head_dim"], r["heads"], r["context"], r["rows"],
                                                                   r["ms"])):
        out.add_row(r["kernel"], r["implementation"], variant(r), "yes" if r["biased"] else "", str(r["rows"]),
                    str(r["context"]), f"{r['heads']}/{r['kv_heads']}/{r['head_dim']}", f"{r['ms']:.3f}",
                    f"{r['tflops']:.3g}", f"{r['max_abs_err']:.2g}")
    return out


def main(config: ConfigDict) -> None:
    """The script."""
    Console().print(table(run(config)))


if __name__ == "__main__":
    start(main, "What to measure, see configs/bench.")
