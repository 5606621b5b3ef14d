"""The report: numbers are those of the rows, pairs are of the same samples, the page needs nothing else."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

from cacheclip_jax.errors import BadInput
from eval import report
from eval.rows import Row, against, cells, complete, read_rows

KEYS = ["run", "device", "date", "commit", "primary", "aux", "aux_adapter", "task", "length", "method", "preset",
        "ratio", "realised_ratio", "n", "score", "full_score", "retention", "ci_low", "ci_high", "kl_first_token",
        "kl_first_tokens", "top1_agreement"]


def rows(run="r1", lengths=(4096, 8192)):
    """Ten samples of two tasks; cacheclip loses the fifth, naive every second."""
    out = []
    for length in lengths:
        for task in ("niah_single_1", "vt"):
            for i in range(10):
                full = Row(run, task, length, "full", f"s{i}", "gold <b>", ("gold", "gone"), 1.0 if i else 0.0,
                           times={"ttft": 2.0 + i / 10}, depth=10.0 * i, device="one GPU", primary="big", aux="small",
                           realised_ratio=1.0, date="2026-11-24", commit="abc")
                out.append(full)
                for ratio in (0.1, 0.2):
                    out.append(replace(full, method="cacheclip", preset="late", ratio=ratio,
                                       realised_ratio=ratio + 0.01, score=0.0 if i in (0, 5) else 1.0,
                                       times={"ttft": 0.5}, kl_first_token=0.25, kl=ratio, top1=i != 5,
                                       question="Where?", context=("noise ", "gold & more"), selected=((6, 10),)))
                out.append(replace(full, method="naive", score=float(i % 2), times={"ttft": 0.2}, realised_ratio=0.0,
                                   kl=0.7))
    return out


@pytest.fixture(scope="module")
def made():
    return cells(rows())


def of(made, method, ratio=None, task="vt", length=4096):
    return next(c for c in made if (c.first.method, c.first.ratio, c.first.task, c.first.length)
                == (method, ratio, task, length))


def test_a_line_has_the_keys_and_numbers_of_its_rows(made):
    line = of(made, "cacheclip", 0.2).to_dict()
    assert list(line) == KEYS
    assert (line["n"], line["score"], line["full_score"]) == (10, 0.8, 0.9)
    assert line["retention"] == pytest.approx(8 / 9, abs=1e-6)
    assert line["ci_low"] < line["retention"] <= line["ci_high"]
    assert (line["kl_first_token"], line["top1_agreement"]) == (0.25, 0.9)
    assert line["realised_ratio"] == pytest.approx(0.21) and line["kl_first_tokens"] == pytest.approx(0.2)


def test_full_attention_retains_itself(made):
    line = of(made, "full").to_dict()
    assert (line["retention"], line["ci_low"], line["ci_high"]) == (1, 1, 1)
    assert (line["kl_first_token"], line["kl_first_tokens"]) == (None, None)


def test_what_is_no_number_is_null_in_valid_json():
    some = [replace(r, score=0.0) for r in rows() if r.sample == "s1"]
    line = json.loads(json.dumps(of(cells(some), "naive").to_dict(), allow_nan=False))
    assert line["retention"] is None and line["ci_low"] is None and line["score"] == 0


def test_methods_are_tested_on_the_samples_that_both_answered():
    made = cells([r for r in rows() if r.method != "naive" or r.sample not in ("s1", "s3")])
    test = against([of(made, "naive")], [of(made, "cacheclip", 0.2)])
    assert test.n == 8 and test.difference < 0


def summary(made):
    """The summary's lines by method and ratio, each by column."""
    return {(line[0], line[1]): dict(zip(report.SUMMARY, line, strict=True))
            for line in report.summary(made, "cacheclip")}


SCORE, KL = "score difference from {reference} (p)", "mean KL difference from {reference} (p)"


def test_the_summary_tests_against_the_reference_at_the_same_or_its_largest_ratio():
    made = cells(rows(lengths=(4096,)) + [replace(r, method="random", preset="", score=0.0, kl=0.4) for r in
                                          rows(lengths=(4096,)) if r.ratio == 0.1])
    lines = summary(made)
    own, random, naive, full = (lines[key] for key in (("cacheclip late", "10.0"), ("random", "10.0"), ("naive", ""),
                                                       ("full", "")))
    assert (own[SCORE], own[KL]) == ("", "")
    assert random[SCORE].startswith("-80.0 (") and random[KL].startswith("+0.300 (")
    assert naive[SCORE].startswith("-30.0 (") and naive[KL].startswith("+0.500 (")
    assert full[SCORE].startswith("+10.0 (") and full[KL] == ""


