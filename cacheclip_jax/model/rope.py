"""Rotary position embedding, in float32, at arbitrary positions."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cacheclip_jax.model.config import Rope


def inverse_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Angle per position of each of the H/2 rotated pairs, float32; Llama 3.1's scaling as in its reference code."""
    freq = np.float32(1.0) / np.float32(rope.theta) ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    if rope.divisors is not None:
        freq = freq / np.asarray(rope.divisors, np.float32)
    if (s := rope.llama3) is not None:
        wavelength = 2 * math.pi / freq
        smooth = (s.original_max_positions / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
        smooth = np.clip(smooth, 0, 1)
        freq = (1 - smooth) * freq / s.factor + smooth * freq
    return freq.astype(np.float32)


def rotate(x: Float[Array, "*B T H"], positions: Int[Array, "T"], rope: Rope) -> Float[Array, "*B T H"]:
    """Rotate rows of queries or keys to their absolute positions; pairs are (i, i + H/2), computed in float32."""
    angle = positions[:, None].astype(jnp.float32) * inverse_frequencies(rope, x.shape[-1])
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
