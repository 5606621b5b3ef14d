"""Which row attention runs where, and why."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

FEW_ROWS = 64  # at most this many rows are decoded or scored at once; a kernel tiled over rows would idle most of a GPU


@dataclasses.dataclass(frozen=True)
class Choice:
    """An implementation of `row_attention` by name, and the reason in a sentence."""

    name: str
    reason: str


def choose(platform: str, compute_capability: str | None, head_dim: int, dtype: Any, sharded: bool = False) -> Choice:
    """The row attention for a device and a model.

    `platform` and `compute_capability` ("9.0", None where there is none) are the device's; `sharded` says that the
    weights are split over a mesh.
    """
    dtype = jnp.dtype(dtype)
    if platform == "cpu":
        return Choice("blocked", "Plain JAX in blocks: on a CPU a kernel has nothing to add.")
    if sharded:
        return Choice("blocked", "The weights are split over several devices; the kernels run on one only.")
    if platform == "tpu":
        if head_dim not in (64, 128):
            return Choice("blocked", f"The TPU kernel has head dims 64 and 128, the model has {head_dim}.")
        return Choice("mosaic_tpu", "A Mosaic kernel that skips what no row sees.")
    if platform not in ("gpu", "cuda", "rocm"):
        return Choice("blocked", f"There is no kernel for {platform}.")
    if dtype not in (jnp.bfloat16, jnp.float16):
        return Choice("blocked", f"The GPU kernels compute in 16 bits; {dtype} keeps its precision in plain JAX.")
    if compute_capability is None or "." not in compute_capability or platform == "rocm":
        return Choice("blocked", "The kernels are for NVIDIA GPUs.")
    hopper = compute_capability.split(".")[0] == "9"
    if hopper and head_dim in (64, 128):
        return Choice("mosaic_gpu", "A Hopper kernel that loads K and V once per group of heads and skips what no row "
                                    "sees.")
    if head_dim % 8 == 0 and head_dim <= 256:
        why = f"the Hopper kernel has head dims 64 and 128, the model has {head_dim}" if hopper else (
            f"our kernel is for Hopper (compute capability 9), this GPU has {compute_capability}")
        return Choice("cudnn", f"cuDNN with a mask: {why}.")
    return Choice("blocked", f"cuDNN has head dims that are multiples of 8 up to 256, the model has {head_dim}.")


def for_rows(how: str, T: int) -> str:
    """The implementation for a call with T rows, where the model's is `how`: kernels leave few rows to `dense`."""
    return "dense" if T <= FEW_ROWS and how in ("mosaic_gpu", "mosaic_tpu", "cudnn") else how
