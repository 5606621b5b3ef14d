"""Time to first token, by config: every method, context, ratio and place of the caches, beside full prefill.

A row of JSON for each cell as it is measured; a table at the end; a plot with eval.plot_ttft.
"""

from __future__ import annotations

import dataclasses
import datetime
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from cacheclip_jax import Budget, CacheClip
from cacheclip_jax.demo import CORPUS
from cacheclip_jax.documents import read_documents, split
from cacheclip_jax.methods import AuxGuided, Full, Method, Naive, Prefix
from cacheclip_jax.model.load import Model, load_model
from cacheclip_jax.model.pull import pull
from cacheclip_jax.prompt import PromptFormat
from cacheclip_jax.score import SCORINGS
from cacheclip_jax.store import ChunkStore, Passage
from eval import synthetic
from eval.machine import command, commit, device, versions
from eval.script import start

QUESTION = "Who is responsible for the pilot boat Kestrel, and what is the phone extension of that person?"
STAGES = ("score", "select", "load", "recompute", "encode")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One measurement."""

    context: int
    method: str
    ratio: float | None = None
    caches: str | None = None
    aux: str | None = None

    def configured(self, scoring: str) -> Method:
        """The method that is measured."""
        if self.method == "cacheclip":
            assert self.ratio is not None
            return AuxGuided(Budget(ratio=self.ratio), SCORINGS[scoring])
        return {"full": Full, "naive": Naive, "prefix": Prefix}[self.method]()


class Bench:
    """Models, passages and a store: what the cells of one config share."""

    def __init__(self, config: Any, store: str):
        self.config, self.store = config, store
        self.random = config.primary in synthetic.SHAPES
        self.primary = self._model(config.primary)
        self.models: dict[str, Model] = {}
        self.format = synthetic.FORMAT if self.random else PromptFormat()

    def _model(self, name: str, on_cpu: bool = False) -> Model:
        if name in synthetic.SHAPES:
            return synthetic.random_model(name, self.config.dtype, jax.devices("cpu")[0] if on_cpu else None)
        return load_model(pull(name).path, dtype=self.config.dtype)

    def aux(self, setting: str) -> tuple[Model, str]:
        """The aux model and scoring of a setting: NAME, NAME@cpu (on the host's CPU), NAME@joint (it prefills the
        whole prompt)."""
        name, _, how = setting.partition("@")
        scoring = self.config.scoring + ("-joint" if how == "joint" else "")
        if name == self.config.primary:
            return self.primary, scoring
        key = f"{name}@cpu" if how == "cpu" else name
        if key not in self.models:
            self.models[key] = self._model(name, how == "cpu")
        return self.models[key], scoring

    def clip(self, aux: str | None, caches: str | None) -> CacheClip:
        """The engine that reads caches from a place."""
        model = self.aux(aux)[0] if aux else None
        host = {"disk": 0}.get(caches or "pinned", 64 << 30)
        device_bytes = self.config.device_bytes if caches == "device" else 0
        return CacheClip(self.primary, model, ChunkStore.open(self.store), prompt_format=self.format, host_bytes=host,
                         device_bytes=device_bytes)

    def question(self) -> str:
        """A question of `question_tokens` tokens for random models, of English words for real ones."""
        return synthetic.text(self.config.question_tokens, 7) if self.random else QUESTION

    def passages(self, context: int, whole: bool = False) -> list[Passage]:
        """Passages of `context` tokens in all; one passage of the same text where it is reused as a `whole` prefix."""
        if self.random:
            chunks = synthetic.passages(context, self.config.chunk_tokens)
        else:
            chunks = handbook(self.primary, self.format, context, self.config.chunk_tokens)
        return [Passage.make("".join(p.text for p in chunks))] if whole else chunks


def handbook(model: Model, prompt_format: PromptFormat, tokens: int, chunk_tokens: int) -> list[Passage]:
    """Passages of the demo's handbook, as many as make up `tokens` tokens."""
    out: list[Passage] = []
    total = 0
    for document in read_documents([str(CORPUS)]):
        for passage in split(document, model.tokenizer, chunk_tokens):
            if total >= tokens:
                return out
            out.append(passage)
            total += len(prompt_format.chunk_ids(model.tokenizer, passage).ids)
    raise ValueError(f"the handbook has {total} tokens, fewer than {tokens}")


def cells(config: Any) -> Iterator[Cell]:
    """What the config asks for: full prefill of a context first, which the others are held against."""
    for context in config.contexts:
        if "full" in config.methods:
            yield Cell(context, "full")
        for caches in config.caches:
            for method in config.methods:
                if method in ("naive", "prefix"):
                    yield Cell(context, method, caches=caches)
                if method == "cacheclip":
                    for aux in config.auxes if caches == config.caches[0] else config.auxes[:1]:
                        for ratio in config.ratios:
                            yield Cell(context, method, ratio, caches, aux)


