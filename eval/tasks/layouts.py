"""Layouts of question-answering files: SQuAD, HotpotQA, CacheBlend's and lost-in-the-middle's, key-value records."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cacheclip_jax.errors import BadInput
from eval.tasks.sample import nfc


@dataclass(frozen=True)
class Question:
    """A question with its passages in the file's order; `gold` indexes those that answer it.

    `beside` are passages of the same article or source, which RULER takes as the first distractors.
    """

    text: str
    answers: tuple[str, ...]
    passages: tuple[str, ...]
    gold: tuple[int, ...]
    beside: tuple[str, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)


def rows(path: Path) -> list[Any]:
    """The objects of a .json list, or of a .jsonl file, either one possibly .gz; a .json object is one row.

    Raises BadInput naming the file for what is missing or isn't JSON.
    """
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
        if path.name.removesuffix(".gz").endswith(".jsonl"):
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        content = json.loads(text)
    except OSError as e:
        raise BadInput(f"{path} can't be read: {e.strerror or e}") from None
    except ValueError as e:
        raise BadInput(f"{path} isn't JSON: {e}") from None
    return content if isinstance(content, list) else [content]


def read_squad(path: Path) -> list[Question]:
    """SQuAD v1.1 or v2 layout: {"data": [{"paragraphs": [{"context", "qas": [...]}]}]}, unanswerable questions out."""
    out = []
    with _naming(path, "SQuAD"):
        for article in rows(path)[0]["data"]:
            contexts = [nfc(p["context"]) for p in article["paragraphs"]]
            for i, paragraph in enumerate(article["paragraphs"]):
                beside = tuple(dict.fromkeys(c for c in contexts if c != contexts[i]))
                for qa in paragraph["qas"]:
                    if not qa.get("is_impossible", False):
                        out.append(Question(nfc(qa["question"]).strip(), _distinct(a["text"] for a in qa["answers"]),
                                            (contexts[i],), (0,), beside, {"source": str(qa.get("id", ""))}))
    return out


def read_hotpot(path: Path) -> list[Question]:
    """HotpotQA's distractor layout: question, answer, supporting_facts, context [[title, [sentences]]]."""
    out = []
    with _naming(path, "HotpotQA"):
        for row in rows(path):
            titles = {title for title, _ in row.get("supporting_facts", ())}
            passages = tuple(nfc(f"{title}\n{''.join(sentences)}") for title, sentences in row["context"])
            gold = tuple(i for i, (title, _) in enumerate(row["context"]) if title in titles)
            meta = {"source": str(row.get("id", row.get("_id", ""))), "type": row.get("type", ""),
                    "level": row.get("level", "")}
            out.append(Question(nfc(row["question"]).strip(), _distinct([row["answer"]]), passages, gold, (), meta))
    return out


def read_ctxs(path: Path) -> list[Question]:
    """CacheBlend's and lost-in-the-middle's layout: question, answers ([str] or [[str]]), ctxs [{title, text}].

    Gold are the passages that contain an answer, or for one passage that one.
    """
    out = []
    with _naming(path, "ctxs"):
        for row in rows(path):
            answers = _distinct(a for item in row["answers"] for a in ([item] if isinstance(item, str) else item))
            passages = tuple(nfc(f"{c['title']}\n{c['text']}" if c.get("title") else c["text"]) for c in row["ctxs"])
            holds = [i for i, p in enumerate(passages) if any(a.lower() in p.lower() for a in answers)]
            gold = (0,) if len(passages) == 1 else tuple(holds)
            out.append(Question(nfc(row["question"]).strip(), answers, passages, gold))
    return out


def read_records(path: Path) -> list[tuple[tuple[tuple[str, str], ...], str, str]]:
    """Key-value retrieval: (records, key, value) of rows with ordered_kv_records, key and value."""
    with _naming(path, "key-value retrieval"):
        return [(tuple((str(k), str(v)) for k, v in row["ordered_kv_records"]), row["key"], row["value"])
                for row in rows(path)]
    raise AssertionError


def texts(path: Path) -> list[str]:
    """The distinct passages of a file in any of these layouts, or the "text" of its objects, in the file's order."""
    first = next(iter(rows(path)), None)
    if not isinstance(first, dict):
        raise BadInput(f"{path} holds no JSON objects")
    if "data" in first:
        return list(dict.fromkeys(p for q in read_squad(path) for p in q.passages))
    if "supporting_facts" in first:
        return list(dict.fromkeys(p for q in read_hotpot(path) for p in q.passages))
    if "ctxs" in first:
        return list(dict.fromkeys(p for q in read_ctxs(path) for p in q.passages))
    if "text" in first:
        return [nfc(str(row["text"])) for row in rows(path)]
    raise BadInput(f"{path} has none of the known layouts: its objects have {', '.join(sorted(first))}")


class _naming:
    """Turns a missing field into BadInput that names the file and the layout."""

    def __init__(self, path: Path, layout: str):
        self.path, self.layout = path, layout

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, KeyError | TypeError | IndexError | ValueError) and not isinstance(error, BadInput):
            raise BadInput(f"{self.path} isn't in {self.layout} layout: {error!r}") from None


def _distinct(answers: Iterator[str] | list[str] | Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(nfc(str(a)) for a in answers))
