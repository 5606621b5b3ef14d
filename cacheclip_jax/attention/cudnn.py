"""Attention by cuDNN: of scattered rows through a mask, of contiguous rows through its own causal path."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Implementation = Literal["cudnn", "xla"]


def refuse(H: int, dtype: Any) -> None:
    """Raises NotImplementedError for a head dim or type that cuDNN's fused attention doesn't have."""
    if H % 8 or H > 256:
        raise NotImplementedError(f"head dim {H}: cuDNN has multiples of 8 up to 256; use how='blocked'")
    if dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"{dtype}: cuDNN has bfloat16 and float16; use how='blocked'")


def cudnn(q: Float[Array, "T N H"], k: Float[Array, "K S H"], v: Float[Array, "K S H"], positions: Int[Array, "T"],
          bias: Float[Array, "S"] | None = None, implementation: Implementation = "cudnn") -> Float[Array, "T N H"]:
    """Row attention (see `row_attention`) with a T x S mask that the heads share.

    Nothing is skipped: it computes about twice what is needed. `implementation` is for tests without a GPU.
    """
    if implementation == "cudnn":
        refuse(q.shape[-1], q.dtype)
    # cuDNN gives NaN for a row that sees nothing: a padding row sees slot 0, and its output is dropped.
    seen = jnp.arange(k.shape[1]) <= jnp.maximum(positions, 0)[:, None]
    k, v = k.swapaxes(0, 1)[None], v.swapaxes(0, 1)[None]
    added = None  # cuDNN broadcasts it over heads, not over rows
    if bias is not None:
        added = jnp.broadcast_to(bias.astype(q.dtype), (1, 1, *seen.shape))
    out = jax.nn.dot_product_attention(q[None], k, v, added, seen[None, None], implementation=implementation)[0]
    return jnp.where(positions[:, None, None] >= 0, out, 0)


def cudnn_causal(q: Float[Array, "B T N H"], k: Float[Array, "B K S H"], v: Float[Array, "B K S H"],
                 implementation: Implementation = "cudnn") -> Float[Array, "B T N H"]:
    """Causal attention (see `causal_attention`): no mask in memory, and blocks after the diagonal are skipped.

    cuDNN aligns the diagonal with the first row and slot, so the slots before the rows' own get rows of zeros.
    """
    if implementation == "cudnn":
        refuse(q.shape[-1], q.dtype)
    before = k.shape[2] - q.shape[1]
    q = jnp.pad(q, ((0, 0), (before, 0), (0, 0), (0, 0)))
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)[:, before:]
