"""The chunk store: what is committed is seen by all and survives interruption; opening."""

import json
import os
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import asdict, replace

import pytest

from cacheclip_jax.errors import BadInput, StoreError
from cacheclip_jax.store import LAYOUT_VERSION, ChunkStore
from cacheclip_jax.store.blobs import Blobs, translated
from cacheclip_jax.store.records import seal
from eval import kill_index as script
from eval.kill_index import write_random_chunks
from tests.chunks import SPACE, chunk, put, same_bits


def test_two_opens_see_each_others_commits(tmp_path):
    for url in (tmp_path / "s", f"file://{tmp_path}/s", "memory://two-opens"):
        one, two = ChunkStore.open(url), ChunkStore.open(str(url))
        passage, ids, kv = put(one, 0)
        assert two.passages() == [passage] and same_bits(two.read(SPACE, ids, passage.id).result(), kv)
    assert ChunkStore.open("memory://another").passages() == []


def kill_index(*flags: object, shell: str = 'exec "$@"') -> subprocess.CompletedProcess:
    words = ["sh", "-c", shell, "sh", sys.executable, "-B", script.__file__, *map(str, flags)]
    return subprocess.run(words, capture_output=True, text=True)


def test_two_processes_see_each_others_commits(tmp_path):
    store = ChunkStore.open(tmp_path)
    write_random_chunks(tmp_path, 2)
    before = {e.chunk: e.created for e in store.entries()}
    done = kill_index("--writer", tmp_path, "--chunks", 5)
    assert done.returncode == 0, done.stderr
    after = {e.chunk: e.created for e in store.entries()}
    assert len(after) == 5 and after | before == after and store.verify() == []


def test_a_write_interrupted_anywhere_is_never_seen_and_can_be_done_again(tmp_path, monkeypatch):
    passage, ids, spans, kv = chunk(0)
    for call in ("open", "fchmod", "write", "fsync"):
        for step in range(3):  # at the space, the head, the layers
            store = ChunkStore.open(tmp_path / call / str(step))
            left, real = step, getattr(os, call)

            def interrupted(*args, real=real, **kwargs):
                nonlocal left
                left -= 1
                if left < 0:
                    raise KeyboardInterrupt
                return real(*args, **kwargs)

            with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
                patch.setattr(os, call, interrupted)
                store.write(SPACE, passage.id, ids, spans, kv)
            again = ChunkStore.open(store.url)
            assert left >= 0 or call == "fsync" or not again.has(SPACE, ids)
            assert all(problem.harmless for problem in again.verify())
            again.write(SPACE, passage.id, ids, spans, kv)
            assert same_bits(again.read(SPACE, ids, passage.id).result(), kv)


def test_half_written_files_are_ignored_and_gc_removes_them(store, tmp_path):
    passage, ids, kv = put(store, 0)
    for file in [p for p in tmp_path.rglob("*") if p.is_file()]:
        file.with_name(file.name + ".__lock").write_bytes(file.read_bytes()[:7])
        file.with_name(".tmp-" + file.name).write_bytes(b"?")
    assert store.passages() == [passage] and all(p.harmless for p in store.verify())
    assert same_bits(store.read(SPACE, ids, passage.id).result(), kv)
    assert store.gc(1 << 40).orphans == 6 and store.verify() == []


def test_readers_and_writers_may_share_a_store_between_threads(store):
    errors = []

    def work(worker: int) -> None:
        try:
            for i in range(6):
                passage, ids, kv = put(store, i)
                assert same_bits(store.read(SPACE, ids, passage.id).result(), kv)
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []




def test_a_store_of_a_newer_layout_is_refused_with_both_versions(tmp_path):
    (tmp_path / "cacheclip.json").write_text(json.dumps({"layout": LAYOUT_VERSION + 1}))
    with pytest.raises(StoreError, match=f"layout {LAYOUT_VERSION + 1}.*up to {LAYOUT_VERSION}"):
        ChunkStore.open(tmp_path)


