"""What runs where, and why: versions, devices, attention, copies, caches, and models by their configs alone."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from cacheclip_jax.attention import Choice, choose, for_rows
from cacheclip_jax.attention.choose import FEW_ROWS
from cacheclip_jax.engine import compilation_cache
from cacheclip_jax.errors import BadInput
from cacheclip_jax.model.config import ModelConfig
from cacheclip_jax.model.load import load_config
from cacheclip_jax.model.pull import models_directory
from cacheclip_jax.pages import uses_pinned
from cacheclip_jax.store.records import DTYPES
from cacheclip_jax.version import __version__

HEAD_DIMS = (64, 128)


def gather(models: Mapping[str, str] | None = None, dtype: str = "bfloat16") -> dict[str, Any]:
    """What this machine runs, as plain values for JSON; sizes are in bytes.

    Args:
      models: model sources by role, as `CacheClip.load` takes them; of each only the config is read.
      dtype: of the models' weights and caches.

    Raises BadInput for an unknown dtype, UnsupportedModel or BadModelFile as `load_config` does.
    """
    if dtype not in DTYPES:
        raise BadInput(f"dtype {dtype!r} isn't supported: choose {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
    configs = {role: (source, load_config(source)) for role, source in (models or {}).items()}
    device = jax.local_devices()[0]  # where a model goes that isn't split over a mesh
    return {
        "versions": {"cacheclip": __version__, **{name: version(name) for name in ("jax", "jaxlib", "tensorstore")},
                     "python": platform.python_version()},
        "devices": _devices(jax.local_devices()),
        "attention": [{"dtype": each, "head_dim": head_dim, **_attention(device, head_dim, each)}
                      for each in DTYPES for head_dim in HEAD_DIMS],
        "few_rows": FEW_ROWS,
        "copies": _copies(device),
        "compiled_programs": compilation_cache(),
        "models_directory": str(models_directory()),
        "models": {role: {"source": source, **_model(config, dtype, device)}
                   for role, (source, config) in configs.items()},
    }


def _devices(devices: Sequence[jax.Device]) -> list[dict[str, Any]]:
    kinds = Counter((d.platform, d.device_kind, _capability(d), _memory(d)) for d in devices)
    return [{"platform": name, "kind": kind, "count": count, "compute_capability": capability, "memory_limit": memory}
            for (name, kind, capability, memory), count in kinds.items()]


def _capability(device: jax.Device) -> str | None:
    return getattr(device, "compute_capability", None)


def _memory(device: jax.Device) -> int | None:
    return (device.memory_stats() or {}).get("bytes_limit")


def _attention(device: jax.Device, head_dim: int, dtype: str) -> dict[str, str]:
    choice: Choice = choose(device.platform, _capability(device), head_dim, dtype)
    return {"rows": choice.name, "few_rows": for_rows(choice.name, FEW_ROWS), "reason": choice.reason}


def _copies(device: jax.Device) -> dict[str, Any]:
    pinned = uses_pinned(SingleDeviceSharding(device))
    reason = ("Copies from pinned memory run at the bus's speed, beside the computation." if pinned else
              "On a CPU a copy may be the same memory: a page is used once." if device.platform == "cpu" else
              f"Pinned pages are for GPUs, this device is a {device.platform}.")
    return {"pinned": pinned, "reason": reason}


def _model(config: ModelConfig, dtype: str, device: jax.Device) -> dict[str, Any]:
    itemsize = jnp.dtype(dtype).itemsize
    shape = ("num_layers", "d_model", "d_mlp", "num_heads", "num_kv_heads", "head_dim", "vocab_size", "max_positions")
    return {"family": config.family, **{name: getattr(config, name) for name in shape}, "dtype": dtype,
            "parameters": config.num_params, "weight_bytes": config.num_params * itemsize,
            "bytes_per_token": config.kv_values_per_token * itemsize,
            "attention": _attention(device, config.head_dim, dtype)}
