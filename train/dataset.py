"""What training reads: prompts of the aux model with the teacher's scores on its own tokens, shuffled and batched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from flax import struct
from jaxtyping import Float

from cacheclip_jax.errors import BadInput
from cacheclip_jax.model.tokenizer import Tokenizer
from cacheclip_jax.prompt import Prompt
from cacheclip_jax.score import map_scores
from train.example import Example, Part
from train.packed import Packed, pack, stack
from train.teach import Target
from train.verdicts import Kept, key_of


@dataclass(frozen=True)
class Sizes:
    """The few sizes of everything: slots of a prompt (its length in tokens, answer included, is rounded up to one of
    `lengths`), rows of question and answer, and how many of them are the answer's."""

    lengths: tuple[int, ...]
    rows: int
    answer: int

    def slots(self, *prompts: Prompt) -> int | None:
        """The smallest size that holds each of the prompts; None where none does."""
        longest = max(len(p.ids) for p in prompts) + self.answer
        if max(len(p.question) for p in prompts) + self.answer > self.rows:
            return None
        return min((n for n in self.lengths if n >= longest), default=None)


@dataclass(frozen=True)
class Asked:
    """An example as both models read it, and the slots that it is packed in."""

    example: Example
    primary: Prompt
    aux: Prompt
    slots: int


@dataclass(frozen=True)
class Lesson:
    """An example with the teacher's score of each of the aux model's context tokens."""

    task: str
    part: Part
    prompt: Prompt
    slots: int
    target: Float[np.ndarray, "C"]


@struct.dataclass
class Batch:
    """Packed prompts, and the teacher's scores on their slots."""

    packed: Packed
    target: Float[Any, "B S"]


def read_prompts(examples: Sequence[Example], primary: Tokenizer, aux: Tokenizer, sizes: Sizes) -> list[Asked]:
    """The examples that fit the sizes, as both models read them. Raises BadInput when none does."""
    out = []
    for example in examples:
        both = example.prompt(primary), example.prompt(aux)
        if (slots := sizes.slots(*both)) is not None:
            out.append(Asked(example, *both, slots))
    if not out:
        raise BadInput(f"none of {len(examples)} examples fits {max(sizes.lengths)} tokens, {sizes.rows} for question "
                       "and answer: raise --config.lengths or --config.question_tokens")
    return out


def lessons(asked: Sequence[Asked], verdicts: Mapping[str, Kept], target: Target, min_kl: float = 0.0) -> list[Lesson]:
    """What there is to learn. Left out are prompts that reuse answers as full prefill does, up to `min_kl` nats, and
    those in which the teacher finds nothing."""
    out = []
    for each in asked:
        kept = verdicts[key_of(each.primary)]
        if kept.kl < min_kl or not (scores := kept.of(target)).any():
            continue
        out.append(Lesson(each.example.task, each.example.part, each.aux, each.slots, mapped(scores, each)))
    return out


def mapped(scores: Float[np.ndarray, "P"], asked: Asked) -> Float[np.ndarray, "C"]:
    """Scores of the primary's context tokens on the aux model's."""
    edges = np.cumsum(asked.primary.chunk_lengths)[:-1]
    return np.concatenate([map_scores(part, mine.spans, theirs.spans) for part, mine, theirs
                           in zip(np.split(scores, edges), asked.primary.chunks, asked.aux.chunks, strict=True)])


def batch_of(chosen: Sequence[Lesson], rows: int) -> Batch:
    """Lessons of one size as arrays."""
    packed = [pack(each.prompt, each.slots, rows) for each in chosen]
    target = np.zeros((len(chosen), chosen[0].slots), np.float32)
    for line, one, each in zip(target, packed, chosen, strict=True):
        line[one.context] = each.target
    return Batch(stack(packed), target)


def batches(items: Sequence[Lesson], rows: int, batch: int, seed: int
            ) -> grain.IterDataset[tuple[Batch, tuple[Lesson, ...]]]:
    """Endless batches, each of one size, and the lessons in them; reshuffled every epoch. The seed fixes their order,
    and the iterator's state is where it stands, so that a run resumes in the same order."""
    sizes = sorted({each.slots for each in items})
    by_size = [[each for each in items if each.slots == slots] for slots in sizes]
    parts = [grain.MapDataset.source(lot).seed(seed + number).shuffle().repeat().batch(batch, batch_fn=tuple)
             for number, lot in enumerate(by_size)]
    mixed: Any = grain.MapDataset.mix(parts, weights=[len(lot) / len(items) for lot in by_size])
    ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    return mixed.map(lambda chosen: (batch_of(chosen, rows), chosen)).to_iter_dataset(ahead)
