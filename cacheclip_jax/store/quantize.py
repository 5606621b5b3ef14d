"""Layers of chunk caches in one byte per value, with a scale and a centre per K or V, head and channel.

K before RoPE has channels that are far from zero and hardly vary over tokens (biases of the projection), so each
channel is centred before it is scaled: int8 then resolves 1/254 of the range that the chunk's tokens really span.
"""

from __future__ import annotations

from typing import Literal

import ml_dtypes
import numpy as np
from jaxtyping import Float, UInt8

Kind = Literal["exact", "int8", "fp8"]
KINDS: tuple[Kind, ...] = ("exact", "int8", "fp8")

_LARGEST = {"int8": 127.0, "fp8": 448.0}
_SIGN_EXPONENT_MANTISSA = np.array(0x87F00000, np.uint32).view(np.int32)[()]


def layer_bytes(kind: Kind, shape: tuple[int, int, int, int], itemsize: int) -> int:
    """Bytes of one stored layer [2, K, C, H]."""
    two, k, c, h = shape
    return two * k * c * h * itemsize if kind == "exact" else two * k * h * 8 + two * k * c * h


def quantize(kind: Kind, layer: Float[np.ndarray, "2 K C H"]) -> UInt8[np.ndarray, " bytes"]:
    """Scales, centres (float32 [2, K, H] each), then one byte per value."""
    x = layer.astype(np.float32)
    low, high = x.min(axis=2, keepdims=True) / 2, x.max(axis=2, keepdims=True) / 2  # halves: sums can't overflow
    centre = low + high
    scale = np.maximum((high - low) / _LARGEST[kind], np.finfo(np.float32).tiny)
    x -= centre
    x /= scale
    # A centre rounded away from the middle of a narrow range leaves more than the largest code, and int8 wraps around.
    np.clip(x, -_LARGEST[kind], _LARGEST[kind], out=x)
    codes = np.rint(x).astype(np.int8) if kind == "int8" else x.astype(ml_dtypes.float8_e4m3fn)
    return np.concatenate([a.reshape(-1).view(np.uint8) for a in (scale, centre, codes)])


def dequantize(kind: Kind, data: UInt8[np.ndarray, " bytes"], out: Float[np.ndarray, "2 K C H"]) -> None:
    """Fills `out` from what `quantize` returned, a head at a time so that its values stay in the processor's cache."""
    two, k, c, h = out.shape
    n = two * k * h * 4
    scale, centre = (data[i * n : (i + 1) * n].view(np.float32).reshape(two * k, 1, h) for i in range(2))
    codes = data[2 * n :].reshape(two * k, c, h)
    x = np.empty((c, h), np.float32)
    for head, (each, s, m) in enumerate(zip(codes, scale, centre, strict=True)):
        if kind == "int8":
            np.multiply(each.view(np.int8), s, out=x)
        else:
            _widen(each, x)
            np.multiply(x, s, out=x)
        np.add(x, m, out=x)
        _round_into(out[divmod(head, k)], x)


def round_trip(kind: Kind, kv: Float[np.ndarray, "L 2 K C H"]) -> Float[np.ndarray, "L 2 K C H"]:
    """What a chunk cache is after it was stored and read."""
    if kind == "exact":
        return kv
    out = np.empty_like(kv)
    for layer, target in zip(kv, out, strict=True):
        dequantize(kind, quantize(kind, layer), target)
    return out


def _widen(codes: UInt8[np.ndarray, "C H"], x: Float[np.ndarray, "C H"]) -> None:
    """Fills x, float32, from fp8 (e4m3): sign, exponent and mantissa move to where float32 has them, whose exponent
    counts from -127, not from -7."""
    bits = x.view(np.int32)
    np.copyto(bits, codes.view(np.int8))
    np.left_shift(bits, 20, out=bits)
    np.bitwise_and(bits, _SIGN_EXPONENT_MANTISSA, out=bits)
    np.multiply(x, np.float32(2.0**120), out=x)


def _round_into(out: Float[np.ndarray, "C H"], x: Float[np.ndarray, "C H"]) -> None:
    """`out[...] = x`; for bfloat16 by its bits, which takes a fraction of the time. Uses x up."""
    if out.dtype != ml_dtypes.bfloat16:
        out[...] = x
        return
    bits = x.view(np.uint32)
    odd = bits >> 16
    odd &= 1
    odd += 0x7FFF
    bits += odd  # round half to even
    bits >>= 16
    np.copyto(out.view(np.uint16), bits, casting="unsafe")
