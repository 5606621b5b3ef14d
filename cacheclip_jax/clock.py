"""Clock: seconds per named stage of a request, of work on the host and of work that the device does meanwhile."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import jax


class Clock:
    """Wall-clock seconds by stage. Stages of the device may overlap with each other and with the host's."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.started = time.perf_counter()
        self._pool = pool
        self._watches: list[Future[None]] = []
        self._ready: dict[str, float] = {}
        self._since: dict[str, float | str | None] = {}

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
        `since` was ready, or from the clock's start."""
        self._since[stage] = since

        def wait() -> None:
            array.block_until_ready()
            self._ready[stage] = time.perf_counter()

        self._watches.append(self._pool.submit(wait))

    def settle(self, within: float) -> dict[str, float]:
        """Seconds by stage, once everything that is watched is there; it was by `within` seconds after the start, also
        where the thread that watches woke up later."""
        for watch in self._watches:
            watch.result()
        for stage, ready in self._ready.items():
            since = self._since[stage]
            begun = self._ready.get(since, self.started) if isinstance(since, str) else since or self.started
            self.seconds[stage] = max(0.0, min(ready, self.started + within) - begun)
        return dict(self.seconds)

    def total(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self.started
