"""A chunk cache on its way from the store to the host."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import tensorstore as ts
from jaxtyping import Float

from cacheclip_jax.errors import BadInput, ChunkCorrupt, StoreError
from cacheclip_jax.store.blobs import FAILURES, translated
from cacheclip_jax.store.layout import chunk_folder, manifest_file
from cacheclip_jax.store.records import Entry, Space

if TYPE_CHECKING:
    from cacheclip_jax.store.store import ChunkStore

# What else goes wrong with committed data means that it is damaged.
_NOT_THE_DATA = ("PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "DEADLINE_EXCEEDED")


class PendingKV:
    """The manifest and every layer of one chunk cache, all of them being read from the start."""

    def __init__(
        self,
        store: ChunkStore,
        space: Space,
        ids: Sequence[int],
        passage_id: str,
        out: np.ndarray | None = None,
    ):
        shape, dtype, chunk = space.shape(len(ids)), space.numpy_dtype, space.chunk_key(ids)
        out = np.empty(shape, dtype) if out is None else out
        if (out.shape, out.dtype) != (shape, dtype):
            raise BadInput(f"`out` is {out.dtype}{list(out.shape)}, not {space.dtype}{list(shape)}.")
        self._space, self._ids, self._passage, self._out = space, ids, passage_id, out
        self._where = store.blobs.where(chunk_folder(space.key, chunk))
        self._manifest = store.blobs.kv.read(manifest_file(space.key, chunk))
        self._source = store.array(space, chunk, len(ids), cached=True)
        self._target = ts.array(out, copy=False)
        self._layers = [self._start(layer) for layer in range(space.num_layers)]

    @property
    def num_layers(self) -> int:
        """Layers of the chunk cache."""
        return self._space.num_layers

    def _start(self, layer: int) -> ts.WriteFutures:
        return self._target[layer].write(self._source[layer])

    @cached_property
    def _entry(self) -> Entry | ValueError | None:
        try:
            with translated("read", f"{self._where}.json"):
                manifest = self._manifest.result()
            if manifest.state == "value":
                return Entry.parse(manifest.value, self._space, self._ids)
            flaw = None
        except ValueError as e:
            flaw = e
        except StoreError:
            self._settle()
            raise
        self._settle()
        return flaw

    def _settle(self) -> None:
        """Waits until nothing is being read into `out`, which after a failure is the caller's again."""
        for layer in self._layers:
            layer.exception()

    def unless_missing(self) -> PendingKV | None:
        """Itself, or None when the store has no such chunk cache; waits for the manifest."""
        return None if self._entry is None else self

    def layer(self, layer: int) -> Float[np.ndarray, "2 K C H"]:
        """Waits for one layer; raises ChunkCorrupt when it is damaged, StoreError when it can't be read."""
        if isinstance(self._entry, ValueError):
            raise self._damaged(f"{self._where}.json: {self._entry}.") from self._entry
        try:
            self._layers[layer].result()
        except FAILURES:
            # Another process may have committed the chunk between our reads of its data and of its manifest.
            self._read_again(layer)
        return self._out[layer]

    def _read_again(self, layer: int) -> None:
        self._settle()
        try:
            with translated("read", self._where):
                self._start(layer).result()
        except StoreError as e:
            if any(sign in str(e) for sign in _NOT_THE_DATA):
                raise
            raise self._damaged(str(e)) from e

    def _damaged(self, how: str) -> ChunkCorrupt:
        message = f"The chunk cache of passage {self._passage} is damaged and has to be encoded again: {how}"
        return ChunkCorrupt(message, chunk=self._passage)

    def result(self) -> Float[np.ndarray, "L 2 K C H"]:
        """Waits for all layers; raises as `layer` does."""
        for layer in range(self._space.num_layers):
            self.layer(layer)
        return self._out