def test_the_summary_s_difference_is_that_of_its_scores_for_tasks_of_very_different_sizes():
    """Naive loses to cacheclip on 40 samples of one task and wins on 4 of another: pooled, it would be far behind."""
    first = replace(rows()[0], score=1.0)
    scores = {"vt": (40, {"full": 1.0, "cacheclip": 0.5, "naive": 0.0}),
              "niah_single_1": (4, {"full": 1.0, "cacheclip": 0.5, "naive": 1.0})}
    made = cells([replace(first, task=task, sample=f"s{i}", method=method, score=score, ratio=None)
                  for task, (count, by) in scores.items() for method, score in by.items() for i in range(count)])
    lines = summary(made)
    assert lines["naive", ""]["score"] == lines["cacheclip", ""]["score"] == "50.0"
    assert lines["naive", ""][SCORE] == "+0.0 (1.000)"


def test_the_mean_kl_s_difference_is_of_the_samples_that_both_have_it_of_and_tasks_weigh_the_same():
    """Naive is 0.5 further on three samples of one task and 0.25 nearer on two of another: (0.5 - 0.25) / 2. Of the 32
    signs, 7 give as much: any of the second task's 4 where the first's are +++, its ++ where they are one of 3 with a
    single -; so p is 14 / 32. One sample more lacks it for naive, one for cacheclip: they count in the means alone."""
    first = replace(rows()[0], score=1.0, kl_first_token=9.0)
    by = {"vt": {"full": [None] * 5, "cacheclip": [0.25, 0.25, 0.25, 1.25, None],
                 "naive": [0.75, 0.75, 0.75, None, 2.75], "random": [None] * 5},
          "niah_single_1": {"full": [None] * 2, "cacheclip": [0.5, 0.5], "naive": [0.25, 0.25], "random": [None] * 2}}
    lines = summary(cells([replace(first, task=task, sample=f"s{i}", method=method, kl=kl)
                           for task, methods in by.items() for method, kls in methods.items()
                           for i, kl in enumerate(kls)]))
    assert [lines[method, ""]["mean KL first tokens"] for method in ("cacheclip", "naive", "random")] == [
        "0.500", "0.750", ""]
    assert [lines[method, ""][KL] for method in ("cacheclip", "naive", "random")] == ["", "+0.125 (0.438)", ""]
    assert lines["naive", ""]["KL first token"] == "9.000" and lines["random", ""][SCORE] == "+0.0 (1.000)"


def test_runs_never_mix():
    other = [replace(r, score=0.0) if r.method != "full" else r for r in rows("r2", lengths=(4096,))]
    made = cells([*rows("r1", lengths=(4096,)), *other])
    text = report.markdown(made)
    assert "## r1: 4096 tokens" in text and "## r2: 4096 tokens" in text
    assert "| cacheclip late | 20.0 | 21.0 | 2 | 20 | 80.0 |" in text
    assert "| cacheclip late | 20.0 | 21.0 | 2 | 20 | 0.0 |" in text


def test_a_sample_without_full_attentions_answer_or_answered_twice_is_refused():
    with pytest.raises(BadInput, match="full attention hasn't answered 10 of the 10"):
        cells([r for r in rows() if r.method != "full" or r.task != "vt"])
    with pytest.raises(BadInput, match="more than once"):
        cells([*rows(), rows()[1]])


def test_of_a_stopped_run_the_samples_that_every_column_has_are_counted():
    whole = rows()
    late = [r for r in rows("r2") if (r.method, r.length) != ("naive", 4096) or (r.task, r.sample) < ("vt", "s7")]
    kept = complete([*whole, *late])
    assert kept[: len(whole)] == whole  # another run's samples have the same names
    assert {(r.task, r.sample) for r in late if r.length == 4096} - {(r.task, r.sample) for r in kept
                                                                     if (r.run, r.length) == ("r2", 4096)} \
        == {("vt", "s7"), ("vt", "s8"), ("vt", "s9")}
    assert {(len(c.rows), c.first.task) for c in cells(kept) if c.first.run == "r2" and c.first.length == 4096} \
        == {(10, "niah_single_1"), (7, "vt")}
    assert [r for r in kept if (r.run, r.length) == ("r2", 8192)] == rows("r2", lengths=(8192,))


def test_a_run_none_of_whose_samples_every_column_has_is_refused():
    apart = [r for r in rows("r2", lengths=(4096,)) if (r.method == "naive") == (r.task == "vt") or r.method == "full"]
    with pytest.raises(BadInput, match="no sample of run 'r2' at 4096 was answered by all of its 4 columns"):
        complete([*rows(), *apart])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("written")
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(r.to_json() + "\n" for r in rows()), encoding="utf-8")
    return source, report.write(rows(), tmp_path / "results" / "quality")


