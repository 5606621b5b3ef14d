"""A sample: one prompt in the parts that KV reuse needs, what counts as its answer, and what asked for it."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from cacheclip_jax.errors import BadInput
from eval import metrics

# Character spans of a text's tokens, tokenised alone and without special tokens: `lambda t: tokenizer.encode(t).spans`.
Spans = Callable[[str], Sequence[tuple[int, int]]]
Split = Literal["tune", "report", "all"]


@dataclass(frozen=True)
class Sample:
    """One prompt: `instructions + context[0] + ... + context[-1] + question + answer_prefix` is its whole text.

    instructions: the shared prefix, the same for every sample of a task and seed.
    context: the chunks' texts in prompt order, white space between them included.
    question: starts and may end without white space; `answer_prefix` is the beginning of the assistant's answer.
    references: accepted answers, or for string_match_all the strings that must all be there.
    meta: what reports group by (depth, facts as character spans of the joined context, ...), JSON values only. "chat":
      False marks prompts that the benchmark gives without a chat template, "first_line" answers cut at a line's end.
    """

    id: str
    task: str
    instructions: str
    context: tuple[str, ...]
    question: str
    answer_prefix: str
    references: tuple[str, ...]
    metric: str
    max_new_tokens: int
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The prompt as one text."""
        return "".join((self.instructions, *self.context, self.question, self.answer_prefix))

    def tokens(self, spans: Spans) -> int:
        """Tokens of prompt and longest answer, each part tokenised alone, as the prompt's ids are made."""
        parts = (self.instructions, *self.context, self.question, self.answer_prefix)
        return sum(len(spans(part)) for part in parts if part) + self.max_new_tokens

    def score(self, prediction: str) -> float:
        """The prediction's score, 0 to 1, by the sample's metric."""
        return metrics.score(self.metric, prediction, self.references, classes=self.meta.get("classes", ()),
                             first_line=self.meta.get("first_line", False))

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False, sort_keys=True)

    @classmethod
    def from_json(cls, line: str) -> Sample:
        """The sample of a line that `to_json` wrote."""
        row = json.loads(line)
        return cls(**{**row, "context": tuple(row["context"]), "references": tuple(row["references"])})


@dataclass(frozen=True)
class Order:
    """What `make` was asked for: `count` samples of at most `length` tokens, answer and chat template included."""

    task: str
    spans: Spans
    length: int | None = None
    count: int | None = None
    split: Split = "report"
    seed: int = 0
    data: Path | None = None
    template_tokens: int = 0

    def __post_init__(self) -> None:
        if self.split not in ("tune", "report", "all"):
            raise BadInput(f"split={self.split!r}: choose tune, report or all")
        if self.count is not None and self.count < 1:
            raise BadInput(f"count={self.count} is out of range: 1 or more, or leave it out for all")
        if self.length is not None and self.length - self.template_tokens < 1:
            raise BadInput(f"length={self.length} leaves no room beside {self.template_tokens} template tokens")

    @property
    def limit(self) -> int:
        """Tokens for a sample's prompt and answer. Raises BadInput where the task needs a length and got none."""
        if self.length is None:
            raise BadInput(f"{self.task} is made to a length: give length=, in tokens")
        return self.length - self.template_tokens

    @property
    def source(self) -> Path:
        """The data file. Raises BadInput where the task needs one and got none."""
        if self.data is None:
            raise BadInput(f"{self.task} reads a file: give data= (see eval/tasks/README.md for where each comes from)")
        return self.data


def nfc(text: str) -> str:
    """`text` in Unicode's composed form, which is what tokenizers see."""
    return unicodedata.normalize("NFC", text)
