"""LongBench v1 (Bai et al., arXiv 2308.14508): its prompts, answer lengths, metrics and truncation, in chunks.

What stands before {context} in a prompt is the shared prefix, what follows it the question. The context is cut by the
rule in DATASETS: "passages" at their headings, one a chunk; "examples" (few-shot) at theirs, packed to chunk_tokens;
"windows" of chunk_tokens tokens. Where no heading is found, windows.
"""

from __future__ import annotations

import functools
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from cacheclip_jax.errors import BadInput
from eval.tasks.chunk import packed, pieces, windows
from eval.tasks.reading import question_id
from eval.tasks.sample import Order, Sample, nfc
from eval.tasks.split import choose

Rule = Literal["passages", "examples", "windows"]

_PASSAGE, _PARAGRAPH = r"(?m)^Passage \d+:", r"(?m)^Paragraph \d+:"
# data set -> metric, chunking rule, heading
DATASETS: dict[str, tuple[str, Rule, str]] = {
    "narrativeqa": ("f1", "windows", ""),
    "qasper": ("f1", "windows", ""),
    "multifieldqa_en": ("f1", "windows", ""),
    "multifieldqa_zh": ("f1_zh", "windows", ""),
    "hotpotqa": ("f1", "passages", _PASSAGE),
    "2wikimqa": ("f1", "passages", _PASSAGE),
    "musique": ("f1", "passages", _PASSAGE),
    "dureader": ("rouge_l_zh", "passages", r"(?m)^文章\d+"),
    "gov_report": ("rouge_l", "windows", ""),
    "qmsum": ("rouge_l", "windows", ""),
    "multi_news": ("rouge_l", "passages", _PASSAGE),
    "vcsum": ("rouge_l_zh", "windows", ""),
    "trec": ("classification", "examples", r"(?m)^Question: "),
    "triviaqa": ("f1", "examples", r"(?m)^Passage:"),
    "samsum": ("rouge_l", "examples", r"(?m)^Dialogue: "),
    "lsht": ("classification", "examples", r"(?m)^新闻内容："),  # noqa: RUF001
    "passage_count": ("count", "passages", _PARAGRAPH),
    "passage_retrieval_en": ("retrieval", "passages", _PARAGRAPH),
    "passage_retrieval_zh": ("retrieval", "passages", r"(?m)^段落\d+："),  # noqa: RUF001
    "lcc": ("code_similarity", "windows", ""),
    "repobench-p": ("code_similarity", "windows", ""),
}
EVEN = ("qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "gov_report", "multi_news", "trec", "triviaqa", "samsum",
        "passage_count", "passage_retrieval_en", "lcc", "repobench-p")  # those of LongBench-E
FIRST_LINE = ("trec", "triviaqa", "samsum", "lsht")  # an answer ends at the first line's end
NO_CHAT = (*FIRST_LINE, "lcc", "repobench-p")  # better without a chat template, says LongBench
HUB, ARCHIVE = "THUDM/LongBench", "data.zip"


def make(order: Order, *, dataset: str, chunk_tokens: int = 512, prompts: Path | None = None,
         answer_lengths: Path | None = None) -> list[Sample]:
    """Samples of a data set; one that is longer than the order's length loses the middle of its context.

    dataset: a name in DATASETS, with "_e" for LongBench-E. order.data: a folder of its .jsonl files, one such file, or
    data.zip; None fetches data.zip from the hub. prompts, answer_lengths: files in the layout of dataset2prompt.json
    and dataset2maxlen.json, instead of LongBench's own.
    """
    name = dataset.removesuffix("_e")
    own = json.loads(Path(__file__).with_name("longbench.json").read_text(encoding="utf-8"))
    prompt = _entry(prompts, own["prompts"], name)
    if prompt.count("{context}") != 1:
        raise BadInput(f"the prompt of {name} must contain {{context}} once: {prompt!r}")
    max_new_tokens = int(_entry(answer_lengths, own["max_new_tokens"], name))
    rows = read(order.data, dataset)
    picked = choose(rows, lambda row: row["input"] or row["context"], order.split, order.seed, order.count)
    return [_fit(order, _builder(order, name, row, prompt, max_new_tokens, chunk_tokens), row["context"])
            for row in picked]


