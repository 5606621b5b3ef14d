"""Chunk caches to the device, a block of layers at a time, ahead of the computation that reads them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from threading import Event
from typing import Any, Protocol

import jax
from jax.sharding import Sharding

from cacheclip_jax.copies import RowBuffers
from cacheclip_jax.errors import ChunkCorrupt
from cacheclip_jax.pages import HostChunk
from cacheclip_jax.reading import Reading

Source = HostChunk | Reading


class Copier(Protocol):
    """A way to the device."""

    def send(self, number: int, chunks: Sequence[HostChunk]) -> Callable[[], Any]:
        """Start to copy a block of layers; what this returns gives, when called, what programs may be given. The copy
        of the block `ahead` before isn't read any more."""

    def finish(self) -> None:
        """Wait until no copy reads the host's pages."""

    def computed(self) -> None:
        """Hear that the device has read every block."""


class PageCopies:
    """Every page becomes an array on the device, all of a block with one call; gives each chunk's pages."""

    def __init__(self, sharding: Sharding, ahead: int):
        self._sharding = sharding
        self._under_way: deque[list[jax.Array]] = deque(maxlen=ahead)

    def send(self, number: int, chunks: Sequence[HostChunk]) -> Callable[[], list[list[jax.Array]]]:
        """Start to copy a block's pages; programs wait for them."""
        self._under_way.append(jax.device_put([page.array for c in chunks for page in c.blocks[number]],
                                              self._sharding))
        copies = iter(self._under_way[-1])
        given = [[next(copies) for _ in chunk.blocks[number]] for chunk in chunks]
        return lambda: given

    def finish(self) -> None:
        """Wait for the copies."""
        jax.block_until_ready(self._under_way)

    def computed(self) -> None:
        """Let go of the pages."""
        self._under_way.clear()


class RowCopies:
    """Rows are copied to where they lie in a buffer on the device; gives the buffer, once the copies are done."""

    def __init__(self, buffers: RowBuffers, size: int, ahead: int, offsets: Sequence[int], rows: Sequence[int]):
        self._buffers, self._offsets, self._rows = buffers, offsets, rows
        self._ring = buffers.borrow(size, ahead)

    def send(self, number: int, chunks: Sequence[HostChunk]) -> Callable[[], jax.Array]:
        """Start to copy a block's rows when the block before is there: a call that asks for a copy holds Python's lock,
        which the request's own thread wants too."""
        self._buffers.stream.enter()
        self._buffers.stream.wait()
        buffer = self._ring[number % len(self._ring)]
        copied = self._buffers.fill(buffer, number, chunks, self._offsets, self._rows)

        def arrived() -> jax.Array:
            copied.reach()
            return buffer

        return arrived

    def finish(self) -> None:
        """Wait for the copies."""
        self._buffers.stream.wait()

    def computed(self) -> None:
        """Give the buffers back."""
        self._buffers.give_back(self._ring)


class BlockLoader:
    """Sends chunk caches block by block from a thread of its own, each block when it was read of every chunk.

    `ahead` blocks at most lie on the device before their turn, which bounds what loading adds to its memory; `computed`
    says how far the device has come. `repair(index, error)` gives a chunk instead of one that turned out damaged, for
    the blocks that weren't sent yet; it is called once a chunk. No copy is started before `release` or the first
    `take`: small inputs of what is computed before would wait in the bus behind all that is sent.
    """

    def __init__(self, pool: ThreadPoolExecutor, copier: Copier, sources: Sequence[Source], blocks: int,
                 ahead: int, repair: Callable[[int, ChunkCorrupt], HostChunk]):
        self._released = Event()
        self._copier, self._sources, self._ahead, self._repair = copier, list(sources), ahead, repair
        self._chunks: list[list[HostChunk]] = []  # of each block, held until no copy reads them
        self._sent = [Event() for _ in range(blocks)]
        self._given: list[Callable[[], Any] | None] = [None] * blocks
        self._copied: Future[None] = Future()
        self._error: BaseException | None = None
        self._marks: SimpleQueue[jax.Array | None] = SimpleQueue()  # for each block computed one that is ready then
        pool.submit(self._run)

    def release(self) -> None:
        """Let copies to the device begin."""
        self._released.set()

    def take(self, number: int) -> Any:
        """What the copier gives for a block, as soon as programs may be given it. Each block can be taken once.

        Raises what went wrong, but for damaged chunks, which are repaired.
        """
        self.release()
        self._sent[number].wait()
        given, self._given[number] = self._given[number], None
        if given is None:
            raise self._error or RuntimeError(f"block {number} was taken already")
        return given()

    def computed(self, mark: jax.Array) -> None:
        """Tell that the next block was dispatched; `mark` is ready when it's done, and no later program is given it."""
        self._marks.put(mark)

    def then(self, do: Callable[[], None]) -> None:
        """Call `do` when every block's copy is done, from the thread that copies, or at once; never where one fails."""
        self._copied.add_done_callback(lambda _: do())

    def stop(self) -> None:
        """Let the thread end, also when not every block was taken."""
        self._fail(RuntimeError("loading was stopped"))

    def _fail(self, error: BaseException) -> None:
        self._error = self._error or error
        for event in (*self._sent, self._released):
            event.set()
        self._marks.put(None)

    def _run(self) -> None:
        try:
            try:
                self._send()
            finally:
                self._copier.finish()
                self._sources.clear()
                self._chunks.clear()
            self._copied.set_result(None)
            for _ in range(min(self._ahead, len(self._sent))):
                last = self._mark()
            last.block_until_ready()
            self._copier.computed()
        except BaseException as e:
            self._fail(e)

    def _send(self) -> None:
        for number, sent in enumerate(self._sent):
            self._chunks.append([self._chunk(i, number) for i in range(len(self._sources))])
            self._released.wait()
            if self._error is not None:
                raise self._error
            if number >= self._ahead:
                self._mark().block_until_ready()
            self._given[number] = self._copier.send(number, self._chunks[-1])
            sent.set()

    def _chunk(self, index: int, number: int) -> HostChunk:
        """A chunk whose block of layers is there."""
        source = self._sources[index]
        try:
            return source if isinstance(source, HostChunk) else source.wait(number)
        except ChunkCorrupt as e:
            self._sources[index] = chunk = self._repair(index, e)
            return chunk

    def _mark(self) -> jax.Array:
        """The mark of the next block that was dispatched; raises when loading was stopped."""
        if (mark := self._marks.get()) is None:
            raise RuntimeError("loading was stopped")
        return mark
