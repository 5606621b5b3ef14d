"""Time to first token, by config: every method, every stage, medians; full prefill by torch in the same run."""

from __future__ import annotations

import datetime
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

from cacheclip_jax import Budget, CacheClip
from cacheclip_jax.demo import CORPUS
from cacheclip_jax.documents import read_documents, split
from cacheclip_jax.methods import AuxGuided, Full, Method, Naive
from cacheclip_jax.model.pull import pull
from cacheclip_jax.score import SCORINGS
from cacheclip_jax.store import Passage
from eval.machine import device, versions

_CONFIG = config_flags.DEFINE_config_file("config", None, "What to measure, see configs/bench.", lock_config=True)
flags.mark_flag_as_required("config")

QUESTION = "Who is responsible for the pilot boat Kestrel, and what is the phone extension of that person?"
STAGES = ("score", "select", "load", "assemble", "recompute", "ttft")


def run(config) -> dict[str, Any]:
    """Measure everything that the config asks for; returns what is written to `config.out`."""
    console = Console(stderr=True)
    rows: list[dict[str, Any]] = []
    ids: np.ndarray | None = None
    path = pull(config.primary).path
    with tempfile.TemporaryDirectory() as store:
        for aux in config.auxes:
            pull(aux)
            clip = CacheClip.load(config.primary, aux, store, dtype=config.dtype)
            chunks = context(clip, config.context_tokens, config.chunk_tokens)
            with console.status(f"indexing for {aux}"):
                clip.index(chunks)
            methods: list[tuple[str, Method]] = []
            if not rows:
                methods += [("full", Full()), ("naive", Naive())]
            methods += [(f"cacheclip {ratio:.0%}, aux {aux}", AuxGuided(Budget(ratio=ratio), SCORINGS[config.scoring]))
                        for ratio in config.ratios]
            for name, method in methods:
                with console.status(name):
                    rows.append({"method": name, **measure(clip, chunks, method, config.repeats)})
            ids = clip.primary.prompt(chunks, QUESTION).ids
            del clip
    if config.torch:
        with console.status("torch"):
            rows.append({"method": "full, transformers + torch", **measure_torch(path, ids, config)})
    full = rows[0]["ttft"]
    for row in rows:
        row["speedup_over_full"] = full / row["ttft"] if row["ttft"] else None
    return {"device": device(), "date": datetime.date.today().isoformat(), "versions": versions(),
            "command": " ".join(["python -m eval.bench_ttft", *sys.argv[1:]]), "config": config.to_dict(), "rows": rows}


def context(clip: CacheClip, tokens: int, chunk_tokens: int) -> list[Passage]:
    """Passages of the handbook, as many as make up `tokens` tokens."""
    out: list[Passage] = []
    total = 0
    for document in read_documents([str(CORPUS)]):
        for passage in split(document, clip.primary.model.tokenizer, chunk_tokens):
            if total >= tokens:
                return out
            out.append(passage)
            total += len(clip.primary.encoded(passage).ids)
    raise ValueError(f"the handbook has {total} tokens, fewer than {tokens}")


def measure(clip: CacheClip, chunks: list[Passage], method: Method, repeats: int) -> dict[str, Any]:
    """Medians over `repeats` warm requests. `floor_speedup` is prompt tokens over computed rows: what a free selection,
    free loading and free attention would give."""
    clip.warmup(QUESTION, chunks, method=method, max_new_tokens=8)
    results = [clip.ask(QUESTION, chunks, method=method, max_new_tokens=8) for _ in range(repeats)]
    if any(r.compiles for r in results):
        raise RuntimeError(f"{method.name} compiled in a measured request")
    r = results[0]
    prompt = r.prefix_tokens + r.context_tokens + r.question_tokens
    computed = prompt if method.caches is None else r.recomputed_tokens + r.question_tokens
    params = clip.primary.model.config.num_params
    median = {s: statistics.median(getattr(r.times, s) for r in results) for s in STAGES}
    return {**median, "ttft_min": min(r.times.ttft for r in results), "ttft_max": max(r.times.ttft for r in results),
            "context_tokens": r.context_tokens, "prompt_tokens": prompt, "computed_rows": computed,
            "realised_ratio": r.realised_ratio, "floor_speedup": prompt / computed,
            "matrix_tflop": 2e-12 * params * computed,
            "decode_tokens_per_second": statistics.median(r.decode_tokens_per_second for r in results)}


def measure_torch(path: Path, ids: np.ndarray | None, config) -> dict[str, Any]:
    """Full prefill of the same ids by transformers + torch SDPA, in the same dtype, on the same cores."""
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError:
        return {"ttft": None, "note": "torch isn't installed: pip install cacheclip-jax[torch]"}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, config.dtype)).eval()
    tokens = torch.from_numpy(np.asarray(ids)[None].astype(np.int64))
    seconds = []
    with torch.inference_mode():
        for _ in range(config.repeats + 1):
            started = time.perf_counter()
            int(model(tokens, use_cache=True, logits_to_keep=1).logits[0, -1].argmax())
            seconds.append(time.perf_counter() - started)
    return {"ttft": statistics.median(seconds[1:]), "ttft_min": min(seconds[1:]), "ttft_max": max(seconds[1:]),
            "torch_threads": torch.get_num_threads()}


def table(report: dict[str, Any]) -> Table:
    """Milliseconds by stage."""
    out = Table("method", *STAGES, "realised", "speed-up", "floor", title=f"{report['device']}, milliseconds, medians")
    for r in report["rows"]:
        cells = [f"{1e3 * r[s]:,.0f}" if r.get(s) is not None else "" for s in STAGES]
        share = f"{r['realised_ratio']:.1%}" if "realised_ratio" in r else ""
        out.add_row(r["method"], *cells, share, f"{r['speedup_over_full']:.2f}x" if r["speedup_over_full"] else "",
                    f"{r['floor_speedup']:.2f}x" if "floor_speedup" in r else "")
    return out


def main(argv: list[str]) -> None:
    """absl's entry point."""
    del argv
    config = _CONFIG.value
    report = run(config)
    target = Path(config.out)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    Console().print(table(report))


if __name__ == "__main__":
    app.run(main)
