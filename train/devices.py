"""The mesh of training: every device has all weights and its own part of a batch."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cacheclip_jax.errors import BadInput


def data_mesh(devices: int = 0) -> Mesh:
    """A mesh with the axes "data" and "model", the second of size 1, over so many devices (0: all)."""
    there = jax.devices()
    if not 0 <= devices <= len(there):
        raise BadInput(f"devices={devices} is out of range: 1 to {len(there)}, or 0 for all")
    chosen = np.array(there[: devices or len(there)])
    return Mesh(chosen.reshape(-1, 1), ("data", "model"))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Arrays, whole on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def spread(tree: Any, mesh: Mesh) -> Any:
    """Arrays, their first axis divided over the devices."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec("data")))


def check_divides(batch: int, mesh: Mesh) -> None:
    """Raises BadInput where a batch can't be divided over the devices."""
    if batch < 1 or batch % mesh.shape["data"]:
        raise BadInput(f"a batch of {batch} can't be divided over {mesh.shape['data']} devices: take a multiple")
