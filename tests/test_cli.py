"""The command line: what every command prints and leaves behind, and one line for whatever is wrong with its input."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from cacheclip_jax import __version__, cli, online
from cacheclip_jax.store import ChunkStore
from cacheclip_jax.store.blobs import Blobs, translated
from tests.checkpoints import QWEN2, weights, write_directory, write_tokenizer

CORPUS = {
    "light.txt": "Ada Moss keeps the north light.\n\nThe lamp burns oil, and the mat at the end of the stairs is red.",
    "cat.md": "The cat sat on the mat <script>alert('mat')</script> & the keeper's hat.",
    "more/boats.txt": "Boats land at the third quay when the tide is high. Barrels cost seven crowns.",
}
QUESTION = "Who keeps the north light?"
COMMANDS = [(), ("pull",), ("index",), ("ask",), ("verify",), ("info",), ("demo",), ("store",), ("store", "stats"),
            ("store", "ls"), ("store", "verify"), ("store", "rm"), ("store", "gc")]


@dataclass(frozen=True)
class Run:
    """What one call of the command line did."""

    code: int
    out: str
    err: str

    @property
    def json(self):
        assert self.code == 0, self.err
        return json.loads(self.out)


def cacheclip(*args: object, stdin: bytes = b"") -> Run:
    """Run the command line in this process, as the console script does."""
    raw = io.BytesIO(), io.BytesIO()
    streams = [io.TextIOWrapper(r, encoding="utf-8", write_through=True) for r in raw]
    argv = ["cacheclip", *map(str, args)]
    source = io.TextIOWrapper(io.BytesIO(stdin))
    with (redirect_stdout(streams[0]), redirect_stderr(streams[1]), mock.patch.object(sys, "argv", argv),
          mock.patch.object(sys, "stdin", source), pytest.raises(SystemExit) as stopped):
        cli.main()
    code = stopped.value.code
    assert code is None or isinstance(code, int)
    return Run(code or 0, *(r.getvalue().decode() for r in raw))


def process(*args: object, env: dict[str, str] | None = None, before: str = "") -> Run:
    """Run the command line in a process of its own, after the statement `before`."""
    program = f"{before}\nfrom cacheclip_jax.cli import main\nmain()"
    done = subprocess.run([sys.executable, "-c", program, *map(str, args)], capture_output=True,
                          env={**os.environ, **(env or {})}, check=False)
    return Run(done.returncode, done.stdout.decode(), done.stderr.decode())


def fails(run: Run, *parts: str) -> None:
    """It failed with exit code 2 and one line on stderr that has all these parts."""
    assert run.code == 2, run
    lines = run.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), run.err
    assert all(part in lines[0] for part in parts), run.err


def whole(store: Path) -> list[str]:
    """The ids of a store's passages, after a check that nothing in it is damaged."""
    assert cacheclip("store", "verify", "--store", store).code == 0
    return [p["id"] for p in cacheclip("store", "ls", "--store", store, "--json").json]


@pytest.fixture(scope="session")
def models(pair) -> list[str]:
    """Options that name the tiny pair, in float32 for exact comparisons."""
    return ["--primary", str(pair[0]), "--aux", str(pair[1]), "--dtype", "float32"]


@pytest.fixture(scope="session")
def indexed(models, tmp_path_factory) -> tuple[Path, dict]:
    """A store of the corpus, whose files are gone, and what indexing said."""
    folder = tmp_path_factory.mktemp("cli")
    write_corpus(folder / "corpus")
    report = cacheclip("index", folder / "corpus", "--store", folder / "store", *models, "--json").json
    shutil.rmtree(folder / "corpus")
    return folder / "store", report


@pytest.fixture
def store(indexed, tmp_path) -> Path:
    """A copy of the indexed store, for tests that change it."""
    return Path(shutil.copytree(indexed[0], tmp_path / "store"))


