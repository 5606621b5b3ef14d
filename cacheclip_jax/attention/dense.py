"""Row attention for few rows: all logits at once, so that the work spreads over slots rather than over rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cacheclip_jax.precision import precision


def dense(q: Float[Array, "T N H"], k: Float[Array, "K S H"], v: Float[Array, "K S H"], positions: Int[Array, "T"],
          bias: Float[Array, "S"] | None = None) -> Float[Array, "T N H"]:
    """Row attention (see `row_attention`) with logits in float32; takes 4 T N S bytes for them."""
    return dense_with_weights(q, k, v, positions, bias)[0]


def dense_with_weights(q: Float[Array, "T N H"], k: Float[Array, "K S H"], v: Float[Array, "K S H"],
                       positions: Int[Array, "T"], bias: Float[Array, "S"] | None = None
                       ) -> tuple[Float[Array, "T N H"], Float[Array, "T N S"]]:
    """`dense`, and the weights themselves in float32; those of padding rows mean nothing."""
    T, N, H = q.shape
    K, S, _ = k.shape
    exact = precision(q.dtype)
    # Rows before slots in every product: XLA:GPU then has the softmax over a whole row in one kernel, where slots first
    # take a kernel for each of its steps; XLA:CPU has only products in this order in bfloat16.
    grouped = q.reshape(T, K, N // K, H).transpose(1, 2, 0, 3)
    s = jnp.einsum("kgth,ksh->kgts", grouped, k, preferred_element_type=jnp.float32, precision=exact) * H**-0.5
    s = s if bias is None else s + bias
    # A padding row sees slot 0, so that its softmax is defined; its output is dropped.
    s = jnp.where(jnp.arange(S) <= jnp.maximum(positions, 0)[:, None], s, -jnp.inf)
    p = jax.nn.softmax(s, axis=-1)
    out = jnp.einsum("kgts,ksh->kgth", p.astype(v.dtype), v, preferred_element_type=jnp.float32, precision=exact)
    out = out.transpose(2, 0, 1, 3).reshape(T, N, H)
    out = jnp.where(positions[:, None, None] >= 0, out, 0).astype(q.dtype)
    return out, p.transpose(2, 0, 1, 3).reshape(T, N, S)
