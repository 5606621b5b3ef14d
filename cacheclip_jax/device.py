"""A bounded tier of chunk caches on the device: what was used lately is gathered from there and not loaded again."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding
from jaxtyping import Array, Float, Int

from cacheclip_jax.host import Key
from cacheclip_jax.model.config import ModelConfig

BLOCK_LAYERS = 4

class DeviceTier:
    """Rows of every layer, in one array for each block of layers, written round and round: what lies under the pen is
    forgotten.

    A request's missing parts are loaded as one block and kept where they are put; a part is found again by its key
    while no later block has overwritten it. For one request at a time: `rows` are donated to the program that adds to
    them, and come back by `written`.
    """

    def __init__(self, cfg: ModelConfig, limit_bytes: int, dtype: Any, sharding: Sharding):
        row_bytes = cfg.num_layers * cfg.head_dim * jnp.dtype(dtype).itemsize
        self.capacity = limit_bytes // row_bytes
        self._shape, self._dtype, self._sharding = (self.capacity, cfg.head_dim), dtype, sharding
        self._num_layers = cfg.num_layers
        self._rows: list[jax.Array] = []
        self._parts: dict[Key, tuple[int, int]] = {}  # first row, number of rows
        self._pen = 0

    def find(self, keys: Sequence[Key]) -> list[int | None]:
        """The first row of each part, None where it isn't here."""
        return [self._parts[k][0] if k in self._parts else None for k in keys]

    def reserve(self, block: int) -> int | None:
        """The first row of room for `block` rows, None when there is never so much; what lay there is forgotten."""
        if block > self.capacity:
            return None
        at = self._pen if self._pen + block <= self.capacity else 0
        self._parts = {k: (first, n) for k, (first, n) in self._parts.items()
                       if first + n <= at or first >= at + block}
        self._pen = at + block
        return at

    def keep(self, key: Key, first: int, size: int) -> None:
        """Note that a part lies at `size` rows from row `first` on."""
        self._parts.setdefault(key, (first, size))

    def take(self, number: int) -> jax.Array:
        """The rows [B, P, H] of a block of layers, to be donated; zeros at first."""
        if not self._rows:
            self._rows = [jnp.zeros((BLOCK_LAYERS, *self._shape), self._dtype, device=self._sharding)
                          for _ in self.blocks(self._num_layers)]
        return self._rows[number]

    @staticmethod
    def blocks(depth: int) -> list[range]:
        """The first `depth` layers in the tier's blocks, the same for every request."""
        return [range(first, min(first + BLOCK_LAYERS, depth)) for first in range(0, depth, BLOCK_LAYERS)]

    def written(self, number: int, rows: jax.Array) -> None:
        """Give rows back after a program has added to them."""
        self._rows[number] = rows


@partial(jax.jit, donate_argnames="kept")
def add_block(kept: Float[Array, "B P H"], new: Float[Array, "B R H"], at: Int[Array, ""]) -> Float[Array, "B P H"]:
    """Write rows into each layer's from row `at` on, in place."""
    return jax.lax.dynamic_update_slice(kept, new, (0, at, 0))
