"""StoreSide: a model's part in a request whose chunk caches come from the store, host memory or the device."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
from jax.sharding import Sharding

from cacheclip_jax.caches import ChunkCaches, Fetched
from cacheclip_jax.clock import Clock
from cacheclip_jax.feed import Feed
from cacheclip_jax.model.load import Model
from cacheclip_jax.plan import Behind, Caches
from cacheclip_jax.prompt import Prompt
from cacheclip_jax.side import LayerFeed, Stage, bucketed
from cacheclip_jax.store import Passage


class StoreSide:
    """A `Side` over a model's chunk caches. What is loaded, and how long it takes, is told to `accounting` and `clock`.

    `reuses` says which caches a feed that is begun ahead of its use holds; None begins none.
    """

    def __init__(self, caches: ChunkCaches, passages: Sequence[Passage], prompt: Prompt, slots: int,
                 pool: ThreadPoolExecutor, clock: Clock, accounting: Fetched, reuses: Caches = None):
        self.prompt, self.slots = prompt, slots
        self._caches, self._passages, self._reuses = caches, passages, reuses
        self._pool, self._clock, self._accounting = pool, clock, accounting
        self._begun: Feed | None = None
        self._released = False
        self._feeds: list[Feed] = []

    @property
    def model(self) -> Model:
        """The model."""
        return self._caches.model

    @property
    def sharding(self) -> Sharding:
        """Whole on every device of the model."""
        return self._caches.pages.sharding

    def feed(self, behind: Behind, depth: int, wanted: Sequence[bool] | None = None) -> LayerFeed:
        """The feed that was begun, the first time, or a new one."""
        begun, self._begun = self._begun, None
        return begun or self._load(behind, depth, wanted)

    def begin(self) -> None:
        """Start to load all layers of what is reused."""
        if self._reuses is not None and not self._feeds:
            self._begun = self._load(self._reuses, self.model.config.num_layers, None)

    def release(self) -> None:
        """Let copies of every feed begin, also of one that is begun only now."""
        self._released = True
        for feed in self._feeds:
            feed.release()

    def rows(self, count: int, stage: Stage) -> int:
        """The bucket that holds `count` rows."""
        return bucketed(count, stage)

    def watch(self, stage: str, array: jax.Array, since: float | str | None = None) -> None:
        """As `Clock.watch`."""
        self._clock.watch(stage, array, since)

    def stop(self) -> None:
        """Let every feed's loading threads end."""
        for feed in self._feeds:
            feed.stop()

    def _load(self, behind: Behind, depth: int, wanted: Sequence[bool] | None) -> Feed:
        feed = Feed(self._caches, self._passages, self.prompt.chunk_lengths, behind, self.slots, depth, self._pool,
                    self._clock, self._accounting, wanted)
        self._feeds.append(feed)
        if self._released:
            feed.release()
        return feed
