"""The chunk store: damage is found, named and repaired, and never served."""

from pathlib import Path

import numpy as np
import pytest

from cacheclip_jax.errors import BadInput, CacheClipError, ChunkCorrupt, StoreError
from cacheclip_jax.store import ChunkStore, files
from tests.chunks import SPACE, chunk, put, same_bits

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


@pytest.mark.parametrize("fate", ["damaged", "cut", "removed"])
def test_what_is_wrong_with_a_file_that_was_found_shows_when_it_is_read(store, tmp_path, fate, monkeypatch):
    monkeypatch.setattr(files, "_MOST_OPEN", 0)  # so that what is removed can't be read
    passage, ids, kv = put(store, 0)
    file = next(tmp_path.rglob("*.kv"))
    if fate != "removed":
        file.write_bytes(b"?" * 5000 if fate == "damaged" else file.read_bytes()[:100])
    pending = store.read(SPACE, ids, passage.id, eager=False)
    if fate == "removed":
        file.unlink()
    with pytest.raises(ChunkCorrupt, match=passage.id):
        pending.read_layers_into(0, np.empty((len(kv), kv[0].nbytes), np.uint8))
    counts = store.metrics.snapshot()["counts"]
    assert counts["hits"] == counts["damaged"] == {"disk": 1} and "misses" not in counts


def test_files_swapped_between_chunks_are_found(store, tmp_path):
    put(store, 0)
    put(store, 1)
    first, second = sorted((tmp_path / "store").glob(KINDS["data"]))
    first.write_bytes(second.read_bytes())
    assert [p.kind for p in store.verify()] == ["data"]
    first, second = sorted((tmp_path / "store").glob(KINDS["passage"]))
    first.write_bytes(second.read_bytes())
    assert sorted(p.kind for p in store.verify()) == ["data", "passage"]
