"""Checkpoints of a run by Orbax: experts in expert order, placement and balancer beside them."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from jax_eplb.checkpoint.array_files import open_tree
from jax_eplb.checkpoint.banks import Bank
from jax_eplb.checkpoint.orbax_item import WrittenItem
from jax_eplb.checkpoint.stored import (
    ARRAYS,
    BALANCER,
    DESCRIPTION,
    StoredCheckpoint,
    description_to_json,
    open_checkpoint,
    step_folders,
)
from jax_eplb.checkpoint.trees import copy_tree, load_tree
from jax_eplb.placement import Placement


class Restored(NamedTuple):
    """What `Checkpoints.restore` read."""

    step: int
    state: Any
    placement: Placement | None  # the one that the state is laid out by
    balancer: Any
    facts: Any
    bytes_read: dict[Any, int]  # of the state, by device of this process; None: the host


def restore(
    folder: str | os.PathLike,
    like: Any,
    placement: Placement | None = None,
    *,
    step: int | None = None,
    balancer: Any = None,
) -> Restored:
    """Read one of the checkpoints in a folder, which is only read.

    `like` is a pytree of arrays, or of jax.ShapeDtypeStruct with shardings; its banks have the
    slots of `placement` (default: the placement that was saved). Each device reads the experts
    that its slots hold. `like` may be a part of what was saved, and its types may differ. With
    `balancer`, a pytree alike, the balancer's state is read too.

    Raises ValueError that names what is missing, damaged, or of another model.
    """
    folder = Path(folder).absolute()
    chosen = _step_folder(folder, step)
    try:
        stored = open_checkpoint(chosen)
        placement = _fitting(placement, stored)
        state, bytes_read = load_tree(like, stored.arrays, stored.banks, placement)
        if balancer is not None:
            balancer, _ = load_tree(balancer, open_tree(chosen / BALANCER).arrays)
    except ValueError as error:
        place = "" if str(error).startswith(str(chosen)) else f"{chosen}: "
        others = [other for other in step_folders(folder) if other != int(chosen.name)]
        remedy = f"; steps {others} are there, too" if others else ""
        raise ValueError(f"{place}{error}{remedy}") from error
    return Restored(int(chosen.name), state, placement, balancer, stored.facts, bytes_read)


class Checkpoints:
    """The last few checkpoints of one run, each in a folder named by its step.

    With several processes, all of them call the same methods, and the folder is one they share.
    """

    def __init__(self, folder: str | os.PathLike, *, keep: int = 2, axis_name: str = "expert"):
        """`axis_name` is the mesh axis that experts are spread over.

        Raises OSError where the folder cannot be made.
        """
        self.folder, self._axis_name = Path(folder).absolute(), axis_name
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        try:
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        except OSError as error:
            fault = f"{self.folder}: no checkpoints can be kept there ({error.strerror})"
            raise OSError(error.errno, fault) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def steps(self) -> list[int]:
        """The steps that can be restored, first to last."""
        return list(step_folders(self.folder))

    def save(
        self,
        step: int,
        state: Any,
        placement: Placement | None,
        *,
        balancer: Any = None,
        facts: Any = None,
    ) -> None:
        """Save any pytree of arrays after `step` steps; returns once the arrays may change again.

        Its banks of experts are laid out by `placement`, which is saved beside them; None where
        there are none: then all arrays are saved as they are. `balancer`, a pytree of arrays, and
        `facts`, anything that JSON can hold, are the same on every process.

        Waits for the save before this one. Raises ValueError where the state cannot be saved, and
        OSError where the save before this one failed; what was saved earlier stays.
        """
        self.wait()
        write, banks = copy_tree(state, placement, self._axis_name)
        write_balancer = None if balancer is None else copy_tree(balancer)[0]
        self.write(step, write, banks, placement, facts, write_balancer)

    def write(
        self,
        step: int,
        write_arrays: Callable[[Path], None],
        banks: dict[str, Bank],
        placement: Placement | None,
        facts: Any = None,
        write_balancer: Callable[[Path], None] | None = None,
    ) -> None:
        """Save what the functions write into their folders, in another thread."""
        self.wait()
        if step in self.steps:
            raise ValueError(f"{self.folder}: step {step} is saved already")
        items: dict[str, Any] = {
            ARRAYS: WrittenItem(write_arrays),
            DESCRIPTION: ocp.args.JsonSave(description_to_json(placement, banks, facts)),
        }
        if write_balancer is not None:
            items[BALANCER] = WrittenItem(write_balancer)
        with self._naming():
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(
        self,
        like: Any,
        placement: Placement | None = None,
        *,
        step: int | None = None,
        balancer: Any = None,
    ) -> Restored:
        """Read a checkpoint onto the devices of `like`: the last one, unless `step` is given.

        See `restore`. Waits for the save in progress.
        """
        self.wait()
        return restore(self.folder, like, placement, step=step, balancer=balancer)

    def open(self, step: int | None = None) -> StoredCheckpoint:
        """One checkpoint, the last unless `step` is given: its placement, facts and arrays.

        Raises ValueError where there is none, or it is damaged.
        """
        return open_checkpoint(_step_folder(self.folder, step))

    def wait(self) -> None:
        """Wait for the save in progress. Raises OSError where it failed; earlier ones stay."""
        with self._naming():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for the save in progress, and end."""
        try:
            self.wait()
        finally:
            self._manager.close()

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        """Name the folder where the disk fails, and free what an unfinished save took."""
        try:
            yield
        except OSError as error:
            self._manager.reload()  # it counts the step that failed
            if jax.process_index() == 0:
                for partial in self.folder.glob("*.orbax-checkpoint-tmp*"):
                    shutil.rmtree(partial, ignore_errors=True)
            raise OSError(
                error.errno,
                f"{self.folder}: the checkpoint could not be written ({error.strerror}); "
                "those before it are whole",
            ) from error


def _step_folder(folder: Path, step: int | None) -> Path:
    folders = step_folders(folder)
    if not folders:
        raise ValueError(f"{folder}: holds no complete checkpoint")
    if step is not None and step not in folders:
        raise ValueError(f"{folder}: no step {step}; there are {list(folders)}")
    return folders[max(folders) if step is None else step]


def _fitting(placement: Placement | None, stored: StoredCheckpoint) -> Placement | None:
    """The placement to read by. Raises ValueError where it is one of another model."""
    saved = stored.placement
    if placement is None or saved is None:
        return saved if placement is None else placement
    if placement.num_experts != saved.num_experts:
        raise ValueError(
            f"the placement is for {placement.num_experts} experts, but this checkpoint has "
            f"{saved.num_experts}; give a plan for this model"
        )
    if placement.layer_ids != saved.layer_ids:
        raise ValueError(
            f"the placement is for layers {list(placement.layer_ids)}, but this checkpoint has "
            f"{list(saved.layer_ids)}; give a plan for this model"
        )
    return placement
