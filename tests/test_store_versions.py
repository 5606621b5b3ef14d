"""Documents that change: readers see one version or the other, and what is outdated goes."""

import threading

import pytest

from cacheclip_jax.errors import BadInput
from cacheclip_jax.store import ChunkStore, Passage
from cacheclip_jax.store import versions as module
from tests.chunks import SPACE, chunk, same_bits


def version(number: int, size: int = 3, document: str = "doc") -> list[Passage]:
    return [Passage.make(f"text {i} of version {number} of {document}", document, i) for i in range(size)]


def index(store: ChunkStore, passages: list[Passage], replace: bool = True) -> None:
    """What an engine does: texts, chunk caches, then the version."""
    store.add_passages(passages)
    for passage in passages:
        _, ids, spans, kv = chunk(int(passage.id[:6], 16))
        store.write(SPACE, passage.id, ids, spans, kv)
    store.publish(passages, replace={p.document for p in passages} if replace else ())


def test_a_replaced_documents_passages_are_readable_but_no_longer_listed_until_gc_removes_them(store):
    index(store, version(1))
    index(store, version(1, document="other"))
    index(store, version(2))
    assert store.passages() == version(2) + version(1, document="other")
    old = version(1)[0]
    assert store.passage(old.id) == old and store.has(SPACE, chunk(int(old.id[:6], 16))[1])
    store.gc(1 << 40)
    assert store.passage(old.id) == old
    store.gc(1 << 40, grace=0.0)
    assert len(store.passage_ids(all=True)) == 6 and store.stats().chunks == 6 and store.verify() == []
    with pytest.raises(BadInput, match="store ls"):
        store.passage(old.id)


def test_a_passage_that_two_versions_share_stays(store):
    index(store, version(1))
    index(store, [*version(1)[:1], *version(2)[1:]])
    store.gc(1 << 40, grace=0.0)
    assert store.passages() == [*version(1)[:1], *version(2)[1:]] and store.stats().chunks == 3


def test_without_replacing_passages_are_added_to_the_document(store):
    index(store, version(1), replace=False)
    index(store, version(2), replace=False)
    assert len(store.passages()) == 6 and store.versions() == {}
    index(store, version(3))
    index(store, version(4), replace=False)
    assert set(store.passages()) == {*version(3), *version(4)}


def test_readers_see_the_old_version_or_the_new_one_never_a_mixture(store):
    index(store, version(0))
    done, seen = threading.Event(), set()

    def read() -> None:
        reader = ChunkStore.open(store.url)
        while not done.is_set():
            seen.add(tuple(reader.passage_ids()))

    thread = threading.Thread(target=read)
    thread.start()
    for number in range(1, 25):
        index(store, version(number))
        if number % 5 == 0:
            store.gc(1 << 40, grace=0.0)
    done.set()
    thread.join()
    every = {tuple(sorted(p.id for p in version(number))) for number in range(25)}
    assert len(seen) > 1 and all(any(set(ids) <= set(one) for one in every) for ids in seen)


def test_a_withdrawn_document_is_gone_with_its_caches_and_an_interrupted_withdrawal_is_still_one(store, monkeypatch):
    index(store, version(1), replace=False)
    index(store, version(1, document="other"))
    assert store.withdraw("doc") == 3 and store.withdraw("nothing") == 0
    assert store.passages() == version(1, document="other") and store.stats().chunks == 3
    monkeypatch.setattr(ChunkStore, "remove", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.withdraw("other")
    monkeypatch.undo()
    again = ChunkStore.open(store.url)
    assert again.passages() == []
    again.gc(1 << 40, grace=0.0)
    assert again.stats().chunks == 0 and again.verify() == []


def test_removing_a_passage_takes_it_out_of_its_document(store):
    index(store, version(1))
    store.remove(version(1)[1].id)
    assert store.versions()["doc"].passages == (version(1)[0].id, version(1)[2].id)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/", "a\x00b", "é" * 5000, "\udcff"])
def test_a_documents_name_may_be_anything_and_stays_inside_the_store(store, name, tmp_path):
    index(store, version(1, document=name))
    index(store, version(2, document=name))
    assert store.passages() == version(2, document=name)
    assert [p.name for p in tmp_path.iterdir()] == ["store"]


def test_a_damaged_record_hides_nothing_is_found_and_healed(store, tmp_path):
    index(store, version(1))
    (file,) = (tmp_path / "store").glob("documents/*/*.json")
    data = bytearray(file.read_bytes())
    data[20] ^= 1
    file.write_bytes(data)
    assert store.passages() == version(1) and [p.kind for p in store.verify()] == ["document"]
    index(store, version(2))
    assert store.passages() == version(2) and store.verify() == []


def test_what_is_read_while_its_document_is_replaced_is_read_whole(store):
    index(store, version(1))
    old = version(1)[0]
    _, ids, _, kv = chunk(int(old.id[:6], 16))
    pending = store.read(SPACE, ids, old.id, eager=False)
    index(store, version(2))
    store.gc(1 << 40, grace=0.0)
    assert not store.has(SPACE, ids) and same_bits(pending.result(), kv)


def test_documents_that_were_never_published_cost_no_reads(store, monkeypatch):
    store.add_passages(version(1))
    monkeypatch.setattr(ChunkStore, "read_passages", lambda *_: pytest.fail("read"))
    assert len(store.passage_ids()) == 3 and module.outdated(store, ["x"]) == {}
