"""One checkpoint on disk, read without Orbax: arrays, placement, balancer state and facts."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jax_eplb.checkpoint.array_files import StoredArray, open_tree, read_json
from jax_eplb.checkpoint.banks import Bank
from jax_eplb.checkpoint.tree_names import Key
from jax_eplb.placement import Placement

# Names of the items. Orbax's v1 looks for `pytree` where none is named.
ARRAYS, BALANCER, DESCRIPTION = "pytree", "balancer", "jax_eplb"


class StoredCheckpoint(NamedTuple):
    """What a checkpoint holds; arrays are read on demand."""

    folder: Path
    arrays: dict[str, StoredArray]
    empty: dict[tuple[Key, ...], str]  # nodes of the tree without arrays
    banks: dict[str, Bank]  # by name of the array
    placement: Placement | None
    facts: Any


def step_folders(folder: str | os.PathLike) -> dict[int, Path]:
    """The complete checkpoints of a folder by step, first to last."""
    found = {
        int(path.name): path
        for path in Path(folder).glob("*")
        if path.name.isdecimal() and path.is_dir()
    }
    return dict(sorted(found.items()))


def open_checkpoint(folder: Path) -> StoredCheckpoint:
    """Open the folder of one step. Raises ValueError that names the file at fault."""
    path = folder / DESCRIPTION / "metadata"
    description = read_json(path)
    try:
        banks = banks_from_json(description["banks"])
        placement, facts = description["placement"], description["facts"]
        if placement is not None:
            placement = placement_from_json(placement)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: damaged, or not written by jax_eplb ({error!r})") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    arrays, empty = open_tree(folder / ARRAYS)
    lost = next((name for name in banks if name not in arrays), None)
    if lost is not None:
        raise ValueError(f"{folder / ARRAYS}: the bank {lost!r} is missing")
    return StoredCheckpoint(folder, arrays, empty, banks, placement, facts)


def description_to_json(placement: Placement | None, banks: dict[str, Bank], facts: Any) -> dict:
    """What stands beside the arrays."""
    return {
        "placement": None if placement is None else placement_to_json(placement),
        "banks": banks_to_json(banks),
        "facts": facts,
    }


def banks_to_json(banks: dict[str, Bank]) -> dict[str, Any]:
    return {name: bank._asdict() for name, bank in banks.items()}


def banks_from_json(values: dict[str, Any]) -> dict[str, Bank]:
    """Raises KeyError, TypeError or AttributeError where the values are no banks."""
    return {
        name: Bank(tuple(bank["layers"]), bool(bank["stacked"]), bank["template"])
        for name, bank in values.items()
    }


def placement_to_json(placement: Placement) -> dict[str, Any]:
    return {
        "num_experts": placement.num_experts,
        "num_ranks": placement.num_ranks,
        "layer_ids": list(placement.layer_ids),
        "slot_to_expert": np.asarray(placement.slot_to_expert).tolist(),
    }


def placement_from_json(values: dict[str, Any]) -> Placement:
    """Read what `placement_to_json` wrote; a table may have empty slots, of id E.

    Raises KeyError, TypeError or ValueError where the values are no placement.
    """
    return Placement.from_slots(
        values["slot_to_expert"],
        num_experts=values["num_experts"],
        num_ranks=values["num_ranks"],
        layer_ids=tuple(values["layer_ids"]),
        may_be_empty=True,
    )
