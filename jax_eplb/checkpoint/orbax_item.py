"""An item of an Orbax checkpoint whose files are written here: Orbax makes it whole or nothing."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint.future import CommitFutureAwaitingContractedSignals


class WrittenItemHandler(ocp.AsyncCheckpointHandler):
    """Runs the writing in a thread, once the folder is there: the first process makes it."""

    async def async_save(self, directory: Any, args: "WrittenItem") -> list[Any]:
        async def write() -> None:
            args.write(Path(directory))

        return [CommitFutureAwaitingContractedSignals(write(), name="write_item")]

    def save(self, directory: Any, args: "WrittenItem") -> None:
        args.write(Path(directory))

    def restore(self, directory: Any, args: Any = None) -> Any:
        raise ValueError(
            f"{directory}: restore with jax_eplb.checkpoint.Checkpoints, or name what you want: "
            "args=orbax.checkpoint.args.Composite(pytree=orbax.checkpoint.args.StandardRestore())"
        )


@ocp.args.register_with_handler(WrittenItemHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class WrittenItem(ocp.args.CheckpointArgs):
    """`write` fills the folder that it is given. It runs in another thread, on every process."""

    write: Callable[[Path], None]
