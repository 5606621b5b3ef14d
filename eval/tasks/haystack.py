"""Haystacks: natural text from any file, cut to words and sentences, and RULER's sentence of noise."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from cacheclip_jax.errors import BadInput
from eval.tasks import layouts
from eval.tasks.sample import nfc

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@cache
def natural_words(path: Path) -> tuple[str, ...]:
    """The words of a file or folder: plain text, RULER's {"text": ...} JSON, or the passages of any layout in
    `layouts`. Raises BadInput for an empty file.
    """
    if path.is_file() and path.name.removesuffix(".gz").endswith((".json", ".jsonl")):
        text = "\n".join(layouts.texts(path))
    else:
        from cacheclip_jax.documents import read_documents  # on use: it brings transformers, which takes seconds

        text = "\n".join(document.text for document in read_documents([str(path)]))
    words = tuple(nfc(text).split())
    if not words:
        raise BadInput(f"{path} holds no words to hide needles in")
    return words


def first_words(words: tuple[str, ...], n: int) -> str:
    """The first n words as one line, from the start again where the text is too short."""
    repeats = -(-n // len(words))
    return " ".join((words * repeats)[:n] if repeats > 1 else words[:n])


def sentences(text: str) -> list[str]:
    """The text cut at white space after a full stop, question or exclamation mark (and closing quotes).

    RULER takes nltk's punkt model, which also knows abbreviations; here they end a sentence.
    """
    return [s for s in re.split(r"(?<=[.!?])\s+|(?<=[.!?][\"')\]])\s+", text.strip()) if s]
