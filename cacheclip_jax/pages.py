"""Chunk caches in host memory as pages: what a copy to a model's device starts from."""

from __future__ import annotations

import ctypes
import weakref
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from jaxtyping import Float, UInt8

from cacheclip_jax.model.config import ModelConfig

PAGE_TOKENS = 256
PAGE_BYTES = 2 << 20  # at least: smaller copies don't reach the bus's rate


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
    """A chunk cache in host memory: the pages of each block of layers."""

    def __init__(self, blocks: Sequence[Sequence[Page]], row_bytes: int):
        self.blocks, self._row_bytes = blocks, row_bytes
        self.nbytes = sum(page.layers.nbytes for pages in blocks for page in pages)

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

    On a GPU they are pinned: copies run at the bus's speed then, beside the computation. Pinned pages are used again
    when nobody holds their chunk any more; whoever has a copy under way must hold it. Pages of a CPU are never used
    again, since a copy there may be the same memory.
    """

    def __init__(self, layout: PageLayout, sharding: Sharding):
        self.layout, self.sharding = layout, sharding
        self.pinned = uses_pinned(sharding)
        self._free: defaultdict[int, deque[Page]] = defaultdict(deque)  # by number of layers

    def empty(self, tokens: int) -> HostChunk:
        """A chunk cache of so many tokens, to be filled."""
        layout = self.layout
        blocks = [[self._page(len(block)) for _ in range(layout.pages(tokens))] for block in layout.blocks]
        chunk = HostChunk(blocks, layout.head_dim * layout.dtype.itemsize)
        if self.pinned:
            weakref.finalize(chunk, self._recycle, blocks).atexit = False
        return chunk

    def filled(self, kv: Float[np.ndarray, "L 2 K C H"]) -> HostChunk:
        """A copy of a chunk cache."""
        layers = np.ascontiguousarray(kv).reshape(len(kv), -1).view(np.uint8)
        chunk = self.empty(kv.shape[3])
        for layer, pieces in zip(layers, chunk.buffers(2 * kv.shape[2] * kv.shape[3]), strict=True):
            start = 0
            for piece in pieces:
                piece[...] = layer[start : start + piece.nbytes]
                start += piece.nbytes
        return chunk

    def _page(self, layers: int) -> Page:
        try:
            return self._free[layers].popleft()
        except IndexError:
            array: Any = np.empty((layers, self.layout.rows, self.layout.head_dim), self.layout.dtype)
        if not self.pinned:
            return Page(array, array.reshape(layers, -1).view(np.uint8))
        (device,) = self.sharding.device_set
        array = jax.device_put(array, SingleDeviceSharding(device, memory_kind="pinned_host")).block_until_ready()
        memory = (ctypes.c_uint8 * array.nbytes).from_address(array.unsafe_buffer_pointer())
        return Page(array, np.frombuffer(memory, np.uint8).reshape(layers, -1))

    def _recycle(self, blocks: Sequence[Sequence[Page]]) -> None:
        for pages in blocks:
            self._free[len(pages[0].layers)].extend(pages)


def uses_pinned(sharding: Sharding) -> bool:
    """Whether copies to an array with this sharding start from pinned memory: on one GPU."""
    return len(sharding.device_set) == 1 and platform_of(sharding) == "gpu"


def platform_of(sharding: Sharding) -> str:
    """The kind of device that an array with this sharding lies on: cpu, gpu or tpu."""
    devices: Any = sharding.device_set
    return next(iter(devices)).platform
