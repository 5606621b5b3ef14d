"""A chunk cache on its way from the store to host memory, some blocks of layers at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import batched
from threading import Event, Lock

from cacheclip_jax.pages import HostChunk, HostPages
from cacheclip_jax.store import PendingKV
from cacheclip_jax.store.store import READERS

# A step takes Python's lock a few times, which other readers and the request's own thread want too.
STEP_BYTES = 8 << 20  # of a chunk at least
LOCAL_READERS = 8  # threads for a model's chunks in local files


class Reading:
    """A chunk cache that is read in steps, each of consecutive blocks of layers; see `start`.

    There are several where a chunk is one piece and lies in a local file, so that its first blocks are computed with
    while the next are read; elsewhere a step is the whole chunk. A thread that reads holds the chunk.
    """

    def __init__(self, pending: PendingKV, pages: HostPages, tokens: int, whole: bool,
                 keep: Callable[[HostChunk], object]):
        """`keep` gets the chunk of `tokens` tokens when all of it was read and checked."""
        layout = pages.layout
        block_bytes = len(layout.blocks[0]) * layout.token_rows * tokens * layout.head_dim * layout.dtype.itemsize
        count, self.local = len(layout.blocks), pending.in_file
        self._blocks = min(count, -(-STEP_BYTES // block_bytes)) if whole and self.local else count  # of a step
        self.steps = [range(some[0].start, some[-1].stop) for some in batched(layout.blocks, self._blocks)]
        self._pending: PendingKV | None = pending
        self._empty, self._keep = lambda: pages.empty(tokens, whole), keep
        self._rows = layout.token_rows * tokens
        self._lock, self._left = Lock(), len(self.steps)
        self._read = [Event() for _ in self.steps]
        self._chunk: HostChunk | None = None
        self._error: BaseException | None = None

    def wait(self, block: int) -> HostChunk:
        """The chunk, as soon as a block of its layers was read and checked; later blocks may hold anything yet.

        Raises what went wrong with any step so far: ChunkCorrupt, or ChunkUnreadable where the bytes may be whole.
        """
        self._read[block // self._blocks].wait()
        if self._error is not None:
            raise self._error
        assert self._chunk is not None
        return self._chunk

    def read(self, number: int) -> None:
        """Read and check a step in the calling thread, unless one went wrong; `wait` tells of errors."""
        try:
            if self._error is not None:
                return
            pending = self._pending
            assert pending is not None
            with self._lock:  # the thread that makes the chunk waits for none
                chunk = self._chunk = self._chunk or self._empty()
            if chunk.whole is not None:
                step = self.steps[number]
                pending.read_layers_into(step.start, chunk.whole[step.start : step.stop])
            else:
                pending.read_scattered(chunk.buffers(self._rows))
            with self._lock:
                self._left -= 1
                last = not self._left
            if last:
                self._pending = None  # and with it what a bucket sent
                self._keep(chunk)
        except BaseException as e:
            self._error = e
        finally:
            self._read[number].set()


def start(readings: Sequence[Reading], readers: ThreadPoolExecutor) -> None:
    """Start to read chunks in background threads: the first layers of all of them, then the next.

    No thread waits for what another has yet to begin. They take the steps from one line: to submit every step would
    hold up the calling thread.
    """
    steps = sorted(((reading, n) for reading in readings for n in range(len(reading.steps))),
                   key=lambda step: step[0].steps[step[1]].start)
    line = deque(steps)
    for _ in range(min(len(line), LOCAL_READERS if all(reading.local for reading in readings) else READERS)):
        readers.submit(_read_on, line)


def _read_on(line: deque[tuple[Reading, int]]) -> None:
    while True:
        try:
            reading, number = line.popleft()
        except IndexError:
            return
        reading.read(number)
