"""Chunk caches to the device, layer by layer, ahead of the computation that reads them."""

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
BATCH = 4  # layers that threads fill before they meet: each meeting is a turn of Python's lock for every one of them


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


class LayerLoader:
    """Loads the parts of an assembled cache, one layer after another, each a single copy to the device.

    Worker threads gather a layer's parts into one host buffer, a coordinator sends it; both run ahead of the caller,
    who takes layers with `take` and says with `computed` how far the device has come.

    Buffers begin with `pages` of the host tier, the `parts` lie behind them. `ahead` layers at most lie on the device
    before their turn, which bounds what loading adds to its memory. `repair(index, error)` gives a source instead of
    one that turned out damaged. No copy is started before `after` is set.
    """

    def __init__(self, pool: ThreadPoolExecutor, staging: Staging, tier: HostTier | None, pages: np.ndarray,
                 parts: Sequence[Part], num_layers: int, shape: tuple[int, int], dtype: Any, ahead: int,
                 repair: Callable[[int, ChunkCorrupt], Source], after: Event | None = None):
        self.num_layers = num_layers
        self.sent_all = Event()
        self._tier, self._parts = tier, list(parts)
        self._repair, self._staging, self._shape, self._dtype, self._ahead = repair, staging, shape, dtype, ahead
        self._buffers: dict[int, Buffer] = {}
        self._layers: list[jax.Array | None] = [None] * num_layers
        self._error: BaseException | None = None
        self._lock = Lock()
        self._batches = [range(n, min(n + BATCH, num_layers)) for n in range(0, num_layers, BATCH)]
        runs = [run for run in np.array_split(pages, 2) if len(run)]  # two calls a layer keep eight threads busy
        sizes = [len(run) * tier.page_bytes for run in runs] if tier else []
        self._runs = [(sum(sizes[:i]), run) for i, run in enumerate(runs)]
        sizes += [part.end - part.start for part in parts]
        shares = [share for share in _shares(np.tile(np.array(sizes, np.int64), BATCH), WORKERS) if share]
        # Everyone waits for an event of their own: threads that wake each other up for nothing queue for Python's lock.
        self._empty, self._full = ([Event() for _ in self._batches] for _ in range(2))
        self._filling = [len(shares)] * len(self._batches)
        self._sent = [Event() for _ in range(num_layers)]
        self._marks: SimpleQueue[jax.Array | None] = SimpleQueue()  # for each layer computed one that is ready then
        pool.submit(self._guard, self._coordinate, after)
        for share in shares:
            pool.submit(self._guard, self._fill, share)

    def take(self, start: int, stop: int) -> tuple[jax.Array, ...]:
        """The rows [R, H] of layers `start` to `stop`, as soon as their copies are under way. Each can be taken once.

        Raises what a worker raised, but for damaged chunks, which are repaired.
        """
        taken = []
        for layer in range(start, stop):
            self._sent[layer].wait()
            rows, self._layers[layer] = self._layers[layer], None
            if rows is None:
                raise self._error or RuntimeError(f"layer {layer} was taken already")
            taken.append(rows)
        return tuple(taken)

    def computed(self, marks: Sequence[jax.Array]) -> None:
        """Tell that the next layers were dispatched; `marks` has for each an array that is ready when it's done, and
        that no later program is given as its own."""
        for mark in marks:
            self._marks.put(mark)

    def stop(self) -> None:
        """Let the threads end, also when not every layer was taken."""
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
        with self._staging.ring(self._shape, self._dtype, 3 * BATCH) as ring:
            prepared = 0
            for number, batch in enumerate(self._batches):
                # Of three batches of buffers one is being filled and one being sent when the third is asked for again.
                while prepared < min(len(self._batches), number + 2):
                    self._buffers |= {layer: ring(layer) for layer in self._batches[prepared]}
                    self._empty[prepared].set()
                    prepared += 1
                self._full[number].wait()
                if after is not None:
                    after.wait()
                    after = None
                for layer in batch:
                    # Not after an error: a worker may still write to this ring, which isn't used again then.
                    if self._error or (layer >= self._ahead and not self._turn_has_come()):
                        raise self._error or RuntimeError("loading was stopped")
                    self._layers[layer] = self._buffers.pop(layer).send()
                    self._sent[layer].set()
            self.sent_all.set()

    def _turn_has_come(self) -> bool:
        """Wait until the device has come a layer further."""
        if (mark := self._marks.get()) is None:
            return False
        mark.block_until_ready()
        return True

    def _fill(self, share: Sequence[int]) -> None:
        for number, batch in enumerate(self._batches):
            self._empty[number].wait()
            if self._error:
                return
            targets = [self._buffers[layer] for layer in batch]
            for task in share:
                nth, index = divmod(task, len(self._runs) + len(self._parts))
                if nth >= len(batch):
                    continue
                if index >= len(self._runs):
                    self._read(index - len(self._runs), batch[nth], targets[nth].bytes)
                elif self._tier:
                    start, pages = self._runs[index]
                    end = start + len(pages) * self._tier.page_bytes
                    self._tier.gather(batch[nth], pages, targets[nth].bytes[start:end])
            with self._lock:
                self._filling[number] -= 1
                last = not self._filling[number]
            if last:
                self._full[number].set()
        if last:  # of all workers, at the last batch
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
