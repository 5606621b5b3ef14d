"""The chunk store: what was committed is there, whole, for everyone; nothing else ever is."""

import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cacheclip_jax.errors import BadInput, ChunkCorrupt
from cacheclip_jax.store import LAYOUT_VERSION, ChunkStore, Passage, files, is_chunk_id
from cacheclip_jax.store.chunkfile import checksum, joined
from tests.chunks import SPACE, chunk, put, same_bits


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
            pending.read_layers_into(layer, staging[i].reshape(3, -1)[layer])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(fill, range(4)))
    assert all(row.tobytes() == kv.tobytes() for row in staging)
    typed = np.empty_like(kv[1])
    pending.read_layers_into(1, typed)
    assert same_bits(typed, kv[1])
    pending.read_layers_into(1, staging[1, : 2 * kv[0].nbytes])
    assert staging[1, : 2 * kv[0].nbytes].tobytes() == kv[1:].tobytes()
    for bad in (staging[0, 1:], np.empty(kv[0].shape, np.int8), np.empty_like(kv[0]).swapaxes(0, 1)):
        with pytest.raises(BadInput, match="C-contiguous"):
            pending.read_layers_into(0, bad)
    for first in (-1, 2):
        with pytest.raises(BadInput, match="the chunk cache has 3"):
            pending.read_layers_into(first, staging[1, : 2 * kv[0].nbytes])


@given(st.integers(1, 20_000), st.integers(1, 5), st.integers(0, 99))
@settings(deadline=None)
def test_a_checksum_of_equal_parts_follows_from_theirs(size, count, seed):
    data = np.random.default_rng(seed).integers(0, 256, (count, size), np.uint8)
    assert joined([checksum(part) for part in data], size) == checksum(data.reshape(-1))


@pytest.mark.parametrize("kind", ["exact", "int8"])
@pytest.mark.parametrize("where", ["file", "memory"])
def test_a_chunk_is_read_into_one_piece_or_pieces_of_any_size_and_checked(where, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_MOST_BUFFERS", 3)  # of one call: several are needed
    store = ChunkStore.open(tmp_path if where == "file" else f"memory://{tmp_path.name}")
    space = replace(SPACE, kv=kind)
    passage, ids, kv = put(store, 0, space)
    expected = store.read(space, ids, passage.id).result()
    layers, whole = np.zeros((2, 3, expected[0].nbytes), np.uint8)
    cuts = (0, 1, 200, 512, layers.shape[1])
    pieces = [[row[a:b] for a, b in itertools.pairwise(cuts)] for row in layers]
    store.read(space, ids, passage.id, eager=False).read_scattered(pieces)
    store.read(space, ids, passage.id, eager=False).read_layers_into(0, whole)
    assert layers.tobytes() == whole.tobytes() == expected.tobytes()
    if where == "file":
        (path,) = tmp_path.glob("kv/*/??/*.kv")
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        with pytest.raises(ChunkCorrupt, match="layer 2 fails its checksum"):
            store.read(space, ids, passage.id, eager=False).read_scattered(pieces)
        with pytest.raises(ChunkCorrupt, match="layer 2 fails its checksum"):
            store.read(space, ids, passage.id, eager=False).read_layers_into(0, whole)


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
