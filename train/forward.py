"""The forward pass of training and teaching: chunks behind the prefix, question rows over their caches; differentiable.

It computes what `encode`, `place` and `score` compute online, for whole batches in few programs: layers are stacked and
scanned, chunks lie in one row of slots with a mask, so that any number of chunks of any length is one shape.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from cacheclip_jax.attention.dense import dense_with_weights
from cacheclip_jax.model import decoder
from cacheclip_jax.model.adapter import Lora, merged
from cacheclip_jax.model.config import ModelConfig
from cacheclip_jax.model.load import Model
from cacheclip_jax.model.params import Layer, Params
from cacheclip_jax.model.rope import rotate
from cacheclip_jax.recompute import rows_over_cached
from train.packed import Packed

Context = Literal["cached", "joint"]
Kernel = Literal["cudnn", "xla"]
Cache = tuple[Float[Array, "L B K S H"], Float[Array, "L B K S H"]]


@struct.dataclass
class Stacked:
    """A model's weights with all layers in one: leaves of `layers` have a leading axis L."""

    top: Params  # without layers
    layers: Layer


def stack_layers(params: Params) -> Stacked:
    """Stack the layers of a model. This copies the weights."""
    top = Params(params.embed, (), params.final_norm, params.head)
    return Stacked(top, jax.tree.map(lambda *leaves: jnp.stack(leaves), *params.layers))


def kernel(model: Model) -> Kernel:
    """Who computes attention among slots: the library's kernel where the model runs on a GPU in half precision."""
    return "cudnn" if model.attention.name in ("cudnn", "mosaic_gpu") else "xla"


def encode_context(weights: Stacked, cfg: ModelConfig, packed: Packed, context: Context, how: Kernel = "xla",
                   lora: Lora | None = None) -> Cache:
    """Keys, rotated to their slots, and values of every slot: chunks that see the prefix and themselves ("cached"), or
    a causal prefill of them all ("joint"). `packed` has a batch axis; `lora` a leading axis L.

    Nothing but each layer's input is kept for a gradient.
    """
    B, S = packed.ids.shape
    slots = jnp.arange(S)
    local = packed.local if context == "cached" else jnp.broadcast_to(slots, (B, S))
    mask = _visible(packed, context)

    @jax.checkpoint
    def layer_of(x, scanned):
        layer, change = scanned
        layer = _tuned(layer, change, cfg)
        q, k, v = (y.reshape(B, S, -1, cfg.head_dim) for y in decoder.project(x.reshape(B * S, -1), layer, cfg))
        attended = jax.nn.dot_product_attention(_rotated(q, local, cfg), _rotated(k, local, cfg), v, mask=mask,
                                                implementation=how)
        x = decoder.finish(x.reshape(B * S, -1), attended.reshape(B * S, cfg.num_heads, -1), layer, cfg)
        return x.reshape(B, S, -1), (rotate(k.swapaxes(1, 2), slots, cfg.rope), v.swapaxes(1, 2))

    return jax.lax.scan(layer_of, decoder.embed(weights.top, packed.ids), (weights.layers, lora))[1]


def _visible(packed: Packed, context: Context) -> Bool[Array, "B 1 S S"]:
    slots = jnp.arange(packed.ids.shape[1])
    causal = slots <= slots[:, None]
    if context == "joint":
        return jnp.broadcast_to(causal, (len(packed.ids), 1, *causal.shape))
    whose = packed.part
    return (causal & ((whose[:, None] == 0) | (whose[:, None] == whose[:, :, None])))[:, None]


def _rotated(x: Float[Array, "B S N H"], positions: Int[Array, "B S"], cfg: ModelConfig) -> Float[Array, "B S N H"]:
    return jax.vmap(partial(rotate, rope=cfg.rope))(x.swapaxes(1, 2), positions).swapaxes(1, 2)


def read_rows(weights: Stacked, cfg: ModelConfig, ids: Int[Array, "T"], positions: Int[Array, "T"],
              cache: tuple[Float[Array, "L K S H"], Float[Array, "L K S H"]], row_weights: Float[Array, "T"],
              reduce: Callable[[Float[Array, "N S"], Any], Any], extra: Any, lora: Lora | None = None
              ) -> tuple[Float[Array, "T D"], Any]:
    """One prompt's rows over its caches: the rows as they leave the last layer, and `reduce(weights, extra)` of every
    layer, stacked.

    `weights` are a layer's attention weights summed over rows by `row_weights`; `extra`, like `lora`, has a leading
    axis L. Rows are sorted by position, padding (-1) comes last. Attention is recomputed for a gradient, never kept.
    """
    @jax.checkpoint
    def layer_of(x, scanned):
        layer, change, keys, values, more = scanned
        layer = _tuned(layer, change, cfg)
        q, kv = rows_over_cached(x, layer, cfg, positions, (keys, values))
        attended, seen = dense_with_weights(q, *kv, positions)
        return decoder.finish(x, attended, layer, cfg), reduce(jnp.einsum("tns,t->ns", seen, row_weights), more)

    return jax.lax.scan(layer_of, decoder.embed(weights.top, ids), (weights.layers, lora, *cache, extra))


def score_batch(weights: Stacked, cfg: ModelConfig, packed: Packed, cache: Cache, head_weights: Float[Array, "L N"],
                lora: Lora | None = None) -> Float[Array, "B S"]:
    """What `score` with rows "last" and these head weights gives for each prompt of a batch, on its context's slots and
    zero elsewhere."""
    def one(packed: Packed, keys, values):
        last = (jnp.arange(len(packed.rows)) == packed.count - 1).astype(jnp.float32)
        _, seen = read_rows(weights, cfg, packed.rows, packed.positions, (keys, values), last,
                            lambda seen, heads: heads @ seen, head_weights, lora)
        return jnp.where(packed.context, seen.sum(0), 0)

    return jax.vmap(one, in_axes=(0, 1, 1))(packed, *cache)


def _tuned(layer: Layer, lora: Lora | None, cfg: ModelConfig) -> Layer:
    return layer if lora is None else dataclasses.replace(layer, qkv=merged(layer.qkv, cfg, lora))
