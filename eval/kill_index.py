"""Kills an indexing process at random moments, and checks that nothing it had committed is lost or changed.

python eval/kill_index.py                      # a small writer of random chunk caches, 20 kills
python eval/kill_index.py --span 20 --command "cacheclip index docs/ --store {store}"

After every kill the store is opened, verified and read in full. An index that completes before its kill is checked
too, and the next one starts in a fresh store. The last run isn't killed and has to complete. Prints a summary in
JSON; exits with 1 when anything was lost, changed or damaged, or when the last run failed.
"""

import argparse
import hashlib
import itertools
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

from cacheclip_jax.errors import CacheClipError
from cacheclip_jax.store import ChunkStore, Passage, Space

Digests = dict[str, str]


@dataclass
class Report:
    """What happened; `lost` names what was committed and is gone or different, `damaged` what `verify` found."""

    kills: int = 0
    early: int = 0
    committed: list[int] = field(default_factory=list)
    leftovers: int = 0
    lost: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    completed: bool = False

    @property
    def ok(self) -> bool:
        return self.completed and not self.lost and not self.damaged


def write_random_chunks(url: str, chunks: int) -> None:
    """The built-in index: the same random chunk caches on every run."""
    space = Space("random", "random", "bfloat16", (1, 2, 3), num_layers=8, num_kv_heads=2, head_dim=64)
    store, tokens = ChunkStore.open(url), 64
    for batch in itertools.batched(range(chunks), 16):
        passages = [Passage.make(f"text {i}", "random", i) for i in batch]
        store.add_passages(passages)
        writes = []
        for i, passage in zip(batch, passages, strict=True):
            rng = np.random.default_rng(i)
            ids = rng.integers(0, 50_000, tokens).tolist()
            if not store.has(space, ids):
                kv = rng.standard_normal(space.shape(tokens), np.float32).astype(space.numpy_dtype)
                writes.append(store.write_async(space, passage.id, ids, [(j, j + 1) for j in range(tokens)], kv))
        for write in writes:
            write.result()


def snapshot(url: Path) -> Digests:
    """A digest of every passage and every committed chunk cache, read in full."""
    try:
        store = ChunkStore.open(url, create=False)
    except CacheClipError:
        if any(url.rglob("*.json")):
            raise
        return {}  # killed before it had made the store
    spaces = store.spaces()
    found = {f"passage {p.id}": _sha(p.to_json()) for p in store.passages()}
    for entry in store.entries():
        pending = store.read(spaces[entry.space], entry.ids, entry.passage)
        if pending is not None:
            found[f"chunk {entry.space}/{entry.chunk}"] = _sha(repr(entry).encode(), pending.result().tobytes())
    return found


def check(url: Path, before: Digests, report: Report) -> Digests:
    """Compares the store with what was committed before; returns what is committed now."""
    try:
        now = snapshot(url)
        problems = ChunkStore.open(url).verify()
    except CacheClipError as e:
        report.damaged.append(str(e))
        return before
    report.lost += [name for name, digest in before.items() if now.get(name) != digest]
    report.damaged += [f"{p.file}: {p.message}" for p in problems if not p.harmless]
    report.leftovers += sum(p.kind == "orphan" for p in problems)
    report.committed.append(len(now))
    return now


def run(command: str, root: Path, kills: int, span: float, seed: int) -> Report:
    """Starts and kills `command` until it was killed `kills` times, up to `span` seconds after it began to write."""
    report, rng = Report(), random.Random(seed)
    stores = (root / str(i) for i in itertools.count())
    store, committed = next(stores), Digests()
    while report.kills < kills:
        with _start(command, store) as process:
            try:
                _wait_for_writes(process, store)
                code = process.wait(rng.uniform(0, span))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                report.kills += 1
                committed = check(store, committed, report)
                continue
        check(store, committed, report)
        report.early += 1
        if code != 0:
            report.damaged.append(f"{command} exited with {code}")
            return report
        store, committed = next(stores), Digests()
    with _start(command, store) as process:
        report.completed = process.wait() == 0
    check(store, committed, report)
    return report


def _start(command: str, store: Path) -> subprocess.Popen:
    words = [word.replace("{store}", str(store)) for word in shlex.split(command)]
    # Its own process group, so that the kill reaches its children; our stdout is for the summary.
    return subprocess.Popen(words, start_new_session=True, stdout=sys.stderr)


def _wait_for_writes(process: subprocess.Popen, store: Path) -> None:
    before = sum(1 for _ in store.rglob("*"))
    while process.poll() is None and sum(1 for _ in store.rglob("*")) <= before:
        time.sleep(0.01)


def _sha(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--command", help="the index to kill; {store} stands for the store's directory")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument(
        "--span", type=float, default=1.0, help="a run is killed within so many seconds of its first write"
    )
    parser.add_argument("--store", type=Path, help="where to make the stores; default: a temporary directory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chunks", type=int, default=400, help="chunks that the built-in index writes")
    parser.add_argument("--writer", metavar="STORE", help="only run the built-in index")
    flags = parser.parse_args()
    if flags.writer:
        write_random_chunks(flags.writer, flags.chunks)
        return 0
    own = shlex.join([sys.executable, __file__, "--chunks", str(flags.chunks), "--writer", "{store}"])
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        report = run(flags.command or own, flags.store or Path(scratch), flags.kills, flags.span, flags.seed)
    print(json.dumps(vars(report) | {"ok": report.ok, "seconds": round(time.monotonic() - started, 1)}))
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
