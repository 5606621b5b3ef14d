"""The chunk store: what was committed is there, whole, for everyone; nothing else ever is."""

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cacheclip_jax.errors import BadInput, CacheClipError, ChunkCorrupt, StoreError
from cacheclip_jax.store import LAYOUT_VERSION, ChunkStore, Passage, files, is_chunk_id
from cacheclip_jax.store.blobs import Blobs, translated
from cacheclip_jax.store.records import seal
from eval import kill_index as script
from eval.kill_index import write_random_chunks
from tests.chunks import SPACE, chunk, put, same_bits


@pytest.fixture
def store(tmp_path) -> ChunkStore:
    return ChunkStore.open(tmp_path / "store")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("where", ["file", "tensorstore", "memory"])
def test_what_is_read_is_bit_for_bit_what_was_written(where, dtype, tmp_path):
    space = replace(SPACE, dtype=dtype)
    url = f"memory://{dtype}-{tmp_path.name}" if where == "memory" else tmp_path / "s"
    store = ChunkStore.open(url, direct=where != "tensorstore")
    passage, ids, spans, kv = chunk(0, space=space)
    assert not store.has(space, ids) and store.read(space, ids, passage.id) is None
    assert store.write(space, passage.id, ids, spans, jnp.asarray(kv))
    assert store.has(space, ids)
    assert same_bits(store.read(space, ids, passage.id).result(), kv)
    assert same_bits(store.read(space, np.asarray(ids), passage.id).layer(2), kv[2])
    entry = store.entry(space, ids)
    assert (entry.passage, entry.ids, entry.nbytes) == (passage.id, tuple(ids), kv.nbytes)
    assert entry.spans == tuple(spans)
    if where != "memory":
        other = ChunkStore.open(url, direct=where == "tensorstore")
        assert same_bits(other.read(space, ids, passage.id).result(), kv)


@pytest.mark.parametrize("where", ["file", "memory"])
def test_layers_stream_into_callers_buffers_from_many_threads(where, tmp_path):
    store = ChunkStore.open(tmp_path if where == "file" else f"memory://{tmp_path.name}")
    passage, ids, kv = put(store, 0)
    pending = store.read(SPACE, ids, passage.id, eager=False)
    staging = np.zeros((4, kv.nbytes), np.uint8)

    def fill(i: int) -> None:
        for layer in (2, 0, 1):
            pending.read_layer_into(layer, staging[i].reshape(3, -1)[layer])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(fill, range(4)))
    assert all(row.tobytes() == kv.tobytes() for row in staging)
    typed = np.empty_like(kv[1])
    pending.read_layer_into(1, typed)
    assert same_bits(typed, kv[1])
    for bad in (staging[0], np.empty(kv[0].shape, np.int8), np.empty_like(kv[0]).swapaxes(0, 1)):
        with pytest.raises(BadInput, match="C-contiguous"):
            pending.read_layer_into(0, bad)


def test_zeros_are_stored_like_any_other_values(store):
    passage, ids, spans, kv = chunk(0)
    store.write(SPACE, passage.id, ids, spans, np.zeros_like(kv))
    assert not store.read(SPACE, ids, passage.id).result().any()
    assert [p for p in store.verify() if not p.harmless] == []


def test_reading_into_a_buffer_fills_it_and_refuses_another_shape(store):
    passage, ids, kv = put(store, 0)
    out = np.ones_like(kv)
    assert store.read(SPACE, ids, passage.id, out).result() is out and same_bits(out, kv)
    with pytest.raises(BadInput, match="`out`"):
        store.read(SPACE, ids, passage.id, out[:1])


def test_more_chunks_than_files_may_be_open_are_read_at_once(store, monkeypatch):
    chunks = [put(store, seed) for seed in range(6)]
    monkeypatch.setattr(files, "_MOST_OPEN", 0)
    pending = store.read_all(SPACE, [(ids, passage.id) for passage, ids, _ in chunks])
    assert all(same_bits(one.result(), kv) for one, (_, _, kv) in zip(pending, chunks, strict=True))


