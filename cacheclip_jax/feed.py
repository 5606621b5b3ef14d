"""Feed: one model's assembled cache for one request, handed out block by block while it is still on its way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cacheclip_jax.assemble import Placement, placement
from cacheclip_jax.bucket import bucket
from cacheclip_jax.caches import Behind, ChunkCaches, DeviceChunk, Fetched
from cacheclip_jax.clock import Clock
from cacheclip_jax.loader import BlockLoader, Copier, PageCopies, RowCopies
from cacheclip_jax.side import up_to
from cacheclip_jax.store import Passage

AHEAD_BYTES = 1 << 30  # of a request's caches on the device before their turn


class Feed:
    """The rows of a request's prefix and chunks, and where in them each slot's lie.

    Chunks that lie in the device tier are used there; the others are fetched and loaded, and kept in the tier where
    there is one. Rows come from pages that are joined on the device, or on a GPU without a device tier from a buffer
    that they were copied to.
    """

    def __init__(self, caches: ChunkCaches, passages: Sequence[Passage], lengths: Sequence[int], behind: Behind,
                 slots: int, depth: int, pool: ThreadPoolExecutor, clock: Clock, accounting: Fetched,
                 wanted: Sequence[bool] | None = None):
        """Start to load the first `depth` layers to the host; to the device with `release` or the first `take`.

        A chunk that isn't `wanted` (all its tokens are recomputed anyway) is left out. `accounting` hears of hits,
        misses and repairs.
        """
        cfg, layout, sharding = caches.model.config, caches.pages.layout, caches.pages.sharding
        wanted = [True] * len(passages) if wanted is None else wanted
        self.blocks = up_to(layout.blocks, depth)
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
        here = [n if w else 0 for n, w in zip(tokens, (True, *wanted), strict=True)]
        self._joined = caches.buffers is None or self._tier is not None or not self._loaded
        if self._joined:
            pages = [len(self._prefix[0]), *map(layout.pages, here[1:])]
            self._count = bucket(sum(pages), 4)
            sizes, total = [layout.rows * n for n in pages], layout.rows * self._count
        else:
            sizes, total = [layout.token_rows * n for n in here], layout.token_rows * bucket(sum(here), 256, steps=32)
        offsets = [end - size for end, size in zip(accumulate(sizes), sizes, strict=True)]
        starts = [at if n else -1 for at, n in zip(offsets, here, strict=True)]
        self.where: Placement = jax.device_put(placement(cfg, slots, tokens, starts), sharding)
        if self._loaded:
            found = caches.fetch(passages, behind, clock, load)
            accounting.absorb(found)
            sources = [source for source in found.sources if source is not None]
            block_bytes = total * layout.nbytes(layout.blocks[0]) // layout.rows
            ahead = min(len(self.blocks), max(2, AHEAD_BYTES // block_bytes))
            parts = [i + 1 for i in self._loaded]
            if self._joined:
                copier: Copier = PageCopies(sharding, ahead)
            else:
                assert caches.buffers is not None
                sources, parts = [caches.prefix_chunk, *sources], [0, *parts]
                copier = RowCopies(caches.buffers, total, ahead, [offsets[i] for i in parts], [sizes[i] for i in parts])
            self._loader = BlockLoader(
                pool, copier, sources, len(self.blocks), ahead,
                repair=lambda i, e: caches.repair(passages, behind, accounting, parts[i] - 1, e))

    def release(self) -> None:
        """Let copies to the device begin; see BlockLoader."""
        if self._loader is not None:
            self._loader.release()

    def take(self, number: int) -> jax.Array:
        """The rows [B, R, H] of the layers `blocks[number]`, each once, in order. Raises what went wrong in loading."""
        if self._loader is not None:
            loaded = self._loader.take(number)
            if not self._joined:
                return loaded
            for i, pages in zip(self._loaded, loaded, strict=True):
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

    def then(self, do: Callable[[], None]) -> None:
        """Call `do` when the last block is on the device."""
        if self._loader is None:
            do()
        else:
            self._loader.then(do)

    def stop(self) -> None:
        """Let the loading thread end, also when not every block was taken."""
        if self._loader is not None:
            self._loader.stop()


@jax.jit
def join(*pages: Float[Array, "B r H"]) -> Float[Array, "B R H"]:
    """Pages one after another."""
    return jnp.concatenate(pages, axis=1)
