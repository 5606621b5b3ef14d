"""Chunk caches -> one cache: the shared prefix once, then the chunks at contiguous positions, keys rotated there."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from cacheclip_jax.model.config import ModelConfig
from cacheclip_jax.model.rope import rotate


@struct.dataclass
class KVCache:
    """An assembled cache: slot s holds the key (RoPE applied) and the value of position s, for every layer."""

    k: Float[Array, "L K S H"]
    v: Float[Array, "L K S H"]

    @property
    def slots(self) -> int:
        """Number of slots S, free ones included."""
        return self.k.shape[2]


def empty(cfg: ModelConfig, slots: int, dtype: Any) -> KVCache:
    """A cache of zeros. Zeros, not uninitialised memory: a masked NaN in V would still poison its row."""
    shape = (cfg.num_layers, cfg.num_kv_heads, slots, cfg.head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def concatenate(cfg: ModelConfig, slots: int, parts: Iterable[np.ndarray | int], dtype: Any) -> np.ndarray:
    """Lay chunk caches [L, 2, K, C, H] one after another into one host buffer [2, L, K, slots, H].

    A number instead of a cache leaves that many slots free (zeros), as are those after the last part.
    """
    joined = np.zeros((2, cfg.num_layers, cfg.num_kv_heads, slots, cfg.head_dim), dtype)
    start = 0
    for part in parts:
        end = start + (part if isinstance(part, int) else part.shape[3])
        if not isinstance(part, int):
            joined[:, :, :, start:end] = part.swapaxes(0, 1)
        start = end
    return joined


@partial(jax.jit, static_argnames="cfg")
def place(cfg: ModelConfig, joined: Float[Array, "2 L K S H"]) -> KVCache:
    """Position rearrangement: rotate the keys of a joined cache to their slots' positions (in float32)."""
    positions = jnp.arange(joined.shape[3])
    return KVCache(k=rotate(joined[0], positions, cfg.rope), v=joined[1])
