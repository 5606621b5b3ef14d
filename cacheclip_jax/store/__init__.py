"""Chunk caches and the passages that they were made from, on disk or in a bucket."""

from cacheclip_jax.store.archive import Transfer
from cacheclip_jax.store.audit import Problem
from cacheclip_jax.store.maintain import GCReport, SpaceStats, StoreStats
from cacheclip_jax.store.pending import PendingKV
from cacheclip_jax.store.records import LAYOUT_VERSION, Entry, Passage, Space, Version, is_chunk_id
from cacheclip_jax.store.store import ChunkStore

__all__ = [
    "LAYOUT_VERSION",
    "ChunkStore",
    "Entry",
    "GCReport",
    "Passage",
    "PendingKV",
    "Problem",
    "Space",
    "SpaceStats",
    "StoreStats",
    "Transfer",
    "Version",
    "is_chunk_id",
]