@pytest.fixture(scope="session")
def ask(indexed, models):
    """`cacheclip ask` over the indexed store."""
    return lambda *options: cacheclip("ask", "--store", indexed[0], *models, "--max-new-tokens", 6, *options)


def write_corpus(folder: Path) -> None:
    for name, text in CORPUS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


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
    assert ("aux score, by rank" in html) == (method == "cacheclip")


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


# -------------------------------------------------------------------- store, verify, pull

def test_store_stats_count_the_indexed_corpus(indexed, pair):
    store, report = indexed
    stats = cacheclip("store", "stats", "--store", store, "--json").json
    assert (stats["documents"], stats["passages"], stats["chunks"]) == (3, 3, 6)
    assert (stats["tokens"], stats["bytes"]) == (report["tokens"], report["bytes"])
    assert {s["model"] for s in stats["spaces"]} == {"primary", "aux"}
    assert {s["dtype"] for s in stats["spaces"]} == {"float32"}
    shown = cacheclip("store", "stats", "--store", store).out
    assert "3 documents, 3 passages" in shown and "primary" in shown


def test_store_rm_removes_a_passage_with_its_chunk_caches(store, indexed):
    first, *rest = sorted(indexed[1]["passages"])
    removed = cacheclip("store", "rm", first[:10], first, "--store", store, "--json").json
    assert removed == {"passages": 1, "chunks": 2}
    assert sorted(whole(store)) == rest
    assert "2 chunk caches removed" in cacheclip("store", "rm", rest[0], "--store", store).out


def test_index_replace_takes_the_place_of_a_document_and_rm_takes_it_out(store, models, tmp_path):
    (tmp_path / "log.txt").write_text("The lamp burns oil.")
    args = ("index", tmp_path / "log.txt", "--store", store, *models, "--replace", "--json")
    old = cacheclip(*args).json["passages"]
    (tmp_path / "log.txt").write_text("The mat is red.")
    new = cacheclip(*args).json["passages"]
    listed = cacheclip("store", "ls", "--store", store, "--json").json
    assert [p["id"] for p in listed if p["document"] == "log.txt"] == new != old
    assert cacheclip("store", "rm", "-d", "log.txt", "--store", store, "--json").json == {"passages": 1, "chunks": 4}
    fails(cacheclip("store", "rm", "-d", "log.txt", "--store", store), "log.txt", "store ls")
    fails(cacheclip("store", "rm", "--store", store), "--document NAME")


def test_a_store_travels_as_one_file_and_what_it_did_is_written_as_metrics(store, models, indexed, tmp_path):
    tar, other = tmp_path / "store.tar", tmp_path / "other"
    cacheclip("store", "export", tar, "--store", store)
    done = cacheclip("store", "import", tar, "--store", other, "--json").json
    assert done["chunks"] == 6 and done["damaged"] == [] and sorted(whole(other)) == sorted(indexed[1]["passages"])
    answer = cacheclip("--metrics", tmp_path / "m.prom", "ask", QUESTION, "--store", other, *models, "--json").json
    assert answer["results"]["cacheclip"]["misses"] == 0
    assert 'cacheclip_store_hits_total{tier="disk"} 6.0' in (tmp_path / "m.prom").read_text()
    fails(cacheclip("store", "import", store / "cacheclip.json", "--store", other), "no store's export")
    fails(cacheclip("store", "import", tmp_path / "none.tar", "--store", other), "none.tar")


def test_namespaces_of_a_store_answer_from_their_own_chunks_alone(store, models, indexed):
    fails(cacheclip("--namespace", "acme", "ask", QUESTION, "--store", store, *models), "index")
    stats = cacheclip("--namespace", "acme", "store", "stats", "--store", store, "--json").json
    assert stats["passages"] == stats["chunks"] == 0
    fails(cacheclip("--namespace", "../x", "store", "ls", "--store", store), "../x", "namespace")


