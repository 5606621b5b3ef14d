"""An example: one prompt in the parts that KV reuse needs, and which part of the data it belongs to."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from cacheclip_jax.model.tokenizer import Tokenizer, nfc
from cacheclip_jax.prompt import Prompt, PromptFormat

Part = Literal["train", "holdout"]


@dataclass(frozen=True)
class Example:
    """One prompt to learn from, or to measure on where `part` is "holdout".

    The prompt is `instructions`, the chunks one after another, the question within its `frame`, and the beginning of
    the answer; `system` goes into the chat header, as in `PromptFormat`.
    """

    id: str
    task: str
    part: Part
    instructions: str
    chunks: tuple[str, ...]
    question: str
    answer_prefix: str = ""
    frame: str = "{question}"
    system: str | None = None

    def prompt(self, tokenizer: Tokenizer) -> Prompt:
        """The prompt's ids for a model, each part tokenised alone as the engine does."""
        form = PromptFormat(self.instructions, "{text}", self.frame, self.system)
        question = form.question_ids(tokenizer, self.question) + tokenizer.encode(nfc(self.answer_prefix)).ids
        return Prompt(form.prefix_ids(tokenizer), tuple(tokenizer.encode(nfc(c)) for c in self.chunks), question)


def write_examples(path: Path, examples: Iterable[Example]) -> None:
    """Write examples as JSON lines, in one atomic step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text("".join(json.dumps(asdict(e), ensure_ascii=False) + "\n" for e in examples), encoding="utf-8")
    partial.replace(path)


def read_examples(path: Path) -> list[Example]:
    """The examples of a file that `write_examples` wrote."""
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line)
    return [Example(**row | {"chunks": tuple(row["chunks"])}) for row in rows]