def test_rows_survive_the_file(written):
    assert read_rows([written[0]]) == rows()


def test_results_of_other_runs_stay_and_those_of_this_one_are_replaced(written, made, tmp_path):
    kept = written[1][0].read_text().splitlines()
    other = tmp_path / "quality.jsonl"
    older = [{k: v for k, v in {**json.loads(line), "run": "r0"}.items() if k != "kl_first_tokens"} for line in kept]
    other.write_text("".join(json.dumps(old) + "\n" + line + "\n" for old, line in zip(older, kept, strict=True)))
    lines = report.merged(other, made)
    assert lines[:len(kept)] == older
    assert [json.dumps(line) for line in lines[len(kept):]] == kept
    other.write_text("[]\n")
    with pytest.raises(BadInput, match="isn't a file of results"):
        report.merged(other, made)


def test_the_same_rows_give_the_same_bytes(written, tmp_path):
    source, first = written
    second = report.write(read_rows([source]), tmp_path / "again")
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]


def test_markdown_tables_are_whole(written):
    text = written[1][1].read_text()
    assert "## r1: 4096 tokens" in text and "## r1: 8192 tokens" in text
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({line.count("|") for line in block.splitlines()}) == 1
    assert "| KL first token | mean KL first tokens | same first tokens |" in text
    assert "| score difference from cacheclip (p) | mean KL difference from cacheclip (p) |" in text
    assert re.search(r"\| vt \| cacheclip late \| 20\.0 \| 10 \| 80\.0 \| 90\.0 \| 88\.9 \(", text)


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links, self.marked, self._in = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._in.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href") and not v.startswith("#")]

    def handle_endtag(self, tag):
        while self._in and self._in.pop() != tag:
            pass

    def handle_data(self, data):
        if self._in and self._in[-1] == "mark":
            self.marked.append(data)


def test_the_page_has_tables_figures_and_examples_and_fetches_nothing(written):
    text = written[1][2].read_text()
    page = _Page()
    page.feed(text)
    assert page.links == [] or all(link.startswith("#") for link in page.links)
    assert not re.search(r"url\((?!#)|@import|<script", text)
    # Two lengths of curve and scatter, and a heatmap for full, naive and two ratios of cacheclip.
    assert page.tags.count("svg") == 2 * 2 + 4
    assert page.marked and set(page.marked) == {"gold"}
    assert "<b>" not in text and "gold &lt;b&gt;" in text


@pytest.mark.parametrize(("selected", "expected"), [
    ((), [("abcdef", False)]), (((0, 6),), [("abcdef", True)]), (((1, 3), (2, 4)), [("a", False), ("bcd", True),
                                                                                 ("ef", False)]),
    (((4, 99),), [("abcd", False), ("ef", True)]), (((3, 3),), [("abcdef", False)])])
def test_highlights_tile_the_text(selected, expected):
    assert list(report.highlighted("abcdef", selected)) == expected


def test_rows_without_times_depths_or_contexts_still_make_a_page(tmp_path):
    some = [replace(r, times={}, depth=None, context=(), realised_ratio=None) for r in rows()]
    page = report.html(cells(some))
    assert "<svg" not in page and "What was lost" not in page


@pytest.mark.parametrize(("line", "message"), [("{}", "line 1 isn't a row"), ("[1]", "line 1"), ("{", "line 1"),
                                               ("", "no rows")])
def test_broken_rows_are_refused_by_line(tmp_path, line, message):
    source = tmp_path / "rows.jsonl"
    source.write_text(line + "\n")
    with pytest.raises(BadInput, match=message):
        read_rows([source])
    source.write_text(replace(rows()[0], score=50.0).to_json())
    with pytest.raises(BadInput, match="0 to 1"):
        read_rows([source])


def test_the_command_writes_three_files_or_says_why_not(written, tmp_path):
    import typer

    app = typer.Typer()
    app.command()(report.main)
    done = CliRunner().invoke(app, [str(written[0]), "--out", str(tmp_path / "cli")])
    assert done.exit_code == 0 and all((tmp_path / f"cli.{s}").exists() for s in ("jsonl", "md", "html"))
    assert "left out" not in done.output
    torn = tmp_path / "torn.jsonl"
    torn.write_text("".join(written[0].read_text().splitlines(keepends=True)[:-1]))
    done = CliRunner().invoke(app, [str(torn), "--out", str(tmp_path / "torn")])
    assert done.exit_code == 0 and "3 answers are left out" in done.output
    assert sum(json.loads(line)["n"] for line in (tmp_path / "torn.jsonl").read_text().splitlines()) == 4 * 39
    failed = CliRunner().invoke(app, [str(tmp_path / "none.jsonl")])
    assert failed.exit_code == 2 and "can't be read" in failed.output