def test_caches_of_one_byte_per_value_are_asked_for_as_they_were_indexed(models, tmp_path):
    write_corpus(tmp_path / "corpus")
    store = ("--store", tmp_path / "store")
    made = cacheclip("index", tmp_path / "corpus", *store, *models, "--kv", "int8", "--json").json
    rows = cacheclip("store", "stats", *store, "--json").json["spaces"]
    assert {row["kv"] for row in rows} == {"int8"} and sum(row["bytes"] for row in rows) < made["bytes"]
    small = cacheclip("ask", QUESTION, *store, *models, "--kv", "int8", "--json").json["results"]["cacheclip"]
    assert small["misses"] == 0
    other = cacheclip("ask", QUESTION, *store, *models, "--json")
    assert other.json["results"]["cacheclip"]["hits"] == 0 and "int8, not exact" in other.err
    fails(cacheclip("ask", QUESTION, *store, *models, "--kv", "int4"), "int4", "fp8")


def test_store_gc_frees_caches_and_keeps_texts(store, models, indexed):
    limit = indexed[1]["bytes"] // 2
    report = cacheclip("store", "gc", "--max-bytes", limit, "--store", store, "--json").json
    assert 0 < report["bytes_left"] <= limit and report["chunks"] > 0
    assert report["bytes_freed"] + report["bytes_left"] == indexed[1]["bytes"]
    assert "0.0 MB left" in cacheclip("store", "gc", "--max-bytes", 0, "--store", store).out
    assert sorted(whole(store)) == sorted(indexed[1]["passages"])
    again = cacheclip("ask", QUESTION, "--store", store, *models, "--json").json["results"]["cacheclip"]
    assert again["misses"] == 6 and set(again["encoded"]) == set(indexed[1]["passages"])


def test_store_verify_finds_a_flipped_byte_and_ask_repairs_it(store, models, ask):
    flip_a_byte(store)
    found = cacheclip("store", "verify", "--store", store, "--json")
    assert found.code == 1
    (problem,) = json.loads(found.out)
    assert problem["kind"] == "data" and not problem["harmless"]
    assert cacheclip("store", "verify", "--store", store).out.startswith("data kv/")
    answer = cacheclip("ask", QUESTION, "--store", store, *models, "--json", "--max-new-tokens", 6)
    assert problem["passage"] in answer.err and answer.err.startswith("warning: ")
    (result,) = answer.json["results"].values()
    assert result["repaired"] == [problem["passage"]]
    assert result["text"] == ask(QUESTION, "--json").json["results"]["cacheclip"]["text"]
    whole(store)


def test_odd_document_names_can_be_listed(models, tmp_path):
    rows = '{"text": "the cat", "id": "[red]:smile: \\ud800"}', '{"text": "mat", "id": "\\u001b"}'
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    name = os.fsdecode(b"caf\xe9 [bold].txt")
    (tmp_path / name).write_text("the mat")
    done = cacheclip("index", tmp_path / "rows.jsonl", tmp_path / name, "--store", tmp_path / "store", *models)
    assert done.code == 0, done.err
    documents = [p["document"] for p in cacheclip("store", "ls", "--store", tmp_path / "store", "--json").json]
    assert sorted(documents) == sorted(["[red]:smile: \ud800", "\u001b", name])
    listed = cacheclip("store", "ls", "--store", tmp_path / "store")
    assert listed.code == 0 and "[red]:smile:" in listed.out and "[bold]" in listed.out
    page = tmp_path / "page.html"
    asked = cacheclip("ask", QUESTION, "--store", tmp_path / "store", *models, "--explain", page, "--max-new-tokens", 1)
    assert asked.code == 0 and "[red]:smile:" in page.read_text()


