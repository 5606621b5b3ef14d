"""Matrix precision: float32 means float32 on every platform, also where the hardware would round the inputs."""

from typing import Any

import jax
import jax.numpy as jnp


def precision(dtype: Any) -> jax.lax.Precision | None:
    """HIGHEST for float32 operands (no TF32, no bfloat16 passes); the platform's default for narrower ones."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None
