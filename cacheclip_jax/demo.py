"""The demo: a real model pair, the handbook that ships with the package, questions, and full prefill beside them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from cacheclip_jax.documents import read_documents
from cacheclip_jax.explain import write_explain_page

CORPUS = Path(str(files("cacheclip_jax") / "demo_corpus"))
PASSAGES = 12
CHUNK_TOKENS = 192


def run_demo(primary: str, aux: str, store: str, page: Path, ratio: float, say: Callable[..., None]
             ) -> list[dict[str, Any]]:
    """Index, ask, compare; prints as it goes and returns the table's rows."""
    from cacheclip_jax.cli import index_with_progress, load

    scorer = "scores for itself" if aux == primary else f"{aux} scores"
    say(f"Models: {primary} answers, {scorer}. What isn't here yet is fetched first.")
    clip = load(primary, aux, store, "bfloat16")
    documents = list(read_documents([str(CORPUS)]))
    say(f"Indexing {len(documents)} documents of a small handbook: every passage is encoded once.")
    report = index_with_progress(clip, documents, CHUNK_TOKENS)
    say(f"  {len(report.passages)} passages: {report.encoded} chunk caches made, {report.found} found in the store, "
        f"{report.seconds:.1f} s.")
    questions = json.loads((CORPUS / "questions.json").read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = []
    say(f"Asking {len(questions)} questions over {PASSAGES} retrieved passages each: full prefill, then CacheClip at "
        f"{ratio:.0%}. What must be compiled is compiled before it's timed.")
    for item in questions:
        question = item["question"]
        chunks = clip.retrieve(question, PASSAGES)
        results = {}
        for method, share in (("full", None), ("cacheclip", ratio)):
            options: dict[str, Any] = dict(method=method, ratio=share, max_new_tokens=40)
            result = clip.ask(question, chunks, **options)
            if result.compiles:
                result = clip.ask(question, chunks, **options)
            results[method] = result
        full, repaired = results["full"], results["cacheclip"]
        write_explain_page(page, question, repaired, clip.primary)
        accepted = item["answer"]
        rows.append({"question": question, "expected": accepted, "answer": repaired.text, "full_answer": full.text,
                     "correct": contains(repaired.text, accepted), "full_correct": contains(full.text, accepted),
                     "passages_needed": len(item["needs"]), "context_tokens": repaired.context_tokens,
                     "ttft_full": full.times.ttft, "ttft": repaired.times.ttft, "ratio": ratio,
                     "realised_ratio": repaired.realised_ratio})
        needs = "needs one passage" if len(item["needs"]) == 1 else f"needs {len(item['needs'])} passages"
        say(f"  {len(rows)}. {escape(question)} ({needs})\n     [green]{escape(repaired.text)}[/]", highlight=False)
    say(_table(rows))
    speedup = statistics.median(r["ttft_full"] / r["ttft"] for r in rows)
    say(f"Median time to first token: {speedup:.1f}x shorter than full prefill. Right answers: CacheClip "
        f"{sum(r['correct'] for r in rows)}, full prefill {sum(r['full_correct'] for r in rows)} of {len(rows)}.")
    say(f"What was recomputed for the last question, token by token: {page}")
    return rows


def contains(text: str, accepted: list[str]) -> bool:
    """Whether a text holds one of the accepted answers, whatever the case."""
    return any(a.lower() in text.lower() for a in accepted)


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("", "answer by CacheClip", "right", "TTFT full", "TTFT", "speed-up", "ratio", "realised",
                  title="CacheClip beside full prefill, by question")
    for number, r in enumerate(rows, 1):
        table.add_row(str(number), escape(r["answer"]), "yes" if r["correct"] else "no", f"{r['ttft_full']:.2f} s",
                      f"{r['ttft']:.2f} s", f"{r['ttft_full'] / r['ttft']:.1f}x", f"{r['ratio']:.0%}",
                      f"{r['realised_ratio']:.1%}")
    return table
