"""Feed: one model's assembled cache for one request, handed out layer by layer while it is still on its way."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import jax

from cacheclip_jax.assemble import Placement, placement
from cacheclip_jax.bucket import bucket
from cacheclip_jax.caches import Behind, ChunkCaches, Fetched
from cacheclip_jax.clock import Clock
from cacheclip_jax.device import add_block
from cacheclip_jax.host import platform_of
from cacheclip_jax.loader import InMemory, LayerLoader, Source
from cacheclip_jax.store import Passage

LAYERS_AHEAD = 8  # layers on the device before their turn: at least two of the largest span


class Feed:
    """The rows of a request's prefix and chunks, and where in them each slot's lie.

    Parts that lie in the model's device tier are used there; the others are fetched, loaded as one block, and kept in
    the tier where there is one.
    """

    def __init__(self, caches: ChunkCaches, passages: Sequence[Passage], lengths: Sequence[int], behind: Behind,
                 slots: int, depth: int, pool: ThreadPoolExecutor, clock: Clock, accounting: Fetched,
                 wanted: Sequence[bool] | None = None, after: Feed | None = None):
        """Start to load the first `depth` layers.

        A chunk that isn't `wanted` (all its tokens are recomputed anyway) is left out. `accounting` hears of hits,
        misses and repairs. The copies of the feed `after` go first.
        """
        self.caches, self.depth = caches, depth
        self._tier, self._at = caches.tier, 0
        cfg, prefix = caches.model.config, caches.prefix_kv()
        wanted = [True] * len(passages) if wanted is None else wanted
        tokens = [prefix.shape[3], *lengths]
        per_token = 2 * cfg.num_kv_heads
        self._keys = [(f"{caches.space(behind).key}/{depth}", part) for part in
                      ("prefix", *(caches.key(behind, p)[1] for p in passages))]
        self._sizes = [per_token * n for n in tokens]
        missing, rows, offsets = self._missing([True, *wanted], per_token)
        accounting.hits += sum(w and not m for w, m in zip(wanted, missing[1:], strict=True))
        self._loader: LayerLoader | None = None
        if any(missing):
            found = caches.fetch(passages, behind, clock, missing[1:])
            accounting.absorb(found)
            sources: list[Source | None] = [InMemory(prefix), *found.sources]
            whole = self._tier is None
            parts = [(source, n) for source, n, m in zip(sources, tokens, missing, strict=True) if m or whole]
            # Part 0 is the prefix where it's loaded; it isn't stored, so never damaged.
            chunks = [i for i, m in enumerate(missing[1:]) if m or whole]
            skip = len(parts) - len(chunks)
            self._loader = LayerLoader(
                pool, caches.staging, parts, depth, per_token, (rows, cfg.head_dim), caches.dtype,
                ahead=depth if platform_of(caches.staging.sharding) == "cpu" else LAYERS_AHEAD,
                repair=lambda i, e: caches.repair(passages, behind, accounting, chunks[i - skip], e),
                after=after.sent_all if after else None)
        self._kept = missing
        where = placement(cfg, slots, tokens, offsets)
        self.where: Placement = jax.device_put(where, caches.staging.sharding)

    def _missing(self, wanted: Sequence[bool], per_token: int) -> tuple[list[bool], int, list[int] | None]:
        """Which parts must be loaded, the rows of the block that they fill, and where every part begins in the rows
        that `take` gives; without a tier, one after another in a block of all."""
        if self._tier is not None:
            missing = [w and at is None for w, at in zip(wanted, self._tier.find(self._keys), strict=True)]
            for _ in range(4):  # a block may take the place of parts that are wanted too: then it must hold them
                need = sum(size for size, m in zip(self._sizes, missing, strict=True) if m)
                rows = per_token * bucket(need // per_token, 256, steps=32) if need else 0
                at = self._tier.reserve(rows) if rows else 0
                if at is None:
                    break
                self._at = at
                now = [w and first is None for w, first in zip(wanted, self._tier.find(self._keys), strict=True)]
                if now == missing:
                    return missing, rows, self._offsets(missing)
                missing = now
            self._tier = None
        return list(wanted), per_token * bucket(sum(self._sizes) // per_token, 256, steps=32), None

    def _offsets(self, missing: Sequence[bool]) -> list[int]:
        assert self._tier is not None
        offsets, end = [], self._at
        for size, absent, first in zip(self._sizes, missing, self._tier.find(self._keys), strict=True):
            offsets.append(end if absent else first or 0)
            end += size if absent else 0
        return offsets

    @property
    def sent_all(self) -> Event | None:
        """Set when the last copy is under way; None where nothing is loaded."""
        return self._loader.sent_all if self._loader else None

    def take(self, start: int, stop: int) -> tuple[jax.Array, ...]:
        """The rows [R, H] of layers `start` to `stop`, each once, in order. Raises what went wrong in loading."""
        if self._tier is None:
            assert self._loader is not None
            return self._loader.take(start, stop)
        if self._loader is not None:
            new = self._loader.take(start, stop)
            self._tier.written(start, add_block(self._tier.take(start, stop), new, self._at))
            if stop == self.depth:
                self._tier.keep(self._keys, self._sizes, self._kept, self._at)
        return self._tier.take(start, stop)

    def computed(self, marks: Sequence[jax.Array]) -> None:
        """Tell that the next layers were dispatched; `marks` has for each an array that is ready when it's done."""
        if self._loader is not None:
            self._loader.computed(marks)

    def stop(self) -> None:
        """Let the loading threads end, also when not every layer was taken."""
        if self._loader is not None:
            self._loader.stop()