def test_verify_passes_on_a_healthy_pair_and_fails_beyond_its_limits(models, tmp_path):
    write_corpus(tmp_path)
    args = ("verify", tmp_path, "--question", QUESTION, *models, "--ratio", 1)
    checks = cacheclip(*args, "--json").json
    assert len(checks) == 4 and all(c["passed"] for c in checks)
    assert set(checks[0]) == {"name", "passed", "measured", "limit", "explanation"}
    strict = cacheclip(*args, "--min-agreement", 1.01)
    assert strict.code == 1 and "failed" in strict.out and not strict.err


def test_verify_fails_when_recomputing_is_wrong(models, tmp_path, monkeypatch):
    write_corpus(tmp_path)
    choose_rows = online.choose_rows

    def shifted(*args):
        x, positions, last = choose_rows(*args)
        return x, positions.at[last].add(1), last

    monkeypatch.setattr(online, "choose_rows", shifted)
    checked = cacheclip("verify", tmp_path, "--question", QUESTION, *models, "--ratio", 1, "--json")
    assert checked.code == 1
    assert not json.loads(checked.out)[0]["passed"]


def test_pull_checks_a_local_model(pair):
    pulled = cacheclip("pull", pair[0], "--json").json
    assert pulled["model"] == pulled["path"] == str(pair[0])
    assert str(pair[0]) in cacheclip("pull", pair[0]).out


# -------------------------------------------------------------------- bad input

def test_a_process_of_its_own_gives_a_shell_its_exit_codes_and_streams(indexed, models, tmp_path):
    good = process("ask", QUESTION, "--store", indexed[0], *models, "--max-new-tokens", 6, "--json")
    assert good.json["results"]["cacheclip"]["misses"] == 0
    bad = process("ask", QUESTION, "--store", indexed[0], "--primary", tmp_path / "nothing",
                  env={"CACHECLIP_NO_HUB": "1", "PYTHONIOENCODING": "ascii"})
    fails(bad, str(tmp_path / "nothing"))


