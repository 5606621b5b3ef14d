"""How the scripts with a config start: `python -m eval.NAME --config=FILE [--config.field=value ...]`."""

from __future__ import annotations

import sys
from collections.abc import Callable

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from cacheclip_jax.errors import CacheClipError


def start(main: Callable[[ConfigDict], None], what: str) -> None:
    """Run `main` with the command line's config; `what` is its help. What is wrong with the input becomes one line.

    The flag is defined here, not where a script is imported, so that several can be.
    """
    config = config_flags.DEFINE_config_file("config", None, what, lock_config=True)
    flags.mark_flag_as_required("config")

    def run(argv: list[str]) -> None:
        del argv
        try:
            main(config.value)
        except CacheClipError as e:
            sys.exit(f"error: {e}")

    app.run(run)