def test_threads_that_ask_a_lazy_read_for_layers_at_once_share_one_array(store):
    passage, ids, kv = put(store, 0)
    for _ in range(20):
        pending = store.read(SPACE, ids, passage.id, eager=False)
        with ThreadPoolExecutor(4) as pool:
            layers = list(pool.map(pending.layer, [0, 1, 2, 0, 1, 2, 2]))
        assert all(same_bits(layer, kv[i]) for layer, i in zip(layers, [0, 1, 2, 0, 1, 2, 2], strict=True))
        assert pending.result() is pending.result()


def test_many_are_read_at_once_and_the_missing_are_none(store):
    (one, ids, kv), (other, *_), (_, missing, *_) = put(store, 0), put(store, 1), chunk(2)
    found = store.read_all(SPACE, [(missing, other.id), (ids, one.id)])
    assert found[0] is None and same_bits(found[1].result(), kv)


def test_writing_twice_is_a_no_op(store, tmp_path):
    passage, ids, kv = put(store, 0)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    assert not store.write(SPACE, passage.id, ids, [(0, 1)] * len(ids), kv + 1)
    store.add_passages([passage])
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}


def test_background_writes_all_arrive_even_of_the_same_chunk(store):
    chunks = [chunk(i % 8) for i in range(40)]
    writes = [store.write_async(SPACE, p.id, ids, spans, kv) for p, ids, spans, kv in chunks]
    assert sum(w.result() for w in writes) >= 8
    assert all(same_bits(store.read(SPACE, ids, p.id).result(), kv) for p, ids, _, kv in chunks)


def test_a_background_write_raises_where_it_is_waited_for(store):
    passage, ids, spans, kv = chunk(0)
    with pytest.raises(BadInput, match="finite"):
        store.write_async(SPACE, passage.id, ids, spans, np.full_like(kv, np.inf)).result()
    assert not store.has(SPACE, ids)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_one_value_that_is_not_finite_is_refused(store, dtype, value):
    space = replace(SPACE, dtype=dtype)
    passage, ids, spans, kv = chunk(0, space=space)
    store.write(space, passage.id, ids[:-1], spans[:-1], np.full_like(kv[..., :-1, :], jnp.finfo(dtype).max))
    kv[1, 0, 1, 5, 3] = value
    with pytest.raises(BadInput, match="layer 1"):
        store.write(space, passage.id, ids, spans, kv)


def test_a_chunk_of_another_shape_or_dtype_is_refused(store):
    passage, ids, spans, kv = chunk(0)
    for bad in (kv[:2], kv[..., :4], kv.astype(np.float32), kv[..., 1:, :]):
        with pytest.raises(BadInput, match="chunk cache is"):
            store.write(SPACE, passage.id, ids, spans, bad)
    with pytest.raises(BadInput, match="15 spans"):
        store.write(SPACE, passage.id, ids, spans[1:], kv)
    with pytest.raises(BadInput, match="0 tokens"):
        store.write(SPACE, passage.id, [], [], kv[..., :0, :])
    with pytest.raises(BadInput, match="int8"):
        replace(SPACE, dtype="int8")


# ------------------------------------------------------------------ passages

texts = st.text(st.characters(codec=None, categories=None))  # lone surrogates too
passages = st.builds(
    Passage.make,
    texts,
    texts | st.sampled_from(["../../etc/passwd", "/", "a\x00b", ".", "x" * 5000]),
    st.integers(0, 10**12),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(passages, max_size=5))
def test_passages_come_back_as_they_were_whatever_they_are_called(tmp_path, found):
    store = ChunkStore.open(f"memory://{os.urandom(8).hex()}")
    store.add_passages(found)
    expected = sorted(set(found), key=lambda p: (p.document, p.start, p.end, p.id))
    assert store.passages() == expected
    assert all(store.passage(p.id) == p for p in found)


