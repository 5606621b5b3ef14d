"""Running a store: verify that resumes, export and import, metrics, logs."""

import io
import json
import logging
import tarfile

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cacheclip_jax import logs
from cacheclip_jax.errors import BadInput, ChunkCorrupt, StoreError
from cacheclip_jax.store import ChunkStore, Passage
from tests.chunks import SPACE, chunk, put, same_bits


@pytest.fixture
def store(tmp_path) -> ChunkStore:
    """Four chunks; one document has a version."""
    store = ChunkStore.open(tmp_path / "store")
    for seed in range(4):
        put(store, seed)
    note = Passage.make("note", "notes")
    store.add_passages([note])
    store.publish([note], replace={"notes"})
    return store


def flip(store: ChunkStore, seed: int) -> None:
    (file,) = store.blobs.files.root.rglob(f"{SPACE.chunk_key(chunk(seed)[1])}.kv")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


# ------------------------------------------------------------------ verify


def test_an_interrupted_verify_goes_on_where_it_stopped(store, tmp_path, monkeypatch):
    notes, read, left = tmp_path / "notes", [], 2

    def stop(done: int, total: int) -> None:
        nonlocal left
        if done > 5:
            left -= 1
        if not left:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.verify(stop, workers=1, resume=notes)
    real = type(store.blobs).read
    monkeypatch.setattr(type(store.blobs), "read", lambda self, key: read.append(key) or real(self, key))
    assert store.verify(workers=3, resume=notes) == [] and not notes.exists()
    assert 0 < len([key for key in read if key.endswith(".kv")]) < 4
    notes.write_text("kv/half a li")
    flip(store, 1)
    assert [p.kind for p in store.verify(resume=notes)] == ["data"]
    with pytest.raises(BadInput, match="name another file"):
        store.verify(resume=tmp_path / "nowhere" / "notes")


def test_damage_found_before_an_interruption_is_found_again(store, tmp_path):
    for seed in range(4):
        flip(store, seed)
    with pytest.raises(ZeroDivisionError):
        store.verify(lambda done, total: 1 // (total - done), resume=tmp_path / "notes")
    assert len(store.verify(resume=tmp_path / "notes")) == 4


# ------------------------------------------------------------------ export, import


def exported(store: ChunkStore) -> bytes:
    out = io.BytesIO()
    store.export_to(out)
    return out.getvalue()


@pytest.mark.parametrize("target", ["disk", "memory"])
def test_an_import_is_the_store_that_was_exported(store, tmp_path, target):
    other = ChunkStore.open(tmp_path / "other" if target == "disk" else f"memory://import-{tmp_path.name}")
    data = exported(store)
    done = other.import_from(io.BytesIO(data))
    assert (done.passages, done.documents, done.chunks, done.damaged) == (5, 1, 4, [])
    assert other.passages() == store.passages() and other.versions().keys() == {"notes"} and other.verify() == []
    for seed in range(4):
        passage, ids, _, kv = chunk(seed)
        assert same_bits(other.read(SPACE, ids, passage.id).result(), kv)
    assert other.import_from(io.BytesIO(data)).found == 10


def test_what_is_damaged_is_neither_exported_nor_imported(store, tmp_path):
    data = bytearray(exported(store))
    at = data.rindex(chunk(2)[3][-1].tobytes())
    data[at] ^= 1
    other = ChunkStore.open(tmp_path / "other")
    done = other.import_from(io.BytesIO(data))
    assert done.chunks == 3 and len(done.damaged) == 1 and other.verify() == []
    flip(store, 0)
    assert len(store.export_to(io.BytesIO()).damaged) == 1


def test_an_export_that_is_cut_anywhere_says_so_and_leaves_a_whole_store(store, tmp_path):
    data = exported(store)
    for i, share in enumerate((0.01, 0.2, 0.5, 0.8, 0.9)):
        other = ChunkStore.open(tmp_path / str(i))
        with pytest.raises(StoreError, match=r"cut short|no store's export"):
            other.import_from(io.BytesIO(data[: int(len(data) * share)]))
        assert all(p.harmless for p in other.verify())
        other.import_from(io.BytesIO(data))
        assert other.passages() == store.passages()


def archive(*members: tuple[str, bytes], kind: bytes = tarfile.REGTYPE) -> io.BytesIO:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(data) * (kind == tarfile.REGTYPE), kind, "/etc/passwd"
            tar.addfile(info, io.BytesIO(data))
    return io.BytesIO(out.getvalue())


BEGIN, END = ("cacheclip-export.json", b'{"layout": 2}'), ("cacheclip-export-end.json", b"{}")


def test_a_hostile_archive_writes_nothing_outside_and_nothing_it_made_up(store, tmp_path):
    key = "0" * 32
    names = ("../evil", "/tmp/evil", "cacheclip.json", f"kv/{key}/00/{key}.kv")
    evil = [(name, b"CCKV0002" * 200) for name in names]
    other = ChunkStore.open(tmp_path / "inner" / "other")
    done = other.import_from(archive(BEGIN, *evil, END))
    assert done.damaged == list(names) and other.verify() == []
    assert [p.name for p in (tmp_path / "inner").iterdir()] == ["other"]
    for bad in (archive(("x", b"")), archive((BEGIN[0], b'{"layout": 99}')), io.BytesIO(b"?" * 2000), io.BytesIO()):
        with pytest.raises(StoreError, match="export"):
            other.import_from(bad)
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
        with pytest.raises(StoreError, match="no file"):
            other.import_from(archive(("passages/aa/x.json", b""), kind=kind))


# ------------------------------------------------------------------ metrics, logs


def test_metrics_count_what_happened_in_plain_numbers_and_as_prometheus_text(store):
    passage, ids, kv = put(store, 7)
    store.read(SPACE, ids, passage.id).result()
    store.read(SPACE, chunk(8)[1], passage.id)
    flip(store, 7)
    with pytest.raises(ChunkCorrupt):
        store.read(SPACE, ids, passage.id).result()
    found = store.metrics.snapshot()
    counts = {what: tiers["disk"] for what, tiers in found["counts"].items()}
    assert counts["hits"] == 2 and counts["misses"] == counts["damaged"] == 1 and counts["writes"] == 5
    assert counts["bytes_written"] == 5 * kv.nbytes and counts["bytes_read"] >= kv.nbytes
    assert found["seconds"]["read"]["disk"]["count"] == 1 and found["seconds"]["write"]["disk"]["count"] == 5
    samples = {
        (s.name, s.labels.get("tier"), s.labels.get("le")): s.value
        for family in text_string_to_metric_families(store.metrics.text())
        for s in family.samples
    }
    assert samples["cacheclip_store_hits_total", "disk", None] == 2
    assert samples["cacheclip_store_write_seconds_bucket", "disk", "+Inf"] == 5


def test_damage_is_logged_as_a_json_object_with_the_file_and_the_passage(store, capsys):
    logs.configure("warning", as_json=True)
    try:
        flip(store, 3)
        with pytest.raises(ChunkCorrupt):
            store.read(SPACE, chunk(3)[1], chunk(3)[0].id).result()
        (line,) = capsys.readouterr().err.splitlines()
        record = json.loads(line)
        assert record["level"] == "warning" and record["logger"] == "cacheclip.store"
        assert record["passage"] == chunk(3)[0].id and record["file"].endswith(".kv") and "layer 2" in record["reason"]
    finally:
        logger = logging.getLogger("cacheclip")
        logger.handlers[:], logger.propagate = [], True
