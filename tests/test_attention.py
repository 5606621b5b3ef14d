"""Row attention against its dense reference."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheclip_jax.attention import causal_attention, choose, for_rows, row_attention, row_attention_reference
from cacheclip_jax.attention.blocked import blocked
from cacheclip_jax.attention.choose import FEW_ROWS
from cacheclip_jax.attention.cudnn import cudnn, cudnn_causal
from cacheclip_jax.attention.dense import dense
from tests.conftest import max_diff

REFERENCE = jax.jit(row_attention_reference)  # compiled as a whole: op by op takes longer


def inputs(T, S, N, K, H, pad=0, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    q, k, v = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((T, N, H), (K, S, H), (K, S, H)))
    chosen = np.sort(rng.choice(S, T - pad, replace=False))
    return q, k, v, jnp.asarray(np.concatenate([chosen, np.full(pad, -1)]), jnp.int32)


IMPLEMENTATIONS = {"blocked": jax.jit(blocked, static_argnames=("block_rows", "block_slots")), "dense": jax.jit(dense),
                   "cudnn": jax.jit(partial(cudnn, implementation="xla"))}
# Rows, slots, query and kv heads, and a block's rows and slots: few, as each is a compile; positions are drawn freely.
SIZES = [((1, 1, 4, 2), (8, 16)), ((37, 90, 7, 1), (16, 7)), ((24, 64, 3, 3), (8, 16)), ((20, 33, 4, 2), (64, 64))]


@settings(max_examples=30, deadline=None)
@given(sizes=st.sampled_from(SIZES), pad=st.integers(0, 20), seed=st.integers(0, 99), biased=st.booleans())
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_every_implementation_equals_the_reference_for_any_positions(name, sizes, pad, seed, biased):
    (T, S, N, K), block = sizes
    bias = jnp.asarray(np.random.default_rng(seed).normal(0, 3, S), jnp.float32) if biased else None
    args = *inputs(T, S, N, K, 8, min(pad, T - 1), seed=seed), bias
    out = IMPLEMENTATIONS[name](*args, *(block if name == "blocked" else ()))
    assert max_diff(out, REFERENCE(*args)) < 1e-5


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_padding_rows_give_zero(name):
    *args, positions = inputs(12, 64, 4, 2, 8, pad=5)
    assert np.all(np.asarray(IMPLEMENTATIONS[name](*args, positions))[7:] == 0)
    assert np.all(np.asarray(IMPLEMENTATIONS[name](*args, jnp.full(12, -1))) == 0)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_rows_never_see_later_slots(name):
    attend = IMPLEMENTATIONS[name]
    q, k, v, positions = inputs(16, 80, 4, 2, 8)
    before = attend(q, k, v, positions)
    for t in (0, 7, 15):
        after = int(positions[t]) + 1
        changed = attend(q, k.at[:, after:].set(99.0), v.at[:, after:].set(99.0), positions)
        assert max_diff(changed[: t + 1], before[: t + 1]) == 0


@pytest.mark.parametrize("T", [1, 32])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_bfloat16_stays_near_the_reference(name, T):
    args = inputs(T, 200, 4, 2, 64, dtype=jnp.bfloat16)
    assert max_diff(IMPLEMENTATIONS[name](*args), REFERENCE(*args)) < 0.03


def test_memory_grows_with_the_block_and_not_with_rows_times_slots():
    def temporary(T, S):
        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((T, 8, 64), (2, S, 64), (2, S, 64))]
        compiled = jax.jit(row_attention).lower(*shapes, jax.ShapeDtypeStruct((T,), jnp.int32)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    T, S = 2048, 8192
    dense = T * S * 8 * 4
    assert temporary(T, S) < dense / 8


def test_heads_that_do_not_group_are_refused():
    q, k, v, positions = inputs(4, 8, 3, 3, 8)
    with pytest.raises(ValueError, match="3 query heads are not a multiple of 2"):
        row_attention(q, k[:2], v[:2], positions)


@pytest.mark.parametrize("how", ["blocked", "dense"])
@pytest.mark.parametrize("prefix", [0, 5])
def test_causal_attention_is_row_attention_at_the_last_positions(how, prefix):
    qs, ks, vs = (jnp.stack(x) for x in zip(*(inputs(12, 12 + prefix, 4, 2, 8, seed=b)[:3] for b in range(2)),
                                             strict=True))
    positions = prefix + jnp.arange(12)
    expected = jnp.stack([REFERENCE(*x, positions) for x in zip(qs, ks, vs, strict=True)])
    assert max_diff(jax.jit(partial(causal_attention, how=how))(qs, ks, vs), expected) < 1e-5
    assert max_diff(cudnn_causal(qs, ks, vs, "xla"), expected) < 1e-5


def test_causal_attention_wants_the_rows_own_slots():
    q, k, v, _ = inputs(12, 12, 4, 2, 8)
    with pytest.raises(ValueError, match="12 rows but 5 slots"):
        causal_attention(q[None], k[None, :, :5], v[None, :, :5])


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("H", [64, 128])
@pytest.mark.parametrize("how", ["blocked", "dense", "cudnn", "mosaic_gpu"])
def test_on_a_gpu_every_implementation_equals_the_reference(how, H):
    if how == "mosaic_gpu" and not str(jax.devices()[0].compute_capability).startswith("9."):
        pytest.skip("needs Hopper")
    for T, S, pad in ((1, 40, 0), (37, 333, 5), (700, 3001, 150)):
        args = inputs(T, S, 14, 2, H, pad, jnp.bfloat16)
        assert max_diff(jax.jit(partial(row_attention, how=how))(*args), REFERENCE(*args)) < 0.02


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("prefix", [0, 37])
def test_on_a_gpu_causal_attention_equals_the_reference(prefix):
    q, k, v, _ = inputs(200, 200 + prefix, 14, 2, 64, dtype=jnp.bfloat16)
    out = jax.jit(partial(causal_attention, how="cudnn"))(q[None], k[None], v[None])[0]
    assert max_diff(out, REFERENCE(q, k, v, prefix + jnp.arange(200))) < 0.02


def test_what_an_implementation_cannot_do_is_refused_with_the_way_out():
    args = inputs(4, 64, 4, 2, 8)
    for how, match in (("cudnn", "float32: cuDNN has bfloat16 and float16; use how='blocked'"),
                       ("mosaic_gpu", "head dim 8: the kernel has"), ("mosaic_tpu", "head dim 8: the kernel has")):
        with pytest.raises(NotImplementedError, match=match):
            row_attention(*args, how)
    with pytest.raises(NotImplementedError, match="head dim 12: cuDNN has multiples of 8"):
        row_attention(*inputs(4, 64, 4, 2, 12, dtype=jnp.bfloat16), "cudnn")
    with pytest.raises(NotImplementedError, match="float32: the kernel has bfloat16 and float16"):
        row_attention(*inputs(4, 64, 4, 2, 64), "mosaic_gpu")
    with pytest.raises(ValueError, match="no row attention is called 'flash': take one of blocked, dense"):
        row_attention(*args, "flash")


@pytest.mark.parametrize("device, model, name, because", [
    (("cpu", None), (128, "bfloat16", False), "blocked", "CPU"),
    (("tpu", None), (128, "bfloat16", False), "mosaic_tpu", "skips"),
    (("tpu", None), (80, "bfloat16", False), "blocked", "80"),
    (("gpu", "9.0"), (128, "bfloat16", False), "mosaic_gpu", "Hopper"),
    (("gpu", "9.0"), (64, "float16", False), "mosaic_gpu", "Hopper"),
    (("gpu", "9.0"), (96, "bfloat16", False), "cudnn", "the model has 96"),
    (("gpu", "8.0"), (128, "bfloat16", False), "cudnn", "this GPU has 8.0"),
    (("gpu", "10.0"), (128, "bfloat16", False), "cudnn", "this GPU has 10.0"),
    (("gpu", "9.0"), (128, "float32", False), "blocked", "float32"),
    (("gpu", "9.0"), (128, "bfloat16", True), "blocked", "split"),
    (("gpu", "8.0"), (260, "bfloat16", False), "blocked", "260"),
    (("gpu", None), (128, "bfloat16", False), "blocked", "NVIDIA"),
])
def test_the_choice_follows_the_device_and_the_model_and_says_why(device, model, name, because):
    choice = choose(*device, *model)
    assert choice.name == name
    assert because in choice.reason and choice.reason.endswith(".")


def test_few_rows_go_to_dense_on_accelerators_and_stay_blocked_elsewhere():
    for how in ("mosaic_gpu", "mosaic_tpu", "cudnn"):
        assert for_rows(how, 1) == for_rows(how, FEW_ROWS) == "dense"
        assert for_rows(how, FEW_ROWS + 1) == how
    assert for_rows("blocked", 1) == "blocked"
