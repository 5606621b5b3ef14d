"""Rows through the primary against an assembled cache: masked grouped recompute, and full prefill as its limit."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cacheclip_jax.assemble import KVCache
from cacheclip_jax.attention import row_attention
from cacheclip_jax.model import decoder
from cacheclip_jax.model.config import ModelConfig
from cacheclip_jax.model.params import Layer, Params
from cacheclip_jax.model.rope import rotate


@partial(jax.jit, static_argnames="cfg", donate_argnames="cache")
def recompute(params: Params, cfg: ModelConfig, ids: Int[Array, "T"], positions: Int[Array, "T"], last: Int[Array, ""],
              cache: KVCache) -> tuple[Float[Array, "V"], KVCache]:
    """Push rows through every layer, overwriting their K and V in the cache; logits of the row with index `last`.

    Rows are sorted by absolute position, padding rows (position -1) come last. At each layer a row attends to every
    slot at or before its own position: stale rows of the cache and fresh ones alike. With every token of a prompt as a
    row this is full prefill, exactly. The cache is donated.
    """
    x, cache = rows_through_layers(params, cfg, decoder.embed(params, ids), positions, cache)
    x = jax.lax.dynamic_slice_in_dim(x, last, 1)
    return decoder.logits(params, cfg, x)[0], cache


@partial(jax.jit, static_argnames="cfg")
def continuation_logits(params: Params, cfg: ModelConfig, ids: Int[Array, "T"], positions: Int[Array, "T"],
                        cache: KVCache) -> Float[Array, "T V"]:
    """Logits of every row: how a repaired cache judges a given continuation. The cache stays as it is."""
    x, _ = rows_through_layers(params, cfg, decoder.embed(params, ids), positions, cache)
    return decoder.logits(params, cfg, x)


def rows_through_layers(params: Params, cfg: ModelConfig, x: Float[Array, "T D"], positions: Int[Array, "T"],
                        cache: KVCache) -> tuple[Float[Array, "T D"], KVCache]:
    """Rows through all layers; the cache rides in the loop's carry, so that it's updated in place."""
    def step(index, carry):
        x, cache = carry
        layer = decoder.layer_at(params.layers, index)
        x, cache, _ = attend_and_finish(x, layer, index, cfg, positions, cache)
        return x, cache

    return jax.lax.fori_loop(0, cfg.num_layers, step, (x, cache))


def attend_and_finish(x: Float[Array, "T D"], layer: Layer, index: Int[Array, ""] | int, cfg: ModelConfig,
                      positions: Int[Array, "T"], cache: KVCache
                      ) -> tuple[Float[Array, "T D"], KVCache, tuple[Float[Array, "T N H"], Float[Array, "K S H"]]]:
    """One layer for rows: overwrite their K and V, attend, finish. Also returns the rows' rotated queries and the
    layer's keys, which scoring reads."""
    q, k, v = decoder.project(x, layer, cfg)
    q = rotate(q.swapaxes(0, 1), positions, cfg.rope).swapaxes(0, 1)
    k = rotate(k.swapaxes(0, 1), positions, cfg.rope)
    # Padding rows write to the slot after the last one, which mode="drop" discards (-1 would wrap around).
    slots = jnp.where(positions < 0, cache.slots, positions)
    keys = cache.k[index].at[:, slots].set(k, mode="drop", indices_are_sorted=True)
    values = cache.v[index].at[:, slots].set(v.swapaxes(0, 1), mode="drop", indices_are_sorted=True)
    with jax.named_scope("row_attention"):
        attended = row_attention(q, keys, values, positions)
    cache = KVCache(k=cache.k.at[index].set(keys), v=cache.v.at[index].set(values))
    return decoder.finish(x, attended, layer, cfg), cache, (q, keys)
