"""Faults against the chunk store, by config: what was committed stays, nothing else is ever served."""

from __future__ import annotations

import datetime
import errno
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from ml_collections import ConfigDict

from cacheclip_jax.errors import ChunkCorrupt, StoreError
from cacheclip_jax.store import ChunkStore, Passage, Space
from eval import machine
from eval.script import start

SPACE = Space("faulty", "faulty", "bfloat16", (1, 2, 3), num_layers=4, num_kv_heads=2, head_dim=32)
TOKENS, CHUNKS = 48, 300
SPANS = [(i, i + 1) for i in range(TOKENS)]


def passage(i: int) -> Passage:
    return Passage.make(f"text {i}", f"document {i % 10}", i)


def ids(i: int) -> list[int]:
    return [i, *range(TOKENS - 1)]


def kv(i: int) -> np.ndarray:
    """What chunk i's cache holds, whoever asks."""
    values = np.random.default_rng(i).standard_normal(SPACE.shape(TOKENS), np.float32)
    return values.astype(SPACE.numpy_dtype)


def put(store: ChunkStore, i: int) -> bool:
    store.add_passages([passage(i)])
    return store.write(SPACE, passage(i).id, ids(i), SPANS, kv(i))


def get(store: ChunkStore, i: int) -> bool | None:
    """Whether chunk i is there with the right bytes; None when it isn't there. Raises what the store raises."""
    pending = store.read(SPACE, ids(i), passage(i).id)
    return None if pending is None else pending.result().tobytes() == kv(i).tobytes()


def heal(store: ChunkStore, i: int) -> None:
    """What an answer does about a damaged chunk whose text is kept."""
    store.discard(SPACE, ids(i))
    put(store, i)


# ------------------------------------------------------------------ kill -9


def kills(root: Path, times: int, seed: int) -> dict[str, Any]:
    """An index, an ask and a gc process over one store; one at random is killed and started again, `times` times."""
    # Forked from a server that has no threads, whose locks a fork would copy as they are.
    rng, context = random.Random(seed), multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["eval.fault_store"])
    journal, wrong = root / "journal", root / "wrong"
    url = root / "store"
    roles = {"index": _index, "ask": _ask, "gc": _gc}

    def start(role: str) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=_reporting, args=(wrong, roles[role], url, journal, rng.random()))
        process.start()
        return process

    running = {role: start(role) for role in roles}
    killed, checks = Counter[str](), 0
    for turn in range(times):
        time.sleep(rng.uniform(0.02, 0.35))
        role = rng.choice(list(roles))
        pid = running[role].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        running[role].join()
        killed[role] += 1
        if turn % 25 == 24:
            checks += _check(context, wrong, url, journal)
        running[role] = start(role)
    for process in running.values():
        process.kill()
        process.join()
    checks += _check(context, wrong, url, journal, last=True)
    problems = wrong.read_text().splitlines() if wrong.exists() else []
    committed = sum(op == "+" for op in _journal(journal).values())
    writes = sum(1 for line in journal.open() if line.startswith("+"))
    return {"kills": dict(killed), "writes": writes, "committed": committed, "checks": checks, "wrong": problems}


def _index(url: Path, journal: Path, seed: float) -> None:
    """Writes random chunks, notes each once it is committed; removes some, and notes that before."""
    rng, store = random.Random(seed), ChunkStore.open(url)
    with journal.open("a") as log:
        while True:
            i = rng.randrange(CHUNKS)
            if rng.random() < 0.1:
                print(f"-{i}", file=log, flush=True)
                store.drop(SPACE.key, SPACE.chunk_key(ids(i)))
            else:
                put(store, i)
                print(f"+{i}", file=log, flush=True)


def _ask(url: Path, journal: Path, seed: float) -> None:
    """Reads random chunks, and repairs what it finds damaged."""
    rng, store = random.Random(seed), ChunkStore.open(url)
    while True:
        i = rng.randrange(CHUNKS)
        assert get(store, i) is not False, f"wrong bytes of chunk {i}"


def _gc(url: Path, journal: Path, seed: float) -> None:
    store = ChunkStore.open(url)
    while True:
        store.gc(1 << 60)
        time.sleep(0.01)


def _reporting(wrong: Path, work: Callable, *args: Any) -> None:
    """Runs a process's work; what it raises is noted down for the end."""
    try:
        work(*args)
    except BaseException:
        with wrong.open("a") as log:
            print(traceback.format_exc().replace("\n", " | "), file=log)


