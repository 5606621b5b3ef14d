"""Small arrays of several kinds as one: a request sends dozens, and each copy to the device takes tens of microseconds
of the host while threads wait for Python's lock."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Int


@struct.dataclass
class Packed:
    """The arrays of a pytree one after another as 32-bit words, and what says how they lie there."""

    words: Int[Any, "W"]
    tree: Any = struct.field(pytree_node=False)
    kinds: tuple[tuple[tuple[int, ...], str], ...] = struct.field(pytree_node=False)  # shape and dtype of each

    def unpacked(self) -> Any:
        """The pytree, in a compiled program."""
        leaves, at = [], 0
        for shape, dtype in self.kinds:
            size = int(np.prod(shape))
            words, at = self.words[at : at + size].reshape(shape), at + size
            leaves.append(words != 0 if dtype == "bool" else jax.lax.bitcast_convert_type(words, jnp.dtype(dtype)))
        return jax.tree.unflatten(self.tree, leaves)


def pack(tree: Any) -> Packed:
    """A pytree of numpy arrays and scalars of int32, float32 or bool, on the host. Raises TypeError for others."""
    leaves, structure = jax.tree.flatten(tree)
    arrays = [np.asarray(leaf) for leaf in leaves]
    for array in arrays:
        if array.dtype not in (np.int32, np.float32, np.bool_):
            raise TypeError(f"arrays of {array.dtype} can't be packed: make them int32, float32 or bool")
    words = [a.astype(np.int32).reshape(-1) if a.dtype == bool else a.reshape(-1).view(np.int32) for a in arrays]
    return Packed(np.concatenate(words), structure, tuple((a.shape, a.dtype.name) for a in arrays))