def test_hostile_document_names_stay_inside_the_store(tmp_path):
    store = ChunkStore.open(tmp_path / "inner" / "store")
    hostile = [Passage.make("text", name) for name in ("../../etc", "/etc/passwd", "a/b\\c", "nul\x00", "é" * 999)]
    store.add_passages(hostile)
    assert {p.name for p in tmp_path.iterdir()} == {"inner"}
    assert {p.name for p in (tmp_path / "inner").iterdir()} == {"store"}
    assert len(store.passages()) == len(hostile)


def test_a_unique_beginning_of_an_id_is_enough_and_an_ambiguous_one_is_not(store):
    ids = [Passage.make(str(i)).id for i in range(400)]
    store.add_passages([Passage.make(str(i)) for i in range(400)])
    assert all(store.resolve(id[:8]) == id for id in ids[:20])
    start = ids[0][:4]
    same = [id for id in ids if id.startswith(start)]
    assert len(same) > 1 or store.resolve(start) == ids[0]
    twin = "abcd" + "0" * 12
    for id in (twin, twin[:-1] + "1"):
        store.blobs.write(f"passages/ab/{id}.json", b"{}")
    with pytest.raises(BadInput, match="more digits"):
        store.resolve("abcd000")


@pytest.mark.parametrize("id", ["beef" * 4, "beef", "", "abc", "../../etc", "BEEF", "x" * 16, "0" * 17])
def test_an_unknown_id_is_named_with_the_way_to_find_one(store, id):
    with pytest.raises(BadInput, match="store ls") as e:
        store.passage(id)
    assert id in str(e.value)
    assert is_chunk_id(id) == (id in ("beef", "beef" * 4))


# ------------------------------------------------------------------ spaces

OTHERS = {
    "model": replace(SPACE, model="beef", model_name="other"),
    "fingerprint": replace(SPACE, model="beef"),
    "dtype": replace(SPACE, dtype="float32"),
    "prefix": replace(SPACE, prefix_ids=(1, 2, 4)),
    "layers": replace(SPACE, num_layers=4),
    "KV heads": replace(SPACE, num_kv_heads=1),
    "stored": replace(SPACE, kv="int8"),
    "layout": replace(SPACE, layout=LAYOUT_VERSION + 1),
}


@pytest.mark.parametrize("part", OTHERS)
def test_another_model_dtype_prefix_shape_or_layout_is_a_miss_and_explained(store, part):
    passage, ids, _ = put(store, 0)
    put(store, 1, replace(SPACE, model="x", model_name="far", dtype="float16", prefix_ids=()))
    assert store.explain_miss(SPACE) is None
    assert not store.has(OTHERS[part], ids)
    assert store.read(OTHERS[part], ids, passage.id) is None
    why = store.explain_miss(OTHERS[part])
    assert part in why and "far" not in why
    if part == "prefix":
        assert "3 tokens" in why and "from token 2" in why


def test_the_models_name_is_for_people_and_nothing_is_explained_without_another_space(store):
    assert store.explain_miss(SPACE) is None
    _, ids, _ = put(store, 0)
    assert store.has(replace(SPACE, model_name="renamed"), ids)


def test_keys_depend_on_every_part_and_on_every_id():
    keys = {SPACE.key} | {space.key for space in OTHERS.values()}
    assert len(keys) == len(OTHERS)  # two of them differ in the name alone
    assert len({SPACE.chunk_key(ids) for ids in ([1], [2], [1, 2], [2, 1], [1, 0], [0, 1])}) == 6
    assert SPACE.chunk_key([1, 2]) == SPACE.chunk_key(np.array([1, 2]))


# ------------------------------------------------------------------ commits


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


# ------------------------------------------------------------------ damage

KINDS = {
    "marker": "cacheclip.json",
    "passage": "passages/*/*.json",
    "space": "kv/*/space.json",
    "data": "kv/*/??/*.kv",
}


