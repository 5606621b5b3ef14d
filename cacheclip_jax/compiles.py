"""How many programs JAX has compiled in this process: a request that warm-up prepared compiles none."""

import jax

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_count = 0


def _on_event(event: str, duration_secs: float, **_: str | int) -> None:
    global _count
    _count += event == _COMPILE_EVENT


jax.monitoring.register_event_duration_secs_listener(_on_event)


def count() -> int:
    """Programs compiled (or loaded from the compilation cache) so far."""
    return _count
