"""Feed: one model's assembled cache for one request, handed out block by block while it is still on its way."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import jax
import numpy as np

from cacheclip_jax.assemble import Placement, placement
from cacheclip_jax.bucket import bucket
from cacheclip_jax.caches import Behind, ChunkCaches, Fetched
from cacheclip_jax.clock import Clock
from cacheclip_jax.device import add_block
from cacheclip_jax.host import PAGE_ROWS, Key, platform_of
from cacheclip_jax.loader import BlockLoader, InMemory, Part, Source
from cacheclip_jax.store import Passage

BLOCK_BYTES = 64 << 20  # of a block of layers: the first one is there after 2 ms, and few are handed over
BLOCKS_AHEAD = 2  # blocks on the device before their turn


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
        cfg, prefix, self._host = caches.model.config, caches.prefix_kv(), caches.host
        tokens, per_token = [prefix.shape[3], *lengths], 2 * cfg.num_kv_heads
        wanted = [True] * len(passages) if wanted is None else wanted
        self._sizes = [per_token * n for n in tokens]
        self._keys = [(f"{caches.space(behind).key}/{depth}", part) for part in
                      ("prefix", *(caches.key(behind, p)[1] for p in passages))]
        self._tier, self._at = caches.tier, 0
        self._loader: BlockLoader | None = None
        self._held: list[Key] = []
        missing, rows = self._missing([True, *wanted], per_token)
        accounting.hits += sum(w and not m for w, m in zip(wanted, missing[1:], strict=True))
        found = caches.fetch(passages, behind, clock, missing[1:]) if any(missing) else Fetched([None] * len(passages))
        accounting.absorb(found)
        sources = [self._prefix(prefix, behind, caches) if missing[0] else None, *found.sources]
        self._held += [caches.key(behind, p) for p, source in zip(passages, found.sources, strict=True)
                       if isinstance(source, np.ndarray)]
        pages, parts, indices, offsets = self._layout(sources, missing, cfg.head_dim * caches.dtype.itemsize)
        layer_bytes = sum(self._sizes) * cfg.head_dim * caches.dtype.itemsize
        # On a CPU nothing is copied that large blocks would make fewer of, and small programs compile sooner.
        on_cpu = platform_of(caches.staging.sharding) == "cpu"
        self.blocks = layer_blocks(depth, 1 if on_cpu else BLOCK_BYTES, layer_bytes)
        if self._tier is not None:
            self.blocks = self._tier.blocks(depth)
        if any(missing):
            shape = (len(self.blocks[0]), rows, cfg.head_dim)
            self._loader = BlockLoader(
                pool, caches.staging, self._host, pages, parts, self.blocks, shape, caches.dtype, BLOCKS_AHEAD,
                # Part 0 of all is the prefix, which is never damaged: it isn't stored.
                repair=lambda i, e: caches.repair(passages, behind, accounting, indices[i] - 1, e),
                after=after.sent_all if after else None)
        self._new = [(key, first, size) for key, first, size, m in
                     zip(self._keys, offsets, self._sizes, missing, strict=True) if m]
        where = placement(cfg, slots, tokens, offsets)
        self.where: Placement = jax.device_put(where, caches.staging.sharding)

    def _prefix(self, prefix: np.ndarray, behind: Behind, caches: ChunkCaches) -> Source | np.ndarray:
        """The prefix as pages of the host tier, so that it's gathered with the chunks, or as a source."""
        if self._host is not None:
            key = (caches.space("shared").key, "prefix")
            pages = self._host.hold(key)
            if pages is None:
                self._host.put(key, prefix)
                pages = self._host.hold(key)
            if pages is not None:
                self._held.append(key)
                return pages
        return InMemory(prefix)

    def _missing(self, wanted: Sequence[bool], per_token: int) -> tuple[list[bool], int]:
        """Which parts must be loaded, and the rows of the block that they fill, where each may end in a page's rest."""
        def block(parts: Sequence[bool]) -> int:
            need = sum(-(-size // PAGE_ROWS) * PAGE_ROWS for size, m in zip(self._sizes, parts, strict=True) if m)
            return per_token * bucket(-(-need // per_token), 256, steps=32) if need else 0

        if self._tier is not None:
            missing = [w and at is None for w, at in zip(wanted, self._tier.find(self._keys), strict=True)]
            for _ in range(4):  # a block may take the place of parts that are wanted too: then it must hold them
                rows = block(missing)
                at = self._tier.reserve(rows) if rows else 0
                if at is None:
                    break
                self._at = at
                now = [w and first is None for w, first in zip(wanted, self._tier.find(self._keys), strict=True)]
                if now == missing:
                    return missing, rows
                missing = now
            self._tier, self._at = None, 0
        return list(wanted), block([True] * len(wanted))

    def _layout(self, sources: Sequence[Source | np.ndarray | None], missing: Sequence[bool], row_bytes: int
                ) -> tuple[np.ndarray, list[Part], list[int], list[int]]:
        """The host tier's pages that fill the block's beginning, the parts behind them and which of all parts they are,
        and where every part begins in the rows that `take` gives."""
        paged = [i for i, source in enumerate(sources) if isinstance(source, np.ndarray)]
        pages = np.concatenate([np.zeros(0, np.int64), *(sources[i] for i in paged)])
        offsets, row = [0] * len(sources), 0
        for i in paged:
            offsets[i], row = self._at + row, row + PAGE_ROWS * len(sources[i])  # type: ignore[arg-type]
        found = self._tier.find(self._keys) if self._tier else [None] * len(sources)
        parts, indices = [], []
        for i, (source, size) in enumerate(zip(sources, self._sizes, strict=True)):
            if isinstance(source, np.ndarray):
                continue
            if not missing[i] and self._tier is not None:
                offsets[i] = found[i] or 0
                continue
            offsets[i] = self._at + row
            parts.append(Part(row * row_bytes, (row + size) * row_bytes, source))
            indices.append(i)
            row += size
        return pages, parts, indices, offsets

    @property
    def sent_all(self) -> Event | None:
        """Set when the last copy is under way; None where nothing is loaded."""
        return self._loader.sent_all if self._loader else None

    def take(self, number: int) -> jax.Array:
        """The rows [B, R, H] of the layers `blocks[number]`, each once, in order. Raises what went wrong in loading."""
        if self._tier is None:
            assert self._loader is not None
            return self._loader.take(number)
        if self._loader is not None:
            new = self._loader.take(number)
            self._tier.written(number, add_block(self._tier.take(number), new, np.int32(self._at)))
            if number == len(self.blocks) - 1:
                for key, first, size in self._new:
                    self._tier.keep(key, first, size)
        return self._tier.take(number)

    def computed(self, mark: jax.Array) -> None:
        """Tell that the next block was dispatched; `mark` is ready when it's done, and no later program is given it."""
        if self._loader is not None:
            self._loader.computed(mark)

    def stop(self) -> None:
        """Let the loading threads end, also when not every layer was taken."""
        if self._loader is not None:
            self._loader.stop()
        if self._host is not None:
            self._host.release(self._held)
            self._held = []


def layer_blocks(depth: int, block_bytes: int, layer_bytes: int) -> list[range]:
    """Layers in blocks of about `block_bytes`, of two layers at least and about equally many."""
    count = max(1, min(depth // 2, -(-depth * layer_bytes // block_bytes)))
    size = -(-depth // count)
    return [range(first, min(first + size, depth)) for first in range(0, depth, size)]
