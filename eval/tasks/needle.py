"""RULER's eight needle tasks (arXiv 2404.06654, section 3): key-value sentences hidden in noise, text or more of them.

Chunks are token windows: the haystack is one text. Prompt, needles, depths and answer prefix are those of
NVIDIA/RULER's niah.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np

from cacheclip_jax.errors import BadInput
from eval.tasks.chunk import Cut, Range, cut_windows, holding
from eval.tasks.fit import largest_fit
from eval.tasks.haystack import NOISE, first_words, natural_words, sentences
from eval.tasks.sample import Order, Sample
from eval.tasks.split import seed_numbers
from eval.tasks.words import Kind, draw

Hay = Literal["noise", "text", "needles"]

MANY = ("Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you "
        "about the {kind} afterwards.\n",
        "What are all the special magic {kind} for {query} mentioned in the provided text?",
        " The special magic {kind} for {query} mentioned in the provided text are")
ONE = ("A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you "
       "about the {kind} afterwards.\n",
       "What is the special magic {kind} for {query} mentioned in the provided text?",
       " The special magic {kind} for {query} mentioned in the provided text is")
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
DEPTHS = tuple(int(d) for d in np.round(np.linspace(0, 100, num=40)))


def make(order: Order, *, haystack: Hay, key_kind: Kind = "words", value_kind: Kind = "numbers", keys: int = 1,
         values: int = 1, queries: int = 1, depth: float | None = None, chunk_tokens: int = 512, cut: Cut = None
         ) -> list[Sample]:
    """Samples whose haystack fills the order's length.

    keys, values, queries: hidden keys, values of each, keys asked for. depth: per cent of the haystack before the first
    needle that is asked for (None: drawn like the others', from RULER's 40 depths). cut: "fact" ends a chunk within
    every needle asked for, "answer" within every value. Text haystacks read `data`.
    """
    keys = max(keys, queries)
    if min(keys, values, queries, chunk_tokens) < 1 or keys * values > len(DEPTHS):
        raise BadInput(f"keys={keys}, values={values}, queries={queries}, chunk_tokens={chunk_tokens}: 1 or more each, "
                       f"and {len(DEPTHS)} needles at most")
    if depth is not None and not 0 <= depth <= 100:
        raise BadInput(f"depth={depth} is out of range: 0 to 100 per cent")
    words = natural_words(order.source) if haystack == "text" else ()
    samples = []
    for number in seed_numbers(order.split, order.seed, order.count):
        build = _builder(order, number, haystack, words, key_kind, value_kind, (keys, values, queries), depth,
                         chunk_tokens, cut)
        low = 1 if haystack == "text" else keys * values
        samples.append(largest_fit(build, lambda s: s.tokens(order.spans), order.limit, low))
    return samples


def _builder(order: Order, number: int, haystack: Hay, words: tuple[str, ...], key_kind: Kind, value_kind: Kind,
             counts: tuple[int, int, int], depth: float | None, chunk_tokens: int, cut: Cut
             ) -> Callable[[int], Sample]:
    """The sample of a seed number with n units of haystack: everything drawn is drawn before n is known."""
    keys, values, queries = counts
    rng = random.Random(f"{order.task}:{number}")
    taken: set[str] = set()
    answers = {draw(rng, key_kind, taken): [draw(rng, value_kind, taken) for _ in range(values)] for _ in range(keys)}
    needles = [(key, NEEDLE.format(kind=value_kind, key=key, value=v)) for key, vs in answers.items() for v in vs]
    rng.shuffle(needles)
    depths: list[float] = [*rng.sample(DEPTHS, len(needles))]
    asked = rng.sample(list(answers), queries)
    if depth is not None:
        depths[next(i for i, (key, _) in enumerate(needles) if key in asked)] = depth
    straw = _Straw(_other_needles(rng, key_kind, value_kind, taken) if haystack == "needles" else None)

    query = asked[0] if queries == 1 else ", ".join(asked[:-1]) + ", and " + asked[-1]
    wanted = tuple(v for key in asked for v in answers[key])
    one = queries * values == 1
    head, question, prefix = (part.format(kind=value_kind[:-1] if one else value_kind, query=query)
                              for part in (ONE if one else MANY))
    asked_needles = [text for key, text in needles if key in asked]

    def build(n: int) -> Sample:
        if haystack == "text":
            units, joint = sentences(first_words(words, n)), " "
            where = [int(len(units) * d / 100) for d in depths]
        else:
            units, joint = straw.first(n), "\n"
            where = random.Random(f"{number}:{n}").sample(range(n), len(needles))
            if depth is not None:
                where = [int(n * d / 100) if d == depth else w for d, w in zip(depths, where, strict=True)]
        text = _insert(units, [text for _, text in needles], where, joint) + "\n"
        facts = [_find(text, needle) for needle in asked_needles]
        values_at = [(b - 1 - len(v), b - 1) for (_, b), v in
                     ((f, text[f[0] : f[1]].rsplit(" ", 1)[1][:-1]) for f in facts)]
        context = cut_windows(text, order.spans, chunk_tokens, cut, facts, values_at)
        return Sample(
            id=f"{order.task}/{order.length}/{number}", task=order.task, instructions=head, context=context,
            question=question, answer_prefix=prefix, references=wanted, metric="string_match_all", max_new_tokens=128,
            meta={"depth": round(100 * facts[0][0] / len(text), 1), "facts": [list(f) for f in facts],
                  "gold": holding(context, facts), "seed": number, "cut": cut, "length": order.length})

    return build


class _Straw:
    """The first n units of a haystack that is drawn as far as it is asked for."""

    def __init__(self, more: Iterator[str] | None):
        self._more, self._units = more, []  # type: ignore[var-annotated]

    def first(self, n: int) -> list[str]:
        if self._more is None:
            return [NOISE] * n
        while len(self._units) < n:
            self._units.append(next(self._more))
        return self._units[:n]


def _other_needles(rng: random.Random, key_kind: Kind, value_kind: Kind, taken: set[str]) -> Iterator[str]:
    while True:
        yield NEEDLE.format(kind=value_kind, key=draw(rng, key_kind, taken), value=draw(rng, value_kind, taken))


def _insert(units: list[str], needles: list[str], where: list[int], joint: str) -> str:
    """The units with each needle before the unit at its index."""
    out: list[str] = []
    last = 0
    for index, needle in sorted(zip(where, needles, strict=True), key=lambda pair: pair[0]):
        out += [*units[last:index], needle]
        last = index
    return joint.join([*out, *units[last:]])


def _find(text: str, fact: str) -> Range:
    start = text.index(fact)
    return start, start + len(fact)
