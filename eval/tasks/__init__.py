"""Tasks that KV-reuse methods are compared on: RULER's thirteen, LongBench, and question answering over local files."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from cacheclip_jax.errors import BadInput
from eval.tasks import frequency, layouts, longbench, needle, reading, records, variable
from eval.tasks.sample import Order, Sample, Spans, Split

RULER: dict[str, Callable[..., list[Sample]]] = {
    "niah_single_1": partial(needle.make, haystack="noise"),
    "niah_single_2": partial(needle.make, haystack="text"),
    "niah_single_3": partial(needle.make, haystack="text", value_kind="uuids"),
    "niah_multikey_1": partial(needle.make, haystack="text", keys=4),
    "niah_multikey_2": partial(needle.make, haystack="needles"),
    "niah_multikey_3": partial(needle.make, haystack="needles", key_kind="uuids", value_kind="uuids"),
    "niah_multivalue": partial(needle.make, haystack="text", values=4),
    "niah_multiquery": partial(needle.make, haystack="text", queries=4),
    "vt": variable.make,
    "cwe": frequency.make_cwe,
    "fwe": frequency.make_fwe,
    "qa_1": partial(reading.make_ruler, reader=layouts.read_squad),
    "qa_2": partial(reading.make_ruler, reader=layouts.read_hotpot),
}
LOCAL: dict[str, Callable[..., list[Sample]]] = {
    "musique": partial(reading.make_given, reader=layouts.read_ctxs),
    "2wikimqa": partial(reading.make_given, reader=layouts.read_ctxs),
    "hotpotqa": partial(reading.make_given, reader=layouts.read_hotpot),
    "nq": partial(reading.make_open, reader=layouts.read_ctxs),
    "squad": partial(reading.make_open, reader=layouts.read_squad),
    "kv": records.make,
}
TASKS: dict[str, Callable[..., list[Sample]]] = {**RULER, **LOCAL, **longbench.ENTRIES}

__all__ = ["LOCAL", "RULER", "TASKS", "Order", "Sample", "Spans", "Split", "make"]


def make(name: str, *, tokenizer_spans: Spans, length: int | None = None, count: int | None = None,
         split: Split = "report", seed: int = 0, data: Path | str | None = None, template_tokens: int = 0,
         **settings: Any) -> list[Sample]:
    """Samples of a task: the same arguments give the same samples, in every process.

    Args:
      tokenizer_spans: text -> character spans of its tokens; lengths and chunks are measured with it.
      length: tokens of prompt and answer at most; generated tasks fill it.
      count: samples (data sets: None for all of the split).
      split: "tune" or "report", which never share a question or a seed number; "all" for data sets.
      seed: 0 to 99, of generated samples; of data sets, which questions a count takes and in what company.
      data: the file a task reads; needles in text and questions have one (README.md here lists them).
      template_tokens: tokens of a chat template, kept free.
      settings: of the task's own, such as depth, cut, chunk_tokens, passages, distractors, position.

    Raises BadInput for an unknown task or setting, naming what there is.
    """
    if name not in TASKS:
        raise BadInput(f"task {name!r} is unknown: choose one of {', '.join(TASKS)}")
    maker = TASKS[name]
    known = [p for p in inspect.signature(maker).parameters if p not in ("order", "reader", "dataset")]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise BadInput(f"{name} has no setting {unknown[0]!r}: it has {', '.join(known) or 'none'}")
    path = None if data is None else Path(data)
    return maker(Order(name, tokenizer_spans, length, count, split, seed, path, template_tokens), **settings)
