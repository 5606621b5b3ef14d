"""Tenants, permissions, and stores that were made to do harm."""

import json
import os
import stat

import crc32c
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheclip_jax.errors import BadInput
from cacheclip_jax.store import ChunkStore
from cacheclip_jax.store.chunkfile import PRELUDE, unpack
from tests.chunks import SPACE, chunk, put, same_bits


def test_namespaces_see_nothing_of_each_other(tmp_path):
    stores = {name: ChunkStore.open(tmp_path, namespace=name) for name in ("", "acme", "zenith")}
    for seed, store in enumerate(stores.values()):
        put(store, seed)
    for seed, store in enumerate(stores.values()):
        mine = chunk(seed)
        assert store.passages() == [mine[0]] and store.stats().chunks == 1 and store.verify() == []
        for other in {0, 1, 2} - {seed}:
            passage, ids, *_ = chunk(other)
            assert not store.has(SPACE, ids) and store.read(SPACE, ids, passage.id) is None
            with pytest.raises(BadInput):
                store.passage(passage.id)
    assert stores["acme"].gc(0).chunks == 1 and stores["zenith"].stats().chunks == stores[""].stats().chunks == 1


def test_a_hit_is_a_matter_of_the_own_namespaces_files_alone(tmp_path, monkeypatch):
    put(ChunkStore.open(tmp_path, namespace="acme"), 0)
    touched, real = [], os.open
    store = ChunkStore.open(tmp_path, namespace="zenith")
    monkeypatch.setattr(os, "open", lambda path, *args: touched.append(str(path)) or real(path, *args))
    put(store, 0)
    store.read(SPACE, chunk(0)[1], chunk(0)[0].id).result()
    assert touched and not [path for path in touched if "acme" in path]


def test_sharing_namespaces_share_chunk_caches_but_no_texts(tmp_path):
    one, two = (ChunkStore.open(tmp_path, namespace=name, share=True) for name in ("acme", "zenith"))
    passage, ids, kv = put(one, 0)
    assert same_bits(two.read(SPACE, ids, passage.id).result(), kv)
    assert two.passages() == [] and not ChunkStore.open(tmp_path, namespace="aloof").has(SPACE, ids)
    assert ChunkStore.open(tmp_path).has(SPACE, ids)
    two.add_passages([passage])
    assert two.remove(passage.id) == 0 and one.has(SPACE, ids) and one.verify() == two.verify() == []


@pytest.mark.parametrize("name", ["..", "../x", "a/b", "A", "", "é", "-a", "x" * 64, "a b", "a\n", "nul\x00"])
def test_a_name_that_could_leave_the_store_or_collide_is_refused(name, tmp_path):
    if name:
        with pytest.raises(BadInput, match="namespace"):
            ChunkStore.open(tmp_path / "store", namespace=name)
    else:
        ChunkStore.open(tmp_path / "store", namespace=name)
    assert {p.name for p in tmp_path.iterdir()} <= {"store"}


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_a_new_store_is_its_owners_alone_and_an_existing_directory_says_who_else_may(tmp_path, umask):
    before = os.umask(umask)
    try:
        (tmp_path / "group").mkdir()
        (tmp_path / "group").chmod(0o750)
        for name, folder, file in (("new", 0o700, 0o600), ("group", 0o750, 0o640)):
            put(ChunkStore.open(tmp_path / name), 0)
            put(ChunkStore.open(tmp_path / name, namespace="acme"), 0)
            paths = [tmp_path / name, *(tmp_path / name).rglob("*")]
            modes = {(path.is_dir(), stat.S_IMODE(path.stat().st_mode)) for path in paths}
            assert modes == {(True, folder), (False, file)}
    finally:
        os.umask(before)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=6),
)
fields = ("space", "chunk", "passage", "text", "shape", "kv", "nbytes", "created", "tables")


@given(st.dictionaries(st.sampled_from([*fields, "evil"]), json_values) | json_values, st.booleans())
def test_a_head_that_was_forged_with_a_right_checksum_is_refused(record, complete):
    if complete and isinstance(record, dict):
        record = dict.fromkeys(fields, 1) | record
    body = json.dumps(record).encode()[: PRELUDE - 12].ljust(PRELUDE - 12, b"\0")
    head = b"CCKV0002" + crc32c.crc32c(body).to_bytes(4, "little") + body
    with pytest.raises(ValueError):
        unpack(head)
