"""Documents from files, folders, JSONL and stdin, and their split into passages of bounded token length."""

from __future__ import annotations

import hashlib
import json
import re
import stat
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cacheclip_jax.errors import BadInput
from cacheclip_jax.model.tokenizer import Tokenizer, nfc
from cacheclip_jax.store import Passage

TEXT_SUFFIXES = {".txt", ".md", ".markdown", ".rst", ".text"}


@dataclass(frozen=True)
class Document:
    """A text to index, and a name for it that answers can point to."""

    text: str
    name: str = ""


def read_documents(sources: Iterable[str]) -> Iterator[Document]:
    """Documents of files, folders (searched for text files), .jsonl files (objects with "text", and optionally "id" or
    "title") and "-" for stdin.

    Raises BadInput naming the file for what is missing, binary, not UTF-8 or not the expected JSON.
    """
    for source in sources:
        path = Path(source)
        mode = _mode(path)
        if source == "-":
            yield Document(_decode(sys.stdin.buffer.read(), "stdin"), "stdin")
        elif stat.S_ISDIR(mode):
            files = sorted(p for p in path.rglob("*") if p.suffix.lower() in TEXT_SUFFIXES | {".jsonl"} and p.is_file()
                           and not any(part.startswith(".") for part in p.relative_to(path).parts))
            if not files:
                raise BadInput(f"{source} holds no text files (looked for {', '.join(sorted(TEXT_SUFFIXES))}, .jsonl)")
            for file in files:
                yield from _read_file(file, str(file.relative_to(path)))
        elif mode:
            yield from _read_file(path, path.name)
        else:
            short = source if len(source) < 200 else f"{source[:200]}..."
            raise BadInput(f"{short!r} doesn't exist: give files, folders, .jsonl files, or - for stdin")


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except (OSError, ValueError):  # not there, or no path at all: a text, which is too long or has a NUL character
        return 0


def _read_file(path: Path, name: str) -> Iterator[Document]:
    try:
        text = _decode(path.read_bytes(), str(path))
    except OSError as e:
        raise BadInput(f"{path} can't be read: {e.strerror}") from None
    if path.suffix.lower() != ".jsonl":
        yield Document(text, name)
        return
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would cut at U+2028 inside a string
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            body = row["text"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise BadInput(f"{path} line {number} isn't a JSON object with a \"text\" field: {line[:80]!r}") from None
        if not isinstance(body, str):
            raise BadInput(f"{path} line {number}: \"text\" must be a string, not {type(body).__name__}")
        id, title = (str("" if row.get(field) is None else row[field]) for field in ("id", "title"))
        text = f"{title}\n{body}" if title else body
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadInput(f"{path} line {number} isn't valid Unicode: it holds half of a surrogate pair") from None
        yield Document(text, id or title or f"{name}:{number}")


def _decode(raw: bytes, where: str) -> str:
    if b"\0" in raw[:65536]:
        raise BadInput(f"{where} is a binary file: convert it to text first")
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as e:
        raise BadInput(f"{where} isn't UTF-8 text (byte {e.start}): convert it first") from None


def split(document: Document, tokenizer: Tokenizer, chunk_tokens: int, overlap: int = 0) -> list[Passage]:
    """Passages of at most `chunk_tokens` tokens that end, where the second half of that length allows it, at the end of
    a paragraph, else of a sentence; each starts `overlap` tokens before the end of the last.

    Spans are character offsets into the NFC-normalised document.
    """
    if chunk_tokens < 16:
        raise BadInput(f"chunk size {chunk_tokens} is too small: 16 tokens or more")
    if not 0 <= overlap <= chunk_tokens // 2:
        raise BadInput(f"overlap {overlap} is out of range: 0 to half the chunk size ({chunk_tokens // 2} tokens)")
    text = nfc(document.text)
    name = document.name or "text-" + hashlib.sha256(text.encode()).hexdigest()[:8]
    spans = tokenizer.encode(text).spans
    passages: list[Passage] = []
    first = 0
    while first < len(spans):
        last = min(first + chunk_tokens, len(spans))  # one past the last token
        if last < len(spans):
            last = _whole_character(spans, _boundary(text, spans, first + chunk_tokens // 2, last), first)
        start, end = spans[first][0], spans[last - 1][1]
        body = text[start:end]
        start, end = start + len(body) - len(body.lstrip()), end - (len(body) - len(body.rstrip()))
        if start < end:
            passages.append(Passage.make(text[start:end], document=name, start=start, end=end))
        if last == len(spans):
            break
        first = max(_whole_character(spans, last - overlap, first), first + 1)
    return passages


def _whole_character(spans: tuple[tuple[int, int], ...], index: int, low: int) -> int:
    """The last token index in (low, index] before which no character is cut: one may take several tokens."""
    return next((i for i in range(index, low + 1, -1) if spans[i][0] >= spans[i - 1][1]), index)


def _boundary(text: str, spans: tuple[tuple[int, int], ...], low: int, high: int) -> int:
    """The token index in (low, high] that ends the last paragraph, else sentence, else line or word; else high."""
    offset, limit = spans[low][0], spans[high - 1][1]
    for pattern in (r"\n\s*\n", r"[.!?][\"')\]]*\s", r"\n", r"\s"):
        ends = [offset + m.end() for m in re.finditer(pattern, text[offset:limit])]
        if ends:
            # The first token that reaches the boundary ends the passage; text after it belongs to the next one.
            return next(i + 1 for i in range(low, high) if spans[i][1] >= ends[-1])
    return high
