"""Builders for the tests of eval/tasks: a tokenizer of words, and small files in every layout."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any


def spans(text: str) -> list[tuple[int, int]]:
    """A word with the space before it, a mark, or a space is a token; digits are tokens of their own."""
    return [m.span() for m in re.finditer(r"\s?\d|\s?[^\W\d]+|\s?[^\w\s]|\s", text)]


def write(path: Path, content: Any) -> Path:
    """A .json or .jsonl file, .gz too."""
    lines = path.name.removesuffix(".gz").endswith(".jsonl")
    text = "".join(json.dumps(row) + "\n" for row in content) if lines else json.dumps(content)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def squad(path: Path, articles: int = 6, paragraphs: int = 3) -> Path:
    """SQuAD layout: every paragraph names its own colour, and has one question about it."""
    data = []
    for a in range(articles):
        rows = []
        for p in range(paragraphs):
            context = (f"The house number {a} on street {p} was painted in colour{a}x{p} by the town. "
                       f"Its garden has {a + 3} trees. Nobody knows why.")
            rows.append({"context": context, "qas": [{
                "id": f"{a}-{p}", "question": f"Which colour has house {a} on street {p}?",
                "answers": [{"text": f"colour{a}x{p}", "answer_start": 0}] * 2}]})
        data.append({"title": f"Article {a}", "paragraphs": rows})
    data[0]["paragraphs"][0]["qas"].append(
        {"id": "no", "question": "What can't be known?", "answers": [], "is_impossible": True})
    return write(path, {"version": "1.1", "data": data})


def hotpot(path: Path, count: int = 12, passages: int = 10) -> Path:
    """HotpotQA layout: passages 3 and 7 are the supporting ones."""
    return write(path, [{
        "id": f"h{i}", "question": f"Where was the maker of thing {i} born?", "answer": f"Town{i}", "type": "bridge",
        "level": "hard", "supporting_facts": [[f"Title {i}-3", 0], [f"Title {i}-7", 0]],
        "context": [[f"Title {i}-{j}", [f"First of {i}-{j}. ", f"It ends with {'Town' if j == 7 else 'Word'}{i}."]]
                    for j in range(passages)]} for i in range(count)])


def ctxs(path: Path, count: int = 30, passages: int = 10, nested: bool = False) -> Path:
    """CacheBlend's layout, and NQ's with 1 passage; the answer of question i stands in passage i % passages."""
    return write(path, [{
        "question": f"what is the {i}th secret ?", "answers": [[f"Answer-{i}."]] if nested else [f"Answer-{i}."],
        "ctxs": [{"title": "" if passages > 1 else f"Page {i}", "text": f"page {i} part {j} says " + (
            f"answer-{i}. and more" if j == i % passages else "little of value to anyone")}
                 for j in range(passages)]} for i in range(count)])


def records(path: Path, count: int = 10, keys: int = 20) -> Path:
    """Key-value retrieval; the right record of row i is the i-th."""
    return write(path, [{"ordered_kv_records": [[f"key-{i}-{k}", f"value-{i}-{k}"] for k in range(keys)],
                         "key": f"key-{i}-{i}", "value": f"value-{i}-{i}"} for i in range(count)])


def essay(path: Path, sentences: int = 60) -> Path:
    """Natural text enough."""
    path.write_text("".join(f"Sentence {i} says that the river is long, and that few people swim there. \n\n"
                            for i in range(sentences)), encoding="utf-8")
    return path
