"""Params: the weights of one decoder as a pytree, their shapes, dtypes and shardings stated once, and random init."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from cacheclip_jax.errors import BadInput
from cacheclip_jax.model.config import ModelConfig


@struct.dataclass
class Layer:
    """Weights of one layer; matrices are [out, in], as in Hugging Face checkpoints.

    `qkv` holds the rows of each kv head together: its G query heads, then its key, then its value. One product for the
    three is a third faster than three for a few hundred rows, and splitting kv heads over devices keeps groups whole.
    `gate_up` holds the MLP's gate and up matrices, one product as well; each is split over devices.
    """

    attn_norm: Any  # [D]
    qkv: Any  # [K*(G+2)*H, D]
    o: Any  # [D, N*H]
    mlp_norm: Any  # [D]
    gate_up: Any  # [2, F, D]
    down: Any  # [D, F]
    qkv_bias: Any = None  # [K*(G+2)*H]
    o_bias: Any = None
    gate_up_bias: Any = None  # [2, F]
    down_bias: Any = None
    q_norm: Any = None  # [H]
    k_norm: Any = None


@struct.dataclass
class Params:
    """A decoder's weights, one Layer for each of L layers: stacked ones would be copied at every use, which costs a
    pass over all weights. `head` is None when the output matrix is tied to `embed`."""

    embed: Any  # [V, D]
    layers: tuple[Layer, ...]
    final_norm: Any  # [D]
    head: Any = None  # [V, D]

    @property
    def outer(self) -> Params:
        """All but the layers, for programs that only embed or only make logits: a call flattens every array it is
        given, and the layers are hundreds."""
        return Params(self.embed, (), self.final_norm, self.head)


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
    D, F, H, V = cfg.d_model, cfg.d_mlp, cfg.head_dim, cfg.vocab_size
    NH, QKV = cfg.num_heads * H, (cfg.num_heads + 2 * cfg.num_kv_heads) * H
    # Where the kv heads can't be divided over the mesh, all heads are replicated.
    divisible = mesh is None or cfg.num_kv_heads % mesh.shape["model"] == 0

    def arr(*shape_and_axes: tuple[int, str | None]) -> jax.ShapeDtypeStruct:
        shape = tuple(n for n, _ in shape_and_axes)
        if mesh is None:
            sharding: Any = SingleDeviceSharding(jax.local_devices()[0])
        else:
            sharding = NamedSharding(mesh, PartitionSpec(*(axis for _, axis in shape_and_axes)))
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)

    model, none, split = (D, None), None, "model" if divisible else None
    qkv, two, mlp = (QKV, split), (2, None), (F, "model")
    layer = Layer(
        attn_norm=arr(model),
        qkv=arr(qkv, model), o=arr(model, (NH, split)),
        mlp_norm=arr(model),
        gate_up=arr(two, mlp, model), down=arr(model, mlp),
        qkv_bias=arr(qkv) if cfg.qkv_bias else none,
        o_bias=arr(model) if cfg.out_bias else none,
        gate_up_bias=arr(two, mlp) if cfg.mlp_bias else none,
        down_bias=arr(model) if cfg.mlp_bias else none,
        q_norm=arr((H, None)) if cfg.qk_norm else none,
        k_norm=arr((H, None)) if cfg.qk_norm else none,
    )
    return Params(
        embed=arr((V, "model"), model),
        layers=(layer,) * cfg.num_layers,
        final_norm=arr(model),
        head=None if cfg.tied else arr((V, "model"), model),
    )


def init(key: jax.Array, cfg: ModelConfig, dtype: Any = jnp.float32, mesh: Mesh | None = None) -> Params:
    """Random weights at a model's real shapes: normal matrices scaled by 1/sqrt(in), norms near one, small biases."""
    leaves, tree = jax.tree.flatten_with_path(abstract(cfg, dtype, mesh))
    drawn = []
    for number, (path, leaf) in enumerate(leaves):
        name = path[-1].name
        scale = 0.1 if "norm" in name or name.endswith("bias") else leaf.shape[-1] ** -0.5
        centre = 1.0 if "norm" in name else 0.0
        # A program for each shape, not one for all: a random draw takes as long to compile as a layer.
        drawn.append(_draw(jax.random.fold_in(key, number), leaf.shape, leaf.dtype, leaf.sharding, centre, scale))
    return jax.tree.unflatten(tree, drawn)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _draw(key, shape, dtype, sharding, centre, scale):
    drawn = (centre + scale * jax.random.normal(key, shape, jnp.float32)).astype(dtype)
    return jax.lax.with_sharding_constraint(drawn, sharding)
