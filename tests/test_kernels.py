"""The kernels without their hardware: interpreted on the CPU against the reference, and lowered for the real target."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from cacheclip_jax.attention.mosaic_gpu import SMEM, Blocks, blocks_for, mosaic_gpu
from cacheclip_jax.attention.mosaic_tpu import mosaic_tpu
from tests.conftest import max_diff
from tests.test_attention import REFERENCE, inputs

H100 = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132)
V5E = jax.sharding.AbstractDevice(device_kind="TPU v5e", platform="tpu", num_cores=1)
HEADS = [(28, 4), (14, 2), (12, 2), (32, 8), (9, 3)]


def on(device):
    """What is traced inside is traced for `device`."""
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


def bias_of(S):
    """A number for each slot as a discount has it, and others."""
    return jnp.where(jnp.arange(S) % 3 == 0, -2.0, jnp.linspace(-1.0, 1.0, S))


def interpreted(*args, blocks=None, races=False):
    params = plgpu.InterpretGPUParams(detect_races=races)
    try:
        with on(H100), plgpu.force_gpu_interpret_mode(params):
            return jax.jit(partial(mosaic_gpu, blocks=blocks, interpretable=True))(*args).block_until_ready()
    except BaseException:
        getattr(plgpu, "reset_gpu_interpret_mode_state", lambda: None)()  # jax 0.11 has none, nor needs it
        raise


def lower(f, device, platform, T, S, N, K, H, dtype, biased=False):
    shapes = [jax.ShapeDtypeStruct(s, dtype) for s in ((T, N, H), (K, S, H), (K, S, H))]
    bias = [jax.ShapeDtypeStruct((S,), jnp.float32)] if biased else []
    with on(device):
        return jax.jit(f).trace(*shapes, jax.ShapeDtypeStruct((T,), jnp.int32), *bias).lower(
            lowering_platforms=(platform,)).as_text()


# 301 slots are no multiple of a block nor of 8; the last tile is partly padding; 3 heads a group don't divide a tile.
# Of 3 blocks in 4 parts and of 5 in 8, some parts have none; first rows see nothing of the last parts.
@pytest.mark.parametrize("heads, H, dtype, pad, blocks", [
    ((6, 2), 64, jnp.bfloat16, 5, Blocks(slots=64)),
    ((7, 1), 128, jnp.float16, 0, Blocks()),
    ((3, 1), 128, jnp.bfloat16, 3, Blocks(consumers=3, turns=False)),
    ((6, 2), 64, jnp.bfloat16, 5, Blocks(slots=64, splits=2)),
    ((7, 1), 128, jnp.float16, 0, Blocks(consumers=1, turns=False, splits=4)),
    ((3, 1), 64, jnp.bfloat16, 3, Blocks(consumers=3, slots=64, turns=False, splits=8)),
])
def test_the_hopper_kernel_equals_the_reference(heads, H, dtype, pad, blocks):
    args = inputs(30, 301, *heads, H, pad, dtype)
    out = interpreted(*args, blocks=blocks)
    assert max_diff(out, REFERENCE(*args)) < 0.02
    assert np.all(np.asarray(out[30 - pad:], np.float32) == 0)


@pytest.mark.parametrize("heads, H, blocks", [((6, 2), 64, Blocks(slots=64)), ((3, 1), 128, Blocks()),
                                              ((3, 1), 64, Blocks(slots=64, splits=4))])
def test_the_hopper_kernel_adds_a_bias(heads, H, blocks):
    args = (*inputs(30, 301, *heads, H, 5, jnp.bfloat16), bias_of(301))
    assert max_diff(interpreted(*args, blocks=blocks), REFERENCE(*args)) < 0.02


@pytest.mark.parametrize("splits", [1, 3])
def test_the_hopper_kernel_has_no_races_and_never_sees_later_slots(splits, capfd, caplog):
    q, k, v, positions = inputs(20, 200, 2, 1, 64, dtype=jnp.bfloat16)
    single, pair = Blocks(consumers=1, slots=64, turns=False, splits=splits), Blocks(slots=64, splits=splits)
    before = interpreted(q, k, v, positions, blocks=single, races=True)
    after = int(positions[9]) + 1
    changed = interpreted(q, k.at[:, after:].set(99.0), v.at[:, after:].set(99.0), positions,
                          blocks=pair, races=True)
    assert max_diff(changed[:10], before[:10]) == 0
    interpreted(q, k, v, positions, bias_of(200), blocks=pair, races=True)
    assert "RACE" not in "".join([*capfd.readouterr(), caplog.text])  # jax 0.11 prints, 0.12 logs


@pytest.mark.parametrize("blocks", [None, Blocks(slots=64, splits=2)])
@pytest.mark.parametrize("T, pad", [(70, 40), (5, 2)])
def test_the_hopper_kernel_gives_zeros_for_tiles_of_padding_and_takes_less_than_a_block(T, pad, blocks):
    q, k, v, positions = inputs(T, 40, 2, 1, 64, pad=pad, dtype=jnp.bfloat16)
    out = interpreted(q, k, v, positions, blocks=blocks)
    assert max_diff(out, REFERENCE(q, k, v, positions)) < 0.02
    assert np.all(np.asarray(out[T - pad :], np.float32) == 0)


@pytest.mark.parametrize("heads", HEADS)
def test_the_hopper_kernel_lowers_for_every_type_and_head_dim(heads):
    for dtype, H, S in ((jnp.bfloat16, 64, 4097), (jnp.bfloat16, 128, 8192), (jnp.float16, 64, 8192),
                        (jnp.float16, 128, 2049)):
        for biased in (False, True):
            assert "mosaic_gpu" in lower(mosaic_gpu, H100, "cuda", 1638, S, *heads, H, dtype, biased)


@pytest.mark.parametrize("blocks", [
    Blocks(slots=64, stages=4), Blocks(slots=192, stages=2), Blocks(stages=3), Blocks(turns=False),
    Blocks(consumers=3, turns=False), Blocks(consumers=1, turns=False), Blocks(splits=2),
    Blocks(consumers=3, turns=False, splits=4), Blocks(consumers=1, turns=False, splits=3),
])
@pytest.mark.parametrize("T, S", [(819, 3), (819, 4097), (1, 300)])
def test_the_hopper_kernel_lowers_for_every_variant_and_any_number_of_rows_and_slots(blocks, T, S):
    for biased in (False, True)[: 1 + (blocks.smem(128, biased=True) <= SMEM)]:
        assert "mosaic_gpu" in lower(partial(mosaic_gpu, blocks=blocks), H100, "cuda", T, S, 28, 4, 128, jnp.bfloat16,
                                     biased)


def test_blocks_that_cannot_work_are_refused_with_the_limit():
    for wrong, match in ((dict(rows_per_group=32), "rows_per_group is 32"), (dict(consumers=4), "4 consumers"),
                         (dict(slots=80), "80 slots"), (dict(stages=1), "1 stages"),
                         (dict(consumers=3), "turns are taken by 2 consumers, not 3"), (dict(splits=0), "0 splits")):
        with pytest.raises(ValueError, match=match):
            Blocks(**wrong)
    for large in (Blocks(stages=4), Blocks(stages=3, splits=2)):  # the second but for the sums of its parts would fit
        with pytest.raises(ValueError, match="bytes of shared memory at head dim 128, over 232448: take fewer"):
            mosaic_gpu(*inputs(4, 300, 2, 1, 128, dtype=jnp.bfloat16), blocks=large)


@pytest.mark.parametrize("H", [64, 128])
@pytest.mark.parametrize("T, K, consumers, splits, biased_splits", [
    (1, 8, 1, 4, 4), (64, 4, 1, 4, 4), (65, 4, 2, 4, 4), (32 * 128, 4, 2, 4, 4), (32 * 128 + 1, 4, 2, 2, 2),
    (65 * 192, 4, 2, 2, 2), (65 * 192 + 1, 4, 3, 1, 2), (98 * 128 + 1, 4, 3, 1, 1), (65 * 192 + 1, 2, 2, 2, 2)])
def test_chosen_blocks_grow_with_the_rows_and_fit_shared_memory(H, T, K, consumers, splits, biased_splits):
    for S, most in ((1, 1), (128, 1), (2047, 1), (2048, 2), (3072, 3), (4096, 4), (32768, 4)):
        blocks = blocks_for(H, T, S, K)
        assert (blocks.consumers, blocks.splits) == (consumers, min(splits, most))
        assert blocks.smem(H, interpretable=True) <= SMEM
        assert blocks.smem(H, biased=True) <= SMEM
        biased = blocks_for(H, T, S, K, biased=True)
        assert (biased.consumers, biased.splits) == (min(consumers, 2), min(biased_splits, most))
        assert biased.smem(H, biased=True) <= SMEM


@pytest.mark.parametrize("heads, H, dtype, pad, error", [
    ((6, 2), 64, jnp.float32, 5, 1e-5), ((7, 1), 128, jnp.bfloat16, 0, 0.02), ((3, 3), 64, jnp.bfloat16, 100, 0.02)])
def test_the_tpu_kernel_equals_the_reference(heads, H, dtype, pad, error):
    args = inputs(110, 300, *heads, H, pad, dtype)
    out = jax.jit(partial(mosaic_tpu, tile=128, slots=128, interpret=True))(*args)
    assert max_diff(out, REFERENCE(*args)) < error
    assert np.all(np.asarray(out[110 - pad:], np.float32) == 0)


def test_the_tpu_kernel_adds_a_bias():
    args = (*inputs(110, 300, 6, 2, 64, 5), bias_of(300))
    out = jax.jit(partial(mosaic_tpu, tile=128, slots=128, interpret=True))(*args)
    assert max_diff(out, REFERENCE(*args)) < 1e-5


def test_the_tpu_kernel_never_sees_later_slots():
    q, k, v, positions = inputs(20, 200, 2, 1, 64)
    attend = jax.jit(partial(mosaic_tpu, tile=128, slots=128, interpret=True))
    before, after = attend(q, k, v, positions), int(positions[9]) + 1
    changed = attend(q, k.at[:, after:].set(99.0), v.at[:, after:].set(99.0), positions)
    assert max_diff(changed[:10], before[:10]) == 0


@pytest.mark.parametrize("heads", HEADS)
def test_the_tpu_kernel_lowers_for_every_type_and_head_dim(heads):
    for dtype, H, S in ((jnp.bfloat16, 64, 8192), (jnp.bfloat16, 128, 1000), (jnp.float32, 128, 8192)):
        for biased in (False, True):
            assert "tpu_custom_call" in lower(mosaic_tpu, V5E, "tpu", 1638, S, *heads, H, dtype, biased)
