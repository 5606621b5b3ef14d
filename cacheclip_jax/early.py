"""What a model's first layers tell of a whole prompt: how far cached values are off, and where the question looks."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cacheclip_jax.assemble import Placement, place
from cacheclip_jax.model import decoder
from cacheclip_jax.model.config import ModelConfig
from cacheclip_jax.model.params import Layer
from cacheclip_jax.model.rope import rotate
from cacheclip_jax.precision import precision


@partial(jax.jit, static_argnames=("cfg", "nth"))
def value_deviation(x: Float[Array, "T D"], layer: Layer, cfg: ModelConfig, rows: Float[Array, "B R H"],
                    where: Placement, nth: int) -> Float[Array, "S"]:
    """Squared L2 distance, over kv heads and their numbers, between each token's value as computed from `x` (row t is
    token t) and its cached one in the layer `nth` of a block of loaded `rows` (CacheBlend, arXiv 2405.16444)."""
    _, _, fresh = decoder.project(x, layer, cfg)
    _, cached = place(cfg, rows[nth], where)
    size = min(len(x), cached.shape[1])
    off = fresh[:size].swapaxes(0, 1).astype(jnp.float32) - cached[:, :size].astype(jnp.float32)
    return jnp.zeros(cached.shape[1], jnp.float32).at[:size].set((off * off).sum((0, 2)))


@partial(jax.jit, static_argnames=("cfg", "count"))
def early_attention(x: Float[Array, "T D"], layer: Layer, cfg: ModelConfig, positions: Int[Array, "T"],
                    question: Int[Array, ""], end: Int[Array, ""], count: int) -> Float[Array, "T"]:
    """Attention of the question's rows (slots `question` to `end`, `count` at most) to every token, summed over rows.

    The heads' logits are added up before the one softmax, as if their queries and keys were one long vector of N * H
    numbers, by whose root they are divided (A3, arXiv 2511.17560). Row t of `x` is token t.
    """
    q, k, _ = decoder.project(x, layer, cfg)
    T, N, H = q.shape
    K = k.shape[1]
    asked = question + jnp.arange(count)
    q = q[jnp.minimum(asked, T - 1)].swapaxes(0, 1)
    # The query heads of a group share a key: their logits add up to those of their summed queries.
    q = rotate(q.reshape(K, N // K, count, H).astype(jnp.float32).sum(1), asked, cfg.rope)
    k = rotate(k.swapaxes(0, 1), positions, cfg.rope).astype(jnp.float32)
    s = jnp.einsum("kqh,kth->qt", q, k, precision=precision(jnp.float32)) * (N * H) ** -0.5
    seen = (positions <= asked[:, None]) & (positions >= 0)
    weights = jax.nn.softmax(jnp.where(seen, s, -jnp.inf), axis=-1)
    return jnp.where((asked < end)[:, None], weights, 0).sum(0)
