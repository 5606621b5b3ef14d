"""Params: the weights of one decoder as a pytree, their shapes, dtypes and shardings stated once, and random init."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from cacheclip_jax.errors import BadInput
from cacheclip_jax.model.config import ModelConfig


@struct.dataclass
class Layer:
    """Weights of all layers, stacked on a leading axis L; matrices are [out, in], as in Hugging Face checkpoints."""

    attn_norm: Any  # [L, D]
    q: Any  # [L, N*H, D]
    k: Any  # [L, K*H, D]
    v: Any  # [L, K*H, D]
    o: Any  # [L, D, N*H]
    mlp_norm: Any  # [L, D]
    gate: Any  # [L, F, D]
    up: Any  # [L, F, D]
    down: Any  # [L, D, F]
    q_bias: Any = None
    k_bias: Any = None
    v_bias: Any = None
    o_bias: Any = None
    gate_bias: Any = None
    up_bias: Any = None
    down_bias: Any = None
    q_norm: Any = None  # [L, H]
    k_norm: Any = None


@struct.dataclass
class Params:
    """A decoder's weights. `head` is None when the output matrix is tied to `embed`."""

    embed: Any  # [V, D]
    layers: Layer
    final_norm: Any  # [D]
    head: Any = None  # [V, D]


def abstract(cfg: ModelConfig, dtype: Any, mesh: Mesh | None = None) -> Params:
    """Shapes, dtypes and shardings of a model's weights, as a Params of `jax.ShapeDtypeStruct`.

    With a mesh, heads, MLP and vocabulary are split over its axis "model"; without one, everything lies on the
    default device. This is the only place that states them: init, loading and tests read it.
    """
    if mesh is not None:
        if "model" not in mesh.shape:
            raise BadInput(f"the mesh has axes {', '.join(mesh.axis_names)}: it needs one named model")
        # The compiler propagates shardings from the weights; explicit axes would want one at every operation.
        mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)
    L, D, F, H, V = cfg.num_layers, cfg.d_model, cfg.d_mlp, cfg.head_dim, cfg.vocab_size
    NH, KH = cfg.num_heads * H, cfg.num_kv_heads * H
    # Where the kv heads can't be divided over the mesh they are replicated: the query heads still are split.
    split = mesh.shape["model"] if mesh is not None else 1
    kv = "model" if cfg.num_kv_heads % split == 0 else None

    def arr(*shape_and_axes: tuple[int, str | None]) -> jax.ShapeDtypeStruct:
        shape = tuple(n for n, _ in shape_and_axes)
        if mesh is None:
            sharding: Any = SingleDeviceSharding(jax.local_devices()[0])
        else:
            sharding = NamedSharding(mesh, PartitionSpec(*(axis for _, axis in shape_and_axes)))
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)

    layer, model, none = (L, None), (D, None), None
    heads, kvs, mlp = (NH, "model"), (KH, kv), (F, "model")
    return Params(
        embed=arr((V, "model"), model),
        layers=Layer(
            attn_norm=arr(layer, model),
            q=arr(layer, heads, model), k=arr(layer, kvs, model), v=arr(layer, kvs, model), o=arr(layer, model, heads),
            mlp_norm=arr(layer, model),
            gate=arr(layer, mlp, model), up=arr(layer, mlp, model), down=arr(layer, model, mlp),
            q_bias=arr(layer, heads) if cfg.qkv_bias else none,
            k_bias=arr(layer, kvs) if cfg.qkv_bias else none,
            v_bias=arr(layer, kvs) if cfg.qkv_bias else none,
            o_bias=arr(layer, model) if cfg.out_bias else none,
            gate_bias=arr(layer, mlp) if cfg.mlp_bias else none,
            up_bias=arr(layer, mlp) if cfg.mlp_bias else none,
            down_bias=arr(layer, model) if cfg.mlp_bias else none,
            q_norm=arr(layer, (H, None)) if cfg.qk_norm else none,
            k_norm=arr(layer, (H, None)) if cfg.qk_norm else none,
        ),
        final_norm=arr(model),
        head=None if cfg.tied else arr((V, "model"), model),
    )


def init(key: jax.Array, cfg: ModelConfig, dtype: Any = jnp.float32, mesh: Mesh | None = None) -> Params:
    """Random weights at a model's real shapes: normal matrices scaled by 1/sqrt(in), norms near one, small biases."""
    shapes = abstract(cfg, dtype, mesh)
    leaves, tree = jax.tree.flatten_with_path(shapes)

    def draw(key: jax.Array, name: str, a: jax.ShapeDtypeStruct) -> jax.Array:
        x = jax.random.normal(key, a.shape, jnp.float32)
        if "norm" in name:
            return (1 + 0.1 * x).astype(a.dtype)
        scale = 0.1 if name.endswith("bias") else a.shape[-1] ** -0.5
        return (scale * x).astype(a.dtype)

    def draw_all(key: jax.Array) -> Params:
        keys = jax.random.split(key, len(leaves))
        return jax.tree.unflatten(tree, [draw(k, path[-1].name, a) for k, (path, a) in zip(keys, leaves, strict=True)])

    return jax.jit(draw_all, out_shardings=jax.tree.map(lambda a: a.sharding, shapes))(key)
