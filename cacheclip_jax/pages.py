"""Chunk caches in host memory, as pages or in one piece: what a copy to a model's device starts from."""

from __future__ import annotations

import ctypes
import math
import weakref
from collections import defaultdict, deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from jaxtyping import Float, UInt8

from cacheclip_jax.model.config import ModelConfig

PAGE_TOKENS = 256
PAGE_BYTES = 2 << 20  # at least: smaller copies don't reach the bus's rate
SPARE_BYTES = 1 << 30  # of pinned memory that nobody holds while other shapes are wanted


@dataclass(frozen=True)
class PageLayout:
    """How the rows of a model's chunk caches lie in pages.

    The layers form `blocks`. A block's rows [B, R, H] are cut to pages [B, rows, H] of PAGE_TOKENS tokens; what is left
    of a chunk's last page holds anything. So every copy has one of few shapes, however long the chunks are.
    """

    blocks: tuple[range, ...]
    token_rows: int
    head_dim: int
    dtype: np.dtype

    @classmethod
    def of(cls, cfg: ModelConfig, dtype: np.dtype, layers: int | None = None) -> PageLayout:
        """The layout for a model: blocks of `layers` layers, or of as many as make a page worth its copy."""
        token_rows = 2 * cfg.num_kv_heads
        layers = layers or -(-PAGE_BYTES // (token_rows * PAGE_TOKENS * cfg.head_dim * dtype.itemsize))
        count = max(1, round(cfg.num_layers / layers))
        size = -(-cfg.num_layers // count)
        blocks = tuple(range(first, min(first + size, cfg.num_layers)) for first in range(0, cfg.num_layers, size))
        return cls(blocks, token_rows, cfg.head_dim, dtype)

    @property
    def rows(self) -> int:
        """Rows of a page: `token_rows` for each of its tokens."""
        return self.token_rows * PAGE_TOKENS

    def pages(self, tokens: int) -> int:
        """Pages of a block that so many tokens take."""
        return -(-tokens // PAGE_TOKENS)

    def nbytes(self, block: range) -> int:
        """Bytes of one page of a block."""
        return len(block) * self.rows * self.head_dim * self.dtype.itemsize


class Page(NamedTuple):
    """Host memory for rows [B, rows, H]: as what is copied to the device, and as the bytes of every layer."""

    array: np.ndarray | jax.Array
    layers: UInt8[np.ndarray, "B bytes"]


class HostChunk:
    """A chunk cache in host memory: the pages of each block of layers, and the bytes that all of it takes.

    Where it is one piece, `whole` are its layers' bytes one after another, as they are stored, and a block's one page
    is a part of it.
    """

    def __init__(self, blocks: Sequence[Sequence[Page]], row_bytes: int, nbytes: int,
                 whole: UInt8[np.ndarray, "L bytes"] | None = None):
        self.blocks, self._row_bytes, self.nbytes, self.whole = blocks, row_bytes, nbytes, whole

    def buffers(self, rows: int) -> list[list[UInt8[np.ndarray, " bytes"]]]:
        """For every layer the memory of its first `rows` rows, as flat pieces one after another."""
        out = []
        for pages in self.blocks:
            for nth in range(len(pages[0].layers)):
                left, pieces = rows * self._row_bytes, []
                for page in pages:
                    pieces.append(page.layers[nth, :left])
                    left -= pieces[-1].nbytes
                out.append(pieces)
        return out


class HostPages:
    """Makes chunk caches in host memory for one model's device.

    On a GPU they are pinned: copies run at the bus's speed then, beside the computation. Pinned memory is used again
    when nobody holds its chunk any more; whoever has a copy under way must hold it. Pages of a CPU are never used
    again, since a copy there may be the same memory.
    """

    def __init__(self, layout: PageLayout, sharding: Sharding):
        self.layout, self.sharding = layout, sharding
        self.pinned = uses_pinned(sharding)
        self._free: defaultdict[tuple[int, ...], deque[Page]] = defaultdict(deque)  # by shape

    def empty(self, tokens: int, whole: bool = False) -> HostChunk:
        """A chunk cache of so many tokens, to be filled: in pages, or `whole`, for `RowBuffers` alone.

        A whole one takes the memory that its pages would take, so that pieces have few sizes.
        """
        layout, layers, count = self.layout, None, self.layout.pages(tokens)
        row_bytes = layout.head_dim * layout.dtype.itemsize
        if whole:
            depth, size = layout.blocks[-1].stop, layout.token_rows * tokens * row_bytes
            memory = [self._page(depth, count * layout.rows)]
            layers = memory[0].layers.reshape(-1)[: depth * size].reshape(depth, size)
            blocks = [[Page(memory[0].array, layers[block.start : block.stop])] for block in layout.blocks]
        else:
            blocks = [[self._page(len(block), layout.rows) for _ in range(count)] for block in layout.blocks]
            memory = [page for pages in blocks for page in pages]
        chunk = HostChunk(blocks, row_bytes, sum(page.layers.nbytes for page in memory), layers)
        if self.pinned:
            weakref.finalize(chunk, self._recycle, memory).atexit = False
        return chunk

    def filled(self, kv: Float[np.ndarray, "L 2 K C H"], whole: bool = False) -> HostChunk:
        """A copy of a chunk cache."""
        layers = np.ascontiguousarray(kv).reshape(len(kv), -1).view(np.uint8)
        chunk = self.empty(kv.shape[3], whole)
        for layer, pieces in zip(layers, chunk.buffers(2 * kv.shape[2] * kv.shape[3]), strict=True):
            start = 0
            for piece in pieces:
                piece[...] = layer[start : start + piece.nbytes]
                start += piece.nbytes
        return chunk

    def _page(self, layers: int, rows: int) -> Page:
        shape = layers, rows, self.layout.head_dim
        try:
            return self._free[shape].popleft()
        except IndexError:
            self._let_go()
            array: Any = np.empty(shape, self.layout.dtype)
        if not self.pinned:
            return Page(array, array.reshape(layers, -1).view(np.uint8))
        (device,) = self.sharding.device_set
        array = jax.device_put(array, SingleDeviceSharding(device, memory_kind="pinned_host")).block_until_ready()
        memory = (ctypes.c_uint8 * array.nbytes).from_address(array.unsafe_buffer_pointer())
        return Page(array, np.frombuffer(memory, np.uint8).reshape(layers, -1))

    def _recycle(self, memory: Sequence[Page]) -> None:
        for page in memory:
            self._free[page.array.shape].append(page)

    def _let_go(self) -> None:
        """Forget memory that nobody holds, as chunks of other lengths left it, beyond SPARE_BYTES."""
        while True:
            spare = {shape: len(free) * math.prod(shape) * self.layout.dtype.itemsize
                     for shape, free in list(self._free.items())}
            if sum(spare.values()) <= SPARE_BYTES:
                return
            with suppress(IndexError):  # it was taken meanwhile
                self._free[max(spare, key=spare.__getitem__)].popleft()


def uses_pinned(sharding: Sharding) -> bool:
    """Whether copies to an array with this sharding start from pinned memory: on one GPU."""
    return len(sharding.device_set) == 1 and platform_of(sharding) == "gpu"


def platform_of(sharding: Sharding) -> str:
    """The kind of device that an array with this sharding lies on: cpu, gpu or tpu."""
    devices: Any = sharding.device_set
    return next(iter(devices)).platform
