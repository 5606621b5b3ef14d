"""RULER's variable tracking (vt): a chain of assignments in noise, behind one solved example.

Chunks are token windows. Text as in NVIDIA/RULER's variable_tracking.py: VAR names of 5 letters (3 in the example), a
trailing space after every "VAR X = VAR Y", an example of at most 500 tokens. The example belongs to the instructions
and is the same for all samples of a seed, so that the shared prefix is; RULER renames its variables every time.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from itertools import pairwise

from cacheclip_jax.errors import BadInput
from eval.tasks.chunk import Cut, cut_windows, holding
from eval.tasks.fit import largest_fit
from eval.tasks.haystack import NOISE
from eval.tasks.sample import Order, Sample
from eval.tasks.split import seed_numbers

HEAD = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
QUESTION = "Question: Find all variables that are assigned the value {value} in the text above."
PREFIX = (" Answer: According to the chain(s) of variable assignment in the text above, {n} variables are assigned "
          "the value {value}, they are: ")
EXAMPLE_TOKENS = 500


def make(order: Order, *, chains: int = 1, hops: int = 4, chunk_tokens: int = 512, cut: Cut = None) -> list[Sample]:
    """Samples whose noise fills the order's length. cut: "fact" ends a chunk within every assignment of the chain asked
    for, "answer" within every variable's first name.
    """
    if chains < 1 or hops < 1:
        raise BadInput(f"chains={chains}, hops={hops}: 1 or more each")
    numbers = seed_numbers(order.split, order.seed, order.count)
    example = _example(order, numbers.start, chains, hops)
    return [largest_fit(_builder(order, number, example, chains, hops, chunk_tokens, cut),
                        lambda s: s.tokens(order.spans), order.limit, low=hops + 1) for number in numbers]


def _example(order: Order, number: int, chains: int, hops: int) -> str:
    """The solved example, its answer included."""
    rng = random.Random(f"{order.task}:{number}:example")
    names, assignments, value = _chains(rng, chains, min(10, hops), letters=3)
    n = len(names[0])

    def build(noise: int) -> str:
        text = _context(random.Random(f"{number}:{noise}:example"), assignments, noise)
        return HEAD + text + "\n" + QUESTION.format(value=value) + PREFIX.format(value=value, n=n)

    low = min(10, hops) + 1
    limit = max(EXAMPLE_TOKENS, len(order.spans(build(low))))  # the shortest one, where tokens are near to letters
    prompt = largest_fit(build, lambda text: len(order.spans(text)), limit, low)
    return f"{prompt} {' '.join(names[0])}\n\n"


def _builder(order: Order, number: int, example: str, chains: int, hops: int, chunk_tokens: int, cut: Cut
             ) -> Callable[[int], Sample]:
    rng = random.Random(f"{order.task}:{number}")
    names, assignments, value = _chains(rng, chains, hops, letters=5)

    def build(noise: int) -> Sample:
        text = _context(random.Random(f"{number}:{noise}"), assignments, noise) + "\n"
        facts = []
        for line in assignments[0]:
            start = text.index(line.strip())
            facts.append((start, start + len(line.strip())))
        answers = [(a + len("VAR "), a + len("VAR ") + len(name))
                   for (a, _), name in zip(facts, names[0], strict=True)]
        context = cut_windows(text, order.spans, chunk_tokens, cut, facts, answers)
        return Sample(
            id=f"{order.task}/{order.length}/{number}", task=order.task, instructions=example + HEAD, context=context,
            question=QUESTION.format(value=value), answer_prefix=PREFIX.format(value=value, n=hops + 1),
            references=tuple(names[0]), metric="string_match_all", max_new_tokens=30,
            meta={"depth": round(100 * facts[0][0] / len(text), 1), "facts": [list(f) for f in facts],
                  "gold": holding(context, facts), "seed": number, "cut": cut, "length": order.length})

    return build


def _chains(rng: random.Random, chains: int, hops: int, letters: int) -> tuple[list[list[str]], list[list[str]], str]:
    """Names and assignments of every chain, and the first chain's value."""
    taken, names, lines, values = {"VAR"}, [], [], []
    for _ in range(chains):
        chain: list[str] = []
        while len(chain) <= hops:
            name = "".join(rng.choices(string.ascii_uppercase, k=letters))
            if name not in taken:
                taken.add(name)
                chain.append(name)
        while (value := str(rng.randrange(10000, 99999))) in values:
            pass
        values.append(value)
        names.append(chain)
        lines.append([f"VAR {chain[0]} = {value}", *(f"VAR {b} = VAR {a} " for a, b in pairwise(chain))])
    return names, lines, values[0]


def _context(rng: random.Random, chains: list[list[str]], noise: int) -> str:
    sentences = [NOISE] * noise
    for chain in chains:
        for shift, (index, line) in enumerate(zip(sorted(rng.sample(range(len(sentences)), len(chain))), chain,
                                                  strict=True)):
            sentences.insert(index + shift, line)
    return "\n".join(sentences)
