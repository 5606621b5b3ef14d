"""Key-value retrieval (Liu et al., "Lost in the Middle", arXiv 2307.03172, section 3): one value of a JSON object.

Chunks are windows of whole records.
"""

from __future__ import annotations

import random

from cacheclip_jax.errors import BadInput
from eval.tasks.chunk import Cut, cut_chunks, holding
from eval.tasks.fit import largest_fit
from eval.tasks.layouts import read_records
from eval.tasks.reading import question_id
from eval.tasks.sample import Order, Sample
from eval.tasks.split import choose

HEAD = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
QUESTION = 'Key: "{key}"\nCorresponding value:'


def make(order: Order, *, records: int | None = None, position: float | None = None, window: int = 8,
         cut: Cut = None) -> list[Sample]:
    """A file's rows, each a JSON object of `records` records (None: all), the right one among them; a length keeps as
    many as fit.

    position: of the right record, 0 to 1 (None: as in the file, if all are kept, else drawn). window: records a chunk.
    cut: "fact" ends a chunk within the right record, "answer" within its value.
    """
    if window < 1 or (records is not None and records < 1):
        raise BadInput(f"window={window}, records={records}: 1 or more each")
    if position is not None and not 0 <= position <= 1:
        raise BadInput(f"position={position} is out of range: 0 to 1")
    rows = read_records(order.source)
    samples = []
    for pairs, key, value in choose(rows, lambda row: row[1], order.split, order.seed, order.count):
        others = [pair for pair in pairs if pair[0] != key]
        place = random.Random(f"{order.task}:{order.seed}:{key}").random() if position is None else position
        where = next(i for i, pair in enumerate(pairs) if pair[0] == key)

        def build(n: int, pairs=pairs, key=key, value=value, others=others, place=place, where=where) -> Sample:
            at = where if n == len(pairs) and position is None else min(int(place * n), n - 1)
            kept = [*others[:at], (key, value), *others[at : n - 1]]
            lines = [f"{' ' if i else '{'}\"{k}\": \"{v}\"{',' if i < n - 1 else '}'}\n" for i, (k, v)
                     in enumerate(kept)]
            context = ["".join(lines[i : i + window]) for i in range(0, n, window)]
            context[-1] += "\n"
            start = sum(map(len, lines[:at]))
            fact = (start, start + len(lines[at]))
            found = "".join(context).index(value, start + lines[at].index('": "'))
            chunks = cut_chunks(context, order.spans, cut, [fact], [(found, found + len(value))])
            return Sample(
                id=f"{order.task}/{order.length}/{question_id(key)}", task=order.task, instructions=HEAD,
                context=chunks, question=QUESTION.format(key=key), answer_prefix="", references=(value,),
                metric="string_match_all", max_new_tokens=100,
                meta={"gold": holding(chunks, [fact]), "facts": [list(fact)], "records": n, "cut": cut,
                      "depth": round(100 * start / sum(map(len, context)), 1), "length": order.length})

        high = min(records or len(pairs), len(pairs))
        samples.append(build(high) if order.length is None else
                       largest_fit(build, lambda s: s.tokens(order.spans), order.limit, 1, high))
    return samples
