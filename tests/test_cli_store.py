"""The command line: store, verify and pull, also on disks that are full, small or read-only."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

from cacheclip_jax import online
from tests.command_line import (
    QUESTION,
    ask,
    cacheclip,
    fails,
    flip_a_byte,
    indexed,
    models,
    mounted,
    process,
    store,
    whole,
    write_corpus,
)

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
    committed = cacheclip("store", "stats", "--store", tmp_path / "store", "--json").json["chunks"]
    assert committed in (1, 2)  # the small passage's, of one model or already of both when the other's is refused
    again = cacheclip(*args, "--json").json
    assert again["found"] == committed and again["encoded"] == 4 - committed
    assert sorted(whole(tmp_path / "store")) == sorted(again["passages"])


def test_compare_reports_what_its_warm_up_repaired(store, models):
    flip_a_byte(store)
    run = cacheclip("ask", QUESTION, "--store", store, *models, "--compare", "--json", "--max-new-tokens", 3)
    assert "damaged" in run.err
