"""Training states on disk by Orbax: saved in the background, restored onto any mesh."""

import os
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


class TrainingCheckpoints:
    """The last few states of one training run."""

    def __init__(self, folder: str | os.PathLike, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        self._manager = ocp.CheckpointManager(Path(folder).absolute(), options=options)

    def save(self, step: int, state) -> None:
        """Write the state after `step` steps; returns once the arrays may change again."""
        self._manager.save(step, args=ocp.args.StandardSave(state))

    def restore_latest(self, like: Any) -> tuple[int, Any]:
        """The last step and its state, with the shardings of `like`; (0, like) where none is."""
        step = self._manager.latest_step()
        if step is None:
            return 0, like

        def target(x):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

        arguments = ocp.args.StandardRestore(jax.tree.map(target, like))
        return step, self._manager.restore(step, args=arguments)

    def close(self) -> None:
        """Wait for what is still being written."""
        self._manager.wait_until_finished()
        self._manager.close()
