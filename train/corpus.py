"""Examples from a user's own documents: questions that the text itself poses, or the user's own questions."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cacheclip_jax.documents import read_documents, split
from cacheclip_jax.errors import BadInput
from cacheclip_jax.model.tokenizer import Tokenizer, nfc
from cacheclip_jax.prompt import PromptFormat
from cacheclip_jax.retrieve import Retriever
from cacheclip_jax.store import Passage
from eval.tasks.layouts import rows
from eval.tasks.split import half
from train.example import Example, Part

ROOM = 32  # tokens of a prompt's length that stay free for the answer
CLOZE = "Which words are missing in this sentence of the passages?\n{sentence}"
LOOKUP = "What do the passages say for \"{key}\"?"
_PAIR = re.compile(r"^[\s*#|-]*([^\n:=|]{3,60}?)\s*[:=|]\s+(\S[^\n]{0,200})$", re.MULTILINE)
_SENTENCE = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class Corpus:
    """A user's documents and how examples are made of them.

    sources: files, folders or .jsonl files, as `cacheclip index` takes them. questions: a .jsonl file of
    {"question": ...}, none if empty. chunk_tokens: longest passage. length: tokens of a prompt at most. per_passage:
    cloze and lookup questions of each passage at most. The text around passages and questions is `format`, the same
    that the deployed system uses.
    """

    sources: tuple[str, ...] = ()
    questions: str = ""
    chunk_tokens: int = 256
    length: int = 4096
    per_passage: int = 2
    seed: int = 0
    format: PromptFormat = field(default_factory=PromptFormat)


def corpus_examples(corpus: Corpus, tokenizer: Tokenizer) -> list[Example]:
    """Examples over a corpus; a hash of each passage, or of a user's question, says if it is trained on or held out.

    A question stands among the passages that BM25 finds for it, its own included, in random order. Held-out questions
    are about other passages than those trained on. Raises BadInput when the documents pose no question.
    """
    documents = read_documents(corpus.sources)
    passages = [p for document in documents for p in split(document, tokenizer, corpus.chunk_tokens)]
    if not passages:
        raise BadInput(f"{', '.join(corpus.sources)}: every document is empty")
    pool, out = Retriever(passages), []
    for own, task, question in _questions(corpus, passages):
        part: Part = "train" if half(own.text if own else question) == "tune" else "holdout"
        rng = random.Random(f"{corpus.seed}:{question}")
        chunks = _company(corpus, pool, own, question, tokenizer, rng)
        name = f"{task}/{own.id if own else 'corpus'}/{rng.getrandbits(48):012x}"
        out.append(Example(name, task, part, corpus.format.instructions, chunks, question,
                           frame=corpus.format.question, system=corpus.format.system))
    if not out:
        raise BadInput(f"{', '.join(corpus.sources)}: no sentence or \"key: value\" line to ask about was found; "
                       "give questions of your own (a .jsonl file)")
    return out


def _questions(corpus: Corpus, passages: Sequence[Passage]) -> Iterator[tuple[Passage | None, str, str]]:
    """(its passage, task, question) of every question."""
    if corpus.questions:
        for row in rows(Path(corpus.questions)):
            if not isinstance(row, dict) or not str(row.get("question", "")).strip():
                raise BadInput(f"{corpus.questions}: {str(row)[:80]} has no \"question\"")
            yield None, "questions", nfc(str(row["question"])).strip()
    makers: tuple[tuple[str, Callable], ...] = (("cloze", _cloze), ("lookup", _lookup))
    for passage in passages:
        rng = random.Random(f"{corpus.seed}:{passage.id}")
        for task, maker in makers:
            found = maker(passage.text, rng)
            chosen = rng.sample(found, min(corpus.per_passage, len(found)))
            yield from ((passage, task, question) for question in chosen)


def _cloze(text: str, rng: random.Random) -> list[str]:
    """Sentences with their longest word, or a number, left out."""
    out = []
    for sentence in _SENTENCE.split(text):
        words = re.findall(r"\w+", sentence)
        if not 8 <= len(words) <= 60:
            continue
        numbers = [w for w in words if w[0].isdigit()]
        hidden = rng.choice(numbers) if numbers else max(words, key=len)
        blank = re.sub(rf"\b{re.escape(hidden)}\b", "____", " ".join(sentence.split()))
        out.append(CLOZE.format(sentence=blank))
    return out


def _lookup(text: str, rng: random.Random) -> list[str]:
    """Questions for the values of lines "key: value", "key = value" and two-column tables."""
    del rng
    return [LOOKUP.format(key=match[1].strip(" *`|")) for match in _PAIR.finditer(text) if match[1].strip(" *`|")]


def _company(corpus: Corpus, pool: Retriever, own: Passage | None, question: str, tokenizer: Tokenizer,
             rng: random.Random) -> tuple[str, ...]:
    """The chunks of a prompt: BM25's best passages, as many as the length holds, the question's own among them."""
    best = pool.top(question, max(2, corpus.length // 32))[::-1]
    ranked = best if own is None else [own, *(p for p in best if p.id != own.id)]
    frame = corpus.format.prefix_ids(tokenizer) + corpus.format.question_ids(tokenizer, question)
    room = corpus.length - len(frame) - ROOM
    kept: list[str] = []
    for passage in ranked:
        text = corpus.format.chunk_text(passage)
        room -= len(tokenizer.encode(text).ids)
        if room < 0 and kept:
            break
        kept.append(text)
    rng.shuffle(kept)
    return tuple(kept)
