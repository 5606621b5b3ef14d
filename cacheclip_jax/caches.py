"""Chunk caches of one model: from the store where they are, encoded on the fly where they aren't or are damaged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from cacheclip_jax.clock import Clock
from cacheclip_jax.encode import encode_many, encode_prefix, no_prefix
from cacheclip_jax.errors import BadInput, ChunkCorrupt, StoreError
from cacheclip_jax.model.load import Model
from cacheclip_jax.model.tokenizer import Encoded
from cacheclip_jax.prompt import Prompt, PromptFormat
from cacheclip_jax.store import ChunkStore, Passage, PendingKV, Space
from cacheclip_jax.store.quantize import round_trip

Behind = Literal["shared", "none"]


@dataclass
class Fetched:
    """Caches of a request's chunks [L, 2, K, C, H] (None where not wanted), and how they were come by."""

    kv: list[np.ndarray | None]
    hits: int = 0
    misses: int = 0
    encoded: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def loaded(self) -> list[np.ndarray]:
        """The caches, where every one was wanted."""
        return [kv for kv in self.kv if kv is not None]

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
        self.format = prompt_format
        self.prefix_ids = prompt_format.prefix_ids(model.tokenizer)
        self.pair: Sequence[ChunkCaches] = (self,)  # the models that share the store on purpose
        self._prefix_kv: np.ndarray | None = None

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
        if not passage.text.strip():
            raise BadInput(f"chunk {passage.id} is empty: leave empty passages out")
        return self.format.chunk_ids(self.model.tokenizer, passage)

    def space(self, behind: Behind) -> Space:
        """The part of the store that holds this model's caches of chunks encoded behind the shared prefix, or alone."""
        cfg = self.model.config
        return Space(model=self.model.fingerprint, model_name=self.model.name, dtype=self.dtype.name, kv=self.store.kv,
                     prefix_ids=self.prefix_ids if behind == "shared" else (), num_layers=cfg.num_layers,
                     num_kv_heads=cfg.num_kv_heads, head_dim=cfg.head_dim)

    def prefix_kv(self) -> np.ndarray:
        """The shared prefix's own cache [L, 2, K, P, H]: encoded once per process, a few dozen tokens."""
        if self._prefix_kv is None:
            self._prefix_kv = encode_prefix(self.model.params, self.model.config, self.prefix_ids)
        return self._prefix_kv

    def encode(self, passages: Sequence[Passage], behind: Behind) -> Iterator[tuple[Passage, np.ndarray]]:
        """Encode passages, batched; nothing is stored."""
        prefix = self.prefix_kv() if behind == "shared" else no_prefix(self.model.params, self.model.config)
        ids = [self.encoded(p).ids for p in passages]
        for i, kv in encode_many(self.model.params, self.model.config, ids, prefix):
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

    def start(self, passages: Sequence[Passage], behind: Behind) -> Fetch:
        """Start reading the caches of passages; the reads go on while the caller computes."""
        space = self.space(behind)
        pending = self.store.read_all(space, [(self.encoded(p).ids, p.id) for p in passages])
        why = None
        if None in pending:
            ours = {c.space(b).key for c in self.pair for b in ("shared", "none")}
            why = self.store.explain_miss(space, ours)
        return Fetch(self, passages, behind, pending, why)

    def write(self, passage: Passage, behind: Behind, kv: np.ndarray):
        """Write one chunk cache; returns what to wait on."""
        encoded = self.encoded(passage)
        return self.store.write_async(self.space(behind), passage.id, encoded.ids, encoded.spans, kv)


@dataclass
class Fetch:
    """Reads under way."""

    caches: ChunkCaches
    passages: Sequence[Passage]
    behind: Behind
    pending: list[PendingKV | None]
    why_missing: str | None

    def result(self, clock: Clock, wanted: Sequence[bool] | None = None) -> Fetched:
        """Wait for the caches; encode, store and report those that are missing or damaged.

        A chunk that isn't `wanted` (all its tokens are recomputed anyway) is neither waited for nor encoded. A store
        that can't be written is a warning: the answer doesn't depend on it.
        """
        out = Fetched(kv=[None] * len(self.passages))
        to_encode: list[int] = []
        for i, (passage, pending) in enumerate(zip(self.passages, self.pending, strict=True)):
            if wanted is not None and not wanted[i]:
                continue
            if pending is None:
                out.misses += 1
                if passage.id not in out.encoded:
                    out.encoded.append(passage.id)
                to_encode.append(i)
                continue
            try:
                out.kv[i] = pending.result()
                out.hits += 1
            except ChunkCorrupt as e:
                out.misses += 1
                out.repaired.append(passage.id)
                out.warnings.append(f"{e}; encoded anew from its text")
                to_encode.append(i)
        if to_encode:
            with clock("encode"):
                self._encode(to_encode, out)
        return out

    def _encode(self, indices: list[int], out: Fetched) -> None:
        caches, space = self.caches, self.caches.space(self.behind)
        if self.why_missing is not None:
            out.warnings.append(self.why_missing)
        by_id = {self.passages[i].id: i for i in indices}
        try:
            caches.store.add_passages([self.passages[i] for i in by_id.values()])
            writable = True
        except StoreError as e:
            out.warnings.append(str(e))
            writable = False
        for passage, kv in caches.encode([self.passages[i] for i in by_id.values()], self.behind):
            as_stored = round_trip(space.kv, kv)  # so that the next answer is the same
            for i in indices:
                if self.passages[i].id == passage.id:
                    out.kv[i] = as_stored
            if not writable:
                continue
            try:
                if passage.id in out.repaired:
                    caches.store.discard(space, caches.encoded(passage).ids)
                caches.write(passage, self.behind, kv).result()
            except StoreError as e:
                out.warnings.append(str(e))
                writable = False
