"""Questions over passages: RULER's qa_1 and qa_2, and MuSiQue, 2WikiMQA, HotpotQA, NQ and SQuAD from local files.

Chunks are passages, one each; `cut="fact"` makes two of every gold passage, `cut="answer"` cuts it where its first
answer stands. RULER numbers its documents, so a document's text depends on its place; the other sets
leave the number out, as retrieval does, and ask in LongBench's words.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from cacheclip_jax.errors import BadInput
from eval.tasks.chunk import Cut, Range, cut_chunks, holding
from eval.tasks.fit import largest_fit
from eval.tasks.layouts import Question
from eval.tasks.sample import Order, Sample
from eval.tasks.split import choose

Reader = Callable[[Path], list[Question]]


@dataclass(frozen=True)
class Style:
    """The words around passages and question, and how answers are scored."""

    head: str
    passage: str
    question: str
    prefix: str
    metric: str
    max_new_tokens: int = 32


_ASK = "Answer the question based on the given {}. Only give me the answer and do not output any other words."
RULER = Style(f"{_ASK.format('documents')}\n\nThe following are given documents.\n\n", "Document {i}:\n{text}\n\n",
              f"{_ASK.format('documents')}\n\nQuestion: {{query}}", " Answer:", "string_match_part")
PLAIN = Style(f"{_ASK.format('passages')}\n\nThe following are given passages.\n\n", "{text}\n\n",
              f"{_ASK.format('passages')}\n\nQuestion: {{query}}\nAnswer:", "", "f1")


def make_ruler(order: Order, reader: Reader, *, cut: Cut = None) -> list[Sample]:
    """As many documents as the order's length holds: the question's own, its article's others, then any, shuffled.

    Where RULER needs more documents than there are it repeats them, and so does this. Below ten documents RULER fails;
    here a question keeps its gold documents first (deviation, for short lengths).
    """
    questions = reader(order.source)
    pool = tuple(sorted({p for q in questions for p in (*q.passages, *q.beside)}))

    def build(q: Question, n: int) -> Sample:
        rng = random.Random(f"{order.task}:{order.seed}:{q.text}")
        ranked = [(rng.random(), text) for text in islice(_by_need(q, pool, rng), n)]
        return _sample(order, q, [text for _, text in sorted(ranked)], RULER, cut, {})

    return [largest_fit(partial(build, q), lambda s: s.tokens(order.spans), order.limit, max(1, len(q.gold)))
            for q in choose(questions, lambda q: q.text, order.split, order.seed, order.count)]


def _by_need(q: Question, pool: Sequence[str], rng: random.Random) -> Iterator[str]:
    gold = [q.passages[i] for i in q.gold]
    own = [*gold, *(p for p in q.passages if p not in gold), *rng.sample(q.beside, len(q.beside))]
    others = [p for p in pool if p not in set(own)]
    yield from own
    yield from rng.sample(others, len(others))
    while True:
        yield from pool


def make_given(order: Order, reader: Reader, *, passages: int | None = None, cut: Cut = None
               ) -> list[Sample]:
    """The file's passages in the file's order; `passages`, and a length if there is one, keep the first of them,
    counting those with the answer first.
    """
    if passages is not None and passages < 1:
        raise BadInput(f"passages={passages} is out of range: 1 or more")

    def build(q: Question, n: int) -> Sample:
        ranked = [*q.gold, *(i for i in range(len(q.passages)) if i not in q.gold)]
        return _sample(order, q, [q.passages[i] for i in sorted(ranked[:n])], PLAIN, cut, {})

    return [_fitted(order, partial(build, q), 1, min(passages or len(q.passages), len(q.passages)))
            for q in choose(reader(order.source), lambda q: q.text, order.split, order.seed, order.count)]


def make_open(order: Order, reader: Reader, *, distractors: int | None = None, position: str | float = "random",
              cut: Cut = None) -> list[Sample]:
    """The question's passage among other questions' passages, `distractors` of them, or as many as the length holds.

    position: of the right passage, "first", "middle", "last", "random", or 0 to 1 from front to back. A distractor
    never contains an answer. With neither a length nor a number there are 11, with both the length is a limit.
    """
    places = {"first": 0.0, "middle": 0.5, "last": 1.0}
    if not (position == "random" or position in places or (isinstance(position, int | float) and 0 <= position <= 1)):
        raise BadInput(f"position={position!r}: choose first, middle, last, random or a number from 0 to 1")
    if distractors is None and order.length is None:
        distractors = 11
    questions = reader(order.source)
    pool = tuple(sorted({p for q in questions for p in q.passages}))
    if distractors is not None and not 0 <= distractors < len(pool):
        raise BadInput(f"distractors={distractors} is out of range: the data has {len(pool) - 1} other passages")

    def builder(q: Question) -> Callable[[int], Sample]:
        rng = random.Random(f"{order.task}:{order.seed}:{q.text}")
        place = rng.random() if position == "random" else places.get(str(position), position)
        answers = [a.lower() for a in q.answers]
        shuffled = rng.sample(pool, len(pool))
        usable = [p for p in (shuffled if distractors is None else shuffled[: 4 * distractors + 64])
                  if p != q.passages[0] and not any(a in p.lower() for a in answers)]

        def build(n: int) -> Sample:
            texts = usable[: n - 1]
            at = min(int(float(place) * (len(texts) + 1)), len(texts))
            return _sample(order, q, [*texts[:at], q.passages[0], *texts[at:]], PLAIN, cut,
                           {"position": position})

        return build

    return [_fitted(order, builder(q), 1, len(pool) if distractors is None else distractors + 1)
            for q in choose(questions, lambda q: q.text, order.split, order.seed, order.count)]


def _fitted(order: Order, build: Callable[[int], Sample], low: int, high: int) -> Sample:
    if order.length is None:
        return build(high)
    return largest_fit(build, lambda s: s.tokens(order.spans), order.limit, low, high)


def _sample(order: Order, q: Question, texts: list[str], style: Style, cut: Cut, meta: dict[str, Any]) -> Sample:
    gold_texts = {q.passages[i] for i in q.gold}
    whole = [style.passage.replace("{i}", str(i + 1)).replace("{text}", text) for i, text in enumerate(texts)]
    starts = [0, *accumulate(map(len, whole))]
    facts = [(starts[i], starts[i + 1]) for i, text in enumerate(texts) if text in gold_texts]
    context = cut_chunks(whole, order.spans, cut, facts, _answers("".join(whole), facts, q.answers))
    return Sample(
        id=f"{order.task}/{order.length}/{question_id(q.text + q.passages[0] + q.meta.get('source', ''))}",
        task=order.task, instructions=style.head, context=context, question=style.question.replace("{query}", q.text),
        answer_prefix=style.prefix, references=q.answers, metric=style.metric, max_new_tokens=style.max_new_tokens,
        meta={**q.meta, **meta, "gold": holding(context, facts), "facts": [list(f) for f in facts], "cut": cut,
              "length": order.length, "depth": round(100 * facts[0][0] / starts[-1], 1) if facts else None})


def _answers(text: str, facts: Sequence[Range], answers: Sequence[str]) -> list[Range]:
    """Where a fact first names an answer of two characters or more, case aside; facts that don't are left out."""
    pattern = "|".join(re.escape(a) for a in answers if len(a) > 1)
    found = (re.compile(pattern, re.IGNORECASE).search(text, start, end) for start, end in facts) if pattern else ()
    return [m.span() for m in found if m]


def question_id(text: str) -> str:
    """A short hash that names a question whatever file it is in."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]
