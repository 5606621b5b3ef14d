"""Feed: one model's assembled cache for one request, handed out block by block while it is still on its way."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cacheclip_jax.assemble import Placement, placement
from cacheclip_jax.bucket import bucket
from cacheclip_jax.caches import Behind, ChunkCaches, DeviceChunk, Fetched
from cacheclip_jax.clock import Clock
from cacheclip_jax.loader import PageLoader
from cacheclip_jax.store import Passage

AHEAD_BYTES = 1 << 30  # of a request's caches on the device before their turn


class Feed:
    """The rows of a request's prefix and chunks, and where in them each slot's lie.

    Chunks that lie in the device tier are used there; the others are fetched and loaded, and kept in the tier where
    there is one.
    """

    def __init__(self, caches: ChunkCaches, passages: Sequence[Passage], lengths: Sequence[int], behind: Behind,
                 slots: int, depth: int, pool: ThreadPoolExecutor, clock: Clock, accounting: Fetched,
                 wanted: Sequence[bool] | None = None, after: Feed | None = None):
        """Start to load the first `depth` layers.

        A chunk that isn't `wanted` (all its tokens are recomputed anyway) is left out. `accounting` hears of hits,
        misses and repairs. The copies of the feed `after` go first.
        """
        layout, sharding = caches.pages.layout, caches.pages.sharding
        wanted = [True] * len(passages) if wanted is None else wanted
        self.blocks = [range(b.start, min(b.stop, depth)) for b in layout.blocks if b.start < depth]
        self._tier, self._prefix = caches.device, caches.prefix_pages
        self._keys = [(*caches.key(behind, p), f"{len(self.blocks)} blocks") for p in passages]
        self._chunks: list[DeviceChunk] = [[] for _ in passages]  # what isn't wanted or isn't there yet has no pages
        for i, key in enumerate(self._keys):
            if wanted[i] and self._tier is not None:
                self._chunks[i] = self._tier.get(key) or []
        load = [w and not chunk for w, chunk in zip(wanted, self._chunks, strict=True)]
        self._loaded, self._loader = [i for i, needed in enumerate(load) if needed], None
        accounting.hits += sum(wanted) - len(self._loaded)
        tokens = [caches.prefix_kv().shape[3], *lengths]
        pages = [len(self._prefix[0]), *(w * layout.pages(n) for n, w in zip(lengths, wanted, strict=True))]
        self._count = bucket(sum(pages), 4)
        if self._loaded:
            found = caches.fetch(passages, behind, clock, load)
            accounting.absorb(found)
            block_bytes = self._count * max(map(layout.nbytes, layout.blocks))
            self._loader = PageLoader(
                pool, sharding, [s for s in found.sources if s is not None], len(self.blocks),
                max(2, AHEAD_BYTES // block_bytes),
                repair=lambda i, e: caches.repair(passages, behind, accounting, self._loaded[i], e),
                after=after.sent_all if after else None)
        offsets = [layout.rows * sum(pages[:i]) if n else -1 for i, n in enumerate(pages)]
        self.where: Placement = jax.device_put(placement(caches.model.config, slots, tokens, offsets), sharding)

    @property
    def sent_all(self) -> Event | None:
        """Set when the last copy is under way; None where nothing is loaded."""
        return self._loader.sent_all if self._loader else None

    def take(self, number: int) -> jax.Array:
        """The rows [B, R, H] of the layers `blocks[number]`, each once, in order. Raises what went wrong in loading."""
        if self._loader is not None:
            for i, pages in zip(self._loaded, self._loader.take(number), strict=True):
                self._chunks[i].append(pages)
        pages = [page for chunk in (self._prefix, *self._chunks) if chunk for page in chunk[number]]
        for i in self._loaded:
            if self._tier is None:
                self._chunks[i][number] = []  # or they would lie on the device until the last layer is done
            elif number == len(self.blocks) - 1:
                self._tier.put(self._keys[i], self._chunks[i], sum(p.nbytes for some in self._chunks[i] for p in some))
        return join(*pages, *pages[:1] * (self._count - len(pages)))

    def computed(self, mark: jax.Array) -> None:
        """Tell that the next block was dispatched; `mark` is ready when it's done, and no later program is given it."""
        if self._loader is not None:
            self._loader.computed(mark)

    def stop(self) -> None:
        """Let the loading thread end, also when not every block was taken."""
        if self._loader is not None:
            self._loader.stop()


@jax.jit
def join(*pages: Float[Array, "B r H"]) -> Float[Array, "B R H"]:
    """Pages one after another."""
    return jnp.concatenate(pages, axis=1)
