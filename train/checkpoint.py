"""Checkpoints: everything that a run needs to go on exactly where it stood."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


class Checkpoints:
    """The last two checkpoints of a run in a folder: a pytree of arrays, and JSON values beside it."""

    def __init__(self, folder: Path):
        self._manager = ocp.CheckpointManager(folder.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=2))

    def save(self, step: int, arrays: Any, run: dict[str, Any]) -> None:
        """Save; the files appear in one step. Waits for them: the next training step takes the arrays' memory."""
        self._manager.save(step, args=ocp.args.Composite(arrays=ocp.args.StandardSave(_named(arrays)),
                                                         run=ocp.args.JsonSave(run)))
        self._manager.wait_until_finished()

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """The last checkpoint's arrays, placed as those of `like`, and its JSON values; None without one."""
        if (step := self._manager.latest_step()) is None:
            return None
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), _named(like))
        found = self._manager.restore(step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(shapes),
                                                                    run=ocp.args.JsonRestore()))
        leaves = [found.arrays[name] for name in _named(like)]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), found.run

    def close(self) -> None:
        """Let go of the folder."""
        self._manager.close()


def _named(tree: Any) -> dict[str, jax.Array]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
