"""What a model would look at while it answers: the attention of tokens that it drafts (SpecPrefill)."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cacheclip_jax.assemble import KVCache
from cacheclip_jax.attention.dense import dense_with_weights
from cacheclip_jax.model import decoder
from cacheclip_jax.model.config import ModelConfig
from cacheclip_jax.model.params import Params
from cacheclip_jax.recompute import rows_over_cached


@partial(jax.jit, static_argnames=("cfg", "steps", "pool"), donate_argnames="cache")
def lookahead_scores(params: Params, cfg: ModelConfig, logits: Float[Array, "V"], cache: KVCache,
                     slot: Int[Array, ""], context: Int[Array, "2"], stop_ids: Int[Array, "M"], steps: int, pool: int
                     ) -> Float[Array, "S"]:
    """Attention of up to `steps` greedily drafted tokens to the context's slots (from context[0] to context[1]): each
    head's weights average-pooled over `pool` tokens, then the largest over all layers and heads, then the mean over
    steps (SpecPrefill, arXiv 2502.02789).

    `logits` are those of the prompt's last row, whose cache this is; it is donated. A stop token ends the draft: it
    counts only where it is the first.
    """
    inside = jnp.arange(cache.slots)
    inside = (inside >= context[0]) & (inside < context[1])

    def step(i, carry):
        logits, cache, total, drafted, ended = carry
        token = jnp.argmax(logits)
        ended |= (token == stop_ids).any() & (i > 0)
        x, best, kvs = decoder.embed(params, token[None]), jnp.zeros(cache.slots), []
        for layer, kv in zip(params.layers, zip(cache.k, cache.v, strict=True), strict=True):
            q, kv = rows_over_cached(x, layer, cfg, (slot + i)[None], kv)
            attended, weights = dense_with_weights(q, *kv, (slot + i)[None])
            pooled = average_pool(jnp.where(inside, weights[0], 0), pool)
            best = jnp.maximum(best, pooled.max(0))
            x = decoder.finish(x, attended, layer, cfg)
            kvs.append(kv)
        total += jnp.where(ended, 0, best)
        return (decoder.logits(params, cfg, x)[0], KVCache(*zip(*kvs, strict=True)), total,
                drafted + jnp.where(ended, 0, 1), ended | (token == stop_ids).any())

    start = logits, cache, jnp.zeros(cache.slots), jnp.int32(0), jnp.bool(False)
    _, _, total, drafted, _ = jax.lax.fori_loop(0, steps, step, start)
    return jnp.where(inside, total / drafted, 0)


def average_pool(x: Float[Array, "*B S"], width: int) -> Float[Array, "*B S"]:
    """Mean of the `width` (odd) numbers around each one, numbers beyond the ends counting as 0."""
    window = (1,) * (x.ndim - 1) + (width,)
    return jax.lax.reduce_window(x, np.float32(0), jax.lax.add, window, (1,) * x.ndim, "SAME") / width
