"""Chunk caches of one model: from the store where they are, encoded on the fly where they aren't or are damaged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from cacheclip_jax.clock import Clock
from cacheclip_jax.copies import RowBuffers
from cacheclip_jax.encode import Fetch, ahead, batch_tokens, batches, encode_prefix, no_prefix, start_batch
from cacheclip_jax.errors import BadInput, ChunkCorrupt, StoreError
from cacheclip_jax.loader import Source
from cacheclip_jax.model.load import Model
from cacheclip_jax.model.tokenizer import Encoded
from cacheclip_jax.pages import HostChunk, HostPages, PageLayout, platform_of
from cacheclip_jax.plan import Behind
from cacheclip_jax.prompt import Prompt, PromptFormat
from cacheclip_jax.reading import Reading, start
from cacheclip_jax.store import ChunkStore, Passage, PendingKV, Space
from cacheclip_jax.store.quantize import round_trip
from cacheclip_jax.tier import Tier

DeviceChunk = list[list[jax.Array]]  # the pages of each block of layers

# Blocks of a CPU's layers: a larger program takes long to compile, and copies are cheap however small.
CPU_BLOCK_LAYERS = 2


@dataclass
class Fetched:
    """A request's chunk caches in host memory or on their way there (None where not wanted), and how they were come by.
    """

    sources: list[Source | None] = field(default_factory=list)
    hits: int = 0
    misses: int = 0
    encoded: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def absorb(self, other: Fetched) -> None:
        """Add another model's accounting; the caches stay this one's."""
        self.hits += other.hits
        self.misses += other.misses
        self.encoded += [i for i in other.encoded if i not in self.encoded]
        self.repaired += [i for i in other.repaired if i not in self.repaired]
        self.warnings += [w for w in other.warnings if w not in self.warnings]


class ChunkCaches:
    """One model's view of a chunk store, under one prompt format."""

    def __init__(self, model: Model, store: ChunkStore, prompt_format: PromptFormat):
        self.model = model
        self.store = store
        sharding = replicated(model.params.embed.sharding)
        layers = CPU_BLOCK_LAYERS if platform_of(sharding) == "cpu" else None
        self.pages = HostPages(PageLayout.of(model.config, self.dtype, layers), sharding)
        self.buffers = RowBuffers.of(self.pages.layout, sharding) if self.pages.pinned else None
        self.host: Tier[HostChunk] | None = None  # of recently used chunks in host memory; the engine sets it
        self.device: Tier[DeviceChunk] | None = None  # of recently used chunks on the device; the engine sets it
        self.format = prompt_format
        self.prefix_ids = prompt_format.prefix_ids(model.tokenizer)
        self.lead_in_ids = prompt_format.lead_in_ids(model.tokenizer)
        self.pair: Sequence[ChunkCaches] = (self,)  # the models that share the store on purpose
        self._recent = lru_cache(maxsize=1024)(self._encoded)
        self.space = lru_cache(maxsize=2)(self._space)
        self.key = lru_cache(maxsize=4096)(self._key)

    @property
    def dtype(self) -> np.dtype:
        """Of weights and caches."""
        return np.dtype(self.model.params.embed.dtype)

    @property
    def _whole(self) -> bool:
        """Whether a chunk lies in one piece in host memory: where its rows go straight to a GPU, no page is wanted."""
        return self.buffers is not None and self.device is None

    def prompt(self, passages: Sequence[Passage], question: str) -> Prompt:
        """A request's ids for this model."""
        return Prompt(prefix=self.prefix_ids, chunks=tuple(self.encoded(p) for p in passages),
                      question=self.format.question_ids(self.model.tokenizer, question), lead_in=self.lead_in_ids)

    def encoded(self, passage: Passage) -> Encoded:
        """A passage's ids and spans. Raises BadInput when it is empty."""
        return self._recent(passage)

    def _encoded(self, passage: Passage) -> Encoded:
        if not passage.text.strip():
            raise BadInput(f"chunk {passage.id} is empty: leave empty passages out")
        return self.format.chunk_ids(self.model.tokenizer, passage)

    def _space(self, behind: Behind) -> Space:
        """The part of the store that holds this model's caches of chunks encoded behind the shared prefix and the
        lead-in, or alone."""
        cfg, before = self.model.config, (*self.prefix_ids, *self.lead_in_ids)
        return Space(model=self.model.fingerprint, model_name=self.model.name, dtype=self.dtype.name, kv=self.store.kv,
                     prefix_ids=before if behind == "shared" else (), num_layers=cfg.num_layers,
                     num_kv_heads=cfg.num_kv_heads, head_dim=cfg.head_dim)

    @cached_property
    def _before_kv(self) -> np.ndarray:
        """The cache of what chunks are encoded behind, once per process: the shared prefix's, then the lead-in's."""
        return encode_prefix(self.model.params, self.model.config, (*self.prefix_ids, *self.lead_in_ids),
                             self.model.attention.name)

    def prefix_kv(self) -> np.ndarray:
        """The shared prefix's own cache [L, 2, K, P, H]."""
        return self._before_kv[:, :, :, : len(self.prefix_ids)]

    @cached_property
    def prefix_chunk(self) -> HostChunk:
        """The shared prefix's own cache; an empty prefix takes a page too."""
        kv = self.prefix_kv()
        return self.pages.filled(kv) if kv.shape[3] else self.pages.empty(1)

    @cached_property
    def prefix_pages(self) -> DeviceChunk:
        """The shared prefix's own cache on the device."""
        blocks = [[page.array for page in pages] for pages in self.prefix_chunk.blocks]
        return jax.block_until_ready(jax.device_put(blocks, self.pages.sharding))

    def encode(self, passages: Sequence[Passage], behind: Behind) -> Iterator[tuple[Passage, np.ndarray]]:
        """Encode passages, batched; nothing is stored."""
        for batch in ahead(self.start(b, behind) for b in self.batches(passages)):
            for passage, fetch in batch:
                yield passage, fetch()

    def batches(self, passages: Sequence[Passage]) -> list[list[Passage]]:
        """Passages in the batches that they are encoded in."""
        lengths = [len(self.encoded(p).ids) for p in passages]
        return [[passages[i] for i in batch] for batch in batches(lengths, batch_tokens(self.model.attention.name))]

    def start(self, batch: Sequence[Passage], behind: Behind) -> list[tuple[Passage, Fetch]]:
        """Start to encode one batch: each passage with what waits for its cache, see `start_batch`."""
        prefix = self._before_kv if behind == "shared" else no_prefix(self.model.params, self.model.config)
        ids = [self.encoded(p).ids for p in batch]
        fetches = start_batch(self.model.params, self.model.config, ids, prefix, self.model.attention.name)
        return list(zip(batch, fetches, strict=True))

    def missing(self, passages: Sequence[Passage], behind: Behind = "shared") -> list[Passage]:
        """The passages that the store has no cache of, each once."""
        space, seen, out = self.space(behind), set(), []
        for passage in passages:
            ids = self.encoded(passage).ids
            if ids not in seen and not self.store.has(space, ids):
                out.append(passage)
            seen.add(ids)
        return out

    def fetch(self, passages: Sequence[Passage], behind: Behind, clock: Clock, wanted: Sequence[bool] | None = None
              ) -> Fetched:
        """Find the caches of passages, in host memory or the store; encode, store and report those that are missing.

        Reads from the store start here and go on while the caller computes. A chunk that isn't `wanted` (all its
        tokens are recomputed anyway) is neither looked for nor encoded. A store that can't be written is a warning: the
        answer doesn't depend on it.
        """
        out = Fetched(sources=[None] * len(passages))
        space = self.space(behind)
        unread: list[int] = []
        for i, passage in enumerate(passages):
            if wanted is not None and not wanted[i]:
                continue
            if self.host is not None and (chunk := self.host.get(self.key(behind, passage))) is not None:
                out.sources[i] = chunk
                out.hits += 1
            else:
                unread.append(i)
        wanted_ids = [(self.encoded(passages[i]).ids, passages[i].id) for i in unread]
        pending = self.store.read_all(space, wanted_ids, eager=False) if unread else []
        missing, readings = [], []
        for i, read in zip(unread, pending, strict=True):
            if read is None:
                out.misses += 1
                missing.append(i)
            else:
                out.hits += 1
                out.sources[i] = reading = self._reading(read, behind, passages[i])
                readings.append(reading)
        start(readings, self.store.readers)
        if missing:
            ours = {c.space(b).key for c in self.pair for b in ("shared", "none")}
            if (why := self.store.explain_miss(space, ours)) is not None:
                out.warnings.append(why)
            out.encoded += list(dict.fromkeys(passages[i].id for i in missing))
            with clock("encode"):
                made = self._make(missing, passages, behind, out)
            for i in missing:
                out.sources[i] = made[passages[i].id]
        return out

    def repair(self, passages: Sequence[Passage], behind: Behind, fetched: Fetched, index: int, error: ChunkCorrupt
               ) -> HostChunk:
        """A chunk cache in place of stored bytes that turned out damaged: encoded anew from its text, stored, reported.
        """
        passage, space = passages[index], self.space(behind)
        fetched.hits, fetched.misses = fetched.hits - 1, fetched.misses + 1
        fetched.repaired.append(passage.id)
        fetched.warnings.append(f"{error}; encoded anew from its text")
        with suppress(StoreError):  # the write that follows reports a store that can't be written
            self.store.discard(space, self.encoded(passage).ids)
        return self._make([index], passages, behind, fetched)[passage.id]

    def _make(self, indices: Sequence[int], passages: Sequence[Passage], behind: Behind, out: Fetched
              ) -> dict[str, HostChunk]:
        """Encode passages; keep them in host memory and, as far as it can be written, in the store."""
        by_id = {passages[i].id: passages[i] for i in indices}
        made: dict[str, HostChunk] = {}
        try:
            self.store.add_passages(by_id.values())
            writable = True
        except StoreError as e:
            out.warnings.append(str(e))
            writable = False
        for passage, kv in self.encode(list(by_id.values()), behind):
            chunk = self.pages.filled(round_trip(self.store.kv, kv), self._whole)  # so that the next answer is the same
            made[passage.id] = self._kept(behind, passage, chunk)
            if not writable:
                continue
            try:
                self.write(passage, behind, kv).result()
            except StoreError as e:
                out.warnings.append(str(e))
                writable = False
        return made

    def _reading(self, pending: PendingKV, behind: Behind, passage: Passage) -> Reading:
        """A stored chunk cache, to be read straight into the memory that it's copied to the device from."""
        return Reading(pending, self.pages, len(self.encoded(passage).ids), self._whole,
                       keep=partial(self._kept, behind, passage))

    def _kept(self, behind: Behind, passage: Passage, chunk: HostChunk) -> HostChunk:
        """The chunk cache, kept in host memory for the next request where there is a tier."""
        if self.host is not None:
            self.host.put(self.key(behind, passage), chunk, chunk.nbytes)
        return chunk

    def _key(self, behind: Behind, passage: Passage) -> tuple[str, str]:
        """What a chunk's cache is called: its space and its own key."""
        space = self.space(behind)
        return space.key, space.chunk_key(self.encoded(passage).ids)

    def write(self, passage: Passage, behind: Behind, kv: np.ndarray | Fetch) -> Future[bool]:
        """Write one chunk cache, in the background; returns what to wait on."""
        encoded = self.encoded(passage)
        return self.store.write_async(self.space(behind), passage.id, encoded.ids, encoded.spans, kv)


def replicated(sharding: Sharding) -> Sharding:
    """The sharding of an array that lies whole on every device of a model."""
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding
