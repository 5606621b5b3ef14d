"""Host memory between the store and the device: a bounded tier of chunk caches, and pinned buffers to copy from."""

from __future__ import annotations

import ctypes
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from jaxtyping import Float

Key = tuple[str, str]  # space, chunk
PAGE_ROWS = 256


class HostTier:
    """One model's chunk caches in host memory, bounded in bytes; the least recently used leave first.

    They lie in pages of PAGE_ROWS rows, the same pages in every layer, so that a request's chunks are gathered layer by
    layer with one call that lets Python's lock go: a call for each chunk would queue for it. Threads may share it.
    """

    def __init__(self, num_layers: int, row_bytes: int, limit_bytes: int):
        self.page_bytes = PAGE_ROWS * row_bytes
        self.pages = limit_bytes // (num_layers * self.page_bytes)
        self._memory = np.empty((num_layers, self.pages, self.page_bytes), np.uint8)
        self._free = list(range(self.pages))
        self._kept: OrderedDict[Key, np.ndarray] = OrderedDict()
        self._held: Counter[Key] = Counter()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def hold(self, key: Key) -> np.ndarray | None:
        """The pages of a chunk cache, which stay as they are until `release`; None when it isn't here."""
        with self._lock:
            if (pages := self._kept.get(key)) is not None:
                self._kept.move_to_end(key)
                self._held[key] += 1
            return pages

    def release(self, keys: Iterable[Key]) -> None:
        """Let chunk caches go that were held."""
        with self._lock:
            self._held -= Counter(keys)

    def gather(self, layer: int, pages: np.ndarray, out: np.ndarray) -> None:
        """Copy pages of a layer into `out`, as bytes, one after another."""
        np.take(self._memory[layer], pages, axis=0, out=out.reshape(-1, self.page_bytes), mode="clip")

    def put(self, key: Key, kv: Float[np.ndarray, "L 2 K C H"]) -> None:
        """Keep a chunk cache, unless there's no room for it beside those that are held."""
        layers = np.ascontiguousarray(kv).reshape(len(kv), -1).view(np.uint8)
        need = -(-layers.shape[1] // self.page_bytes)
        with self._lock:
            if key in self._kept or not self._make_room(need):
                return
            pages = np.array([self._free.pop() for _ in range(need)], np.int64)
            whole = layers.shape[1] // self.page_bytes
            split = whole * self.page_bytes
            self._memory[:, pages[:whole]] = layers[:, :split].reshape(len(kv), whole, self.page_bytes)
            if whole < need:
                self._memory[:, pages[whole], : layers.shape[1] - split] = layers[:, split:]
            self._kept[key] = pages

    def _make_room(self, need: int) -> bool:
        for key in list(self._kept):
            if len(self._free) >= need:
                break
            if not self._held[key]:
                self._free += self._kept.pop(key).tolist()
        return len(self._free) >= need


def platform_of(sharding: Sharding) -> str:
    """The kind of device that an array with this sharding lies on: cpu, gpu or tpu."""
    devices: Any = sharding.device_set
    return next(iter(devices)).platform


class Buffer:
    """Host memory for the rows [B, R, H] of a block of layers: fill every `layer`, then `send` it."""

    def __init__(self, shape: tuple[int, int, int], dtype: Any, sharding: Sharding, pinned: bool):
        self._sharding = sharding
        self._sent: jax.Array | None = None
        if pinned:
            (device,) = sharding.device_set
            self._host: Any = jax.device_put(np.zeros(shape, dtype),
                                             SingleDeviceSharding(device, memory_kind="pinned_host"))
            address = self._host.block_until_ready().unsafe_buffer_pointer()
            flat = np.frombuffer((ctypes.c_uint8 * self._host.nbytes).from_address(address), np.uint8)
        else:
            self._host = host = np.zeros(shape, dtype)
            flat = host.reshape(-1).view(np.uint8)
        self._bytes = flat.reshape(shape[0], -1)

    def layer(self, nth: int) -> np.ndarray:
        """The bytes of the block's nth layer."""
        return self._bytes[nth]

    def send(self) -> jax.Array:
        """Start the copy to the device."""
        sent = self._sent = jax.device_put(self._host, self._sharding)
        return sent

    def free(self) -> None:
        """Wait until what was sent has left this memory."""
        if self._sent is not None:
            self._sent.block_until_ready()
            self._sent = None


class Staging:
    """Buffers for blocks of layers on their way to one model's device.

    On a GPU they are pinned and used again and again: copies run at the bus's speed (50 GB/s where pageable memory
    gives 29 on an H100), beside the computation. On a CPU a copy may be no copy at all but the same memory, so that
    every buffer is used once.
    """

    kept_sizes = 2

    def __init__(self, sharding: Sharding):
        self.sharding = sharding
        self.pinned = len(sharding.device_set) == 1 and platform_of(sharding) == "gpu"
        self._rings: OrderedDict[tuple, list[Buffer]] = OrderedDict()
        self._lock = Lock()

    @contextmanager
    def ring(self, shape: tuple[int, int, int], dtype: Any) -> Iterator[Callable[[int], Buffer]]:
        """A function that gives the n-th buffer of a shape, once it may be filled; number n + 3 is the same."""
        def new() -> Buffer:
            return Buffer(shape, dtype, self.sharding, self.pinned)

        if not self.pinned:
            yield lambda n: new()
            return
        key = (shape, np.dtype(dtype))
        with self._lock:
            buffers = self._rings.pop(key, None) or [new() for _ in range(3)]

        def nth(n: int) -> Buffer:
            buffers[n % 3].free()
            return buffers[n % 3]

        yield nth
        with self._lock:  # not after an error: copies may be under way
            self._rings[key] = buffers
            while len(self._rings) > self.kept_sizes:
                self._rings.popitem(last=False)