def _check(context: Any, wrong: Path, url: Path, journal: Path, last: bool = False) -> int:
    """Runs `_compare` in a process of its own."""
    process = context.Process(target=_reporting, args=(wrong, _compare, url, journal, last))
    process.start()
    process.join(300)
    assert process.exitcode == 0, f"the check exited with {process.exitcode}"
    return 1


def _compare(url: Path, journal: Path, last: bool) -> None:
    """Everything that is noted as committed is there, and the store is whole."""
    store = ChunkStore.open(url)
    for i in _journal(journal):
        for _ in range(5):  # it may be dropped and be on its way back while we look
            found = get(store, i)
            assert found is not False, f"wrong bytes of chunk {i}"
            if found or _journal(journal)[i] == "-":
                break
        else:
            raise AssertionError(f"chunk {i} was committed and is gone")
    if last:
        store.gc(1 << 60, grace=0.0)
    harmful = [p for p in store.verify() if not p.harmless or (last and p.kind != "unowned")]
    assert not harmful, f"verify found {harmful}"


def _journal(path: Path) -> dict[int, str]:
    """The last note of every chunk. One that was being dropped may be there or not."""
    notes: dict[int, str] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        if len(line) > 1:
            notes[int(line[1:])] = line[0]
    return notes


# ------------------------------------------------------------------ damage


def flips(root: Path, times: int, seed: int, torn: bool = False) -> dict[str, Any]:
    """One flipped bit (or a torn file: cut short, or a block of zeros) at a time, at random; detected, then healed."""
    rng, store = random.Random(seed), ChunkStore.open(root / "store")
    for i in range(8):
        put(store, i)
    files = {i: root / "store" / _key(i) for i in range(8)}
    found = Counter[str](detected=0, healed=0, served_wrong=0)
    for _ in range(times):
        i = rng.randrange(8)
        data = bytearray(files[i].read_bytes())
        whole = bytes(data)
        while bytes(data) == whole:
            at = rng.randrange(len(data))
            if not torn:
                data[at] ^= 1 << rng.randrange(8)
            elif rng.random() < 0.5:
                del data[at:]
            else:
                data[at : at + 512] = bytes(len(data[at : at + 512]))
        files[i].write_bytes(data)
        try:
            found["served_wrong"] += get(store, i) is False
        except ChunkCorrupt:
            found["detected"] += 1
        heal(store, i)
        found["healed"] += get(store, i) is True
    return {"times": times, **found, "clean": store.verify() == []}


def _key(i: int) -> str:
    from cacheclip_jax.store.layout import chunk_file

    return chunk_file(SPACE.key, SPACE.chunk_key(ids(i)))


# ------------------------------------------------------------------ full and failing disks


def full_disks(root: Path, times: int, seed: int) -> dict[str, Any]:
    """The disk fills up at a random moment of an index: a clear error, a whole store, the rest after space returns."""
    rng, found = random.Random(seed), Counter[str](clear=0, readable=0, resumed=0)
    with _small_disk(root) as (place, how, fill):
        for turn in range(times):
            store = ChunkStore.open(place / str(turn))
            done: list[int] = []
            with fill(rng):
                try:
                    for i in range(40):
                        put(store, i)
                        done.append(i)
                except StoreError as e:
                    found["clear"] += "No space left" in str(e) and "store gc" in str(e)
                again = ChunkStore.open(place / str(turn))
                whole = all(get(again, i) for i in done) and all(p.harmless for p in again.verify())
                found["readable"] += whole
            for i in range(40):
                put(store, i)
            store.gc(1 << 60, grace=0.0)
            found["resumed"] += all(get(store, i) for i in range(40)) and store.verify() == []
            subprocess.run(["rm", "-rf", place / str(turn)], check=True)
    return {"times": times, "how": how, **found}


@contextmanager
def _small_disk(root: Path) -> Iterator[tuple[Path, str, Callable]]:
    """A tmpfs of 8 MB that a ballast file fills; where that may not be mounted, ENOSPC after a random write."""
    place = root / "disk"
    place.mkdir(parents=True)

    @contextmanager
    def ballast(rng: random.Random) -> Iterator[None]:
        free = os.statvfs(place)
        size = free.f_bavail * free.f_frsize - rng.randrange(1_800_000)
        (place / "ballast").write_bytes(bytes(max(0, size)))
        yield
        (place / "ballast").unlink()

    @contextmanager
    def injected(rng: random.Random) -> Iterator[None]:
        with failing({"write", "posix_fallocate"}, errno.ENOSPC, after=rng.randrange(60)):
            yield

    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place], capture_output=True)
    try:
        yield (place, "tmpfs", ballast) if mounted.returncode == 0 else (place, "injected ENOSPC", injected)
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "-l", place], check=True)