def served(root: Path) -> list[tuple[object, object]]:
    """What a fresh process gets of each chunk and passage: the value, or the name of the error."""
    out = []
    for seed in range(2):
        passage, ids, _, _ = chunk(seed)
        try:
            store = ChunkStore.open(root)
            pending = store.read(SPACE, ids, passage.id)
            kv = pending and pending.result().tobytes()
        except CacheClipError as e:
            kv = type(e)
        try:
            text = ChunkStore.open(root).passage(passage.id)
        except CacheClipError as e:
            text = type(e)
        out.append((kv, text))
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "delete", "grow"])
def test_damage_to_any_file_is_found_or_harmless_and_never_wrong_bytes(kind, damage, tmp_path):
    root = tmp_path / "s"
    store = ChunkStore.open(root)
    for seed in range(2):
        put(store, seed)
    good = served(root)
    file = min(root.glob(KINDS[kind]))
    data = file.read_bytes()
    rng = np.random.default_rng(len(data))
    for _ in range(40 if damage == "flip" else 1 if damage in ("empty", "delete") else 5):
        at = int(rng.integers(len(data)))
        bit = 1 << int(rng.integers(8))
        file.write_bytes(
            {
                "flip": data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :],
                "truncate": data[:at],
                "grow": data + data[:at] + b"?",
            }.get(damage, b"")
        )
        if damage == "delete":
            file.unlink()
        for got, was in zip(served(root), good, strict=True):
            assert got[0] in (was[0], None, ChunkCorrupt, StoreError)
            assert got[1] in (was[1], BadInput, ChunkCorrupt, StoreError)
        problems = {p.kind for p in store.verify()}
        expected = {("passage", "delete"): "unowned"}.get((kind, damage), kind)
        assert expected in problems or kind == "marker" or (kind, damage) == ("data", "delete")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    assert served(root) == good and store.verify() == []


def test_damaged_data_names_the_passage_and_the_file_and_is_repaired_by_writing_again(store, tmp_path):
    passage, ids, kv = put(store, 0)
    file = next(tmp_path.rglob("*.kv"))
    data = bytearray(file.read_bytes())
    data[-kv.nbytes + 5] ^= 4
    file.write_bytes(data)
    with pytest.raises(ChunkCorrupt, match=f"{passage.id}.*{file}.*layer 0") as e:
        store.read(SPACE, ids, passage.id).result()
    assert e.value.chunk == passage.id
    assert same_bits(store.read(SPACE, ids, passage.id).layer(2), kv[2])  # the other layers are whole
    store.discard(SPACE, ids)
    assert store.write(SPACE, passage.id, ids, chunk(0)[2], kv)
    assert same_bits(store.read(SPACE, ids, passage.id).result(), kv)
    store.discard(SPACE, ids)
    assert store.has(SPACE, ids)  # what is whole stays


def test_a_damaged_head_or_passage_is_repaired_by_writing_again(store, tmp_path):
    passage, ids, kv = put(store, 0)
    for pattern in (KINDS["data"], KINDS["passage"]):
        next((tmp_path / "store").glob(pattern)).write_bytes(b"{}")
    assert not store.has(SPACE, ids)
    with pytest.raises(ChunkCorrupt, match=passage.id):
        store.read(SPACE, ids, passage.id).result()
    with pytest.raises(ChunkCorrupt, match="store rm"):
        store.passages()
    put(store, 0)
    assert store.verify() == [] and same_bits(store.read(SPACE, ids, passage.id).result(), kv)


def test_files_swapped_between_chunks_are_found(store, tmp_path):
    put(store, 0)
    put(store, 1)
    first, second = sorted((tmp_path / "store").glob(KINDS["data"]))
    first.write_bytes(second.read_bytes())
    assert [p.kind for p in store.verify()] == ["data"]
    first, second = sorted((tmp_path / "store").glob(KINDS["passage"]))
    first.write_bytes(second.read_bytes())
    assert sorted(p.kind for p in store.verify()) == ["data", "passage"]


# ------------------------------------------------------------------ opening


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


# ------------------------------------------------------------------ maintenance


def test_stats_count_what_was_written(store):
    other = replace(SPACE, model="beef", model_name="aux", head_dim=4)
    for seed in range(3):
        put(store, seed)
    put(store, 0, other)
    store.add_passages([Passage.make("elsewhere", "doc 2")])
    stats = store.stats()
    assert (stats.passages, stats.documents, stats.chunks, stats.tokens) == (4, 2, 4, 64)
    by_name = {s.space.model_name: s for s in stats.spaces}
    assert by_name["tiny"].chunks == 3 and by_name["tiny"].bytes_per_token == 3 * 2 * 2 * 8 * 2
    assert stats.nbytes == sum(e.nbytes for e in store.entries()) == sum(s.nbytes for s in stats.spaces)


