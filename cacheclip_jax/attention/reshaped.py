"""Attention that weighs a context of parallel chunks differently from all other slots (APE)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cacheclip_jax.attention.choose import FEW_ROWS
from cacheclip_jax.plan import Context
from cacheclip_jax.precision import precision

_MASKED = -1e30  # finite: of a context without slots the log-sum-exp is just very small


def reshaped(q: Float[Array, "T N H"], k: Float[Array, "K S H"], v: Float[Array, "K S H"], slots: Int[Array, "T"],
             context: Context, bias: Float[Array, "S"] | None = None) -> Float[Array, "T N H"]:
    """Attention of rows in `slots` behind the context, to the context and to every other slot at or before their own.

    Within the context logits are divided by its temperature T. The two parts' outputs are merged with
    softmax([lse_context * scale * T, lse_other]), lse being each part's log-sum-exp (APE, arXiv 2502.05431, section 4).
    With temperature and scale 1 it is row attention with that bias, padding rows (slot -1, output zero) included.
    """
    T = len(slots)
    if T <= FEW_ROWS:
        return _dense(q, k, v, slots, context, bias)
    blocks = -(-T // FEW_ROWS)
    q = jnp.pad(q, ((0, blocks * FEW_ROWS - T), (0, 0), (0, 0))).reshape(blocks, FEW_ROWS, *q.shape[1:])
    slots = jnp.pad(slots, (0, blocks * FEW_ROWS - T), constant_values=-1).reshape(blocks, FEW_ROWS)
    out = jax.lax.map(lambda block: _dense(block[0], k, v, block[1], context, bias), (q, slots))
    return out.reshape(-1, *out.shape[2:])[:T]


def _dense(q, k, v, slots, reshape, bias):
    T, N, H = q.shape
    K, S, _ = k.shape
    exact = precision(q.dtype)
    s = jnp.einsum("tkgh,ksh->kgts", q.reshape(T, K, N // K, H), k, preferred_element_type=jnp.float32,
                   precision=exact) * H**-0.5
    s = s if bias is None else s + bias
    slot = jnp.arange(S)
    context = (slot >= reshape.start) & (slot < reshape.end)
    s = jnp.where(slot <= slots[:, None], jnp.where(context, s / reshape.temperature, s), _MASKED)
    inside = jax.nn.logsumexp(jnp.where(context, s, _MASKED), -1, keepdims=True)
    outside = jax.nn.logsumexp(jnp.where(context, _MASKED, s), -1, keepdims=True)
    merged = inside * reshape.scale * reshape.temperature
    both = jnp.logaddexp(merged, outside)
    # Each slot's share of its part times the part's share of all: one product with V instead of two, written as in
    # `dense` for the sake of bfloat16.
    p = jnp.exp(s + jnp.where(context, merged - inside, 0) - both)
    out = jnp.einsum("kgts,ksh->kgth", p.astype(v.dtype), v, preferred_element_type=jnp.float32, precision=exact)
    return jnp.where(slots[:, None, None] >= 0, out.transpose(2, 0, 1, 3).reshape(T, N, H), 0).astype(q.dtype)