@contextmanager
def failing(calls: set[str], code: int, after: int = 0, chance: float = 1.0, seed: float = 0) -> Iterator[None]:
    """System calls that fail, all of them `after` so many or each by chance."""
    rng, count = random.Random(seed), 0

    def wrap(real: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count > after and rng.random() < chance:
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        return call

    with ExitStack() as patches:
        for name in calls:
            patches.enter_context(mock.patch.object(os, name, wrap(getattr(os, name))))
        yield


def io_errors(root: Path, times: int, seed: int) -> dict[str, Any]:
    """Reads and writes over a disk that fails at random: right bytes or an error of ours, then a whole store."""
    rng, store = random.Random(seed), ChunkStore.open(root / "store")
    found, committed = Counter[str](errors=0, right=0, wrong=0, lost=0), set[int]()
    calls = {"open", "preadv", "pread", "write", "fsync", "fstat", "fchmod"}
    for turn in range(times):
        i = rng.randrange(20)
        with failing(calls, errno.EIO, chance=0.1, seed=seed * times + turn):
            try:
                if rng.random() < 0.5:
                    put(store, i)
                    committed.add(i)
                else:
                    outcome = get(store, i)
                    found["right"] += outcome is True
                    found["wrong"] += outcome is False
            except StoreError:
                found["errors"] += 1
    found["lost"] = sum(get(store, i) is not True for i in committed)
    store.gc(1 << 60, grace=0.0)
    return {"times": times, **found, "clean": store.verify() == []}


def clock_jumps(root: Path, times: int, seed: int) -> dict[str, Any]:
    """A clock that jumps by years at every look: nothing is lost, and gc spares what is being written."""
    rng, store = random.Random(seed), ChunkStore.open(root / "store")
    lost = 0
    with mock.patch.object(time, "time", lambda: rng.uniform(0, 4e9)):
        for turn in range(times):
            i = turn % 30
            writing = store.write_async(SPACE, passage(i).id, ids(i), SPANS, kv(i))
            store.gc(1 << 60, grace=0.0)
            writing.result()
            lost += get(store, i) is not True
    return {"times": times, "lost": lost, "harmful": sum(not p.harmless for p in store.verify())}


# ------------------------------------------------------------------ all of it


def run(config) -> dict[str, Any]:
    """Every fault of the config; `ok` says whether all went as it must."""
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": machine.command("eval.fault_store"),
        "machine": f"{os.cpu_count()} cores",
        "seed": config.seed,
    }
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        for name in ("kills", "flips", "torn", "full_disks", "io_errors", "clock_jumps"):
            (root / name).mkdir()
        started = time.monotonic()
        result["kills"] = kills(root / "kills", config.kills, config.seed)  # first: it forks, so no threads before it
        result["flips"] = flips(root / "flips", config.flips, config.seed)
        result["torn"] = flips(root / "torn", config.torn, config.seed, torn=True)
        result["full_disks"] = full_disks(root / "full_disks", config.full_disks, config.seed)
        result["io_errors"] = io_errors(root / "io_errors", config.io_errors, config.seed)
        result["clock_jumps"] = clock_jumps(root / "clock_jumps", config.clock_jumps, config.seed)
        result["seconds"] = round(time.monotonic() - started, 1)
    result["ok"] = all(ok(found) for found in result.values() if isinstance(found, dict))
    return result


def ok(found: dict[str, Any]) -> bool:
    """Whether one fault did no harm."""
    none = ("wrong", "served_wrong", "lost", "harmful")
    every = ("detected", "healed", "clear", "readable", "resumed")
    return (
        not any(found.get(name) for name in none)
        and all(found.get(name, found.get("times")) == found.get("times") for name in every)
        and found.get("clean", True)
    )


def main(config: ConfigDict) -> None:
    result = run(config)
    print(json.dumps(result, indent=1))
    with suppress(FileExistsError):
        Path(config.out).parent.mkdir(parents=True)
    Path(config.out).write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(0 if result["ok"] else 1)


if __name__ == "__main__":
    start(main, "Which faults, see configs/bench.")
