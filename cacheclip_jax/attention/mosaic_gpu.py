"""Row attention on Hopper: a warp-specialised Mosaic kernel.

The G query heads of a kv head are folded into the rows, so that one load of K and V serves the whole group. A block of
the grid is a kv head and a tile of rows: one warpgroup streams K and V through a ring of buffers (TMA), the others
compute an online softmax over 64 rows each; two of them take turns, so that one's softmax runs under the other's matrix
products (FlashAttention-3, arXiv:2407.08608, section 3.1), three overlap without. Because rows are sorted by position,
a tile's blocks of slots are, in order: seen by all its rows (no mask), the edge (masked), and not loaded at all.

A tile takes as long as its last row's position, so few tiles leave most of the GPU idle: `splits` deals a tile's blocks
of slots out to several blocks of the grid, each with a softmax of its own, which are combined outside the kernel
(Flash-Decoding, pytorch.org/blog/flash-decoding).
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

HEAD_DIMS = (64, 128)
SMEM = 227 * 1024  # shared memory that a block can have on Hopper
_TILING = (8, 64)  # of a copy to shared memory: slots and numbers of a head, both in full tiles
_MULTIPROCESSORS = 132  # of an H100
_RESERVED = 3 * 1024  # of which barriers and the compiler's scratch for reductions
_REGISTERS = {2: (232, 40), 3: (160, 32)}  # consumer's and producer's, by consumers; one consumer has plenty
_LOG2_E = math.log2(math.e)
_NOTHING_SEEN = -1e30  # finite: a row that sees nothing has exp2(-inf - top) = 0, not NaN


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes and variants of the kernel; `blocks_for` picks them.

    A tile has `rows_per_group * consumers` rows; `slots` per block of K and V, `stages` blocks in flight. `turns` makes
    two consumers alternate between softmax and matrix products. `splits` blocks of the grid share a tile's slots.
    """

    rows_per_group: int = 64
    consumers: int = 2
    slots: int = 128
    stages: int = 2
    turns: bool = True
    splits: int = 1

    def __post_init__(self):
        if self.rows_per_group != 64:
            raise ValueError(f"rows_per_group is {self.rows_per_group}: a warpgroup's matrix product has 64 rows")
        if not 1 <= self.consumers <= 3:
            raise ValueError(f"{self.consumers} consumers: a block has registers for 1 to 3")
        if self.slots % 64 or not 64 <= self.slots <= 256:
            raise ValueError(f"{self.slots} slots: a block has 64, 128, 192 or 256, as the layout of V wants")
        if self.stages < 2:
            raise ValueError(f"{self.stages} stages: loading ahead takes at least 2")
        if self.turns and self.consumers != 2:
            raise ValueError(f"turns are taken by 2 consumers, not {self.consumers}: set turns=False")
        if self.splits < 1:
            raise ValueError(f"{self.splits} splits: a tile's slots have at least 1 part, splits=1")

    @property
    def tile(self) -> int:
        """Folded rows of a tile."""
        return self.rows_per_group * self.consumers

    def smem(self, H: int, interpretable: bool = False, biased: bool = False) -> int:
        """Bytes of shared memory at head dim H in a 16-bit type; `biased` with a number for each slot."""
        rows = self.tile * (H + (self.slots if interpretable else 0))
        sums = 4 * self.tile if self.splits > 1 else 0
        return 2 * (rows + 2 * self.stages * self.slots * (H + biased)) + sums + _RESERVED