def run(config: Any, report: Callable[[dict[str, Any]], None]) -> None:
    """Measure every cell; each row goes to `report` as soon as it's there."""
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(config, config.store or temporary)
        rate = matmul_rate(config.dtype)
        about = {"device": device(), "date": datetime.date.today().isoformat(), "commit": commit(),
                 "versions": versions(), "command": command("eval.bench_ttft"),
                 "model": config.primary, "dtype": config.dtype, "chunk_tokens": config.chunk_tokens,
                 "matmul_tflops": rate / 1e12}
        full: dict[int, float] = {}
        clips: dict[tuple[str | None, str | None], CacheClip] = {}
        for cell in cells(config):
            key = (cell.aux, cell.caches)
            if key not in clips:
                clips.clear()
                gc.collect()  # arrays of the last engine
                clips[key] = bench.clip(*key)
            row = {**about, **dataclasses.asdict(cell)}
            try:
                row |= measure(bench, clips[key], cell, rate)
            except Exception as e:  # a cell that fails, for want of memory say, is a row too
                row["error"] = f"{type(e).__name__}: {e}"[:500]
                console.print(f"{describe(row)}: {row['error']}", markup=False)
                report(row)
                continue
            if cell.method == "full":
                full[cell.context] = row["ttft_ms"]
            if cell.context in full:
                row |= {"full_ms": full[cell.context], "speedup": full[cell.context] / row["ttft_ms"]}
            console.print(f"{describe(row)}: {row['ttft_ms']:.1f} ms, {row.get('speedup', 0):.2f}x, "
                          f"floor {row['floor_ms']:.1f} ms, "
                          + ", ".join(f"{k} {v:.1f}" for k, v in row["stages"].items())
                          + f" ({row['seconds']:.0f} s)", highlight=False, soft_wrap=True)
            report(row)
        clips.clear()
        question = len(bench.format.question_ids(bench.primary.tokenizer, bench.question()))
        prompts = [len(bench.format.prefix_ids(bench.primary.tokenizer)) + c + question for c in config.contexts]
        del bench
        gc.collect()
        if config.torch:
            for context, row in torch_rows(config, about, prompts, console):
                if context in full:
                    row |= {"full_ms": full[context], "speedup": full[context] / row["ttft_ms"]}
                report(row)


def measure(bench: Bench, clip: CacheClip, cell: Cell, rate: float) -> dict[str, Any]:
    """Medians over warm requests; `each` has every request's times in order.

    `floor_ms` is the needed FLOPs, of matrices and attention, at the rate of a large matrix product measured in the
    same run: what a free selection, free loading and attention as fast as matrix products would give.
    """
    config, question, began = bench.config, bench.question(), time.perf_counter()
    chunks = bench.passages(cell.context, whole=cell.method == "prefix")
    scoring = bench.aux(cell.aux)[1] if cell.aux else config.scoring
    method = cell.configured(scoring)
    if cell.method != "full":
        clip.index(chunks)
    options: dict[str, Any] = dict(method=method, max_new_tokens=1)
    for _ in range(config.warmups):
        clip.ask(question, chunks, **options)
    before = memory("peak_bytes_in_use")
    results = [clip.ask(question, chunks, **options) for _ in range(config.repeats)]
    if any(r.compiles for r in results):
        raise RuntimeError(f"{cell} compiled in a measured request: warm up more")
    r, cfg = results[0], bench.primary.config
    prompt = r.prefix_tokens + r.context_tokens + r.question_tokens
    positions = np.arange(prompt)
    if method.caches is not None:
        context = r.prefix_tokens + np.flatnonzero(r.selection.recompute)
        positions = np.concatenate([context, np.arange(prompt - r.question_tokens, prompt)])
    # The last layer: K and V of every row, the rest for one.
    matrices = (cfg.num_params - cfg.vocab_size * cfg.d_model * (1 if cfg.tied else 2)) / cfg.num_layers
    last = 2 * cfg.num_kv_heads * cfg.head_dim * cfg.d_model
    attention = 4 * cfg.num_heads * cfg.head_dim * float((positions + 1).sum())
    flops = (cfg.num_layers - 1) * (2 * matrices * len(positions) + attention) + 2 * last * len(positions)
    ttft = [r.times.ttft for r in results]
    median = statistics.median(ttft)
    each = {s: [1e3 * getattr(r.times, s) for r in results] for s in ("ttft", *STAGES)}
    return {"ttft_ms": 1e3 * median, "ttft_min_ms": 1e3 * min(ttft), "ttft_max_ms": 1e3 * max(ttft),
            "stages": {s: statistics.median(t) for s, t in each.items() if s != "ttft" and any(t)},
            "each": {s: [round(x, 2) for x in t] for s, t in each.items() if any(t)}, "floor_ms": 1e3 * flops / rate,
            "tflops": flops / median / 1e12, "share_of_floor": flops / rate / median, "rows": len(positions),
            "prompt_tokens": prompt, "realised_ratio": r.realised_ratio, "aux_scoring": scoring if cell.aux else None,
            "attention": bench.primary.attention.name, "peak_bytes": memory("peak_bytes_in_use"),
            "peak_bytes_before": before, "seconds": time.perf_counter() - began}


