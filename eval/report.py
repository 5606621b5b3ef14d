"""The report of an evaluation: rows of answers -> results/quality.jsonl, a Markdown page and one HTML page.

    python -m eval.report runs/quality.jsonl --out results/quality

writes results/quality.jsonl (the lines of other runs stay), results/quality.md and results/quality.html.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jinja2
import typer

from cacheclip_jax.errors import BadInput, CacheClipError
from eval import figures
from eval.rows import Cell, Row, against, cells, complete, parts, pool, pooled_retention, read_rows, rival
from eval.statistics import Comparison, Estimate


@dataclass(frozen=True)
class Example:
    """A sample that a method answered worse than full attention, with what it recomputed."""

    row: Row
    full: Row
    runs: tuple[tuple[str, bool], ...]


def write(rows: Sequence[Row], out: Path, *, examples: int = 6, reference: str = "cacheclip") -> list[Path]:
    """Write `out`.jsonl, .md and .html from rows; returns the three.

    reference: the method that others are tested against, at the same ratio, or at its largest one where a method has
      no ratio.
    """
    made = cells(rows)
    targets = [out.with_suffix(suffix) for suffix in (".jsonl", ".md", ".html")]
    lines = merged(targets[0], made)
    contents = ["".join(json.dumps(line) + "\n" for line in lines), markdown(made, reference),
                html(made, reference, examples)]
    out.parent.mkdir(parents=True, exist_ok=True)
    for target, content in zip(targets, contents, strict=True):
        part = target.with_name(target.name + ".part")
        part.write_text(content, encoding="utf-8")
        part.replace(target)
    return targets


def merged(path: Path, made: Sequence[Cell]) -> list[dict[str, Any]]:
    """The file's lines of other runs, then this one's."""
    runs = {c.first.run for c in made}
    old: list[dict[str, Any]] = []
    if path.exists():
        try:
            old = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
            old = [line for line in old if line["run"] not in runs]
        except (ValueError, KeyError, TypeError) as e:
            raise BadInput(f"{path} isn't a file of results ({e!r}): name another --out, or delete it") from None
    return old + [c.to_dict() for c in made]


def markdown(made: Sequence[Cell], reference: str = "cacheclip") -> str:
    """Tables per length: methods over all tasks, then every cell."""
    out = ["# Quality against full attention", "", setting(made), ""]
    for (run, length), part in parts(made).items():
        named = [column.format(reference=reference) for column in SUMMARY]
        out += [f"## {_title(run, length)}", "", *_table(named, summary(part, reference)), "",
                *_table(DETAIL, detail(part)), ""]
    return "\n".join(out)


SUMMARY = ("method", "ratio", "realised", "tasks", "samples", "score", "retention (95%)", "TTFT ms", "KL first token",
           "mean KL first tokens", "same first tokens", "score difference from {reference} (p)",
           "mean KL difference from {reference} (p)")
DETAIL = ("task", "method", "ratio", "n", "score", "full", "retention (95%)", "where full answers", "TTFT ms")


def summary(part: Sequence[Cell], reference: str) -> list[tuple[str, ...]]:
    """A line per method and ratio of one run and length, tasks weighing the same."""
    out: list[tuple[str, ...]] = []
    for (name, ratio), group in pool(part).items():
        other = rival(part, reference, ratio)
        if other and other[0].name == name:  # a method isn't tested against itself
            other = []
        times = [c.ttft for c in group]
        out.append((name, _percent(ratio), _percent(_mean(c.mean_of("realised_ratio") for c in group)), str(len(group)),
                    str(sum(len(c.rows) for c in group)), _percent(_mean(c.score for c in group)),
                    _interval(pooled_retention(group)), _text(_mean(1000 * t for t in times), "{:.0f}"),
                    _text(_mean(c.mean_of("kl_first_token") for c in group), "{:.3f}"),
                    _text(_mean(c.mean_of("kl") for c in group), "{:.3f}"),
                    _percent(_mean(c.mean_of("top1") for c in group)),
                    _difference(against(group, other), "{:+.1f}", 100),
                    _difference(against(group, other, "kl"), "{:+.3f}")))
    return out


def detail(part: Sequence[Cell]) -> list[tuple[str, ...]]:
    """A line per task, method and ratio."""
    return [(c.first.task, c.name, _percent(c.first.ratio), str(len(c.rows)), _percent(c.score),
             _percent(c.full_score), _interval(c.retention), _percent(c.answered), _text(1000 * c.ttft, "{:.0f}"))
            for c in part]


def html(made: Sequence[Cell], reference: str = "cacheclip", examples: int = 6) -> str:
    """One page with tables, figures and examples; nothing in it is fetched from elsewhere."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
                                     loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")))
    named = tuple(column.format(reference=reference) for column in SUMMARY)
    sections = [{"title": _title(run, length), "summary": summary(part, reference), "detail": detail(part),
                 "curves": figures.ratio_curves(part), "scatter": figures.quality_over_ttft(part)}
                for (run, length), part in parts(made).items()]
    heatmaps = [(f"{run}: {name} {_percent(ratio)}".strip(), svg) for run in dict.fromkeys(c.first.run for c in made)
                for (name, ratio), group in pool([c for c in made if c.first.run == run]).items()
                if (svg := figures.needle_heatmap(group))]
    return environment.get_template("report.html").render(
        setting=setting(made), sections=sections, summary_columns=named, detail_columns=DETAIL, heatmaps=heatmaps,
        examples=worst(made, examples), percent=_percent)