def blocks_for(H: int, T: int, S: int, K: int, biased: bool = False) -> Blocks:
    """Blocks that suit a head dim, a number of folded rows (of one kv head), of slots and of kv heads.

    3 consumers where their tiles make 2 blocks a multiprocessor or more, else 2 that take turns; 1 for up to 64 rows.
    H100, 2026-11-24, TFLOP/s at 28/4/128, bfloat16, 6553 rows of 32768, 2 stages of 128 slots: 662 with 3, 607 with 2.
    `biased` blocks have at most 2: a number for each slot takes registers that 3 don't have.
    4 splits where tiles are fewer than multiprocessors, 2 up to 3 a multiprocessor, of 8 blocks or more each. H100,
    2026-11-27, biased, 28/4/128, microseconds with 1, 2 and 4 splits: 167, 113, 104 for 409 rows of 8192; 168, 160, 163
    for 819; 264, 245, 278 for 1638; 282, 255, 266 for 819 of 16384; 454, 446, 464 for 1638.
    """
    sized = partial(Blocks, slots=64 if S <= 64 else 128, stages=4 if H == 64 else 2)
    large = sized(consumers=3, turns=False)
    if T > 64 and not biased and K * -(-T // large.tile) >= 2 * _MULTIPROCESSORS:
        return large
    blocks = sized(consumers=1, turns=False) if T <= 64 else sized(consumers=2, turns=True)
    tiles = K * -(-T // blocks.tile)
    splits = 4 if tiles < _MULTIPROCESSORS else 2 if tiles < 3 * _MULTIPROCESSORS else 1
    return dataclasses.replace(blocks, splits=max(min(splits, S // (8 * blocks.slots)), 1))


def mosaic_gpu(q: Float[Array, "T N H"], k: Float[Array, "K S H"], v: Float[Array, "K S H"], positions: Int[Array, "T"],
               bias: Float[Array, "S"] | None = None, blocks: Blocks | None = None, interpretable: bool = False
               ) -> Float[Array, "T N H"]:
    """Row attention (see `row_attention`) on a Hopper GPU, for float16 and bfloat16 and head dims 64 and 128.

    K and V are copied if S is less than a block has or no multiple of 8: caches are best padded to multiples of 8.
    `interpretable` takes P to the second product through shared memory and adds P V outside it, which is what Pallas'
    interpreter for CPUs knows; the rest of the kernel is the same. Raises NotImplementedError for other types and head
    dims, ValueError for blocks that don't fit.
    """
    T, N, H = q.shape
    K, S, _ = k.shape
    if H not in HEAD_DIMS:
        raise NotImplementedError(f"head dim {H}: the kernel has {HEAD_DIMS}; use how='cudnn' or 'blocked'")
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"{q.dtype}: the kernel has bfloat16 and float16; use how='blocked'")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}: they must have one type")
    G = N // K
    blocks = blocks or blocks_for(H, T * G, S, K, bias is not None)
    if (need := blocks.smem(H, interpretable, bias is not None)) > SMEM:
        raise ValueError(f"{blocks} needs {need} bytes of shared memory at head dim {H}, over {SMEM}: "
                         "take fewer stages, slots or consumers")
    if missing := _missing(S, blocks.slots):
        k, v = (jnp.pad(x, ((0, 0), (0, missing), (0, 0))) for x in (k, v))
    added = () if bias is None else (jnp.pad(bias.astype(jnp.float32) * _LOG2_E, (0, -S % blocks.slots)),)

    tiles = -(-T * G // blocks.tile)
    q = q.reshape(T, K, G, H).transpose(1, 0, 2, 3).reshape(K, T * G, H)
    q = jnp.pad(q, ((0, 0), (0, _missing(T * G, blocks.rows_per_group)), (0, 0)))
    pos = jnp.pad(jnp.repeat(positions.astype(jnp.int32), G), (0, tiles * blocks.tile - T * G), constant_values=-1)
    steps = jnp.maximum(pos.reshape(tiles, -1).max(1), 0) // blocks.slots + 1  # a tile of padding rows takes 1
    by_group = pos.reshape(tiles, blocks.consumers, -1)
    first = jnp.where(by_group < 0, S, by_group).min(2)
    full = jnp.minimum((first + 1) // blocks.slots, steps[:, None]).reshape(-1)
    kernel = _kernel(K, tiles, q.shape[1], H, q.dtype, blocks, bool(added), interpretable)
    out, lse = kernel(q, k, v, pos, steps, full, *added)
    if lse is not None:
        out = _combine(*(x.reshape(blocks.splits, K, *x.shape[1:]) for x in (out, lse)))
    return out[:, : T * G].reshape(K, T, G, H).transpose(1, 0, 2, 3).reshape(T, N, H)


def _missing(count: int, copied: int) -> int:
    """How many more rows or slots there must be for copies of `copied` at a time, whose last one is cut at the end."""
    return max(copied - count, -count % _TILING[0])


def _combine(out: Float[Array, "P K T H"], lse: Float[Array, "P K T"]) -> Float[Array, "K T H"]:
    """Outputs of softmaxes over parts of the slots, with the log 2 of each one's sum, as that over all slots."""
    weights = jnp.exp2(lse - lse.max(0))
    weights /= weights.sum(0)
    return (weights[..., None] * out.astype(jnp.float32)).sum(0).astype(out.dtype)


class _Scratch(NamedTuple):
    """A block's shared memory and barriers; a ring buffer's barriers tell its stages filled and used."""

    q: Any
    k: Any
    v: Any
    bias: Any
    p: Any
    lse: Any
    q_ready: Any
    k_ready: Any
    v_ready: Any
    k_used: Any
    v_used: Any
    turn: Any


def _kernel(K: int, tiles: int, T: int, H: int, dtype: Any, blocks: Blocks, biased: bool, interpretable: bool):
    """The kernel from T folded rows [K, T, H] and each tile's blocks to folded outputs; `biased` adds a number for each
    slot, in units of log 2. With splits it has outputs [splits * K, ...] and the log 2 of each row's sum in a part,
    else None for these."""
    M, slots, stages, consumers = blocks.rows_per_group, blocks.slots, blocks.stages, blocks.consumers
    splits = blocks.splits
    log2_scale = H**-0.5 * _LOG2_E
    per_row, per_slot = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)

    def body(q_g, k_g, v_g, pos_g, steps_g, full_g, *others):
        (bias_g, out_g, lse_g, *scratch) = others if biased else (None, *others)
        # Tiles of the largest positions have the most blocks: started first, the short ones fill the gaps at the end.
        tile, output = tiles - 1 - lax.axis_index("tile"), lax.axis_index("head")
        thread = lax.axis_index("warpgroup")
        head, begin, end = part_of(output, steps_g[tile])

        @pl.when(thread < consumers)
        def _():
            if consumers in _REGISTERS:
                plgpu.set_max_registers(_REGISTERS[consumers][0], action="increase")
            consume(thread, tile, head, begin, end, q_g, pos_g, full_g, output, out_g, lse_g, _Scratch(*scratch))

        @pl.when(thread == consumers)
        def _():
            if consumers in _REGISTERS:
                plgpu.set_max_registers(_REGISTERS[consumers][1], action="decrease")
            produce(head, begin, end, k_g, v_g, bias_g, _Scratch(*scratch))

    def part_of(output, steps):  # heads of the first part come first
        if splits == 1:
            return output, 0, steps
        part, head = lax.div(output, jnp.int32(K)), lax.rem(output, jnp.int32(K))
        return head, *(lax.div(steps * p, jnp.int32(splits)) for p in (part, part + 1))

    def stage_of(step):
        return lax.rem(step, jnp.int32(stages))

    def produce(head, begin, end, k_g, v_g, bias_g, smem: _Scratch):
        @pl.loop(begin, end)
        def _(step):
            stage, block = stage_of(step), (head, pl.ds(step * slots, slots))
            for source, target, ready, used in ((k_g, smem.k, smem.k_ready, smem.k_used),
                                                (v_g, smem.v, smem.v_ready, smem.v_used)):
                pl.when(step >= begin + stages)(partial(plgpu.barrier_wait, used.at[stage]))
                plgpu.copy_gmem_to_smem(source.at[block], target.at[stage], ready.at[stage])
                if biased and source is k_g:
                    plgpu.copy_gmem_to_smem(bias_g.at[block[1]], smem.bias.at[stage], ready.at[stage])

        # Who waited for a barrier must have seen all its arrivals when it goes out of scope.
        @pl.loop(lax.max(end - stages, jnp.int32(begin)), end)
        def _(step):
            for used in (smem.k_used, smem.v_used):
                plgpu.barrier_wait(used.at[stage_of(step)])

    def consume(thread, tile, head, begin, end, q_g, pos_g, full_g, output, out_g, lse_g, smem: _Scratch):
        rows = pl.ds(tile * blocks.tile + thread * M, M)
        q, full = smem.q.at[thread], full_g[tile * consumers + thread]
        plgpu.copy_gmem_to_smem(q_g.at[head, rows], q, smem.q_ready.at[thread])
        pos = plgpu.load(pos_g.at[rows], layout=per_row, optimized=False)
        plgpu.barrier_wait(smem.q_ready.at[thread])

        def take_turns():
            if blocks.turns:
                plgpu.barrier_arrive(smem.turn)
                plgpu.barrier_wait(smem.turn)

        def wait_for_k(i):
            plgpu.barrier_wait(smem.k_ready.at[stage_of(i)])

        def scores(i):
            def product(s_ref):
                plgpu.wgmma(s_ref, q, smem.k.at[stage_of(i)].transpose((1, 0)))
                bias = plgpu.load(smem.bias.at[stage_of(i)], layout=per_slot) if biased else None  # while that runs
                take_turns()
                return s_ref[...], bias

            s, bias = pl.run_scoped(product, plgpu.ACC((M, slots), jnp.float32))
            if biased:
                s = s * log2_scale + lax.broadcast_in_dim(bias, s.shape, [1])
                plgpu.commit_smem()  # orders the read before the copy that uses the stage next
            plgpu.barrier_arrive(smem.k_used.at[stage_of(i)])
            return s

        def in_log2(x):
            return x if biased else x * log2_scale

        def softmax(i, s, carry, masked: bool):
            acc, top, total = carry
            if masked:
                slot = plgpu.broadcasted_iota(jnp.int32, (M, slots), 1, layout=plgpu.Layout.WGMMA)
                s = jnp.where(slot <= lax.broadcast_in_dim(pos - i * slots, s.shape, [0]), s, -jnp.inf)
            new_top = jnp.maximum(top, in_log2(s.max(axis=1)))
            shrink = jnp.exp2(top - new_top)
            p = jnp.exp2(in_log2(s) - lax.broadcast_in_dim(new_top, s.shape, [0]))
            acc *= lax.broadcast_in_dim(shrink, acc.shape, [0])
            total = total * shrink + p.sum(axis=1)
            p = p.astype(dtype)
            if interpretable:
                smem.p.at[thread][...] = p
                plgpu.commit_smem()
                p = smem.p.at[thread]
            else:
                # Keeps the softmax on this side of the turn: afterwards the tensor cores are this warpgroup's.
                acc, total, new_top, p = lax.optimization_barrier((acc, total, new_top, p))
            if blocks.turns:
                plgpu.barrier_arrive(smem.turn)
            plgpu.barrier_wait(smem.v_ready.at[stage_of(i)])
            if blocks.turns:
                plgpu.barrier_wait(smem.turn)
            return acc, new_top, total, p

        def add_values(i, acc, p):
            def product(acc_ref):
                plgpu.wgmma(acc_ref, p, smem.v.at[stage_of(i)])
                pl.when(i + 1 < end)(partial(wait_for_k, i + 1))  # here the tensor cores are busy meanwhile
                return acc_ref[...] if interpretable else None

            if interpretable:
                acc = acc + pl.run_scoped(product, plgpu.ACC((M, H), jnp.float32))
            else:
                acc = pl.run_state(product)(plgpu.ACC.init(acc))
            plgpu.barrier_arrive(smem.v_used.at[stage_of(i)])
            return acc

        def step(i, carry, masked: bool):
            acc, top, total, p = softmax(i, scores(i), carry, masked)
            return add_values(i, acc, p), top, total

        def vector(x):
            return plgpu.layout_cast(jnp.full((M,), x, jnp.float32), per_row)

        carry = (plgpu.layout_cast(jnp.zeros((M, H), jnp.float32), plgpu.Layout.WGMMA), vector(_NOTHING_SEEN),
                 vector(0.0))
        if splits == 1:
            wait_for_k(jnp.int32(0))
        else:
            pl.when(begin < end)(partial(wait_for_k, begin))  # fewer blocks than parts leave some of these empty
            full = lax.max(begin, lax.min(full, end))
        # The second consumer starts half a step late, and the first one waits for it at the end.
        pl.when(thread == 1)(take_turns)
        carry = lax.fori_loop(begin, full, partial(step, masked=False), carry)
        acc, top, total = lax.fori_loop(full, end, partial(step, masked=True), carry)
        pl.when(thread == 0)(take_turns)

        share = jnp.where(pos >= 0, 1 / jnp.maximum(total, 1e-30), 0.0)
        q[...] = (acc * lax.broadcast_in_dim(share, acc.shape, [0])).astype(dtype)
        if splits > 1:
            smem.lse.at[thread][...] = top + jnp.log2(jnp.maximum(total, 1e-30))  # about _NOTHING_SEEN for an empty sum
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q, out_g.at[output, rows])
        if splits > 1:
            plgpu.copy_smem_to_gmem(smem.lse.at[thread], lse_g.at[output, rows])
        plgpu.wait_smem_to_gmem(0)

    layout: Any = (plgpu.TilingTransform(_TILING), plgpu.SwizzleTransform(128))  # type: ignore[abstract]
    ring = plgpu.SMEM((stages, slots, H), dtype, transforms=layout)
    filled = plgpu.Barrier(num_barriers=stages)
    used = plgpu.Barrier(num_arrivals=consumers, num_barriers=stages)
    out = jax.ShapeDtypeStruct((splits * K, T, H), dtype)
    return plgpu.kernel(
        body, out_type=(out, jax.ShapeDtypeStruct(out.shape[:2], jnp.float32) if splits > 1 else None),
        grid=(tiles, splits * K), grid_names=("tile", "head"), num_threads=consumers + 1, thread_name="warpgroup",
        kernel_name="row_attention", compiler_params=plgpu.CompilerParams(approx_math=True),
        scratch_types=_Scratch(
            q=plgpu.SMEM((consumers, M, H), dtype, transforms=layout), k=ring, v=ring,
            bias=plgpu.SMEM((stages, slots), jnp.float32) if biased else None,
            p=plgpu.SMEM((consumers, M, slots), dtype, transforms=layout) if interpretable else None,
            lse=plgpu.SMEM((consumers, M), jnp.float32) if splits > 1 else None,
            q_ready=plgpu.Barrier(num_barriers=consumers), v_ready=filled,
            k_ready=plgpu.Barrier(num_arrivals=2 if biased else 1, num_barriers=stages), k_used=used, v_used=used,
            turn=plgpu.Barrier(num_arrivals=consumers) if blocks.turns else None))
