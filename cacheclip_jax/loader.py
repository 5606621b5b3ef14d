"""Chunk caches to the device, a block of layers at a time, ahead of the computation that reads them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from threading import Event

import jax
from jax.sharding import Sharding

from cacheclip_jax.errors import ChunkCorrupt
from cacheclip_jax.pages import HostChunk

Source = HostChunk | Future  # of a HostChunk


class PageLoader:
    """Copies chunk caches to the device in a thread of its own: all pages of a block of layers with one call.

    `ahead` blocks at most lie on the device before their turn, which bounds what loading adds to its memory; `computed`
    says how far the device has come. `repair(index, error)` gives a chunk instead of one that turned out damaged. No
    copy is started before `after` is set.
    """

    def __init__(self, pool: ThreadPoolExecutor, sharding: Sharding, sources: Sequence[Source], blocks: int, ahead: int,
                 repair: Callable[[int, ChunkCorrupt], HostChunk], after: Event | None = None):
        self.sent_all = Event()
        self._sources, self._sharding, self._ahead, self._repair = sources, sharding, ahead, repair
        self._sent = [Event() for _ in range(blocks)]
        self._pages: list[list[list[jax.Array]]] = [[] for _ in range(blocks)]
        self._error: BaseException | None = None
        self._marks: SimpleQueue[jax.Array | None] = SimpleQueue()  # for each block computed one that is ready then
        pool.submit(self._run, after)

    def take(self, number: int) -> list[list[jax.Array]]:
        """Each source's pages of a block, as soon as their copies are under way. Each block can be taken once.

        Raises what went wrong, but for damaged chunks, which are repaired.
        """
        self._sent[number].wait()
        pages, self._pages[number] = self._pages[number], []
        if not pages:
            raise self._error or RuntimeError(f"block {number} was taken already")
        return pages

    def computed(self, mark: jax.Array) -> None:
        """Tell that the next block was dispatched; `mark` is ready when it's done, and no later program is given it."""
        self._marks.put(mark)

    def stop(self) -> None:
        """Let the thread end, also when not every block was taken."""
        self._fail(RuntimeError("loading was stopped"))

    def _fail(self, error: BaseException) -> None:
        self._error = self._error or error
        for event in (*self._sent, self.sent_all):
            event.set()
        self._marks.put(None)

    def _run(self, after: Event | None) -> None:
        under_way: deque[list[jax.Array]] = deque(maxlen=self._ahead)
        try:
            chunks = [self._chunk(i, source) for i, source in enumerate(self._sources)]
            if after is not None:
                after.wait()
            for number, sent in enumerate(self._sent):
                if number >= self._ahead and not self._turn_has_come():
                    raise RuntimeError("loading was stopped")
                pages = [page.array for chunk in chunks for page in chunk.blocks[number]]
                under_way.append(jax.device_put(pages, self._sharding))
                copies = iter(under_way[-1])
                self._pages[number] = [[next(copies) for _ in chunk.blocks[number]] for chunk in chunks]
                sent.set()
            self.sent_all.set()
        except BaseException as e:
            self._fail(e)
        jax.block_until_ready(under_way)  # `chunks` lets go of the host's pages only then: they may be used again

    def _chunk(self, index: int, source: Source) -> HostChunk:
        try:
            return source.result() if isinstance(source, Future) else source
        except ChunkCorrupt as e:
            return self._repair(index, e)

    def _turn_has_come(self) -> bool:
        """Wait until the device has come a block further."""
        if (mark := self._marks.get()) is None:
            return False
        mark.block_until_ready()
        return True
