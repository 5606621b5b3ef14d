"""Chunk caches -> one cache: the shared prefix once, then the chunks at contiguous positions, keys rotated there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from cacheclip_jax.model.config import ModelConfig
from cacheclip_jax.model.rope import rotate


@struct.dataclass
class KVCache:
    """An assembled cache: slot s holds the key (RoPE applied) and the value of the prompt's token s, whose position is
    s unless a method says otherwise; one pair of arrays a layer, so that a program which updates a layer touches
    nothing else."""

    k: tuple[Float[Array, "K S H"], ...]
    v: tuple[Float[Array, "K S H"], ...]

    @property
    def slots(self) -> int:
        """Number of slots S, free ones included."""
        return self.k[0].shape[1]


@struct.dataclass
class Placement:
    """Where each slot's key and value lie in a layer's rows, which hold the parts' [2, K, C, H] one after another.

    Part p (0 key, 1 value) of kv head h of slot s is row `first[s] + (p * K + h) * stride[s]`: first is where the part
    begins plus the token's place in it, stride the part's C. A free slot has first -1. The `table` has both.
    """

    table: Int[Array | np.ndarray, "2 S"]

    @property
    def first(self) -> Int[Array | np.ndarray, "S"]:
        """The row of each slot's key of kv head 0."""
        return self.table[0]

    @property
    def stride(self) -> Int[Array | np.ndarray, "S"]:
        """How many rows lie from one kv head's to the next."""
        return self.table[1]


@struct.dataclass
class Fresh:
    """Keys (before RoPE) and values of rows computed anew, and for each slot which row is its own (-1: none)."""

    k: Float[Array, "K T H"]
    v: Float[Array, "K T H"]
    row: Int[Array, "S"]


def empty(cfg: ModelConfig, slots: int, dtype: Any) -> KVCache:
    """A cache of zeros. Zeros, not uninitialised memory: a masked NaN in V would still poison its row."""
    shape = (cfg.num_kv_heads, slots, cfg.head_dim)
    return KVCache(*(tuple(jnp.zeros(shape, dtype) for _ in range(cfg.num_layers)) for _ in range(2)))


def placement(cfg: ModelConfig, slots: int, lengths: Sequence[int], offsets: Sequence[int] | None = None) -> Placement:
    """The placement of parts of `lengths` tokens at contiguous positions, in `slots` slots.

    `offsets` says at which row each part begins, -1 for one that isn't there (its slots are free); by default they
    follow one another from row 0.
    """
    tokens = np.asarray(lengths, np.int32)
    starts = np.cumsum(tokens, dtype=np.int32) - tokens
    begins = 2 * cfg.num_kv_heads * starts if offsets is None else np.asarray(offsets, np.int32)
    total = int(tokens.sum())
    table = np.zeros((2, slots), np.int32)
    first, stride = table
    first[total:] = -1
    first[:total] = np.arange(total, dtype=np.int32) + np.repeat(begins - starts, tokens)
    stride[:total] = np.repeat(tokens, tokens)
    for start, count in zip(starts[begins < 0], tokens[begins < 0], strict=True):
        first[start : start + count] = -1
    return Placement(table)


def place(cfg: ModelConfig, rows: Float[Array, "R H"], where: Placement, fresh: Fresh | None = None,
          at: Int[Array, "S"] | None = None) -> tuple[Float[Array, "K S H"], Float[Array, "K S H"]]:
    """Position rearrangement of one layer: gather its keys and values, put fresh ones over stale ones, rotate the keys
    to their slots' positions (in float32): the slots themselves, or `at`. Free slots are zero."""
    part = jnp.arange(2 * cfg.num_kv_heads).reshape(2, cfg.num_kv_heads, 1)
    index = jnp.where(where.first < 0, rows.shape[0], where.first + part * where.stride)
    k, v = rows.at[index].get(mode="fill", fill_value=0)
    if fresh is not None:
        # Chosen as they are gathered, and rotated once: a scatter into the placed cache would read and write it again.
        taken = fresh.row[:, None] >= 0
        k, v = (jnp.where(taken, new[:, jnp.maximum(fresh.row, 0)], old)
                for new, old in ((fresh.k, k), (fresh.v, v)))
    return rotate(k, jnp.arange(where.first.shape[0]) if at is None else at, cfg.rope), v


def row_of_slot(positions: Int[Array, "T"], slots: int) -> Int[Array, "S"]:
    """For each slot the row at its position, -1 where there is none; rows at position -1 are padding."""
    at = jnp.where(positions < 0, slots, positions)
    return jnp.full(slots, -1, jnp.int32).at[at].set(jnp.arange(len(positions)), mode="drop", indices_are_sorted=True)


def join(cfg: ModelConfig, slots: int, parts: Iterable[np.ndarray], dtype: Any) -> list[np.ndarray]:
    """Each layer's rows [R, H] of chunk caches [L, 2, K, C, H], padded with zeros to those of `slots` tokens."""
    out = [np.zeros((2 * cfg.num_kv_heads * slots, cfg.head_dim), dtype) for _ in range(cfg.num_layers)]
    start = 0
    for part in parts:
        flat = part.reshape(cfg.num_layers, -1, cfg.head_dim)
        for rows, layer in zip(out, flat, strict=True):
            rows[start : start + len(layer)] = layer
        start += flat.shape[1]
    return out
