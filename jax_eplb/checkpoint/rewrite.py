"""A checkpoint rewritten for another placement, or as another kind of file, expert by expert.

No more than one expert, or 16 MiB of another array, is in memory at a time. What was written is
read back and compared with its checksums before it takes its name.

Axes: L layers, S slots, P ranks, N = S / P slots of a rank.
"""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jax_eplb.checkpoint.banks import Bank
from jax_eplb.checkpoint.checkpoints import Checkpoints
from jax_eplb.checkpoint.sources import NOTES, Source, side_files
from jax_eplb.checkpoint.stored import ARRAYS, BALANCER, banks_to_json, placement_to_json
from jax_eplb.checkpoint.to_orbax import write_item
from jax_eplb.checkpoint.to_tensors import plan_files, write_files
from jax_eplb.checkpoint.tree_names import joined
from jax_eplb.placement import Placement


class Work(NamedTuple):
    """What rewriting reads, writes and moves; sizes in bytes."""

    expert_bytes_read: int
    other_bytes_read: int
    bytes_written: int
    files: dict[str, int]  # size by name; of an Orbax checkpoint, the folder of its arrays
    rank_bytes: list[int]  # experts that each rank reads, once an expert
    changed_slots: int | None  # None where the checkpoint has no placement of as many slots
    moved_bytes: int | None  # experts that are new to their rank


def check_placement(source: Source, placement: Placement) -> None:
    """Raise ValueError unless the placement is one of this model."""
    if placement.num_experts != source.num_experts:
        raise ValueError(
            f"the placement is for {placement.num_experts} experts, but {source.path} has "
            f"{source.num_experts}; give a plan for this model"
        )
    missing = [layer for layer in source.layer_ids if layer not in placement.layer_ids]
    unknown = [layer for layer in placement.layer_ids if layer not in source.layer_ids]
    if missing or unknown:
        fault = f"does not name layers {missing}" if missing else f"names layers {unknown}"
        raise ValueError(
            f"the placement {fault}, but {source.path} has MoE layers {list(source.layer_ids)}; "
            "give a plan for this model"
        )


def work_of(source: Source, placement: Placement, kind: str, layout: str) -> Work:
    """What `rewrite` would do."""
    if kind == "orbax":
        files = {ARRAYS: source.expert_bytes + source.other_bytes}
        read = source.expert_bytes
    else:
        planned = plan_files(source, placement, layout)
        files = {name: sum(t.spec.nbytes for t in tensors) for name, tensors in planned.items()}
        read = sum(files.values()) - source.other_bytes
    held = _held(source, placement)
    changed, moved = None, None
    old = source.placement
    if old is not None and (old.num_slots, old.num_ranks, old.layer_ids) == (
        placement.num_slots,
        placement.num_ranks,
        placement.layer_ids,
    ):
        tables = np.asarray(old.slot_to_expert), np.asarray(placement.slot_to_expert)
        changed = int((tables[0] != tables[1]).sum())
        before = _held(source, old)
        moved = sum(
            bank.expert_bytes * int((held[row] & ~before[row]).sum())
            for bank, row in _bank_rows(source, placement)
        )
    by_rank = np.zeros(placement.num_ranks, int)
    for bank, row in _bank_rows(source, placement):
        by_rank += bank.expert_bytes * held[row].sum(axis=(0, 2))
    return Work(
        read, source.other_bytes, sum(files.values()), files, by_rank.tolist(), changed, moved
    )


def rewrite(
    source: Source,
    out: Path,
    placement: Placement,
    *,
    kind: str,
    layout: str = "experts",
    on_progress: Callable[[int], None] = lambda written: None,
) -> Path:
    """Write the checkpoint for this placement to a new folder, and return where its arrays are.

    `kind`: "orbax", or "safetensors" with `layout` "experts" (the names that the experts have, or
    had) or "slots" (a file for each rank, its slots' experts in order). `on_progress` is called
    with the bytes of each piece written. The folder appears when it is complete and verified.

    Raises ValueError where the placement is another model's, the folder exists, the source is
    damaged, or the disk has too little room; OSError where it cannot be written.
    """
    check_placement(source, placement)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: exists and is not empty; give a new folder")
    _check_room(out, work_of(source, placement, kind, layout).bytes_written)
    partial = out.with_name(f"{out.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)  # of a run that was cut off
    try:
        partial.mkdir(parents=True)
        if kind == "orbax":
            written = _to_orbax(source, partial, placement, on_progress)
        else:
            written = _to_tensors(source, partial, placement, layout, on_progress)
        for file in side_files(source.path):
            shutil.copyfile(file, partial / file.name)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out / written


def _to_orbax(
    source: Source, folder: Path, placement: Placement, on_progress: Callable[[int], None]
) -> str:
    write = functools.partial(write_item, source, on_progress=on_progress)
    step, copy_balancer = 0, None
    if source.stored is not None:
        name, balancer = source.stored.folder.name, source.stored.folder / BALANCER
        step = int(name) if name.isdecimal() else 0
        if balancer.exists():
            copy_balancer = functools.partial(_copy_folder, balancer)
    with Checkpoints(folder) as checkpoints:
        checkpoints.write(step, write, _banks(source), placement, source.facts, copy_balancer)
    return str(step)


def _copy_folder(source: Path, folder: Path) -> None:
    shutil.copytree(source, folder, dirs_exist_ok=True)


def _to_tensors(
    source: Source,
    folder: Path,
    placement: Placement,
    layout: str,
    on_progress: Callable[[int], None],
) -> str:
    files = plan_files(source, placement, layout)
    write_files(source, files, folder, with_index=layout == "experts", on_progress=on_progress)
    notes = {
        "layout": layout,
        "placement": placement_to_json(placement),
        "banks": banks_to_json(_banks(source)),
    }
    (folder / NOTES).write_text(json.dumps(notes))
    return ""


def _banks(source: Source) -> dict[str, Bank]:
    return {joined(each.keys): each.bank for each in source.banks}


def _bank_rows(source: Source, placement: Placement):
    """Each bank with the rows of the placement that are its layers."""
    at = {layer: row for row, layer in enumerate(placement.layer_ids)}
    return [(each, [at[layer] for layer in each.bank.layers]) for each in source.banks]


def _held(source: Source, placement: Placement) -> np.ndarray:
    """bool[L, P, E]: the experts that each rank holds."""
    table = np.asarray(placement.slot_to_expert)
    layers, slots = np.indices(table.shape)
    held = np.zeros((*table.shape[:1], placement.num_ranks, source.num_experts + 1), bool)
    held[layers, slots // placement.slots_per_rank, table] = True
    return held[..., :-1]


def _check_room(out: Path, needed: int) -> None:
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise ValueError(
            f"{out}: {needed / 1e9:.2f} GB would be written, but {free / 1e9:.2f} GB are free there"
        )
