"""RULER's aggregation tasks: the ten common words of a numbered list (cwe), the three frequent coded words (fwe).

Chunks are token windows. Texts as in NVIDIA/RULER's common_words_extraction.py and freq_words_extraction.py. cwe's
solved example belongs to the instructions and is the same for all samples of a seed.
"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from functools import partial

from cacheclip_jax.errors import BadInput
from eval.tasks.chunk import windows
from eval.tasks.fit import largest_fit
from eval.tasks.sample import Order, Sample
from eval.tasks.split import seed_numbers
from eval.tasks.words import word_list

CWE = ("Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
       "appear most often.\n",
       "Question: What are the {n} most common words in the above list?",
       " Answer: The top {n} words that appear most often in the list are:")
FWE = ("Read the following coded text and track the frequency of each coded word. Find the three most frequently "
       "appeared coded words. ",
       "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
       "appeared words in the above coded text?",
       " Answer: According to the coded text above, the three most frequently appeared words are:")
SHORT = 4096  # below this length RULER repeats cwe's words less often


def make_cwe(order: Order, *, common: int = 10, common_repeats: int | None = None,
             uncommon_repeats: int | None = None, chunk_tokens: int = 512) -> list[Sample]:
    """Samples with as many uncommon words as the length holds.

    Repeats default to RULER's: 30 and 3, below 4,096 tokens 6 and 1. Words are wonderwords' (about 8,200); RULER turns
    to another list where they run out, at about 150k tokens, which is refused here.
    """
    words = word_list("noun", "adjective", "verb")
    short = order.limit + order.template_tokens < SHORT
    often = common_repeats or (6 if short else 30)
    rarely = uncommon_repeats or (1 if short else 3)
    if common < 1 or rarely >= often:
        raise BadInput(f"common={common}, repeats of {often} and {rarely}: common words must be there and repeat more")
    head, question, prefix = (part.format(n=common) for part in CWE)
    numbers = seed_numbers(order.split, order.seed, order.count)
    rng = random.Random(f"{order.task}:{numbers.start}:example")
    shown = rng.sample(words, 20 if short else 40)
    listed = _numbered(rng, shown[:common], shown[common:], *((3, 1) if short else (10, 3)))
    answer = " ".join(f"{i + 1}. {word}" for i, word in enumerate(shown[:common]))
    example = f"{head}{listed}\n{question}{prefix} {answer}\n"

    def build(number: int, order_of_words: Sequence[str], n: int) -> Sample:
        chosen = order_of_words[:n]
        text = _numbered(random.Random(f"{number}:{n}"), chosen[:common], chosen[common:], often, rarely) + "\n"
        return Sample(
            id=f"{order.task}/{order.length}/{number}", task=order.task, instructions=example + head,
            context=windows(text, order.spans, chunk_tokens), question=question, answer_prefix=prefix,
            references=tuple(chosen[:common]), metric="string_match_all", max_new_tokens=120,
            meta={"seed": number, "words": n, "length": order.length})

    samples = []
    for number in numbers:
        shuffled = random.Random(f"{order.task}:{number}").sample(words, len(words))
        sample = largest_fit(partial(build, number, shuffled), lambda s: s.tokens(order.spans),
                             order.limit, low=common + 1, high=len(words))
        if sample.meta["words"] == len(words):
            raise BadInput(f"length={order.length} takes more than the {len(words)} words there are: cwe ends at about "
                           f"{sample.tokens(order.spans)} tokens")
        samples.append(sample)
    return samples


def _numbered(rng: random.Random, common: Sequence[str], uncommon: Sequence[str], often: int, rarely: int) -> str:
    listed = [*common] * often + [*uncommon] * rarely
    rng.shuffle(listed)
    return " ".join(f"{i + 1}. {word}" for i, word in enumerate(listed))


def make_fwe(order: Order, *, alpha: float = 2.0, letters: int = 6, vocabulary: int | None = None,
             chunk_tokens: int = 512) -> list[Sample]:
    """Samples of coded words whose k-th most frequent appears in proportion to k**-alpha; the first is dots, noise.

    vocabulary defaults to RULER's, a fiftieth of the prompt's tokens.
    """
    from scipy.special import zeta

    if alpha <= 1:
        raise BadInput(f"alpha={alpha} is out of range: above 1")
    head, question, prefix = FWE
    answer_tokens = 50
    size = vocabulary or max(4, (order.limit - answer_tokens) // 50)
    weights = [k**-alpha / float(zeta(alpha)) for k in range(1, size + 1)]

    def build(number: int, vocab: Sequence[str], n: int) -> Sample:
        text = [word for word, weight in zip(vocab, weights, strict=True) for _ in range(int(n * weight))]
        random.Random(f"{number}:{n}").shuffle(text)
        return Sample(
            id=f"{order.task}/{order.length}/{number}", task=order.task, instructions=head,
            context=windows(" ".join(text) + "\n", order.spans, chunk_tokens), question=question, answer_prefix=prefix,
            references=tuple(vocab[1:4]), metric="string_match_all", max_new_tokens=answer_tokens,
            meta={"seed": number, "words": len(text), "length": order.length})

    samples = []
    for number in seed_numbers(order.split, order.seed, order.count):
        rng = random.Random(f"{order.task}:{number}")
        coded: dict[str, None] = {"...": None}
        while len(coded) < size:
            coded["".join(rng.choices(string.ascii_lowercase, k=letters))] = None
        enough = int(2 / (weights[3] - weights[4])) if size > 4 else int(2 / weights[3])  # so that the top 3 stand out
        samples.append(largest_fit(partial(build, number, tuple(coded)),
                                   lambda s: s.tokens(order.spans), order.limit, low=enough))
    return samples
