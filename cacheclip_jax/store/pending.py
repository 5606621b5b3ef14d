"""A chunk cache on its way from the store to the host."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, UInt8

from cacheclip_jax.errors import BadInput, ChunkCorrupt, ChunkUnreadable, StoreError
from cacheclip_jax.store.blobs import FAILURES, translated
from cacheclip_jax.store.chunkfile import checksum, head_bytes, joined, stored_layer_bytes, unpack_for
from cacheclip_jax.store.files import FileSource
from cacheclip_jax.store.layout import chunk_file
from cacheclip_jax.store.quantize import dequantize
from cacheclip_jax.store.records import Entry, Space

if TYPE_CHECKING:
    from cacheclip_jax.store.store import ChunkStore

log = logging.getLogger("cacheclip.store")

_TASK_BYTES = 1 << 20
# A failure with one of these says nothing about the data, which may be whole.
_NOT_THE_DATA = ("Permission", "PERMISSION", "UNAUTHENTICATED", "UNAVAILABLE", "DEADLINE", "CURL", "Too many open",
                 "can't be reached")


class PendingKV:
    """One chunk cache being read.

    An eager one reads every layer from the start, in background threads, for `layer` and `result`. One that isn't
    reads nothing before it is asked, but for the head of what isn't a local file: for `read_scattered`, or
    for `read_layers_into`, which any number of threads may call at once, each with a buffer of its own.
    """

    def __init__(
        self,
        store: ChunkStore,
        space: Space,
        ids: Sequence[int],
        passage_id: str,
        out: np.ndarray | None = None,
        eager: bool = True,
    ):
        shape, dtype, chunk = space.shape(len(ids)), space.numpy_dtype, space.chunk_key(ids)
        if out is not None and (out.shape, out.dtype) != (shape, dtype):
            raise BadInput(f"`out` is {out.dtype}{list(out.shape)}, not {space.dtype}{list(shape)}.")
        self._store, self._space, self._ids, self._passage, self._out = store, space, ids, passage_id, out
        key = chunk_file(space.key, chunk)
        self._where = store.pool.where(key)
        self._head, self._step = head_bytes(space.num_layers, len(ids)), stored_layer_bytes(space, len(ids))
        self._size = self._head + space.num_layers * self._step
        self._layers: list[Future[None]] = []
        self._lock = Lock()
        self._eager, self._began, self._layers_read = eager, time.perf_counter(), 0
        self._failure: Exception | None = None
        self._flawed = False
        self._source, self._tier = None, store.pool.tier
        try:
            self._source = store.pool.source(key, self._head, self._size if eager else None)
        except (*FAILURES, StoreError) as e:
            self._failure = e
        self._found = not eager and self.in_file  # else the head has to be read to know

    @cached_property
    def _entry(self) -> Entry | ChunkCorrupt | None:
        """The entry, None when there is no such chunk, or why it can't be used."""
        try:
            if self._failure or self._source is None:
                raise self._failure or StoreError("it was closed")
            head = np.empty(self._head, np.uint8)
            self._source.read_into(0, head)
            entry = unpack_for(head.tobytes(), self._space, self._ids)
        except FileNotFoundError as e:
            return self._flaw(e) if self._found else None
        except (*FAILURES, StoreError) as e:
            return self._flaw(e)
        return entry

    def unless_missing(self) -> PendingKV | None:
        """Itself, or None when the store has no such chunk cache; waits for the beginning of it where it has to."""
        if not self._found and self._entry is None:
            self._store.metrics.count("misses", self._tier)
            return None
        if self._found or isinstance(self._entry, Entry):
            self._store.metrics.count("hits", self._tier)
            if self._eager:
                self._start()
        return self

    def _start(self) -> None:
        """Begins to read every layer into `out`, some at a time where they are small; once."""
        with self._lock:
            if self._layers:
                return
            if self._out is None:
                self._out = np.empty(self._space.shape(len(self._ids)), self._space.numpy_dtype)
            some, count = max(1, _TASK_BYTES // self._step), self._space.num_layers
            layers: list[Future[None]] = []
            for first in range(0, count, some):
                last = min(count, first + some)
                task = self._store.readers.submit(self._load, first, self._out[first:last])
                layers += [task] * (last - first)
            self._layers = layers

    def _load(self, first: int, out: Float[np.ndarray, "S 2 K C H"]) -> None:
        """Reads, checks and (where they were quantised) expands consecutive layers."""
        entry, source = self._entry, self._source
        assert isinstance(entry, Entry) and source is not None
        offset = self._head + first * self._step
        straight = self._space.kv == "exact" and out.flags.c_contiguous
        data = out.reshape(-1).view(np.uint8) if straight else np.empty(len(out) * self._step, np.uint8)
        source.read_into(offset, data)
        self._store.metrics.count("bytes_read", self._tier, data.nbytes)
        parts, crcs = data.reshape(len(out), -1), entry.crcs[first : first + len(out)]
        if checksum(data) != joined(crcs, self._step):  # one call: each takes Python's lock again, which others want
            for i, (stored, crc) in enumerate(zip(parts, crcs, strict=True)):
                if checksum(stored) != crc:
                    raise ValueError(f"layer {first + i} fails its checksum")
        for stored, layer in () if straight else zip(parts, out, strict=True):
            if self._space.kv != "exact":
                dequantize(self._space.kv, stored, layer)
            else:
                layer[...] = stored.view(layer.dtype).reshape(layer.shape)

    @property
    def in_file(self) -> bool:
        """Whether it lies in a local file, of which parts are read as fast as all of it."""
        return isinstance(self._source, FileSource)

    def read_layers_into(self, first: int, buffer: np.ndarray) -> None:
        """Fills a caller's buffer with consecutive layers [2, K, C, H] from `first` on, in the calling thread.

        `buffer` is C-contiguous and writable, of the space's dtype or uint8, of any shape with as many bytes as the
        layers: 2 * K * C * H * itemsize each. Bytes go from the file to the buffer with one read and without another
        copy, and are checked with one checksum before this returns; Python's lock is free meanwhile. Threads may ask
        for the same or different layers, in any order. Raises BadInput for another buffer, else as `layer` does; the
        buffer then holds anything.
        """
        shape, dtype = self._space.shape(len(self._ids)), self._space.numpy_dtype
        size = math.prod(shape[1:]) * dtype.itemsize
        count, rest = divmod(buffer.nbytes, size)
        if rest or not buffer.flags.c_contiguous or buffer.dtype not in (dtype, np.uint8):
            raise BadInput(
                f"The buffer is {buffer.dtype}{list(buffer.shape)} of {buffer.nbytes} bytes; layers take a "
                f"C-contiguous one of {dtype} or uint8 with {size} bytes each."
            )
        if not 0 <= first < first + count <= shape[0]:
            raise BadInput(f"{count} layers from layer {first} on are asked for; the chunk cache has {shape[0]}.")
        with self._judged():
            self._load(first, buffer.reshape(-1).view(dtype).reshape(count, *shape[1:]))
        self._finished(count)

    def layer(self, layer: int) -> Float[np.ndarray, "2 K C H"]:
        """Waits for one layer; raises ChunkCorrupt when it is damaged, ChunkUnreadable when it can't be read now."""
        with self._judged():
            self._start()
            if self._layers[layer].exception() is not None:
                # It was read together with others: this one may be whole.
                assert self._out is not None
                self._load(layer, self._out[layer : layer + 1])
        assert self._out is not None
        return self._out[layer]

    def read_scattered(self, layers: Sequence[Sequence[UInt8[np.ndarray, " bytes"]]]) -> None:
        """Reads and checks every layer in the calling thread, each into flat buffers that it fills one after another;
        raises as `layer` does. Where values are stored as they are, bytes go from the file to the buffers."""
        with self._judged():
            entry, source = self._entry, self._source
            assert isinstance(entry, Entry) and source is not None
            if self._space.kv == "exact" and isinstance(source, FileSource):
                source.read_scattered(self._head, [piece for pieces in layers for piece in pieces])
                self._store.metrics.count("bytes_read", self._tier, self._size - self._head)
                for i, pieces in enumerate(layers):
                    crc = 0
                    for piece in pieces:
                        crc = checksum(piece, crc)
                    if crc != entry.crcs[i]:
                        raise ValueError(f"layer {i} fails its checksum")
            else:
                whole = np.empty(self._space.shape(len(self._ids)), self._space.numpy_dtype)
                self._load(0, whole)
                for pieces, layer in zip(layers, whole.reshape(len(whole), -1).view(np.uint8), strict=True):
                    start = 0
                    for piece in pieces:
                        piece[...] = layer[start : start + piece.nbytes]
                        start += piece.nbytes
            source.release()
        self._finished(self._space.num_layers)

    def result(self) -> Float[np.ndarray, "L 2 K C H"]:
        """Waits for all layers; raises as `layer` does."""
        if not self._layers or any(task.exception() is not None for task in self._layers):
            for layer in range(self._space.num_layers):
                self.layer(layer)
        assert self._out is not None and self._source is not None
        self._source.release()
        self._finished(self._space.num_layers)
        return self._out

    def _finished(self, layers: int) -> None:
        """Takes the time when as many layers were read as there are, once."""
        with self._lock:
            before, self._layers_read = self._layers_read, self._layers_read + layers
        if before < self._space.num_layers <= self._layers_read:
            self._store.metrics.time("read", self._tier, time.perf_counter() - self._began)

    @contextmanager
    def _judged(self):
        """Turns any failure into what is wrong with the chunk; `out` is the caller's again then."""
        if isinstance(self._entry, ChunkCorrupt):
            raise self._entry
        try:
            yield
        except (*FAILURES, StoreError) as e:
            for task in self._layers:
                task.exception()
            raise self._flaw(e) from e

    def _flaw(self, e: Exception) -> ChunkCorrupt:
        """What a failure says about the chunk."""
        try:
            with translated("read", self._where):
                raise e
        except StoreError as translation:  # or what it was already
            how = str(translation)
        with self._lock:  # other parts of it, read at the same time, may tell of the same flaw
            known, self._flawed = self._flawed, True
        if any(sign in how for sign in _NOT_THE_DATA):
            if not known:
                self._store.metrics.count("unreadable", self._tier)
            message = f"The chunk cache of passage {self._passage} can't be read now: {how}"
            return ChunkUnreadable(message, chunk=self._passage)
        if not known:
            self._store.metrics.count("damaged", self._tier)
            log.warning("a chunk cache is damaged",
                        extra={"passage": self._passage, "file": self._where, "reason": how})
        message = f"The chunk cache of passage {self._passage} is damaged and has to be encoded again: {how}"
        return ChunkCorrupt(message, chunk=self._passage)