def test_a_store_of_the_first_layout_keeps_its_texts_and_its_caches_are_made_again(tmp_path):
    record = {name: value for name, value in asdict(SPACE).items() if name != "kv"} | {"layout": 1}
    old, key = replace(SPACE, layout=1), "ab" * 16
    (tmp_path / "cacheclip.json").write_text('{"layout": 1}')
    place = tmp_path / "kv" / old.key
    (place / "ab" / key).mkdir(parents=True)
    (place / "space.json").write_bytes(seal(record))
    for file in (f"{key}.json", f"{key}/zarr.json", f"{key}/c.0.0.0.0.0"):
        (place / "ab" / file).write_bytes(b"{}")
    ChunkStore.open(tmp_path, create=False).blobs.write("passages/x", b"")
    assert "1" in (tmp_path / "cacheclip.json").read_text()
    store = ChunkStore.open(tmp_path)
    assert json.loads((tmp_path / "cacheclip.json").read_text()) == {"layout": LAYOUT_VERSION}
    passage, ids, *_ = chunk(0)
    assert not store.has(SPACE, ids) and "the layout (1, not 2)" in store.explain_miss(SPACE)
    assert [(p.kind, p.harmless) for p in store.verify()] == [("old", True)]
    put(store, 0)
    assert store.gc(1 << 40).orphans == 1 and store.verify() == []
    assert store.has(SPACE, ids) and not list(place.rglob("c.*"))


def test_a_place_that_is_no_store_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(StoreError, match=r"thesis.tex.*new or an empty directory"):
        ChunkStore.open(tmp_path)
    with pytest.raises(StoreError, match="is a file"):
        ChunkStore.open(tmp_path / "thesis.tex")
    with pytest.raises(StoreError, match=r"Could not .*thesis.tex"):
        ChunkStore.open(tmp_path / "thesis.tex" / "below")
    with pytest.raises(StoreError, match="no chunk store"):
        ChunkStore.open(tmp_path / "new", create=False)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    for url in ("ftp://host/x", "s3://", "memory://", "file://"):
        with pytest.raises(BadInput, match="s3://BUCKET"):
            ChunkStore.open(url)


def test_two_processes_may_create_a_store_at_the_same_time(tmp_path, monkeypatch):
    read, others = Blobs.read, []

    def read_first(blobs, key):
        found = read(blobs, key)
        if not others:  # between this process' look for the marker and what it does without one
            others.append(None)
            others.append(put(ChunkStore.open(tmp_path), 0)[0])
        return found

    monkeypatch.setattr(Blobs, "read", read_first)
    assert ChunkStore.open(tmp_path).passages() == others[1:]


def test_a_creation_that_was_interrupted_can_be_done_again(tmp_path):
    (tmp_path / "cacheclip.json.__lock").write_bytes(b"{")
    assert ChunkStore.open(tmp_path).passages() == []


@pytest.mark.parametrize("url", ["s3://bucket/a/b", "gs://bucket/a/b", "s3://bucket", "gs://bucket/"])
def test_a_bucket_is_the_same_code_with_another_driver(url):
    blobs = Blobs.open(url)
    assert blobs.spec["bucket"] == "bucket" and blobs.spec["path"] in ("a/b/", "")
    assert blobs.files is None and blobs.tier == "bucket" and blobs.below("x").spec["path"].endswith("x/")


@pytest.mark.parametrize(
    "text, way_out",
    [
        ("RESOURCE_EXHAUSTED: Failed writing: No space left on device [os_error_code='28']", "store gc"),
        ("PERMISSION_DENIED: Failed to open: Read-only file system [os_error_code='30']", "permissions"),
        ("Failed to create directory: Permission denied [os_error_code='13']", "permissions"),
    ],
)
def test_a_failure_of_the_system_names_the_place_and_the_way_out(text, way_out):
    with pytest.raises(StoreError, match=f"/some/store.*{way_out}") as e, translated("write", "/some/store"):
        raise ValueError(text)
    assert "os_error_code" not in str(e.value)


def test_a_full_disk_loses_nothing_that_was_committed(store, tmp_path):
    passage, ids, kv = put(store, 0)
    limit = 'ulimit -f 100; exec "$@"'  # blocks of 512 or 1024 bytes: less than one chunk cache
    done = kill_index("--writer", tmp_path / "store", "--chunks", 2, shell=limit)
    assert done.returncode == 1 and "store gc" in done.stderr, done.stderr
    assert [e.passage for e in store.entries()] == [passage.id]
    assert store.verify() == []
    assert same_bits(store.read(SPACE, ids, passage.id).result(), kv)
    write_random_chunks(tmp_path / "store", 2)
    assert store.verify() == [] and len(list(store.entries())) == 3


def test_killing_the_writer_loses_nothing(tmp_path):
    done = kill_index("--kills", 2, "--span", 0.3, "--chunks", 60, "--store", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(done.stdout)
    assert summary["kills"] == 2 and summary["lost"] == [] and summary["completed"]
