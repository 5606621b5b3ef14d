"""A bucket behind a local disk, over a real S3-compatible server: reads, writes, eviction, pins, outages."""

import logging
import os
import socket
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace

import pytest

from cacheclip_jax.engine import CacheClip
from cacheclip_jax.errors import BadInput, ChunkUnreadable, StoreError
from cacheclip_jax.store import ChunkStore, Passage, blobs
from cacheclip_jax.store import tier as module
from cacheclip_jax.store.usage import Usage
from tests.chunks import SPACE, chunk, put, same_bits

server = pytest.importorskip("moto.server")


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of an S3 server with one bucket, `bucket`."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/bucket", method="PUT"))
        yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def url(s3, request) -> str:
    return f"s3://bucket/{abs(hash(request.node.name))}?endpoint={s3}&region=us-east-1"


@pytest.fixture
def closed() -> str:
    """A bucket's URL where nobody answers."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    os.environ.setdefault("AWS_ACCESS_KEY_ID", "test")
    os.environ.setdefault("AWS_SECRET_ACCESS_KEY", "test")
    return f"s3://bucket/x?endpoint=http://127.0.0.1:{port}&region=us-east-1"


def test_a_bucket_holds_what_a_disk_would(url):
    store = ChunkStore.open(url)
    passage, ids, kv = put(store, 0)
    other = ChunkStore.open(url, create=False)
    assert other.passages() == [passage] and same_bits(other.read(SPACE, ids, passage.id).result(), kv)
    assert same_bits(other.read(SPACE, ids, passage.id, eager=False).layer(1), kv[1])
    quantised = replace(SPACE, kv="int8")
    put(store, 1, quantised)
    assert other.stats().chunks == 2 and other.verify() == []
    assert other.remove(passage.id) == 1 and not store.has(SPACE, ids)
    with pytest.raises(BadInput, match="endpoint"):
        ChunkStore.open("s3://bucket/x?endpoints=1")


def test_reads_go_through_to_the_disk_and_writes_reach_the_bucket_behind(url, tmp_path):
    one = ChunkStore.open(url, local=tmp_path / "one")
    passage, ids, kv = put(one, 0)
    one.publish([passage], replace={"doc"})
    one.flush(30)
    assert one.blobs.pending() == [] and ChunkStore.open(url).passages() == [passage]
    two = ChunkStore.open(url, local=tmp_path / "two")
    assert two.passages() == [passage]
    for _ in range(3):
        assert same_bits(two.read(SPACE, ids, passage.id).result(), kv)
    counts = two.metrics.snapshot()["counts"]
    assert counts["fetches"] == {"bucket": 1} and counts["local_hits"] == {"disk": 2}
    assert len(list((tmp_path / "two").rglob("*.kv"))) == 1 and two.verify() == []
    newer = Passage.make("newer", "doc")
    two.add_passages([newer])
    two.publish([newer], replace={"doc"})
    assert two.passages() == [newer]
    two.flush(30)
    assert one.passages() == [newer] == ChunkStore.open(url).passages()


def test_a_local_copy_that_is_damaged_is_replaced_by_the_buckets(url, tmp_path):
    store = ChunkStore.open(url, local=tmp_path)
    passage, ids, kv = put(store, 0)
    store.flush(30)
    (file,) = tmp_path.rglob("*.kv")
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(StoreError, match="damaged"):
        store.read(SPACE, ids, passage.id).result()
    store.discard(SPACE, ids)
    assert same_bits(store.read(SPACE, ids, passage.id).result(), kv)


def test_uploads_that_were_interrupted_go_on_with_the_next_process(url, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(module.TieredBlobs, "_upload", lambda self, key: None)  # killed before any
        store = ChunkStore.open(url, local=tmp_path)
        passage, ids, kv = put(store, 0)
        with pytest.raises(StoreError, match=r"safe in .*next process"):
            store.flush(0.1)
        assert not ChunkStore.open(url).has(SPACE, ids)
    ChunkStore.open(url, local=tmp_path).flush(30)
    assert same_bits(ChunkStore.open(url).read(SPACE, ids, passage.id).result(), kv)


def test_a_bucket_that_does_not_answer_is_said_so_soon_and_what_the_disk_has_is_served(url, closed, tmp_path):
    store = ChunkStore.open(url, local=tmp_path)
    passage, ids, kv = put(store, 0)
    store.flush(30)
    away = ChunkStore.open(closed, local=tmp_path)
    assert away.passages() == [passage] and same_bits(away.read(SPACE, ids, passage.id).result(), kv)
    _, missing, spans, other = chunk(1)
    assert not away.has(SPACE, missing)
    with pytest.raises(ChunkUnreadable, match="can't be read now"):
        away.read(SPACE, missing, passage.id).result()
    away.discard(SPACE, missing)
    assert away.write(SPACE, passage.id, missing, spans, other)  # and is answered from, though the bucket is away
    assert same_bits(away.read(SPACE, missing, passage.id).result(), other)
    assert away.blobs.pending() and away.explain_miss(replace(SPACE, model="x"))
    with pytest.raises(StoreError, match="can't be reached"):
        ChunkStore.open(closed)


def test_the_disk_stays_within_its_size_and_gives_up_what_is_least_worth(url, tmp_path):
    limit = 4 * 8192
    store = ChunkStore.open(url, local=tmp_path, local_bytes=limit)
    first = put(store, 0)
    for seed in range(1, 9):
        put(store, seed)
        store.flush(30)
        store.read(SPACE, first[1], first[0].id).result()  # often used: stays
    store.pool._evict()
    local = {file.stem for file in tmp_path.rglob("*.kv")}
    assert sum(file.stat().st_size for file in tmp_path.rglob("*.kv")) <= limit
    assert SPACE.chunk_key(first[1]) in local and 1 < len(local) < 9
    assert all(store.has(SPACE, chunk(seed)[1]) for seed in range(9))
    assert same_bits(store.read(SPACE, chunk(1)[1], chunk(1)[0].id).result(), chunk(1)[3])


def test_pinned_documents_are_never_evicted_nor_collected(url, tmp_path):
    store = ChunkStore.open(url, local=tmp_path, local_bytes=2 * 8192)
    kept = Passage.make("keep me", "precious")
    _, ids, spans, kv = chunk(100)
    store.add_passages([kept])
    store.pin("precious")
    store.write(SPACE, kept.id, ids, spans, kv)
    for seed in range(6):
        put(store, seed)
        store.flush(30)
    store.pool._evict()
    assert SPACE.chunk_key(ids) in {file.stem for file in tmp_path.rglob("*.kv")}
    assert store.pinned() == ["precious"] and store.gc(0).chunks == 6 and store.has(SPACE, ids)
    store.unpin("precious")
    assert store.pinned() == [] and store.gc(0).chunks == 1


def test_a_lost_or_damaged_usage_file_costs_counts_alone(url, tmp_path):
    store = ChunkStore.open(url, local=tmp_path)
    passage, ids, kv = put(store, 0)
    store.flush(30)
    (tmp_path / "usage.db").write_bytes(b"not a database" * 100)
    again = ChunkStore.open(url, local=tmp_path)
    assert same_bits(again.read(SPACE, ids, passage.id).result(), kv)
    (tmp_path / "usage.db").unlink(missing_ok=True)
    assert ChunkStore.open(url, local=tmp_path).pool.usage.size() > 0


def test_value_is_uses_times_cost_over_size_and_ages(tmp_path):
    usage = Usage(tmp_path / "usage.db")
    usage.add([("large", 100, 100.0, ""), ("small", 10, 100.0, ""), ("dear", 100, 900.0, ""), ("used", 100, 100.0, "")])
    for _ in range(5):
        usage.use("used")
    assert usage.victims(1, lambda *_: False) == ["large"]
    assert usage.victims(205, lambda *_: False) == ["large", "used", "dear"]
    usage.remove("large")
    assert usage.victims(1, lambda key, text: key == "used") == ["dear"]
    usage.add([("new", 100, 100.0, "")])  # as good as what was given up last, for now
    assert usage.victims(1, lambda *_: False)[0] != "new"


def test_a_directory_takes_no_local_tier(tmp_path):
    with pytest.raises(BadInput, match="local itself"):
        ChunkStore.open(tmp_path / "a", local=tmp_path / "b")


def test_a_bucket_that_is_slow_is_waited_for_once_then_left_alone(url, tmp_path, monkeypatch):
    store = ChunkStore.open(url, local=tmp_path)
    passage, *_ = put(store, 0)
    store.flush(30)
    monkeypatch.setattr(blobs, "_TIMEOUT", 0.4)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        slow = ChunkStore.open(f"s3://bucket/x?endpoint=http://127.0.0.1:{silent.getsockname()[1]}", local=tmp_path)
        for most in (3.0, 0.2):
            started = time.monotonic()
            with pytest.raises(ChunkUnreadable):
                slow.read(SPACE, chunk(1)[1], passage.id).result()
            assert time.monotonic() - started < most


def test_an_answer_comes_from_encoding_anew_when_the_bucket_does_not_answer_and_says_so(url, closed, pair, tmp_path):
    primary, aux = pair
    texts = ["The lamp burns oil. " * 3, "The mat at the end of the stairs is red. " * 3]
    question, options = "Which colour is the mat?", {"max_new_tokens": 4, "ratio": 0.2}
    clip = CacheClip.load(primary, aux, ChunkStore.open(url, local=tmp_path), dtype="float32")
    ids = clip.index([Passage.make(text) for text in texts]).passages
    clip.store.flush(30)
    before = clip.ask(question, list(ids), **options)
    for file in tmp_path.rglob("*.kv"):
        file.unlink()
    away = CacheClip.load(primary, aux, ChunkStore.open(closed, local=tmp_path), dtype="float32")
    after = away.ask(question, list(ids), **options)
    assert after.token_ids == before.token_ids and set(after.repaired) == set(ids)
    assert any("can't be read now" in warning and "encoded anew" in warning for warning in after.warnings)
    again = away.ask(question, list(ids), **options)
    assert again.token_ids == before.token_ids and not again.repaired
