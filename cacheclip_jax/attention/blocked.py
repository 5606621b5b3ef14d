"""Row attention in plain jnp: blocks of rows, and for each only the blocks of slots it can see. Memory is O(block)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cacheclip_jax.precision import precision

_MASKED = -1e30  # finite, so that a block in which a row sees nothing yields exp(0), not NaN; rescaled away later


def blocked(q: Float[Array, "T N H"], k: Float[Array, "K S H"], v: Float[Array, "K S H"], positions: Int[Array, "T"],
            bias: Float[Array, "S"] | None = None, block_rows: int = 128, block_slots: int = 512
            ) -> Float[Array, "T N H"]:
    """Row attention (see `row_attention`) with an online softmax in float32."""
    T, N, H = q.shape
    K, S, _ = k.shape
    G = N // K
    bt, bs = min(block_rows, T), min(block_slots, S)
    rows = -(-T // bt)
    q = jnp.pad(q, ((0, rows * bt - T), (0, 0), (0, 0)))
    positions = jnp.pad(positions, (0, rows * bt - T), constant_values=-1)
    q = q.reshape(rows, bt, K, G, H).transpose(0, 2, 1, 3, 4).reshape(rows, K, bt * G, H)
    exact = precision(q.dtype)

    def attend_rows(block):
        q, pos = block
        pos = jnp.repeat(pos, G)[:, None]  # one per row and query head of the group

        def attend_slots(i, carry):
            acc, top, total = carry
            # The last block is moved back to end at S; slots that the block before it has done are masked.
            start = jnp.minimum(i * bs, S - bs)
            slot = start + jnp.arange(bs)
            kb = jax.lax.dynamic_slice_in_dim(k, start, bs, axis=1)
            vb = jax.lax.dynamic_slice_in_dim(v, start, bs, axis=1)
            s = jnp.einsum("kth,ksh->kts", q, kb, preferred_element_type=jnp.float32, precision=exact) * H**-0.5
            if bias is not None:
                s += jax.lax.dynamic_slice_in_dim(bias, start, bs)
            s = jnp.where((slot <= pos) & (slot >= i * bs), s, _MASKED)
            new_top = jnp.maximum(top, s.max(-1, keepdims=True))
            shrink, p = jnp.exp(top - new_top), jnp.exp(s - new_top)
            pv = jnp.einsum("kts,ksh->kth", p.astype(v.dtype), vb, preferred_element_type=jnp.float32, precision=exact)
            return acc * shrink + pv, new_top, total * shrink + p.sum(-1, keepdims=True)

        start = (jnp.zeros((K, bt * G, H), jnp.float32), jnp.full((K, bt * G, 1), _MASKED),
                 jnp.zeros((K, bt * G, 1), jnp.float32))
        needed = jnp.minimum(pos.max() // bs + 1, -(-S // bs))
        acc, _, total = jax.lax.fori_loop(0, needed, attend_slots, start)
        out = jnp.where(pos >= 0, acc / jnp.maximum(total, 1e-30), 0)
        return out.astype(v.dtype)

    out = jax.lax.map(attend_rows, (q, positions.reshape(rows, bt)))
    return out.reshape(rows, K, bt, G, H).transpose(0, 2, 1, 3, 4).reshape(rows * bt, N, H)[:T].astype(q.dtype)
