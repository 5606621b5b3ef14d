"""Chunk caches of one model: from the store where they are, encoded on the fly where they aren't or are damaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial

import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from cacheclip_jax.clock import Clock
from cacheclip_jax.device import DeviceTier
from cacheclip_jax.encode import encode_many, encode_prefix, no_prefix
from cacheclip_jax.errors import BadInput, ChunkCorrupt, StoreError
from cacheclip_jax.host import HostTier, Key, Staging
from cacheclip_jax.loader import InMemory, Source
from cacheclip_jax.model.load import Model
from cacheclip_jax.model.tokenizer import Encoded
from cacheclip_jax.plan import Behind
from cacheclip_jax.prompt import Prompt, PromptFormat
from cacheclip_jax.store import ChunkStore, Passage, PendingKV, Space
from cacheclip_jax.store.quantize import round_trip


@dataclass
class Fetched:
    """A request's chunk caches, each as pages held in the host tier or as a source (None where not wanted), and how
    they were come by."""

    sources: list[Source | np.ndarray | None] = field(default_factory=list)
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
        self.host: HostTier | None = None  # of recently used chunks in host memory; the engine sets it
        self.staging = Staging(replicated(model.params.embed.sharding))
        self.tier: DeviceTier | None = None  # of recently used chunks on the device; the engine sets it
        self.format = prompt_format
        self.prefix_ids = prompt_format.prefix_ids(model.tokenizer)
        self.pair: Sequence[ChunkCaches] = (self,)  # the models that share the store on purpose
        self._prefix_kv: np.ndarray | None = None
        self._recent = lru_cache(maxsize=1024)(self._encoded)
        self.space = lru_cache(maxsize=2)(self._space)
        self.key = lru_cache(maxsize=4096)(self._key)

    @property
    def dtype(self) -> np.dtype:
        """Of weights and caches."""
        return np.dtype(self.model.params.embed.dtype)

    def prompt(self, passages: Sequence[Passage], question: str) -> Prompt:
        """A request's ids for this model."""
        return Prompt(prefix=self.prefix_ids, chunks=tuple(self.encoded(p) for p in passages),
                      question=self.format.question_ids(self.model.tokenizer, question))

    def encoded(self, passage: Passage) -> Encoded:
        """A passage's ids and spans. Raises BadInput when it is empty."""
        return self._recent(passage)

    def _encoded(self, passage: Passage) -> Encoded:
        if not passage.text.strip():
            raise BadInput(f"chunk {passage.id} is empty: leave empty passages out")
        return self.format.chunk_ids(self.model.tokenizer, passage)

    def _space(self, behind: Behind) -> Space:
        """The part of the store that holds this model's caches of chunks encoded behind the shared prefix, or alone."""
        cfg = self.model.config
        return Space(model=self.model.fingerprint, model_name=self.model.name, dtype=self.dtype.name, kv=self.store.kv,
                     prefix_ids=self.prefix_ids if behind == "shared" else (), num_layers=cfg.num_layers,
                     num_kv_heads=cfg.num_kv_heads, head_dim=cfg.head_dim)

    def prefix_kv(self) -> np.ndarray:
        """The shared prefix's own cache [L, 2, K, P, H]: encoded once per process, a few dozen tokens."""
        if self._prefix_kv is None:
            self._prefix_kv = encode_prefix(self.model.params, self.model.config, self.prefix_ids,
                                            self.model.attention.name)
        return self._prefix_kv

    def encode(self, passages: Sequence[Passage], behind: Behind) -> Iterator[tuple[Passage, np.ndarray]]:
        """Encode passages, batched; nothing is stored."""
        prefix = self.prefix_kv() if behind == "shared" else no_prefix(self.model.params, self.model.config)
        ids = [self.encoded(p).ids for p in passages]
        for i, kv in encode_many(self.model.params, self.model.config, ids, prefix, self.model.attention.name):
            yield passages[i], kv

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
            if self.host and (pages := self.host.hold(self.key(behind, passage))) is not None:
                out.sources[i] = pages
                out.hits += 1
            else:
                unread.append(i)
        wanted_ids = [(self.encoded(passages[i]).ids, passages[i].id) for i in unread]
        try:
            pending = self.store.read_all(space, wanted_ids, eager=False) if unread else []
        except StoreError:
            if self.host:
                self.host.release(self.key(behind, p) for p, pages in zip(passages, out.sources, strict=True)
                                  if pages is not None)
            raise
        missing = []
        for i, read in zip(unread, pending, strict=True):
            if read is None:
                out.misses += 1
                missing.append(i)
            else:
                out.hits += 1
                out.sources[i] = Stored(read, self.store.readers, partial(self._admit, self.key(behind, passages[i])))
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
               ) -> Source:
        """A source for a chunk whose stored bytes turned out damaged: encoded anew from its text, stored, reported."""
        passage, space = passages[index], self.space(behind)
        fetched.hits, fetched.misses = fetched.hits - 1, fetched.misses + 1
        fetched.repaired.append(passage.id)
        fetched.warnings.append(f"{error}; encoded anew from its text")
        with suppress(StoreError):  # the write that follows reports a store that can't be written
            self.store.discard(space, self.encoded(passage).ids)
        return self._make([index], passages, behind, fetched)[passage.id]

    def _make(self, indices: Sequence[int], passages: Sequence[Passage], behind: Behind, out: Fetched
              ) -> dict[str, Source]:
        """Encode passages; keep them in host memory and, as far as it can be written, in the store."""
        by_id = {passages[i].id: passages[i] for i in indices}
        made: dict[str, Source] = {}
        try:
            self.store.add_passages(by_id.values())
            writable = True
        except StoreError as e:
            out.warnings.append(str(e))
            writable = False
        for passage, kv in self.encode(list(by_id.values()), behind):
            as_stored = round_trip(self.store.kv, kv)  # so that the next answer is the same
            made[passage.id] = InMemory(as_stored)
            if self.host:
                self.host.put(self.key(behind, passage), as_stored)
            if not writable:
                continue
            try:
                self.write(passage, behind, kv).result()
            except StoreError as e:
                out.warnings.append(str(e))
                writable = False
        return made

    def _admit(self, key: Key, kv: np.ndarray) -> None:
        """Keep a chunk cache of the store in host memory too, where there is a tier."""
        if self.host:
            self.host.put(key, kv)

    def _key(self, behind: Behind, passage: Passage) -> Key:
        """What a chunk's cache is called: its space and its own key."""
        space = self.space(behind)
        return space.key, space.chunk_key(self.encoded(passage).ids)

    def write(self, passage: Passage, behind: Behind, kv: np.ndarray):
        """Write one chunk cache; returns what to wait on."""
        encoded = self.encoded(passage)
        return self.store.write_async(self.space(behind), passage.id, encoded.ids, encoded.spans, kv)


def replicated(sharding: Sharding) -> Sharding:
    """The sharding of an array that lies whole on every device of a model."""
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding


class Stored:
    """A chunk cache being read from the store, whole: one read and one check a chunk take Python's lock far less often
    than one a layer. `admit` gets it in the end."""

    def __init__(self, pending: PendingKV, readers: ThreadPoolExecutor, admit: Callable[[np.ndarray], None]):
        self._whole, self._admit = readers.submit(pending.read_whole), admit

    def read_layer(self, layer: int, out: np.ndarray) -> None:
        """Copy a layer's bytes, once the chunk is there."""
        np.copyto(out, self._whole.result()[layer].reshape(-1).view(np.uint8))

    def done(self) -> None:
        """Have it kept in host memory, now that nobody waits for it."""
        self._admit(self._whole.result())
