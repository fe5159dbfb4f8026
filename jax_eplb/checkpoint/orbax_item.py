"""An item of an Orbax checkpoint whose files are written here: Orbax makes it whole or nothing."""

import dataclasses
import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.future import CommitFutureAwaitingContractedSignals

from jax_eplb.checkpoint.array_files import has_written

# Between the first process that has written its part and the last; as long as Orbax's own default.
_TIMEOUT_MS = 1_200_000


class WrittenItemHandler(ocp.AsyncCheckpointHandler):
    """Runs the writing in a thread, once the folder is there: the first process makes it."""

    async def async_save(self, directory: Any, args: "WrittenItem") -> list[Any]:
        async def write() -> None:
            _write_together(args.write, Path(directory))

        return [CommitFutureAwaitingContractedSignals(write(), name="write_item")]

    def save(self, directory: Any, args: "WrittenItem") -> None:
        _write_together(args.write, Path(directory))

    def restore(self, directory: Any, args: Any = None) -> Any:
        raise ValueError(
            f"{directory}: restore with jax_eplb.checkpoint.Checkpoints, or name what you want: "
            "args=orbax.checkpoint.args.Composite(pytree=orbax.checkpoint.args.StandardRestore())"
        )


@ocp.args.register_with_handler(WrittenItemHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class WrittenItem(ocp.args.CheckpointArgs):
    """`write` fills the folder that it is given, its process's checksums last.

    It runs in another thread, on every process.
    """

    write: Callable[[Path], None]


def _write_together(write: Callable[[Path], None], folder: Path) -> None:
    """All processes fail where one does: Orbax would let all of them wait for twenty minutes.

    They see in the folder, which they share, who wrote all of its part.
    """
    try:
        write(folder)
    finally:
        meet = ocp.multihost.get_barrier_sync_fn()
        meet(key=f"written: {folder}", timeout_ms=_TIMEOUT_MS)
    failed = [each for each in range(jax.process_count()) if not has_written(folder, each)]
    if failed:
        raise OSError(errno.EIO, f"process {failed[0]} could not write its part", str(folder))
