"""The decoder's parts as pure functions over rows: embed, project to q/k/v, finish a layer, logits.

A layer is `project` -> attention (the caller's: it decides what the rows see) -> `finish`. Encoding, scoring,
recompute and decoding differ in the attention between the two, and in nothing else.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cacheclip_jax.model.config import ModelConfig
from cacheclip_jax.model.params import Layer, Params
from cacheclip_jax.precision import precision


def embed(params: Params, ids: Int[Array, "T"]) -> Float[Array, "T D"]:
    """Embedding rows of token ids."""
    return params.embed[ids]


def project(x: Float[Array, "T D"], layer: Layer, cfg: ModelConfig
            ) -> tuple[Float[Array, "T N H"], Float[Array, "T K H"], Float[Array, "T K H"]]:
    """Queries, keys and values of rows, before RoPE."""
    with jax.named_scope("project"):
        x = _norm(x, layer.attn_norm, cfg)
        groups = cfg.num_heads // cfg.num_kv_heads
        qkv = _linear(x, layer.qkv, layer.qkv_bias)
        qkv = qkv.reshape(-1, cfg.num_kv_heads, groups + 2, cfg.head_dim)
        q = qkv[:, :, :groups].reshape(-1, cfg.num_heads, cfg.head_dim)
        k, v = qkv[:, :, groups], qkv[:, :, groups + 1]
        if cfg.qk_norm:
            q, k = _norm(q, layer.q_norm, cfg), _norm(k, layer.k_norm, cfg)
        return q, k, v


def finish(x: Float[Array, "T D"], attended: Float[Array, "T N H"], layer: Layer, cfg: ModelConfig
           ) -> Float[Array, "T D"]:
    """The rest of a layer: output projection, residual, MLP, residual."""
    with jax.named_scope("finish"):
        x = x + _linear(attended.reshape(x.shape[0], -1), layer.o, layer.o_bias)
        h = _norm(x, layer.mlp_norm, cfg)
        gate, up = jnp.moveaxis(_linear(h, layer.gate_up, layer.gate_up_bias), 1, 0)
        gate = jax.nn.silu(gate.astype(jnp.float32)).astype(x.dtype)
        return x + _linear(gate * up, layer.down, layer.down_bias)


def logits(params: Params, cfg: ModelConfig, x: Float[Array, "T D"]) -> Float[Array, "T V"]:
    """Next-token logits of rows that left the last layer, float32."""
    head = params.embed if params.head is None else params.head
    x = _norm(x, params.final_norm, cfg)
    return _matmul(x, head)


def _norm(x: Float[Array, "... D"], weight: Float[Array, "D"], cfg: ModelConfig) -> Float[Array, "... D"]:
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + cfg.norm_eps)
    return (x32 * scale).astype(x.dtype) * weight


def _linear(x: Float[Array, "T I"], weight: Float[Array, "*O I"], bias: Float[Array, "*O"] | None
            ) -> Float[Array, "T *O"]:
    """x @ weight.T + bias, accumulated in float32, returned in x's dtype."""
    def rounded_last(x, weight, bias):
        # As one matrix: XLA:CPU copies weights of three axes at every product.
        y = _matmul(x, weight.reshape(-1, weight.shape[-1])).reshape(len(x), *weight.shape[:-1])
        return (y if bias is None else y + bias.astype(jnp.float32)).astype(x.dtype)

    def rounded_by_library(x, weight, bias):  # float32 output costs 15% of the product's time on an H100
        y = jnp.einsum("ti,...i->t...", x, weight, preferred_element_type=x.dtype, precision=precision(x.dtype))
        return y if bias is None else y + bias

    return jax.lax.platform_dependent(x, weight, bias, cpu=rounded_last, default=rounded_by_library)


def _matmul(x: Float[Array, "T I"], weight: Float[Array, "O I"]) -> Float[Array, "T O"]:
    """x @ weight.T, accumulated in and returned as float32."""
    def product(x, weight):
        return jnp.einsum("ti,oi->to", x, weight, preferred_element_type=jnp.float32, precision=precision(x.dtype))

    def two_rows(x, weight):
        # XLA:CPU computes a single row on one thread: 191 ms for the head of Qwen2.5-0.5B, where two rows take 13.
        return product(jnp.pad(x, ((0, 1), (0, 0))), weight)[:1]

    if x.shape[0] != 1:
        return product(x, weight)
    return jax.lax.platform_dependent(x, weight, cpu=two_rows, default=product)
