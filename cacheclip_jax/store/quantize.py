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
_FP8 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def layer_bytes(kind: Kind, shape: tuple[int, int, int, int], itemsize: int) -> int:
    """Bytes of one stored layer [2, K, C, H]."""
    two, k, c, h = shape
    return two * k * c * h * itemsize if kind == "exact" else two * k * h * 8 + two * k * c * h


def quantize(kind: Kind, layer: Float[np.ndarray, "2 K C H"]) -> UInt8[np.ndarray, " bytes"]:
    """Scales, centres (float32 [2, K, H] each), then one byte per value."""
    x = layer.astype(np.float32)
    low, high = x.min(axis=2, keepdims=True), x.max(axis=2, keepdims=True)
    centre = (low + high) / 2
    scale = np.maximum((high - low) / 2 / _LARGEST[kind], np.finfo(np.float32).tiny)
    x -= centre
    x /= scale
    if kind == "int8":
        codes = np.rint(x).astype(np.int8)
    else:
        codes = np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return np.concatenate([a.reshape(-1).view(np.uint8) for a in (scale, centre, codes)])


def dequantize(kind: Kind, data: UInt8[np.ndarray, " bytes"], out: Float[np.ndarray, "2 K C H"]) -> None:
    """Fills `out` from what `quantize` returned."""
    two, k, c, h = out.shape
    n = two * k * h * 4
    scale, centre = (data[i * n : (i + 1) * n].view(np.float32).reshape(two, k, 1, h) for i in range(2))
    codes = data[2 * n :].reshape(out.shape)
    x = codes.view(np.int8).astype(np.float32) if kind == "int8" else _FP8[codes]
    x *= scale
    x += centre
    out[...] = x
