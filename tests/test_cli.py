"""The command line: help, index and ask, what they print and leave behind."""

from __future__ import annotations

import json
import os
import re
from itertools import pairwise
from unittest import mock

import pytest

from cacheclip_jax import __version__
from tests.command_line import (
    COMMANDS,
    CORPUS,
    QUESTION,
    Run,
    ask,
    cacheclip,
    indexed,
    models,
    process,
    store,
    unwritable,
    whole,
    write_corpus,
)

# -------------------------------------------------------------------- help

def test_version_is_printed():
    assert cacheclip("--version") == Run(0, f"cacheclip {__version__}\n", "")


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help(command):
    shown = cacheclip(*command, "--help")
    assert shown.code == 0 and "Usage" in shown.out and not shown.err


def test_help_needs_neither_jax_nor_transformers():
    check = "import atexit, sys; atexit.register(lambda: print({'jax', 'transformers'} & set(sys.modules)))"
    shown = process("ask", "--help", before=check)
    assert shown.code == 0 and shown.out.endswith("set()\n")


def test_an_option_that_does_not_exist_is_a_usage_error():
    assert cacheclip("ask", "--no-such-option", QUESTION).code == 2
    assert cacheclip("nothing").code == 2


# -------------------------------------------------------------------- index

def test_index_reports_what_it_made(indexed):
    store, report = indexed
    assert report["documents"] == len(CORPUS) == len(report["passages"])
    assert report["encoded"] == 2 * len(CORPUS) and report["found"] == 0
    assert sorted(whole(store)) == sorted(report["passages"])
    documents = {p["document"]: p["text"] for p in cacheclip("store", "ls", "--store", store, "--json").json}
    assert documents == CORPUS


def test_a_store_indexed_without_a_lead_in_is_asked_without_one(models, tmp_path):
    write_corpus(tmp_path / "folder")
    options = ("--store", tmp_path / "store", *models)
    made = cacheclip("index", tmp_path / "folder", *options, "--no-lead-in", "--json").json
    assert made["encoded"] == 2 * len(CORPUS)
    plain = cacheclip("ask", QUESTION, *options, "--no-lead-in", "--json").json["results"]["cacheclip"]
    assert plain["misses"] == 0 and not plain["warnings"]
    led = cacheclip("ask", QUESTION, *options, "--json").json["results"]["cacheclip"]
    assert led["misses"] > 0 and "the prefix" in led["warnings"][0]


def test_index_takes_files_folders_jsonl_and_stdin_and_again_makes_nothing_new(models, tmp_path):
    write_corpus(tmp_path / "folder")
    (tmp_path / "folder" / ".hidden.txt").write_text("hidden")
    (tmp_path / "folder" / "picture.png").write_bytes(b"\0\1")
    (tmp_path / "one.txt").write_bytes(b"\xef\xbb\xbfA file with a mark\r\nand two lines.")
    rows = [{"text": "first row", "id": "r1"}, {"text": "second \u2028 row", "title": "A title", "id": 0},
            {"text": "third"}]
    lines = "\n\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
    (tmp_path / "rows.jsonl").write_text(lines)
    args = ("index", tmp_path / "folder", tmp_path / "one.txt", tmp_path / "rows.jsonl", "-", "--store",
            tmp_path / "store", *models)
    first = cacheclip(*args, "--json", stdin="from stdin, naïve".encode()).json
    assert first["documents"] == len(CORPUS) + 1 + 3 + 1 and first["found"] == 0
    found = cacheclip("store", "ls", "--store", tmp_path / "store", "--json").json
    texts = {p["document"]: p["text"] for p in found}
    assert texts == CORPUS | {"one.txt": "A file with a mark\nand two lines.", "r1": "first row",
                              "0": "A title\nsecond \u2028 row", "rows.jsonl:5": "third", "stdin": "from stdin, naïve"}
    again = cacheclip(*args, stdin="from stdin, naïve".encode())
    assert again.code == 0 and "0 chunk caches made, 16 found" in again.out
    assert found == cacheclip("store", "ls", "--store", tmp_path / "store", "--json").json


