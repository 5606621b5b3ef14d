"""Small arrays packed as one come out as they were."""

import jax
import numpy as np
import pytest

from cacheclip_jax.packed import Packed, pack
from cacheclip_jax.plan import Discount


def test_what_is_packed_comes_out_of_a_program_as_it_was():
    tree = {"ids": np.array([[1, -2], [2**31 - 1, -(2**31)]], np.int32), "share": np.float32(-0.1), "none": None,
            "mask": np.array([True, False, True]), "empty": np.zeros((0, 3), np.float32),
            "odd": np.array([np.nan, np.inf, -0.0], np.float32),
            "discount": Discount(np.int32(3), np.int32(9), np.float32(0.69))}
    packed = pack(tree)
    assert packed.words.dtype == np.int32 and packed.words.shape == (4 + 1 + 3 + 3 + 3,)
    out = jax.jit(Packed.unpacked)(jax.device_put(packed))
    assert jax.tree.structure(out) == jax.tree.structure(tree)
    for got, given in zip(jax.tree.leaves(out), jax.tree.leaves(tree), strict=True):
        assert got.dtype == given.dtype and got.shape == given.shape
        assert np.asarray(got).tobytes() == np.asarray(given).tobytes()


def test_packed_arrays_of_the_same_shapes_share_a_program():
    traced = []
    compiled = jax.jit(lambda packed: (traced.append(1), packed.unpacked())[1])
    for seed in range(3):
        rng = np.random.default_rng(seed)
        compiled(pack((rng.integers(0, 9, 5, np.int32), rng.random(4, np.float32))))
    assert len(traced) == 1


@pytest.mark.parametrize("wrong", [np.zeros(2), np.zeros(2, np.int64), np.zeros(2, np.float16)])
def test_other_dtypes_are_refused_by_name(wrong):
    with pytest.raises(TypeError, match=str(wrong.dtype)):
        pack([np.zeros(1, np.int32), wrong])
