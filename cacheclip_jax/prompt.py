"""The prompt of one request as token ids: shared prefix, chunks, question; the same ids for every method."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from cacheclip_jax.errors import BadInput
from cacheclip_jax.model.tokenizer import Encoded, Tokenizer, nfc
from cacheclip_jax.store import Passage

if TYPE_CHECKING:
    from cacheclip_jax.plan import Behind


LEAD_IN_TOKENS = 512  # of a lead-in at most
LEAD_IN = """{"5bc8fbbc-bde5-4099-8164-d8399f767c45": "d76d4330-f144-4bea-b0c1-1fdecb91ce37",
 "87b0b125-ec1d-4da0-a6eb-8c9ebd69fe29": "c6a53877-7733-4bdb-9721-0dff076ce2ef",
 "0d464138-a623-4255-bfc1-ea36f17fd374": "5f2dd97f-1cfb-40f6-a827-688de6a16a3b",

The town library opens at nine and closes at six, except on Sundays, when the reading room is used for
talks. Last spring a retired engineer spoke about bridges: how long they last, what the salt does to the
bolts, and why the old ferry was kept for so many years after the first one was built. About forty people
came.

Bread needs flour, water, salt and time. A warm kitchen makes the dough rise within two hours; in winter it may take
the whole night. Bakers judge it by touch, since clocks know nothing of yeast.

In 1907 the company moved its workshop to the river, where coal was cheaper to bring. It made pumps, then engines, and
later small turbines for mills in the hills. The last of them ran until 1964 and now stands in the museum's yard,
beside the tram that used to climb to the upper station.

Migrating birds rest on the northern shore in October. Counting them is done from two towers, early in the morning, by
volunteers with telescopes. The numbers have fallen for ducks and risen for geese; nobody is sure of the reason, but
milder winters in the east are thought to play a part.

"""


@dataclass(frozen=True)
class PromptFormat:
    """The words around passages and question. `chunk` is part of what is encoded and cached, as are `system` and
    `instructions` (the shared prefix): changing one of them makes new caches.

    lead_in: a text, of which the first LEAD_IN_TOKENS count, that stands between the shared prefix and a chunk while
      the chunk is encoded, and in no prompt. So a chunk's caches are those of words in the middle of a context, as most
      of them will be; the first chunk's then aren't exact any more. LEAD_IN, identifiers and prose, is one for any
      purpose, "" is none.
    answer: the beginning of the answer, which the model goes on from.
    chat: whether prompts follow the model's chat template; else they are the texts alone, one after another.
    strip: whether white space around a question is dropped.
    """

    instructions: str = "Answer the question using only the passages below.\n\n"
    chunk: str = "{text}\n\n"
    question: str = "Question: {question}\nAnswer in one short sentence."
    system: str | None = None
    lead_in: str = ""
    answer: str = ""
    chat: bool = True
    strip: bool = True

    def __post_init__(self) -> None:
        for field, name in (("chunk", "{text}"), ("question", "{question}")):
            if getattr(self, field).count(name) != 1:
                raise BadInput(f"the prompt format's {field} must contain {name} once: {getattr(self, field)!r}")

    def prefix_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Ids of everything before the first chunk: chat header and instructions."""
        return tokenizer.encode(self._around(tokenizer, "?")[0], special=True).ids

    def lead_in_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Ids of what stands between prefix and chunk while a chunk is encoded."""
        return tokenizer.encode(nfc(self.lead_in)).ids[:LEAD_IN_TOKENS]

    def chunk_ids(self, tokenizer: Tokenizer, passage: Passage) -> Encoded:
        """A chunk's ids, tokenised alone, and the character spans of its formatted text."""
        return tokenizer.encode(self.chunk_text(passage))

    def chunk_text(self, passage: Passage) -> str:
        """The text of a chunk as the models read it."""
        return nfc(self.chunk.replace("{text}", passage.text))

    def question_ids(self, tokenizer: Tokenizer, question: str) -> tuple[int, ...]:
        """Ids of everything after the last chunk, through the assistant header and the answer's beginning.

        The user's words and the answer's are encoded as plain text: only our own frame may hold control tokens.
        """
        if not question.strip():
            raise BadInput("the question is empty: ask something, for example cacheclip ask \"Who ...?\"")
        before, after = self.question.split("{question}")
        rendered = self._around(tokenizer, nfc(self.question))[1]
        head, found, tail = rendered.partition("{question}")
        if not found:
            raise BadInput(f"the chat template changed the question's text: {before + after!r} isn't in {rendered!r}")
        words = head + nfc(question.strip() if self.strip else question)
        frame = tokenizer.encode(words).ids + tokenizer.encode(tail, special=True).ids
        return frame + tokenizer.encode(nfc(self.answer)).ids

    def _around(self, tokenizer: Tokenizer, question: str) -> tuple[str, str]:
        return tokenizer.prompt_parts(nfc(self.instructions), question, self.system, chat=self.chat)


@dataclass(frozen=True)
class Prompt:
    """A request's ids for one model. Context tokens are the chunks' tokens; prefix and question are not counted. The
    lead-in belongs to how the chunks are encoded, not to what is read."""

    prefix: tuple[int, ...]
    chunks: tuple[Encoded, ...]
    question: tuple[int, ...]
    lead_in: tuple[int, ...] = ()

    @cached_property
    def chunk_lengths(self) -> tuple[int, ...]:
        """Tokens of each chunk."""
        return tuple(len(c.ids) for c in self.chunks)

    @cached_property
    def context_tokens(self) -> int:
        """Tokens of all chunks."""
        return sum(self.chunk_lengths)

    @cached_property
    def ids(self) -> np.ndarray:
        """The whole prompt, int32: what a full prefill reads."""
        return np.concatenate([np.array(self.prefix, np.int32), *(c.array for c in self.chunks),
                               np.array(self.question, np.int32)])

    def in_slots(self, slots: int) -> tuple[Int[np.ndarray, "S"], Int[np.ndarray, "3"]]:
        """The ids in so many slots, and at which of them the context begins, the question begins, and the prompt ends.
        """
        ids = np.zeros(slots, np.int32)
        ids[: len(self.ids)] = self.ids
        return ids, np.array([len(self.prefix), self.question_start, len(self.ids)], np.int32)

    def exact_tokens(self, behind: Behind) -> int:
        """Tokens from the beginning whose cached K and V are those of a full prefill: the prefix, and the first chunk
        where it was encoded behind that and nothing else."""
        differs = self.lead_in if behind == "shared" else self.prefix
        return len(self.prefix) + (0 if differs else self.chunk_lengths[0])

    @property
    def question_start(self) -> int:
        """Absolute position of the question's first token."""
        return len(self.prefix) + self.context_tokens