E_LINE = '{"text": "good"}\n\n{"text": '
DOCUMENTS = {  # name: (content, parts of the message)
    "empty.txt": (b" \n\n", ("empty.txt", "every document is empty")),
    "binary.txt": (b"\x7fELF\0\0", ("binary.txt", "binary file", "convert")),
    "latin.txt": ("größer".encode("latin-1"), ("latin.txt", "UTF-8", "byte 2")),
    "utf16.txt": ("text".encode("utf-16"), ("utf16.txt", "binary")),
    "broken.jsonl": (E_LINE.encode(), ("broken.jsonl", "line 3", '"text"')),
    "list.jsonl": (b"[1, 2]", ("list.jsonl", "line 1")),
    "no-text.jsonl": (b'{"body": "a"}', ("no-text.jsonl", "line 1", '"text"')),
    "number.jsonl": (b'{"text": "a"}\n{"text": 7}', ("number.jsonl", "line 2", "int")),
    "deep.jsonl": (b"[" * 100_000, ("deep.jsonl", "line 1")),
    "digits.jsonl": (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", ("digits.jsonl", "line 1")),
    "surrogate.jsonl": (b'{"text": "a \\ud800 b"}', ("surrogate", "Unicode")),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_bad_document_is_named_and_changes_nothing(store, models, tmp_path, name):
    content, parts = DOCUMENTS[name]
    (tmp_path / "good.txt").write_text("" if name == "empty.txt" else "the cat")
    (tmp_path / name).write_bytes(content)
    before = whole(store)
    fails(cacheclip("index", tmp_path / "good.txt", tmp_path / name, "--store", store, *models), *parts)
    assert whole(store) == before


@pytest.mark.parametrize("source, parts", [
    ("missing.txt", ("missing.txt", "doesn't exist")), ("folder", ("folder", "no text files")),
    ("a long text, given as if it were a file " * 200, ("a long text", "doesn't exist"))])
def test_a_bad_source_is_named_and_changes_nothing(store, models, tmp_path, monkeypatch, source, parts):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    before = whole(store)
    fails(cacheclip("index", source, "--store", store, *models), *parts)
    fails(cacheclip("verify", source, *models), *parts)
    assert whole(store) == before


def test_verify_refuses_an_empty_document(models, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    fails(cacheclip("verify", tmp_path / "empty.txt", *models), "empty.txt", "empty")


@pytest.mark.parametrize("options, parts", [
    (("--chunk-tokens", 3), ("chunk size 3", "16")), (("--chunk-tokens", 64, "--overlap", 33), ("overlap 33", "32")),
    (("--overlap", -1), ("overlap -1", "0")), (("--dtype", "int8"), ("int8", "bfloat16")),
    (("--store", "ftp://somewhere"), ("ftp://somewhere", "s3://"))], ids=str)
def test_a_bad_index_option_is_named_and_changes_nothing(store, models, tmp_path, options, parts):
    (tmp_path / "good.txt").write_text("the cat")
    before = whole(store)
    fails(cacheclip("index", tmp_path / "good.txt", "--store", store, *models, *options), *parts)
    assert whole(store) == before


@pytest.mark.parametrize("options, parts", [
    (("",), ("question is empty",)), ((" \n",), ("question is empty",)),
    ((QUESTION * 40,), ("512", "question")),
    ((QUESTION, "--max-new-tokens", 500), ("answer 500", "512")),
    ((QUESTION, "--chunk", "0123456789abcdef"), ("0123456789abcdef", "store ls")),
    ((QUESTION, "--chunk", "the cat"), ("'the cat'", "store ls")),
    ((QUESTION, "--chunk", "abc"), ("'abc'", "store ls")), ((QUESTION, "--chunk", ""), ("''", "store ls")),
    ((QUESTION, "--ratio", 1.5), ("ratio=1.5", "between 0 and 1")),
    ((QUESTION, "--ratio", -0.1), ("ratio=-0.1", "between 0 and 1")),
    ((QUESTION, "--ratio", "nan"), ("ratio=nan", "between 0 and 1")),
    ((QUESTION, "--mass", 2), ("mass=2.0", "between 0 and 1")),
    ((QUESTION, "--tokens", -1), ("tokens=-1", "0 or more")),
    ((QUESTION, "--ratio", 0.1, "--tokens", 5), ("ratio, tokens", "one of")),
    ((QUESTION, "--method", "magic"), ("'magic'", "naive-none")),
    ((QUESTION, "--scoring", "magic"), ("'magic'", "paper-joint")),
    ((QUESTION, "--max-new-tokens", 0), ("max_new_tokens=0", "1 or more")),
    ((QUESTION, "--temperature", -1), ("temperature=-1",)), ((QUESTION, "--temperature", "nan"), ("temperature=nan",)),
    ((QUESTION, "--top-p", 0), ("top_p=0",)), ((QUESTION, "--top-k", -1), ("top_k=-1",)),
    ((QUESTION, "--stop", ""), ("empty stop string",)), ((QUESTION, "-k", 0), ("0 passages", "1 or more")),
    ((QUESTION, "--aux", "none"), ("aux",)), ((QUESTION, "--dtype", "int8"), ("int8", "float32")),
    ((QUESTION, "--explain", "file.txt/page.html"), ("file.txt/page.html",)),
    ((QUESTION, "--explain", "."), ("'.'", "can't be written")),
], ids=lambda x: " ".join(map(str, x))[:60])
def test_a_bad_ask_is_one_line_and_changes_nothing(ask, indexed, tmp_path, monkeypatch, options, parts):
    monkeypatch.chdir(tmp_path)
    Path("file.txt").write_text("")
    fails(ask(*options), *parts)
    assert sorted(whole(indexed[0])) == sorted(indexed[1]["passages"])


def test_an_ambiguous_beginning_of_a_chunk_id_lists_the_ids(ask, indexed, monkeypatch):
    monkeypatch.setattr(ChunkStore, "passage_ids", lambda self, prefix="", **_: [prefix + "00", prefix + "01"])
    fails(ask(QUESTION, "--chunk", "abcd"), "abcd00, abcd01", "more digits")


@pytest.mark.parametrize("command", [("stats",), ("ls",), ("verify",), ("rm", "0123"), ("gc", "--max-bytes", 0)],
                         ids=lambda c: c[0])
def test_looking_after_a_store_that_is_not_there_makes_none(tmp_path, command):
    fails(cacheclip("store", *command, "--store", tmp_path / "none"), "no chunk store", "cacheclip index")
    assert not (tmp_path / "none").exists()


def test_asking_a_store_that_is_not_there_makes_none(models, tmp_path):
    fails(cacheclip("ask", QUESTION, "--store", tmp_path / "none", *models), "no chunk store", "cacheclip index")
    assert not (tmp_path / "none").exists()


def test_store_commands_refuse_what_is_out_of_range(store):
    before = whole(store)
    fails(cacheclip("store", "gc", "--max-bytes", -1, "--store", store), "-1", "0 or more")
    fails(cacheclip("store", "rm", before[0], "0123456789abcdef", "--store", store), "0123456789abcdef", "store ls")
    assert whole(store) == before


@pytest.mark.parametrize("command, way_out", [
    (("index", "good.txt"), "--store"), (("ask", QUESTION), "cacheclip index")], ids=["index", "ask"])
def test_a_store_path_that_is_no_store_is_refused_untouched(models, tmp_path, monkeypatch, command, way_out):
    monkeypatch.chdir(tmp_path)
    Path("good.txt").write_text("the cat")
    Path("folder").mkdir()
    Path("folder/thesis.tex").write_text("years of work")
    fails(cacheclip(*command, "--store", "good.txt", *models), "good.txt", "is a file", "--store")
    fails(cacheclip(*command, "--store", "folder", *models), "folder", way_out)
    assert [p.name for p in Path("folder").iterdir()] == ["thesis.tex"]
    assert Path("good.txt").read_text() == "the cat"


def bad_model(folder: Path, what: str) -> Path:
    """A model directory with one defect."""
    w = {name: x * np.float32(0.3) for name, x in weights(QWEN2).items()}
    if what == "not finite":
        w["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    write_directory(folder, QWEN2 | ({"model_type": "mamba"} if what == "unsupported" else {}), w)
    file = folder / "model.safetensors"
    if what == "truncated":
        file.write_bytes(file.read_bytes()[:-1000])
    if what == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    if what == "broken tokenizer":
        (folder / "tokenizer.json").write_text('{"version": "1.0",\n "truncation"')
    if what == "broken config":
        (folder / "config.json").write_text("{\n")
    if what == "no weights":
        file.unlink()
    if what == "missing":
        shutil.rmtree(folder)
    if what == "a file":
        shutil.rmtree(folder)
        folder.write_text("")
    return folder


@pytest.mark.parametrize("what, parts", [
    ("not finite", ("up_proj",)), ("unsupported", ("mamba",)), ("truncated", ("model.safetensors", "truncated")),
    ("no tokenizer", ("tokenizer.json",)), ("broken tokenizer", ("tokenizer.json",)),
    ("broken config", ("config.json",)), ("no weights", ("model.safetensors",)), ("missing", ("no local path",)),
    ("a file", ("isn't a model",))])
@pytest.mark.parametrize("role", ["--primary", "--aux"])
def test_a_bad_model_is_named_and_changes_nothing(ask, indexed, tmp_path, monkeypatch, role, what, parts):
    monkeypatch.setenv("CACHECLIP_NO_HUB", "1")
    model = bad_model(tmp_path / "model", what)
    fails(ask(QUESTION, role, model), str(model), *parts)
    assert sorted(whole(indexed[0])) == sorted(indexed[1]["passages"])


def test_models_that_are_not_there_leave_no_store_behind(models, tmp_path, monkeypatch):
    monkeypatch.setenv("CACHECLIP_NO_HUB", "1")
    (tmp_path / "good.txt").write_text("the cat")
    fails(cacheclip("index", tmp_path / "good.txt", "--store", tmp_path / "s", *models, "--aux", tmp_path / "no"), "no")
    fails(cacheclip("pull", tmp_path / "no"), str(tmp_path / "no"))


def test_a_bad_tokenizer_config_is_one_line(ask, tmp_path):
    model = bad_model(tmp_path / "model", "")
    write_tokenizer(model, chat_template="{% for %}")
    fails(ask(QUESTION, "--primary", model), "chat template")


@contextmanager
def unwritable() -> Iterator[None]:
    """Every write to a store fails as on a medium that is read-only."""
    def refuse(self: Blobs, key, parts) -> None:
        with translated("write", self.where(key)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with mock.patch.object(Blobs, "write_parts", refuse):
        yield


def flip_a_byte(store: Path) -> None:
    """Damage one chunk cache's data."""
    file = sorted(store.glob("kv/*/*/*.kv"))[0]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.fixture
def mounted(tmp_path) -> Iterator[Path]:
    """A small file system of its own; where that may not be mounted the test is skipped."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_read_only_disk_is_named_and_what_it_holds_is_read(mounted, indexed, models):
    subprocess.run(["mount", "-o", "remount,size=16m", mounted], check=True)
    store = Path(shutil.copytree(indexed[0], mounted / "store"))
    (store / "good.txt").write_text("the cat")
    subprocess.run(["mount", "-o", "remount,ro", mounted], check=True)
    fails(cacheclip("index", store / "good.txt", "--store", store, *models), "Read-only", "--store")
    fails(cacheclip("index", store / "good.txt", "--store", mounted / "new", *models), "Read-only", "--store")
    assert cacheclip("ask", QUESTION, "--store", store, *models, "--json").json["results"]["cacheclip"]["misses"] == 0
    assert sorted(whole(store)) == sorted(indexed[1]["passages"])


def test_a_full_disk_keeps_what_was_committed_and_the_next_index_resumes(mounted, models, tmp_path):
    write_corpus(tmp_path / "corpus")
    args = ("index", tmp_path / "corpus", "--store", mounted / "store", *models)
    fails(cacheclip(*args), "No space left", "store gc")
    committed = cacheclip("store", "stats", "--store", mounted / "store", "--json").json["chunks"]
    assert set(whole(mounted / "store")) and committed < 6
    subprocess.run(["mount", "-o", "remount,size=16m", mounted], check=True)
    again = cacheclip(*args, "--json").json
    assert again["found"] == committed and again["encoded"] == 6 - committed
    assert sorted(whole(mounted / "store")) == sorted(again["passages"])


def test_a_limit_on_file_sizes_keeps_what_was_committed_and_the_next_index_resumes(models, tmp_path):
    (tmp_path / "a.txt").write_text("the mat")
    (tmp_path / "b.txt").write_text("The lamp burns oil, and the mat at the end of the stairs is red. " * 3)
    args = ("index", tmp_path / "a.txt", tmp_path / "b.txt", "--store", tmp_path / "store", *models)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))"
    fails(process(*args, before=limit, env={"JAX_ENABLE_COMPILATION_CACHE": "0"}), "File too large", "store gc")
    assert len(whole(tmp_path / "store")) == 2
    again = cacheclip(*args, "--json").json
    assert again["found"] == 1 and again["encoded"] == 3
    assert sorted(whole(tmp_path / "store")) == sorted(again["passages"])


def test_compare_reports_what_its_warm_up_repaired(store, models):
    flip_a_byte(store)
    run = cacheclip("ask", QUESTION, "--store", store, *models, "--compare", "--json", "--max-new-tokens", 3)
    assert "damaged" in run.err
