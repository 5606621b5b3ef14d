"""The explain page: the context as the models read it, recomputed tokens marked, what they were ranked by as shade."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import jinja2
import numpy as np

from cacheclip_jax.answer import Result
from cacheclip_jax.caches import ChunkCaches
from cacheclip_jax.errors import BadInput


@dataclass(frozen=True)
class Run:
    """Consecutive characters of one look: shade 0..9 of their score, recomputed or reused."""

    text: str
    shade: int
    recomputed: bool


def explain_page(question: str, result: Result, primary: ChunkCaches) -> str:
    """One self-contained HTML page for an answer: what was recomputed, and why."""
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        (files("cacheclip_jax") / "templates" / "explain.html").read_text(encoding="utf-8"))
    encoded = [primary.encoded(p) for p in result.passages]
    ends = np.cumsum([len(e.ids) for e in encoded])[:-1]
    ranked = result.selection.ranked
    shades = shade(ranked) if ranked is not None else np.zeros(result.context_tokens, int)
    chunks = []
    for passage, tokens, shaded, chosen in zip(result.passages, encoded, np.split(shades, ends),
                                               np.split(result.selection.recompute, ends), strict=True):
        chunks.append({"passage": passage, "tokens": len(tokens.ids), "recomputed": int(chosen.sum()),
                       "runs": runs(primary.format.chunk_text(passage), tokens.spans, shaded, chosen)})
    return template.render(question=question, result=result, chunks=chunks, model=primary.model.name,
                           scored=ranked is not None)


def write_explain_page(path: Path, question: str, result: Result, primary: ChunkCaches) -> None:
    """Write the page, making its folder. Raises BadInput when that can't be done there."""
    page = explain_page(question, result, primary)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Names of files that aren't UTF-8 hold surrogates.
        path.write_text(page, encoding="utf-8", errors="backslashreplace")
    except OSError as e:
        raise BadInput(f"the explain page {str(path)!r} can't be written ({e.strerror}): name another file") from None


def shade(scores: np.ndarray) -> np.ndarray:
    """Scores -> 0..9 by rank, so that one huge score doesn't bleach the rest; zero scores stay 0."""
    rank = np.argsort(np.argsort(scores, kind="stable"), kind="stable") / max(len(scores) - 1, 1)
    return np.where(scores > 0, np.clip((rank - 0.5) * 20, 0, 9), 0).astype(int)


def runs(text: str, spans, shades: np.ndarray, recomputed: np.ndarray) -> list[Run]:
    """A chunk's text cut where the look changes. A character of several tokens (bytes) takes the first one's look."""
    looks: list[tuple[int, bool]] = [(0, False)] * len(text)
    for (start, end), s, r in reversed(list(zip(spans, shades, recomputed, strict=True))):
        looks[start:end] = [(int(s), bool(r))] * (end - start)
    out: list[Run] = []
    begin = 0
    for i in range(1, len(text) + 1):
        if i == len(text) or looks[i] != looks[begin]:
            out.append(Run(text[begin:i], *looks[begin]))
            begin = i
    return out
