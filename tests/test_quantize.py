"""Caches of one byte per value: how near, how small, and that nothing else about them differs."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cacheclip_jax.errors import ChunkCorrupt
from cacheclip_jax.store import ChunkStore
from cacheclip_jax.store.quantize import dequantize, layer_bytes, quantize, round_trip
from tests.chunks import SPACE, chunk, same_bits

KINDS = ("int8", "fp8")


def reference(kind: str, data: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    two, k, c, h = shape
    scale, centre = data[: 16 * k * h].view(np.float32).reshape(2, two, k, 1, h)
    codes = data[16 * k * h :].reshape(shape).view(np.int8 if kind == "int8" else ml_dtypes.float8_e4m3fn)
    return codes.astype(np.float32) * scale + centre


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.sampled_from(["bfloat16", "float16", "float32"]),
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 5)),
    st.floats(-4, 4),
    st.floats(-3, 2),
    st.integers(0, 2**32 - 1),
)
@example("int8", "float32", (1, 2, 1), 3.0, -2.0, 0)  # the centre isn't the middle: half a range is more than 127 steps
def test_every_value_is_within_half_a_step_of_its_channels_range(kind, dtype, size, centre, spread, seed):
    shape = (2, *size)
    x = np.random.default_rng(seed).standard_normal(shape) * 10.0**spread + 10.0**centre
    x = x.astype(np.dtype(dtype) if dtype != "bfloat16" else ml_dtypes.bfloat16)
    data = quantize(kind, x)
    assert data.nbytes == layer_bytes(kind, shape, x.dtype.itemsize)
    out = np.empty_like(x)
    dequantize(kind, data, out)
    expected = reference(kind, data, shape)
    assert same_bits(out, expected.astype(x.dtype))
    wide = x.astype(np.float32)
    half_range = (wide.max(axis=2, keepdims=True) - wide.min(axis=2, keepdims=True)) / 2
    step = half_range / 254 if kind == "int8" else half_range / 16
    rounding = np.abs(wide) * float(ml_dtypes.finfo(np.float32).eps) * 4
    assert (np.abs(expected - wide) <= step * 1.01 + rounding).all()


@pytest.mark.parametrize("kind", KINDS)
def test_channels_that_are_constant_or_zero_come_back_exactly(kind):
    x = np.zeros((2, 1, 5, 4), ml_dtypes.bfloat16)
    x[..., 1], x[..., 2] = 100, -3e38
    out = np.empty_like(x)
    dequantize(kind, quantize(kind, x), out)
    assert same_bits(out, x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("url", ["disk", "memory://quantized"])
def test_a_stored_chunk_takes_half_the_bytes_and_is_read_as_its_round_trip_everywhere(kind, url, tmp_path):
    space = replace(SPACE, kv=kind)
    store = ChunkStore.open(tmp_path if url == "disk" else f"{url}-{kind}", kv=kind)
    passage, ids, spans, kv = chunk(0, tokens=512, space=space)
    store.add_passages([passage])
    assert store.write(space, passage.id, ids, spans, kv) and not store.has(SPACE, ids)
    expected = round_trip(kind, kv)
    assert same_bits(store.read(space, ids, passage.id).result(), expected)
    lazy, buffer = store.read(space, ids, passage.id, eager=False), np.empty_like(kv[0])
    for layer in (2, 0, 1):
        lazy.read_layers_into(layer, buffer)
        assert same_bits(buffer, expected[layer])
    (stats,) = store.stats().spaces
    assert 0.5 < stats.nbytes / kv.nbytes < 0.51 and stats.space.kv == kind and store.verify() == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_is_found_in_scales_centres_and_codes(kind, tmp_path):
    space = replace(SPACE, kv=kind)
    store = ChunkStore.open(tmp_path)
    passage, ids, spans, kv = chunk(0, space=space)
    store.write(space, passage.id, ids, spans, kv)
    (file,) = tmp_path.rglob("*.kv")
    data = file.read_bytes()
    layer = layer_bytes(kind, kv.shape[1:], 2)
    for at in (0, layer // 2, layer - 1):
        bad = bytearray(data)
        bad[len(data) - layer + at] ^= 8
        file.write_bytes(bad)
        with pytest.raises(ChunkCorrupt, match="layer 2"):
            store.read(space, ids, passage.id).result()