def read(data: Path | None, dataset: str) -> list[dict[str, Any]]:
    """The rows of a data set, texts in composed Unicode. Raises BadInput saying where the data was looked for."""
    path = _from_hub() if data is None else data
    file = f"{dataset}.jsonl"
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                inside = [n for n in archive.namelist() if n.rsplit("/", 1)[-1] == file]
                text = archive.read(inside[0]).decode() if inside else None
        else:
            path = path / file if path.is_dir() else path
            text = path.read_text(encoding="utf-8") if path.exists() else None
        if text is None:
            raise BadInput(f"{path} has no {file}: give the folder of LongBench's .jsonl files, or its {ARCHIVE}")
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        return [{**row, "input": nfc(row["input"]), "context": nfc(row["context"]),
                 "answers": [nfc(a) for a in row["answers"]]} for row in rows]
    except (OSError, zipfile.BadZipFile, ValueError, KeyError, TypeError) as e:
        raise BadInput(f"{path} isn't LongBench data: {e!r}; expected JSON lines with input, context and answers"
                       ) from None


def _from_hub() -> Path:
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(HUB, ARCHIVE, repo_type="dataset"))
    except Exception as e:  # whatever the network and the hub's client raise, the way out is the same
        raise BadInput(f"LongBench can't be fetched from the hub ({type(e).__name__}): fetch {ARCHIVE} of the dataset "
                       f"{HUB} where there is a network and give it as data=") from None


def _entry(path: Path | None, own: dict[str, Any], name: str) -> Any:
    try:
        table = own if path is None else json.loads(path.read_text(encoding="utf-8"))
        return table[name]
    except (OSError, ValueError, KeyError) as e:
        raise BadInput(f"{path or 'longbench.json'} has no entry for {name!r}: {e!r}") from None


def _builder(order: Order, name: str, row: dict[str, Any], prompt: str, max_new_tokens: int, chunk_tokens: int
             ) -> Callable[[str], Sample]:
    metric, rule, heading = DATASETS[name]
    head, tail = (part.replace("{input}", row["input"]) for part in prompt.split("{context}"))
    question = tail.lstrip()
    gap = tail[: len(tail) - len(question)]
    meta = {"source": row.get("_id", ""), "length": order.length, "chat": name not in NO_CHAT,
            "first_line": name in FIRST_LINE, "classes": row.get("all_classes") or []}

    def build(context: str) -> Sample:
        return Sample(
            id=f"{order.task}/{order.length}/{row.get('_id') or question_id(row['input'] + row['context'])}",
            task=order.task, instructions=head,
            context=chunks(context + gap, order, rule, heading, chunk_tokens), question=question, answer_prefix="",
            references=tuple(row["answers"]), metric=metric, max_new_tokens=max_new_tokens,
            meta={**meta, "truncated": len(context) < len(row["context"])})

    return build


def chunks(context: str, order: Order, rule: Rule, heading: str, chunk_tokens: int) -> tuple[str, ...]:
    """The context's chunks by a rule of DATASETS."""
    if rule == "windows" or not re.search(heading, context):
        return windows(context, order.spans, chunk_tokens)
    parts = pieces(context, heading)
    return parts if rule == "passages" else packed(parts, order.spans, chunk_tokens)


def _fit(order: Order, build: Callable[[str], Sample], context: str) -> Sample:
    """The sample, its context cut in the middle until prompt and answer fit the length, as LongBench cuts prompts."""
    sample = build(context)
    if order.length is None or (over := sample.tokens(order.spans) - order.limit) <= 0:
        return sample
    spans = order.spans(context)
    fixed = len(order.spans(sample.instructions)) if sample.instructions else 0
    after = len(order.spans(sample.question)) if sample.question else 0
    keep = len(spans) - over
    while keep > 0:
        # LongBench keeps as much of the prompt's front as of its back; instructions and question are part of both.
        front = min(max((keep + fixed + after) // 2 - fixed, 0), keep)
        back = keep - front
        first = context[: spans[front][0]]
        last = context[spans[len(spans) - back][0] :] if back else ""
        sample = build(first + last)
        if (over := sample.tokens(order.spans) - order.limit) <= 0:
            return sample
        keep -= over
    raise BadInput(f"length={order.length} leaves no room for context: instructions, question and answer of "
                   f"{order.task} take {fixed + after + sample.max_new_tokens} tokens")


ENTRIES = {f"longbench_{name}": functools.partial(make, dataset=name)
           for name in (*DATASETS, *(f"{name}_e" for name in EVEN))}
