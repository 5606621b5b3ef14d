"""Chunks of a text: fixed windows of tokens, optionally with a cut through a fact; or the passages that are there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Literal

from cacheclip_jax.errors import BadInput
from eval.tasks.sample import Spans

Cut = Literal["fact", "answer"] | None
Range = tuple[int, int]


def windows(text: str, spans: Spans, size: int, cuts: Sequence[int] = ()) -> tuple[str, ...]:
    """Consecutive pieces of `size` tokens that tile `text`; the last one of a run is shorter.

    A piece also ends at every character offset in `cuts`. A character that takes several tokens is never cut, so a
    piece may hold a few tokens more. Raises BadInput for a size below 1.
    """
    if size < 1:
        raise BadInput(f"chunk_tokens={size} is out of range: 1 or more")
    edges = [0, *sorted(set(cuts)), len(text)]
    return tuple(piece for a, b in pairwise(edges) for piece in _run(text[a:b], spans, size))


def _run(text: str, spans: Spans, size: int) -> list[str]:
    edges, count, covered = [0], 0, 0
    for start, end in spans(text):
        if count >= size and start >= covered:
            edges.append(start)
            count = 0
        count += 1
        covered = max(covered, end)
    edges.append(len(text))
    return [text[a:b] for a, b in pairwise(edges) if a < b]


def middle(text: str, spans: Spans, fact: Range) -> int:
    """The character offset that cuts a fact in two: the token boundary nearest to its middle, else the middle."""
    start, end = fact
    if end - start < 2:
        raise BadInput(f"the fact {text[start:end]!r} is too short to cut: give cut=None")
    half = (start + end) // 2
    inside = [a for a, _ in spans(text) if start < a < end]
    return min(inside, key=lambda a: abs(a - half), default=half)


def cut_windows(text: str, spans: Spans, size: int, cut: Cut, facts: Sequence[Range], answers: Sequence[Range]
                ) -> tuple[str, ...]:
    """Windows of a text that holds facts; `cut` puts a boundary through every fact, or through every answer in one."""
    return windows(text, spans, size, [middle(text, spans, f) for f in _chosen(cut, facts, answers)])


def cut_chunks(chunks: Sequence[str], spans: Spans, cut: Cut, facts: Sequence[Range], answers: Sequence[Range]
               ) -> tuple[str, ...]:
    """Chunks that are there already, further cut through every fact, or through every answer (ranges of the joined
    text).
    """
    text = "".join(chunks)
    edges = {0, *accumulate(map(len, chunks))} | {middle(text, spans, f) for f in _chosen(cut, facts, answers)}
    return tuple(text[a:b] for a, b in pairwise(sorted(edges)))


def _chosen(cut: Cut, facts: Sequence[Range], answers: Sequence[Range]) -> Sequence[Range]:
    if cut not in (None, "fact", "answer"):
        raise BadInput(f"cut={cut!r}: choose fact, answer or None")
    return {None: (), "fact": facts, "answer": answers}[cut]


def holding(chunks: Sequence[str], facts: Sequence[Range]) -> list[int]:
    """The chunks that a fact lies in, or part of one, by index."""
    edges = [0, *accumulate(map(len, chunks))]
    return [i for i, (a, b) in enumerate(pairwise(edges)) if any(start < b and a < end for start, end in facts)]


def pieces(text: str, heading: str) -> tuple[str, ...]:
    """The text cut before every match of the regular expression `heading`; what precedes the first joins it."""
    edges = [m.start() for m in re.finditer(heading, text)]
    edges = [0, *edges[1:], len(text)]
    return tuple(text[a:b] for a, b in pairwise(edges) if a < b)


def packed(parts: Sequence[str], spans: Spans, size: int) -> tuple[str, ...]:
    """Consecutive parts joined while they hold at most `size` tokens together; a longer part stays alone."""
    out: list[str] = []
    room = 0
    for part in parts:
        tokens = len(spans(part))
        if out and tokens <= room:
            out[-1] += part
            room -= tokens
        else:
            out.append(part)
            room = size - tokens
    return tuple(out)
