"""Tensor: one tensor of a checkpoint, read by slices, so that a model never lies in host memory twice."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cacheclip_jax.errors import BadModelFile

_BLOCK_BYTES = 32 << 20


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint file; `read(slices)` gives a part of it in the stored precision."""

    file: Path
    name_in_file: str
    shape: tuple[int, ...]
    read: Callable[[tuple[slice, ...]], np.ndarray]

    def fill(self, out: np.ndarray, index: tuple[slice, ...],
             map: Callable[..., Iterable] = builtins.map) -> None:
        """Write the part at `index` into `out`, cast to its dtype, a block of rows at a time.

        `map` may be a thread pool's, to do the blocks in parallel. Raises BadModelFile when a value isn't
        finite in `out`'s dtype.
        """
        start, stop, _ = index[0].indices(self.shape[0])
        row_bytes = 4 * out[:1].size
        step = max(1, _BLOCK_BYTES // max(1, row_bytes))

        def block(lo: int) -> None:
            part = out[lo - start:lo - start + step]
            # A value beyond float16's range becomes inf, which the check below reports better than a warning.
            with np.errstate(over="ignore"):
                part[...] = self.read((slice(lo, min(lo + step, stop)), *index[1:]))
            if not np.isfinite(part).all():
                raise BadModelFile(f"{self.file}: tensor {self.name_in_file} holds NaN or infinite values as "
                                   f"{out.dtype}: fetch the model again, or load it as float32")

        for _ in map(block, range(start, stop, step)):
            pass
