"""Chunk caches to the device, a block of layers at a time, ahead of the computation that reads them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from threading import Event, Lock
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jaxtyping import Float

from cacheclip_jax.errors import ChunkCorrupt
from cacheclip_jax.host import Buffer, HostTier, Staging

WORKERS = min(8, os.cpu_count() or 1)


class Source(Protocol):
    """A chunk cache that can be read layer by layer."""

    def read_layer(self, layer: int, out: np.ndarray) -> None:
        """Copy a layer's [2, K, C, H] into `out`, as bytes. Raises ChunkCorrupt for bytes that fail their checksum."""

    def done(self) -> None:
        """Hear that every layer that was wanted has been read."""


class InMemory:
    """A chunk cache that lies in host memory."""

    def __init__(self, kv: Float[np.ndarray, "L 2 K C H"]):
        self._layers = np.ascontiguousarray(kv).reshape(len(kv), -1).view(np.uint8)

    def read_layer(self, layer: int, out: np.ndarray) -> None:
        """Copy a layer's bytes."""
        np.copyto(out, self._layers[layer])

    def done(self) -> None:
        """Nothing is left to do."""


class Part(NamedTuple):
    """A part of every layer's bytes that a source fills; a source of None leaves them as they are, for tokens that are
    recomputed anyway."""

    start: int
    end: int
    source: Source | None


class BlockLoader:
    """Loads the parts of an assembled cache, a block of layers after another, each a single copy to the device.

    Worker threads gather a block's parts into one host buffer, a coordinator sends it; both run ahead of the caller,
    who takes blocks with `take` and says with `computed` how far the device has come. Threads hand over once a block
    and not once a layer, because each waits for its turn of Python's lock then.

    A layer's rows begin with `pages` of the host tier, the `parts` lie behind them. `ahead` blocks at most lie on the
    device before their turn, which bounds what loading adds to its memory. `repair(index, error)` gives a source
    instead of one that turned out damaged. No copy is started before `after` is set.
    """

    def __init__(self, pool: ThreadPoolExecutor, staging: Staging, tier: HostTier | None, pages: np.ndarray,
                 parts: Sequence[Part], blocks: Sequence[range], shape: tuple[int, int, int], dtype: Any, ahead: int,
                 repair: Callable[[int, ChunkCorrupt], Source], after: Event | None = None):
        self.sent_all = Event()
        self._tier, self._parts, self._blocks = tier, list(parts), blocks
        self._repair, self._staging, self._shape, self._dtype, self._ahead = repair, staging, shape, dtype, ahead
        runs = [run for run in np.array_split(pages, 2) if len(run)]  # two calls a layer keep eight threads busy
        sizes = [len(run) * tier.page_bytes for run in runs] if tier else []
        self._runs = [(sum(sizes[:i]), run) for i, run in enumerate(runs)]
        sizes += [part.end - part.start for part in parts]
        shares = [share for share in _shares(np.tile(np.array(sizes, np.int64), shape[0]), WORKERS) if share]
        self._buffers: dict[int, Buffer] = {}
        self._rows: list[jax.Array | None] = [None] * len(blocks)
        self._error: BaseException | None = None
        self._lock = Lock()
        # Everyone waits for an event of their own: threads that wake each other up for nothing queue for Python's lock.
        self._empty, self._full, self._sent = ([Event() for _ in blocks] for _ in range(3))
        self._filling = [len(shares)] * len(blocks)
        self._marks: SimpleQueue[jax.Array | None] = SimpleQueue()  # for each block computed one that is ready then
        pool.submit(self._guard, self._coordinate, after)
        for share in shares:
            pool.submit(self._guard, self._fill, share)

    def take(self, number: int) -> jax.Array:
        """The rows [B, R, H] of a block, as soon as its copy is under way. Each can be taken once.

        Raises what a worker raised, but for damaged chunks, which are repaired.
        """
        self._sent[number].wait()
        rows, self._rows[number] = self._rows[number], None
        if rows is None:
            raise self._error or RuntimeError(f"block {number} was taken already")
        return rows

    def computed(self, mark: jax.Array) -> None:
        """Tell that the next block was dispatched; `mark` is ready when it's done, and no later program is given it."""
        self._marks.put(mark)

    def stop(self) -> None:
        """Let the threads end, also when not every block was taken."""
        self._fail(RuntimeError("loading was stopped"))

    def _fail(self, error: BaseException) -> None:
        self._error = self._error or error
        for event in (*self._empty, *self._full, *self._sent, self.sent_all):
            event.set()
        self._marks.put(None)

    def _guard(self, task: Callable[..., None], *args: Any) -> None:
        try:
            task(*args)
        except BaseException as e:
            self._fail(e)

    def _coordinate(self, after: Event | None) -> None:
        with self._staging.ring(self._shape, self._dtype) as ring:
            prepared = 0
            for number in range(len(self._blocks)):
                # Of three buffers one is being filled and one being sent when the third is asked for again.
                while prepared < min(len(self._blocks), number + 2):
                    self._buffers[prepared] = ring(prepared)
                    self._empty[prepared].set()
                    prepared += 1
                self._full[number].wait()
                if after is not None:
                    after.wait()
                    after = None
                # Not after an error: a worker may still write to this ring, which isn't used again then.
                if self._error or (number >= self._ahead and not self._turn_has_come()):
                    raise self._error or RuntimeError("loading was stopped")
                self._rows[number] = self._buffers.pop(number).send()
                self._sent[number].set()
            self.sent_all.set()

    def _turn_has_come(self) -> bool:
        """Wait until the device has come a block further."""
        if (mark := self._marks.get()) is None:
            return False
        mark.block_until_ready()
        return True

    def _fill(self, share: Sequence[int]) -> None:
        for number, layers in enumerate(self._blocks):
            self._empty[number].wait()
            if self._error:
                return
            buffer = self._buffers[number]
            for task in share:
                nth, index = divmod(task, len(self._runs) + len(self._parts))
                if nth >= len(layers):
                    continue
                layer = buffer.layer(nth)
                if index >= len(self._runs):
                    self._read(index - len(self._runs), layers[nth], layer)
                elif self._tier:
                    start, pages = self._runs[index]
                    self._tier.gather(layers[nth], pages, layer[start : start + len(pages) * self._tier.page_bytes])
            with self._lock:
                self._filling[number] -= 1
                last = not self._filling[number]
            if last:
                self._full[number].set()
        if last:  # of all workers, at the last block
            for part in self._parts:
                if part.source is not None:
                    part.source.done()

    def _read(self, index: int, layer: int, buffer: np.ndarray) -> None:
        start, end, source = part = self._parts[index]
        if source is None:
            return
        try:
            source.read_layer(layer, buffer[start:end])
        except ChunkCorrupt as e:
            with self._lock:
                if self._parts[index] is part:  # else another worker, at another layer, has repaired it meanwhile
                    self._parts[index] = Part(start, end, self._repair(index, e))
            self._read(index, layer, buffer)


def _shares(sizes: np.ndarray, workers: int) -> list[list[int]]:
    """Tasks for each worker, about equally many bytes: the largest task first, to whoever has least."""
    shares: list[list[int]] = [[] for _ in range(workers)]
    load = [0] * workers
    for index in np.argsort(-sizes, kind="stable"):
        least = load.index(min(load))
        shares[least].append(int(index))
        load[least] += int(sizes[index])
    return shares
