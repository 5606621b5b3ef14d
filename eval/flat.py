"""A flat prompt in the parts that KV reuse needs: instructions, chunks and question, cut by a stated rule."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from cacheclip_jax.errors import BadInput
from eval.tasks.chunk import windows
from eval.tasks.sample import Spans

# Where passages begin that are numbered: "Document 3: ...", "Passage [3]", or a line with "[3]" first.
_PASSAGE = re.compile(r"^(?:(?:Document|Passage|Paragraph|Context|Source)[ \t]*[\[(#]?\d+|\[\d+\])", re.MULTILINE)
_QUESTION = re.compile(r"^(?:Question|Query|Q)[ \t]*\d*[ \t]*:", re.MULTILINE)
_BLANK_LINES = re.compile(r"(?<=\S)[ \t]*\n[ \t]*\n\s*")


@dataclass(frozen=True)
class Rule:
    """How a prompt that is one text is cut.

    The question begins at the last line that starts with "Question:", "Query:" or "Q:" (a number may stand before the
    colon); without such a line, or where `question` says so, it is that many of the last paragraphs. Paragraphs end at
    blank lines. What comes before it is instructions and context: where lines begin with "Document 1", "Passage [1]"
    and the like, or with "[1]", each starts a chunk, and what stands before the first one are the instructions.
    Otherwise the first `instructions` paragraphs are, and the others are put together to chunks.

    chunk_tokens: tokens of the primary in a chunk, at most; what is longer is cut, wherever that is.
    """

    chunk_tokens: int = 512
    instructions: int = 1
    question: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("chunk_tokens", 1), ("instructions", 0), ("question", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise BadInput(f"{name}={value} is out of range: {least} or more")


@dataclass(frozen=True)
class Parts:
    """`instructions + chunks[0] + ... + chunks[-1] + question` is the whole prompt."""

    instructions: str
    chunks: tuple[str, ...]
    question: str


def cut(text: str, rule: Rule, spans: Spans) -> Parts:
    """The parts of a prompt; `spans` are its tokenizer's. Raises BadInput where no context is left for chunks."""
    asked = [m.start() for m in _QUESTION.finditer(text)] if rule.question is None else []
    at = asked[-1] if asked else len(text) - sum(map(len, paragraphs(text)[-(rule.question or 1) :]))
    before = text[:at]
    passages = [m.start() for m in _PASSAGE.finditer(before)]
    if passages:
        instructions = before[: passages[0]]
        chunks = [piece for a, b in pairwise([*passages, at]) for piece in windows(text[a:b], spans, rule.chunk_tokens)]
    else:
        found = paragraphs(before)
        instructions = "".join(found[: rule.instructions])
        chunks = together(found[rule.instructions :], rule.chunk_tokens, spans)
    if not chunks:
        raise BadInput(
            f"nothing in this prompt can be reused: between its instructions ({len(instructions)} characters) and its "
            f"question ({len(text) - at}) there is no passage. It begins {text[:60]!r}. Number its passages "
            "(Document 1: ...), put blank lines between them, or say with instructions=0 that it begins with one and "
            "with question=1 how many of its last paragraphs ask")
    return Parts(instructions, tuple(chunks), text[at:])


def paragraphs(text: str) -> list[str]:
    """A text's paragraphs, the blank lines behind each included: together they are the text."""
    edges = [0, *(m.end() for m in _BLANK_LINES.finditer(text)), len(text)]
    return [text[a:b] for a, b in pairwise(edges) if a < b]


def together(pieces: Sequence[str], size: int, spans: Spans) -> list[str]:
    """Neighbouring pieces joined as far as they have at most `size` tokens, each counted alone; longer ones are cut."""
    out: list[str] = []
    used = 0
    for piece in (part for whole in pieces for part in windows(whole, spans, size)):
        count = len(spans(piece))
        if out and used + count <= size:
            out[-1] += piece
            used += count
        else:
            out.append(piece)
            used = count
    return out
