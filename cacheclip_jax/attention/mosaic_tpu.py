"""Row attention on TPUs: a Mosaic kernel over a grid of kv heads, tiles of rows and blocks of slots.

As on the GPU the query heads of a group are folded into the rows. The grid is static; a step whose block no row of the
tile sees computes nothing and, because its block index repeats the last needed one, loads nothing.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from cacheclip_jax.precision import precision

HEAD_DIMS = (64, 128)
_LANES = 128
_NOTHING_SEEN = -1e30  # finite: a row that sees nothing has exp(-inf - top) = 0, not NaN


def mosaic_tpu(q: Float[Array, "T N H"], k: Float[Array, "K S H"], v: Float[Array, "K S H"], positions: Int[Array, "T"],
               bias: Float[Array, "S"] | None = None, tile: int = 256, slots: int = 512, interpret: bool = False
               ) -> Float[Array, "T N H"]:
    """Row attention (see `row_attention`) on a TPU: `tile` folded rows by `slots` slots at a time, multiples of 128.

    Raises NotImplementedError for head dims other than 64 and 128. `interpret` runs it on any platform, for tests.
    """
    T, N, H = q.shape
    K, S, _ = k.shape
    if H not in HEAD_DIMS:
        raise NotImplementedError(f"head dim {H}: the kernel has {HEAD_DIMS}; use how='blocked'")
    if tile % _LANES or slots % _LANES:
        raise ValueError(f"tile {tile} and slots {slots} must be multiples of {_LANES}")
    G = N // K
    slots = min(slots, -(-S // _LANES) * _LANES)
    tiles, blocks = -(-T * G // tile), -(-S // slots)
    pad = tiles * tile - T * G
    q = jnp.pad(q.reshape(T, K, G, H).transpose(1, 0, 2, 3).reshape(K, T * G, H), ((0, 0), (0, pad), (0, 0)))
    pos = jnp.pad(jnp.repeat(positions.astype(jnp.int32), G), (0, pad), constant_values=-1)
    steps = pos.reshape(tiles, tile).max(1) // slots + 1  # 0 for a tile of padding rows

    def rows(head, t, s, steps):
        return head, t, 0

    def block(head, t, s, steps):
        return head, jnp.clip(s, 0, jnp.maximum(steps[t] - 1, 0)), 0

    biased = () if bias is None else (bias.astype(jnp.float32)[None],)
    out = pl.pallas_call(
        partial(_kernel, slots=slots, S=S, scale=H**-0.5),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(K, tiles, blocks),
            in_specs=[pl.BlockSpec((tile, 1), lambda head, t, s, steps: (t, 0)), pl.BlockSpec((None, tile, H), rows),
                      pl.BlockSpec((None, slots, H), block), pl.BlockSpec((None, slots, H), block),
                      *[pl.BlockSpec((1, slots), lambda *at: (0, block(*at)[1])) for _ in biased]],
            out_specs=pl.BlockSpec((None, tile, H), rows),
            scratch_shapes=[pltpu.VMEM((tile, H), jnp.float32), pltpu.VMEM((tile, _LANES), jnp.float32),
                            pltpu.VMEM((tile, _LANES), jnp.float32)]),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret)(steps, pos[:, None], q, k, v, *biased)
    return out[:, : T * G].reshape(K, T, G, H).transpose(1, 0, 2, 3).reshape(T, N, H)


def _kernel(steps, pos, q, k, v, *others, slots: int, S: int, scale: float):
    *bias, out, acc, top, total = others
    t, s = pl.program_id(1), pl.program_id(2)
    exact = precision(q.dtype)

    @pl.when(s == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)
        top[...] = jnp.full_like(top, _NOTHING_SEEN)
        total[...] = jnp.zeros_like(total)

    @pl.when(s < steps[t])
    def _():
        values = v[...]
        if S % slots:  # what the last block has beyond S is undefined, and 0 * NaN is NaN
            inside = s * slots + lax.broadcasted_iota(jnp.int32, values.shape, 0) < S
            values = jnp.where(inside, values, jnp.zeros_like(values))
        x = lax.dot_general(q[...], k[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32,
                            precision=exact) * scale
        x = x + bias[0][...] if bias else x
        x = jnp.where(s * slots + lax.broadcasted_iota(jnp.int32, x.shape, 1) <= pos[...], x, -jnp.inf)
        new_top = jnp.maximum(top[...], x.max(1, keepdims=True))
        shrink, p = jnp.exp(top[...] - new_top), jnp.exp(x - new_top[:, :1])
        top[...], total[...] = new_top, total[...] * shrink + p.sum(1, keepdims=True)
        acc[...] = acc[...] * shrink[:, :1] + jnp.dot(p.astype(values.dtype), values,
                                                      preferred_element_type=jnp.float32, precision=exact)

    @pl.when(s == pl.num_programs(2) - 1)
    def _():
        out[...] = (acc[...] / jnp.maximum(total[...][:, :1], 1e-30)).astype(out.dtype)