def test_index_splits_long_documents_with_an_overlap(models, tmp_path):
    text = " ".join(f"The cat number {i} sat on mat {i}." for i in range(12))
    (tmp_path / "long.txt").write_text(text)
    sizes = ("--chunk-tokens", 64, "--overlap", 16)
    assert cacheclip("index", tmp_path / "long.txt", "--store", tmp_path / "store", *models, *sizes).code == 0
    found = cacheclip("store", "ls", "--store", tmp_path / "store", "--json").json
    assert len(found) > 3
    assert all(text[p["start"] : p["end"]] == p["text"] for p in found)
    assert all(b["start"] < a["end"] for a, b in pairwise(found))
    assert found[0]["start"] == 0 and found[-1]["end"] == len(text)


def test_index_reads_a_pipe(models, tmp_path):
    reader, writer = os.pipe()
    os.write(writer, b"through a pipe")
    os.close(writer)
    try:
        done = cacheclip("index", f"/dev/fd/{reader}", "--store", tmp_path / "store", *models)
    finally:
        os.close(reader)
    assert done.code == 0, done.err


# -------------------------------------------------------------------- ask

def test_ask_retrieves_from_the_store_alone(ask, indexed):
    answer = ask(QUESTION, "--json", "-k", 2).json
    result = answer["results"]["cacheclip"]
    assert answer["question"] == QUESTION and len(result["chunks"]) == 2
    best = cacheclip("store", "ls", "--store", indexed[0]).out
    assert re.search(rf"{result['chunks'][-1]}  light\.txt", best)
    assert result["misses"] == 0 and result["hits"] == 4 and not result["warnings"]


def test_ask_takes_chunks_by_the_beginnings_of_their_ids_in_prompt_order(ask, indexed):
    ids = indexed[1]["passages"]
    for order in ([ids[2], ids[0]], [ids[0], ids[2]]):
        options = [word for id in order for word in ("--chunk", id[:8])]
        assert ask(QUESTION, "--json", *options).json["results"]["cacheclip"]["chunks"] == order


@pytest.mark.parametrize("method", ["cacheclip", "full", "prefix", "naive", "naive-none", "random"])
def test_ask_answers_by_every_method(store, models, method):
    run = cacheclip("ask", QUESTION, "--store", store, *models, "--method", method, "--json", "--max-new-tokens", 6)
    result = run.json["results"][method]
    assert result["method"] == method.removesuffix("-none") and result["text"]
    assert result["recomputed_tokens"] + result["reused_tokens"] == result["context_tokens"]
    missing = len(CORPUS) if method == "naive-none" else 0  # those lie in a space of their own
    assert result["misses"] == len(result["encoded"]) == missing
    whole(store)


@pytest.mark.parametrize("method", ["prophetkv", "specprefill"])
def test_ask_loads_what_a_rival_needs_and_gives_it_the_ratio(store, models, method):
    run = cacheclip("ask", QUESTION, "--store", store, *models, "--method", method, "--ratio", 0.3, "--json",
                    "--max-new-tokens", 2)
    assert 0.25 < run.json["results"][method]["realised_ratio"] < 0.7


@pytest.mark.parametrize("option, value, low, high", [
    ("--ratio", 0, 0, 0), ("--ratio", 0.5, 0.5, 0.6), ("--ratio", 1, 1, 1), ("--tokens", 40, 0.15, 0.5),
    ("--tokens", 10_000, 1, 1), ("--mass", 0, 0, 0), ("--mass", 0.5, 0.01, 0.8), ("--mass", 1, 1, 1)])
def test_ask_recomputes_what_the_budget_says(ask, option, value, low, high):
    result = ask(QUESTION, option, value, "--json").json["results"]["cacheclip"]
    assert low <= result["realised_ratio"] <= high


@pytest.mark.parametrize("scoring", ["late", "paper", "late-joint", "paper-joint"])
def test_ask_scores_in_every_way(ask, scoring):
    assert ask(QUESTION, "--scoring", scoring, "--json").json["results"]["cacheclip"]["recomputed_tokens"]


@pytest.mark.parametrize("extra", [(), ("--temperature", 1.5, "--seed", 3), ("--method", "full", "--stop", "t")])
def test_the_streamed_text_is_the_text_in_the_json(ask, extra):
    options = (QUESTION, "--max-new-tokens", 40, *extra)
    (result,) = ask(*options, "--json").json["results"].values()
    streamed = ask(*options)
    text, _, summary = streamed.out.rpartition("\n\n")
    assert text == result["text"] and not streamed.err
    assert f"{result['recomputed_tokens']} of {result['context_tokens']} context tokens recomputed" in summary


