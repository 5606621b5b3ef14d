"""The command line: one line for whatever is wrong with its input, and nothing changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from cacheclip_jax.store import ChunkStore
from tests.checkpoints import QWEN2, weights, write_directory, write_tokenizer
from tests.command_line import (
    QUESTION,
    ask,
    cacheclip,
    fails,
    indexed,
    models,
    process,
    store,
    whole,
)

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
