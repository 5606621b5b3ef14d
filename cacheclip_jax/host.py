"""Host memory between the store and the device: a bounded tier of chunk caches, and pinned buffers to copy from."""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from jaxtyping import Float

Key = tuple[str, str]  # space, chunk


class HostTier:
    """Chunk caches in host memory, bounded in bytes; the least recently used leave first. Safe to share by threads."""

    def __init__(self, limit_bytes: int):
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self._kept: OrderedDict[Key, np.ndarray] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Key) -> Float[np.ndarray, "L 2 K C H"] | None:
        """A chunk cache, to be read only; None when it isn't here."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, key: Key, kv: Float[np.ndarray, "L 2 K C H"]) -> None:
        """Keep a chunk cache, unless it alone is over the limit; the array is shared, not copied."""
        with self._lock:
            if kv.nbytes > self.limit_bytes or key in self._kept:
                return
            self._kept[key] = kv
            self.used_bytes += kv.nbytes
            while self.used_bytes > self.limit_bytes:
                _, dropped = self._kept.popitem(last=False)
                self.used_bytes -= dropped.nbytes

    def drop(self, key: Key) -> None:
        """Forget a chunk cache, where it's here."""
        with self._lock:
            if (kv := self._kept.pop(key, None)) is not None:
                self.used_bytes -= kv.nbytes


def platform_of(sharding: Sharding) -> str:
    """The kind of device that an array with this sharding lies on: cpu, gpu or tpu."""
    devices: Any = sharding.device_set
    return next(iter(devices)).platform


class Buffer:
    """Host memory for one layer's rows: fill `bytes`, then `send` it."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, sharding: Sharding, pinned: bool):
        self._sharding = sharding
        self._sent: jax.Array | None = None
        if pinned:
            (device,) = sharding.device_set
            self._host: Any = jax.device_put(np.zeros(shape, dtype),
                                             SingleDeviceSharding(device, memory_kind="pinned_host"))
            address = self._host.block_until_ready().unsafe_buffer_pointer()
            self.bytes = np.frombuffer((ctypes.c_uint8 * self._host.nbytes).from_address(address), np.uint8)
        else:
            self._host = host = np.zeros(shape, dtype)
            self.bytes = host.reshape(-1).view(np.uint8)

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
    """Buffers for layers on their way to one model's device.

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
    def ring(self, shape: tuple[int, ...], dtype: Any, depth: int) -> Iterator[Callable[[int], Buffer]]:
        """A function that gives the n-th buffer of a shape, once it may be filled; number n + `depth` is the same."""
        def new() -> Buffer:
            return Buffer(shape, dtype, self.sharding, self.pinned)

        if not self.pinned:
            yield lambda n: new()
            return
        key = (shape, np.dtype(dtype))
        with self._lock:
            buffers = self._rings.pop(key, None) or [new() for _ in range(depth)]

        def nth(n: int) -> Buffer:
            buffers[n % depth].free()
            return buffers[n % depth]

        yield nth
        with self._lock:  # not after an error: copies may be under way
            self._rings[key] = buffers
            while len(self._rings) > self.kept_sizes:
                self._rings.popitem(last=False)
