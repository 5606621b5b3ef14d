"""Row attention, the one entry, and its dense reference."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cacheclip_jax.attention.blocked import blocked
from cacheclip_jax.attention.cudnn import cudnn
from cacheclip_jax.attention.dense import dense
from cacheclip_jax.precision import precision

NAMES = ("blocked", "dense", "mosaic_gpu", "mosaic_tpu", "cudnn")


def row_attention(q: Float[Array, "T N H"], k: Float[Array, "K S H"], v: Float[Array, "K S H"],
                  positions: Int[Array, "T"], how: str = "blocked", bias: Float[Array, "S"] | None = None
                  ) -> Float[Array, "T N H"]:
    """Attention of rows to every cache slot at or before their own position: slot s is seen by row t iff
    s <= positions[t].

    Rows must be sorted by position, with padding rows (position -1, output zero) at the end: blocks of slots after a
    block's last position are skipped, not masked. Scale is H ** -0.5; N must be a multiple of K. Slots that no row sees
    never influence the result, but every slot must hold a finite number: a weight of 0 times infinity is not 0.

    `bias`, finite and in float32, is added to what every row's logit of a slot is after scaling: -log 2 lets the slot
    count half.

    `how` names the implementation (`choose` picks it); each raises NotImplementedError for what it can't do.
    """
    N, K = q.shape[1], k.shape[0]
    if N % K:
        raise ValueError(f"{N} query heads are not a multiple of {K} kv heads")
    match how:
        case "blocked":
            return blocked(q, k, v, positions, bias)
        case "dense":
            return dense(q, k, v, positions, bias)
        case "cudnn":
            return cudnn(q, k, v, positions, bias)
        case "mosaic_gpu":  # imported here: not every platform's jaxlib has the compilers for both
            from cacheclip_jax.attention.mosaic_gpu import mosaic_gpu
            return mosaic_gpu(q, k, v, positions, bias)
        case "mosaic_tpu":
            from cacheclip_jax.attention.mosaic_tpu import mosaic_tpu
            return mosaic_tpu(q, k, v, positions, bias)
    raise ValueError(f"no row attention is called {how!r}: take one of {', '.join(NAMES)}")


def row_attention_reference(q: Float[Array, "T N H"], k: Float[Array, "K S H"], v: Float[Array, "K S H"],
                            positions: Int[Array, "T"], bias: Float[Array, "S"] | None = None
                            ) -> Float[Array, "T N H"]:
    """The same in a few lines with a T x S mask, in float32: what every implementation is tested against."""
    T, N, H = q.shape
    K, S, _ = k.shape
    grouped = q.reshape(T, K, N // K, H).astype(jnp.float32)
    scores = jnp.einsum("tkgh,ksh->kgts", grouped, k.astype(jnp.float32), precision=precision(jnp.float32)) * H**-0.5
    scores = scores if bias is None else scores + bias
    seen = jnp.arange(S) <= positions[:, None]
    scores = jnp.where(seen, scores, -jnp.inf)
    weights = jnp.where(seen, jnp.exp(scores - scores.max(-1, keepdims=True, initial=-1e30)), 0)
    weights /= jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)
    out = jnp.einsum("kgts,ksh->tkgh", weights, v.astype(jnp.float32), precision=precision(jnp.float32))
    return out.reshape(T, N, H).astype(q.dtype)