def test_markup_emoji_codes_and_tabs_in_an_answer_are_printed_as_they_are(ask):
    odd = "[bold]a[/] :smile:\tb \n\n c  "
    with mock.patch("cacheclip_jax.decode.TextStream.push", lambda self, ids: ""), \
            mock.patch("cacheclip_jax.decode.TextStream.finish", lambda self: odd):
        assert ask(QUESTION).out.startswith(odd + "\n\n")


def test_compare_runs_full_prefill_on_the_same_chunks_without_compiling(ask):
    results = ask(QUESTION, "--compare", "--json").json["results"]
    assert list(results) == ["cacheclip", "full"]
    assert results["cacheclip"]["chunks"] == results["full"]["chunks"]
    assert results["cacheclip"]["compiles"] == results["full"]["compiles"] == 0
    table = ask(QUESTION, "--compare").out
    assert "cacheclip" in table and "full" in table and "100.0%" in table and "compiling" not in table


def test_json_holds_what_scripts_need(ask):
    result = ask(QUESTION, "--json").json["results"]["cacheclip"]
    assert set(result) == {
        "text", "token_ids", "finish_reason", "method", "realised_ratio", "context_tokens", "prefix_tokens",
        "question_tokens", "reused_tokens", "recomputed_tokens", "hits", "misses", "encoded", "repaired", "warnings",
        "compiles", "chunks", "times", "decode_tokens_per_second"}
    assert set(result["times"]) == {"retrieve", "score", "select", "load", "encode", "recompute", "ttft",
                                    "decode"}
    assert result["finish_reason"] == "length" and len(result["token_ids"]) == 6


@pytest.mark.parametrize("method", ["cacheclip", "full"])
def test_the_explain_page_is_self_contained_marks_tokens_and_escapes_text(ask, tmp_path, method):
    page = tmp_path / "new folder" / "page.html"
    options = ("--explain", page, "--method", method, "--ratio", 0.5, "--json")
    result = ask('Is <b>this</b> "escaped"?', *options).json["results"][method]
    html = page.read_text()
    assert not re.search(r"""(src|href)\s*=|@import|url\(|<script""", html)
    assert "&lt;b&gt;this&lt;/b&gt;" in html and "&lt;script&gt;" in re.sub(r"</?span[^>]*>", "", html)
    marked = "".join(re.findall(r'<span class="s\d r">(.*?)</span>', html, re.S))
    plain = "".join(re.findall(r'<span class="s\d">(.*?)</span>', html, re.S))
    assert marked and bool(plain) == (method == "cacheclip")
    assert f"{result['recomputed_tokens']} of {result['context_tokens']}" in html
    assert all(id in html for id in result["chunks"])
    assert ('<span class="s9">high</span> score, by rank' in html) == (method == "cacheclip")


def test_a_question_of_unknown_or_common_words_still_retrieves(ask):
    for question in ("Zyzzyva?", "what is the", "???", "漢字"):
        assert len(ask(question, "--json", "-k", 2).json["results"]["cacheclip"]["chunks"]) == 2


def test_options_can_come_from_the_environment(indexed, pair, monkeypatch):
    for name, value in zip(("PRIMARY", "AUX", "STORE"), (*pair, indexed[0]), strict=True):
        monkeypatch.setenv(f"CACHECLIP_{name}", str(value))
    done = cacheclip("ask", QUESTION, "--dtype", "float32", "--max-new-tokens", 6, "--json")
    assert done.json["results"]["cacheclip"]["misses"] == 0


def test_a_store_that_can_not_be_written_still_answers_and_warns(store, models):
    with unwritable():
        stored = cacheclip("ask", QUESTION, "--store", store, *models, "--json")
        missing = cacheclip("ask", QUESTION, "--store", store, *models, "--method", "naive-none", "--json")
    assert stored.json["results"]["cacheclip"]["misses"] == 0 and not stored.err
    assert missing.json["results"]["naive-none"]["misses"] == len(CORPUS)
    assert "warning: Could not write" in missing.err and "name another --store" in missing.err
    whole(store)