def test_verify_reports_its_progress_and_separates_the_harmless(store):
    put(store, 0)
    put(store, 1)
    store.blobs.delete(f"passages/{chunk(0)[0].id[:2]}/{chunk(0)[0].id}.json")
    (Path(store.url) / "passages/.tmp-1").write_bytes(b"?")
    seen = []
    problems = store.verify(lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert {p.kind for p in problems} == {"unfinished", "unowned"} and all(p.harmless for p in problems)


def test_removing_a_passage_keeps_the_chunk_cache_of_its_twin(store):
    passage, ids, spans, kv = chunk(0)
    twin, other = Passage.make(passage.text, "copy"), put(store, 1)
    store.add_passages([passage, twin])
    store.write(SPACE, passage.id, ids, spans, kv)
    assert store.remove(passage.id[:8]) == 0
    assert same_bits(store.read(SPACE, ids, twin.id).result(), kv)
    assert store.remove(twin.id) == 1
    assert not store.has(SPACE, ids) and store.verify() == []
    assert store.passages() == [other[0]] and store.has(SPACE, other[1])


def test_removing_reaches_every_space_and_several_passages_at_once(store):
    spaces = (SPACE, replace(SPACE, dtype="float32"))
    for space in spaces:
        for seed in range(3):
            put(store, seed, space)
    assert store.remove(chunk(0)[0].id, chunk(1)[0].id) == 4
    assert {e.passage for e in store.entries()} == {chunk(2)[0].id} and len(store.passages()) == 1
    with pytest.raises(BadInput, match="store ls"):
        store.remove(chunk(0)[0].id)


def test_gc_drops_the_oldest_first_and_keeps_every_text(store):
    for seed in range(5):
        put(store, seed)
    each = next(store.entries()).nbytes
    report = store.gc(max_bytes=2 * each + 1)
    assert (report.chunks, report.bytes_freed, report.bytes_left) == (3, 3 * each, 2 * each)
    assert [store.has(SPACE, chunk(seed)[1]) for seed in range(5)] == [False] * 3 + [True] * 2
    assert len(store.passages()) == 5 and store.verify() == []


def test_gc_spares_a_write_under_way_whatever_the_clock_says(store, tmp_path, monkeypatch):
    passage, ids, spans, kv = chunk(0)
    reports, real = [], os.fsync

    def collect(fd):
        real(fd)
        if not reports:
            for clock in (0.0, time.time(), 1e12):
                with monkeypatch.context() as patch:
                    patch.setattr(time, "time", lambda clock=clock: clock)
                    reports.append(ChunkStore.open(store.url).gc(1 << 40, grace=-1.0))

    store.write(SPACE, passage.id, ids[1:], spans[1:], kv[..., 1:, :])
    monkeypatch.setattr(os, "fsync", collect)
    store.write(SPACE, passage.id, ids, spans, kv)
    assert [r.orphans for r in reports] == [0, 0, 0]
    assert same_bits(store.read(SPACE, ids, passage.id).result(), kv)


def test_what_is_being_read_can_be_removed_and_is_still_read(store):
    passage, ids, kv = put(store, 0)
    lazy, eager = (store.read(SPACE, ids, passage.id, eager=eager) for eager in (False, True))
    assert store.gc(0).chunks == 1 and not store.has(SPACE, ids)
    assert same_bits(lazy.layer(1), kv[1]) and same_bits(lazy.result(), kv) and same_bits(eager.result(), kv)


def test_killing_the_writer_loses_nothing(tmp_path):
    done = kill_index("--kills", 2, "--span", 0.3, "--chunks", 60, "--store", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(done.stdout)
    assert summary["kills"] == 2 and summary["lost"] == [] and summary["completed"]