def memory(key: str) -> int | None:
    """A figure of the device's allocator, where it keeps any."""
    return (jax.devices()[0].memory_stats() or {}).get(key)


def matmul_rate(dtype: str, seconds: float = 0.3) -> float:
    """FLOP/s of a large matrix product on the default device."""
    size = 8192 if jax.devices()[0].platform != "cpu" else 1024
    a, b = (jax.random.normal(jax.random.key(i), (size, size), dtype) for i in range(2))
    product = jax.jit(jnp.matmul)
    product(a, b).block_until_ready()
    timed: list[float] = []
    while sum(timed) < seconds:
        started = time.perf_counter()
        jax.block_until_ready([product(a, b) for _ in range(4)])
        timed.append(time.perf_counter() - started)
    return 4 * 2 * size**3 / statistics.median(timed)


def torch_rows(config: Any, about: dict[str, Any], prompts: Sequence[int], console: Console
               ) -> Iterator[tuple[int, dict[str, Any]]]:
    """Full prefill by transformers + torch on the same device, in a process of its own; nothing where torch isn't."""
    name = config.primary if config.primary in synthetic.SHAPES else str(pull(config.primary).path)
    on = "cpu" if jax.devices()[0].platform == "cpu" else "cuda"
    process = [sys.executable, "-m", "eval.torch_prefill", name, ",".join(map(str, prompts)), f"--dtype={config.dtype}",
               f"--device={on}", f"--repeats={config.repeats}"]
    done = subprocess.run(process, capture_output=True, text=True, check=False)
    if done.returncode:
        console.print(f"torch: {done.stderr.strip().splitlines()[-1:]}", markup=False)
        return
    measured = json.loads(done.stdout.strip().splitlines()[-1])
    for context, tokens in zip(config.contexts, prompts, strict=True):
        seconds = measured[str(tokens)]
        yield context, {**about, "context": context, "method": "full, transformers + torch", "ratio": None,
                        "caches": None, "aux": None, "ttft_ms": 1e3 * seconds["median"],
                        "ttft_min_ms": 1e3 * seconds["min"], "ttft_max_ms": 1e3 * seconds["max"], "stages": {},
                        "prompt_tokens": tokens}


def describe(row: dict[str, Any]) -> str:
    """A cell in words."""
    parts = [f"{row['context']:,}", row["method"]]
    parts += [f"{row['ratio']:.0%}"] if row["ratio"] is not None else []
    return " ".join([*parts, *(str(row[k]) for k in ("caches", "aux") if row[k])])


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Milliseconds by context and method."""
    title = f"{rows[0]['model']} on {rows[0]['device']}: milliseconds, medians" if rows else "nothing measured"
    out = Table("context", "method", "ratio", "caches", "aux", *STAGES[:4], "TTFT", "speed-up", "floor", title=title)
    for r in rows:
        if "error" in r:
            continue
        stages = [f"{r['stages'][s]:.1f}" if s in r["stages"] else "" for s in STAGES[:4]]
        ratio = f"{r['ratio']:.0%}" if r["ratio"] is not None else ""
        out.add_row(f"{r['context']:,}", r["method"], ratio, r["caches"] or "", r["aux"] or "", *stages,
                    f"{r['ttft_ms']:.1f}", f"{r['speedup']:.2f}x" if "speedup" in r else "",
                    f"{r['floor_ms']:.1f}" if "floor_ms" in r else "")
    return out


def main(config: ConfigDict) -> None:
    """The script."""
    target, rows = Path(config.out), []
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("a" if config.append else "w", encoding="utf-8") as file:
        def report(row: dict[str, Any]) -> None:
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()

        run(config, report)
    Console().print(table(rows))


if __name__ == "__main__":
    start(main, "What to measure, see configs/bench.")
