"""Row attention against its dense reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheclip_jax.attention import row_attention, row_attention_reference
from cacheclip_jax.attention.blocked import blocked
from tests.conftest import max_diff


def inputs(T, S, N, K, H, pad=0, dtype=jnp.float32, seed=0):
    q, k, v = (jax.random.normal(key, shape, dtype) for key, shape in
               zip(jax.random.split(jax.random.key(seed), 3), ((T, N, H), (K, S, H), (K, S, H)), strict=True))
    chosen = np.sort(np.random.default_rng(seed).choice(S, T - pad, replace=False))
    return q, k, v, jnp.asarray(np.concatenate([chosen, np.full(pad, -1)]), jnp.int32)


@settings(max_examples=12, deadline=None)
@given(T=st.integers(1, 40), extra=st.integers(0, 60), heads=st.sampled_from([(4, 2), (3, 3), (7, 1)]),
       pad=st.integers(0, 3), block=st.sampled_from([(8, 16), (16, 7), (64, 64)]), seed=st.integers(0, 99))
def test_blocked_equals_the_reference_for_any_rows_slots_heads_and_blocks(T, extra, heads, pad, block, seed):
    pad = min(pad, T - 1)
    args = inputs(T, T + extra, *heads, 8, pad, seed=seed)
    assert max_diff(blocked(*args, *block), row_attention_reference(*args)) < 1e-5


def test_padding_rows_give_zero():
    *args, positions = inputs(12, 64, 4, 2, 8, pad=5)
    assert np.all(np.asarray(row_attention(*args, positions))[7:] == 0)


def test_rows_never_see_later_slots():
    q, k, v, positions = inputs(16, 80, 4, 2, 8)
    before = row_attention(q, k, v, positions)
    for t in (0, 7, 15):
        after = int(positions[t]) + 1
        changed = row_attention(q, k.at[:, after:].set(9.0), v.at[:, after:].set(9.0), positions)
        assert max_diff(changed[: t + 1], before[: t + 1]) == 0


def test_bfloat16_stays_near_the_reference():
    args = inputs(32, 200, 4, 2, 64, dtype=jnp.bfloat16)
    assert max_diff(row_attention(*args), row_attention_reference(*args)) < 0.03


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