def worst(made: Sequence[Cell], count: int) -> list[Example]:
    """The samples with a context that lost most against full attention."""
    pairs = [(r, f) for c in made for r, f in zip(c.rows, c.full, strict=True) if r.context and r.method != "full"]
    pairs.sort(key=lambda pair: pair[0].score - pair[1].score)
    return [Example(r, f, highlighted("".join(r.context), r.selected)) for r, f in pairs[:count]]


def highlighted(text: str, selected: Sequence[tuple[int, int]]) -> tuple[tuple[str, bool], ...]:
    """The text in runs, each selected or not. Spans may touch or overlap; outside the text they end with it."""
    out: list[tuple[str, bool]] = []
    at = 0
    for start, end in sorted(selected):
        start, end = max(start, at), min(end, len(text))
        if start < end:
            if start > at:
                out.append((text[at:start], False))
            if out and out[-1][1]:
                out[-1] = (out[-1][0] + text[start:end], True)
            else:
                out.append((text[start:end], True))
            at = end
    return (*out, (text[at:], False)) if at < len(text) else tuple(out)


def setting(made: Sequence[Cell]) -> str:
    """The runs, and on what they ran."""
    runs = dict.fromkeys((c.first.run, c.first.primary, c.first.aux, c.first.aux_adapter, c.first.device, c.first.date,
                          c.first.commit) for c in made)
    return "; ".join(", ".join(f"{name} {value}".strip() for name, value in zip(
        ("run", "primary", "aux", "adapter", "on", "", "commit"), run, strict=True) if value) for run in runs)


def _title(run: str, length: int) -> str:
    return f"{run}: {length} tokens" if length else f"{run}: as long as they are"


def _table(columns: Sequence[str], lines: Sequence[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}", *(f"| {' | '.join(line)} |" for line in lines)]


def _mean(values) -> float | None:
    there = [v for v in values if v is not None and not math.isnan(v)]
    return sum(there) / len(there) if there else None


def _percent(value: float | None) -> str:
    return _text(None if value is None else 100 * value, "{:.1f}")


def _interval(of: Estimate) -> str:
    return f"{_percent(of.value)} ({_percent(of.low)} to {_percent(of.high)})"


def _difference(of: Comparison, form: str, scale: float = 1) -> str:
    return f"{form.format(scale * of.difference)} ({of.p_value:.3f})" if of.n else ""


def _text(value: float | None, form: str) -> str:
    return "" if value is None or math.isnan(value) else form.format(value)


def main(rows: Annotated[list[Path], typer.Argument(help="JSONL files of rows, see eval/rows.py.")],
         out: Annotated[Path, typer.Option(help="Where to write, without a suffix.")] = Path("results/quality"),
         examples: Annotated[int, typer.Option(help="Examples on the page.")] = 6,
         reference: Annotated[str, typer.Option(help="The method that others are tested against.")] = "cacheclip"
         ) -> None:
    """Write results, Markdown and HTML of evaluation runs."""
    try:
        answers = read_rows(rows)
        kept = complete(answers)
        if left := len(answers) - len(kept):
            print(f"{left} answers are left out: to samples that not every method of their run has answered")
        for path in write(kept, out, examples=examples, reference=reference):
            print(path)
    except CacheClipError as e:
        print(f"error: {e}", file=sys.stderr)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    typer.run(main)
