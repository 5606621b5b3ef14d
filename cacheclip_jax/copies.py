"""Copies from pinned memory to where their rows lie on a GPU, through CUDA's driver.

An array for each page would cost the runtime tens of microseconds and several callbacks, which hold the driver's lock
while programs are launched. Here a copy is one call of a few microseconds, and rows needn't be put together afterwards.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Sequence
from functools import cache
from threading import Lock
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from cacheclip_jax.pages import HostChunk, PageLayout

_HOST, _DEVICE, _NON_BLOCKING, _DISABLE_TIMING = 1, 2, 1, 2


class _Memcpy2D(ctypes.Structure):
    """CUDA_MEMCPY2D of the driver's interface."""

    _fields_ = [(f"{end}{name}", kind) for end in ("src", "dst") for name, kind in (
        ("XInBytes", ctypes.c_size_t), ("Y", ctypes.c_size_t), ("MemoryType", ctypes.c_int), ("Host", ctypes.c_void_p),
        ("Device", ctypes.c_uint64), ("Array", ctypes.c_void_p), ("Pitch", ctypes.c_size_t))] + [
        ("WidthInBytes", ctypes.c_size_t), ("Height", ctypes.c_size_t)]


@cache
def driver(keep_lock: bool = False) -> Any:
    """CUDA's driver; with `keep_lock`, calls that keep Python's lock, for those that don't wait. None without CUDA."""
    try:
        return (ctypes.PyDLL if keep_lock else ctypes.CDLL)("libcuda.so.1")
    except OSError:
        return None


class Stream:
    """A CUDA stream of one device, beside those of the runtime."""

    def __init__(self, device: jax.Device):
        self._context, self.handle = ctypes.c_void_p(), ctypes.c_void_p()
        _check("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device.local_hardware_id)
        self.enter()
        _check("cuStreamCreate", ctypes.byref(self.handle), _NON_BLOCKING)

    def enter(self) -> None:
        """Let the calling thread use this stream."""
        _check("cuCtxSetCurrent", self._context)

    def copy(self, source: int, source_pitch: int, target: int, target_pitch: int, width: int, height: int) -> None:
        """Start to copy `height` runs of `width` bytes from pinned memory to the device, a pitch apart on each side."""
        _check("cuMemcpy2DAsync_v2", ctypes.byref(_Memcpy2D(
            srcMemoryType=_HOST, srcHost=source, srcPitch=source_pitch, dstMemoryType=_DEVICE, dstDevice=target,
            dstPitch=target_pitch, WidthInBytes=width, Height=height)), self.handle, keep_lock=True)

    def mark(self) -> Mark:
        """The end of the copies that were asked for so far."""
        return Mark(self)

    def wait(self) -> None:
        """Wait until every copy is done."""
        _check("cuStreamSynchronize", self.handle)


class Mark:
    """A place in a stream's work, that threads may wait for without Python's lock."""

    def __init__(self, stream: Stream):
        self._enter, self._event = stream.enter, ctypes.c_void_p()
        _check("cuEventCreate", ctypes.byref(self._event), _DISABLE_TIMING, keep_lock=True)
        _check("cuEventRecord", self._event, stream.handle, keep_lock=True)

    def reach(self) -> None:
        """Wait until all work before it is done."""
        self._enter()
        _check("cuEventSynchronize", self._event)

    def __del__(self) -> None:
        driver(keep_lock=True).cuEventDestroy_v2(self._event)


def _check(name: str, *args: Any, keep_lock: bool = False) -> None:
    if code := getattr(driver(keep_lock), name)(*args):
        raise RuntimeError(f"CUDA's driver says {code} to {name}: copies to the GPU don't work")


class RowBuffers:
    """Arrays [B, R, H] on the device that rows are copied into, used again and again: new ones would be cleared first.

    Whoever borrows some gives them back when no program reads them any more; what isn't given back is forgotten.
    """

    kept_sizes = 2

    def __init__(self, layout: PageLayout, sharding: Sharding, stream: Stream):
        self.layout, self.stream, self._sharding = layout, stream, sharding
        self._free: OrderedDict[int, list[jax.Array]] = OrderedDict()  # by R, those given back last at the end
        self._lock = Lock()

    @classmethod
    def of(cls, layout: PageLayout, sharding: Sharding) -> RowBuffers | None:
        """Buffers on one device; None where there is no CUDA."""
        (device,) = sharding.device_set
        return cls(layout, sharding, Stream(device)) if driver() else None

    def borrow(self, rows: int, count: int) -> list[jax.Array]:
        """`count` arrays of `rows` rows for each layer of a block."""
        shape = len(self.layout.blocks[0]), rows, self.layout.head_dim
        with self._lock:
            free = self._free.get(rows, [])
            found = [free.pop() for _ in range(min(count, len(free)))]
        new = [jnp.zeros(shape, self.layout.dtype, device=self._sharding) for _ in range(count - len(found))]
        return found + jax.block_until_ready(new)

    def give_back(self, buffers: Sequence[jax.Array]) -> None:
        """Return borrowed arrays; the sizes borrowed last are kept."""
        rows = buffers[0].shape[1]
        with self._lock:
            self._free.setdefault(rows, []).extend(buffers)
            self._free.move_to_end(rows)
            while len(self._free) > self.kept_sizes:
                self._free.popitem(last=False)

    def fill(self, buffer: jax.Array, block: int, chunks: Sequence[HostChunk], offsets: Sequence[int],
             rows: Sequence[int]) -> Mark:
        """Start to copy a block of layers of chunks to `buffer`, `rows[i]` rows a layer to row `offsets[i]`; gives the
        end of the copies, before which nobody may compute with the buffer."""
        row_bytes = self.layout.head_dim * self.layout.dtype.itemsize
        start, pitch = buffer.unsafe_buffer_pointer(), buffer.shape[1] * row_bytes
        for chunk, offset, count in zip(chunks, offsets, rows, strict=True):
            target, left = start + offset * row_bytes, count * row_bytes
            for page in chunk.blocks[block]:
                height, size = page.layers.shape
                self.stream.copy(page.layers.ctypes.data, size, target, pitch, min(left, size), height)
                target, left = target + size, left - size
        return self.stream.mark()
