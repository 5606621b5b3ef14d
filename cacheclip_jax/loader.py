"""Chunk caches to the device, layer by layer, ahead of the computation that reads them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Condition, Event, Lock
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import Float

from cacheclip_jax.errors import ChunkCorrupt
from cacheclip_jax.host import Buffer, Staging

WORKERS = min(16, os.cpu_count() or 1)
BATCH = 4  # layers that threads fill before they meet: meeting takes a turn of Python's lock for each of them


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


class LayerLoader:
    """Loads the parts of an assembled cache, one layer after another, each a single copy to the device.

    Worker threads gather a layer's parts into one host buffer, a coordinator sends it; both run ahead of the caller,
    who takes layers with `take` and says with `computed` how far the device has come.

    `parts` are (source, tokens); a source of None leaves its slots as they are, for tokens that are recomputed anyway.
    `ahead` layers at most lie on the device before their turn, which bounds what loading adds to its memory.
    `repair(index, error)` gives a source instead of one that turned out damaged. No copy is started
    before `after` is set.
    """

    def __init__(self, pool: ThreadPoolExecutor, staging: Staging, parts: Sequence[tuple[Source | None, int]],
                 num_layers: int, rows_per_token: int, shape: tuple[int, int], dtype: Any, ahead: int,
                 repair: Callable[[int, ChunkCorrupt], Source], after: Event | None = None):
        self.num_layers = num_layers
        self.sent_all = Event()
        self._sources = [source for source, _ in parts]
        self._repair, self._staging, self._shape, self._dtype, self._ahead = repair, staging, shape, dtype, ahead
        row_bytes = shape[1] * np.dtype(dtype).itemsize
        sizes = np.array([tokens for _, tokens in parts], np.int64) * rows_per_token * row_bytes
        ends = np.cumsum(sizes)
        self._spans = [(int(end - size), int(end)) for size, end in zip(sizes, ends, strict=True)]
        self._state, self._repairing = Condition(), Lock()
        self._buffers: dict[int, Buffer] = {}
        self._layers: list[jax.Array | None] = [None] * num_layers
        self._progress: list[jax.Array] = []  # per layer computed, an array that is ready then
        self._error: BaseException | None = None
        self._batches = [range(n, min(n + BATCH, num_layers)) for n in range(0, num_layers, BATCH)]
        self._filled = [0] * len(self._batches)
        shares = [share for share in _shares(np.tile(sizes, BATCH), WORKERS) if share]
        self._workers = len(shares)
        self._tasks: list[Future] = [pool.submit(self._guard, self._coordinate, after)]
        self._tasks += [pool.submit(self._guard, self._fill, share) for share in shares]

    def take(self, start: int, stop: int) -> tuple[jax.Array, ...]:
        """The rows [R, H] of layers `start` to `stop`, as soon as their copies are under way. Each can be taken once.

        Raises what a worker raised, but for damaged chunks, which are repaired.
        """
        with self._state:
            self._state.wait_for(lambda: bool(self._error) or all(x is not None for x in self._layers[start:stop]))
            if self._error:
                raise self._error
            taken = tuple(x for x in self._layers[start:stop] if x is not None)
            self._layers[start:stop] = [None] * (stop - start)
            return taken

    def computed(self, marks: Sequence[jax.Array]) -> None:
        """Tell that the next layers were dispatched; `marks` has for each an array that is ready when it's done."""
        with self._state:
            self._progress += marks
            self._state.notify_all()

    def stop(self) -> None:
        """Let the threads end, also when not every layer was taken."""
        with self._state:
            self._error = self._error or RuntimeError("loading was stopped")
            self._state.notify_all()
        self.sent_all.set()

    def _guard(self, task: Callable[..., None], *args: Any) -> None:
        try:
            task(*args)
        except BaseException as e:
            with self._state:
                self._error = self._error or e
                self._state.notify_all()
            self.sent_all.set()

    def _coordinate(self, after: Event | None) -> None:
        with self._staging.ring(self._shape, self._dtype, 3 * BATCH) as ring:
            prepared = 0
            for number, batch in enumerate(self._batches):
                # Of three batches of buffers one is being filled and one being sent when the third is asked for again.
                while prepared < min(len(self._batches), number + 2):
                    buffers = {layer: ring(layer) for layer in self._batches[prepared]}
                    with self._state:
                        self._buffers |= buffers
                        self._state.notify_all()
                    prepared += 1
                with self._state:
                    while self._filled[number] < self._workers and not self._error:
                        self._state.wait()
                    if self._error:
                        raise self._error  # so that the ring, which a worker may still write to, isn't used again
                if after is not None:
                    after.wait()
                    after = None
                for layer in batch:
                    self._wait_for_turn(layer)
                    sent = self._buffers.pop(layer).send()
                    with self._state:
                        self._layers[layer] = sent
                        self._state.notify_all()
            self.sent_all.set()

    def _wait_for_turn(self, layer: int) -> None:
        if layer < self._ahead:
            return
        with self._state:
            self._state.wait_for(lambda: bool(self._error) or len(self._progress) > layer - self._ahead)
            mark = None if self._error else self._progress[layer - self._ahead]
        if mark is not None:
            mark.block_until_ready()

    def _fill(self, share: Sequence[int]) -> None:
        for number, batch in enumerate(self._batches):
            with self._state:
                while batch[-1] not in self._buffers and not self._error:
                    self._state.wait()
                if self._error:
                    return
                targets = [self._buffers[layer].bytes for layer in batch]
            for task in share:
                nth, index = divmod(task, len(self._sources))
                if nth < len(batch):
                    start, end = self._spans[index]
                    self._read(index, batch[nth], targets[nth][start:end])
            with self._state:
                self._filled[number] += 1
                last = self._filled[number] == self._workers
                self._state.notify_all()
        if last:  # of all workers, at the last batch
            for source in self._sources:
                if source is not None:
                    source.done()

    def _read(self, index: int, layer: int, out: np.ndarray) -> None:
        source = self._sources[index]
        if source is None:
            return
        try:
            source.read_layer(layer, out)
        except ChunkCorrupt as e:
            with self._repairing:
                if self._sources[index] is source:  # else another worker, at another layer, has repaired it meanwhile
                    self._sources[index] = self._repair(index, e)
            self._read(index, layer, out)


def _shares(sizes: np.ndarray, workers: int) -> list[list[int]]:
    """Tasks for each worker, about equally many bytes: the largest task first, to whoever has least."""
    shares: list[list[int]] = [[] for _ in range(workers)]
    load = [0] * workers
    for index in np.argsort(-sizes, kind="stable"):
        least = load.index(min(load))
        shares[least].append(int(index))
        load[least] += int(sizes[index])
    return shares
