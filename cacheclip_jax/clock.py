"""Clock: seconds per named stage of a request, of work on the host and of work that the device does meanwhile."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import jax


class _Watch:
    """When an array that the device computes was seen to be there, by whichever thread saw it first."""

    def __init__(self, array: jax.Array, since: float | _Watch) -> None:
        self._array: jax.Array | None = array
        self._since = since
        self._ready: float | None = None

    def wait(self) -> None:
        """Until what it counts from is there, then until the array is: so the two are seen in this order, however late
        the thread wakes up."""
        if isinstance(self._since, _Watch):
            self._since.wait()
        if (array := self._array) is not None:
            array.block_until_ready()
            now = time.perf_counter()
            if self._ready is None:
                self._ready = now
            self._array = None  # a cache's memory isn't kept for its time

    def seconds(self) -> float:
        """From what it counts from until the array was there."""
        begun = self._since if isinstance(self._since, float) else self._since._ready
        assert self._ready is not None and begun is not None
        return self._ready - begun


class Clock:
    """Wall-clock seconds by stage. Stages of the device may overlap with each other and with the host's."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._started = time.perf_counter()
        self._pool = pool
        self._watches: dict[str, _Watch] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count the block's time to `stage`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - started

    def watch(self, stage: str, array: jax.Array, since: float | str | None = None) -> None:
        """Count the time until `array` is there to `stage`, without waiting: from the time `since`, from when the stage
        `since`, if it is watched, was ready, or from the clock's start. The last watch of a stage counts."""
        begun = self._watches.get(since, self._started) if isinstance(since, str) else since or self._started
        self._watches[stage] = watch = _Watch(array, begun)
        self._pool.submit(watch.wait)

    def stop(self) -> float:
        """Seconds since the clock was made, once everything that is watched is there."""
        for watch in self._watches.values():
            watch.wait()
        return time.perf_counter() - self._started

    def stages(self) -> dict[str, float]:
        """Seconds by stage, of a clock that was stopped."""
        return self.seconds | {stage: watch.seconds() for stage, watch in self._watches.items()}
