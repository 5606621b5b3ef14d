"""Causal attention of contiguous rows: full prefill, and chunks behind a shared prefix."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cacheclip_jax.attention.cudnn import cudnn_causal
from cacheclip_jax.attention.row import row_attention


def causal_attention(q: Float[Array, "B T N H"], k: Float[Array, "B K S H"], v: Float[Array, "B K S H"],
                     how: str = "blocked") -> Float[Array, "B T N H"]:
    """Attention of the last T of S positions to themselves and to all before: row t sees slots up to S - T + t.

    For a chunk behind a shared prefix, put the prefix's slots before the chunk's own. On a GPU the library's causal
    path takes half-precision rows, whichever of "cudnn" and "mosaic_gpu" `how` names; otherwise it is row attention.
    Raises ValueError for fewer slots than rows.
    """
    T, S = q.shape[1], k.shape[2]
    if S < T:
        raise ValueError(f"{T} rows but {S} slots: k and v must hold the rows' own slots, after those of the prefix")
    if how in ("cudnn", "mosaic_gpu"):
        return cudnn_causal(q, k, v)
    positions = jnp.arange(S - T, S)
    return jax.vmap(lambda q, k, v: row_attention(q, k, v, positions, how))(q, k, v)
