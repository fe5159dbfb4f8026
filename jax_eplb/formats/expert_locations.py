"""What SGLang and SGLang-JAX both read at their start: a dict of `physical_to_logical_map`, the
expert of each slot, or of `logical_count`, the load that they then plan for by themselves.

Their rows are the layers of the model, dense ones included.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jax_eplb.formats.files import DAMAGE, brief, naming
from jax_eplb.formats.safe_pickle import PickledArray
from jax_eplb.formats.slot_tables import SlotTable, is_integer, layer_count, table_of_rows
from jax_eplb.load import Recording

SLOTS = "physical_to_logical_map"
COUNTS = "logical_count"


def slots_of(content: Mapping[Any, Any]) -> SlotTable:
    """The table in a dict that has one; ValueError naming layer and slot where it is faulty."""
    return table_of_rows(array_of(content, SLOTS), field=SLOTS, numbering="all")


def counts_of(content: object) -> np.ndarray:
    """`logical_count` of a dict, [steps, layers, experts] or [layers, experts].

    Raises ValueError where there is none, and where it is no array.
    """
    if not isinstance(content, dict):
        raise ValueError(f"holds a {type(content).__name__}, expected a dict with {COUNTS!r}")
    if COUNTS not in content:
        if "records" in content:
            raise ValueError(
                "written by SGLang in a mode of detail (per_pass or per_token), one file a rank; "
                "record with --expert-distribution-recorder-mode stat"
            )
        raise ValueError(f"no {COUNTS!r}; it holds {brief(list(content))}")
    counts = array_of(content, COUNTS)
    if not isinstance(counts, np.ndarray):
        raise ValueError(f"{COUNTS} is a {type(counts).__name__}, expected a tensor")
    return counts


def array_of(content: Mapping[Any, Any], key: str) -> Any:
    """The value of a key, with an array where a pickle has one."""
    value = content[key]
    if isinstance(value, PickledArray):
        try:
            return value.array()
        except DAMAGE as error:
            detail = f"{type(error).__name__}: {error}"
            raise ValueError(f"array {key!r} is damaged ({detail})") from error
    return value


def array_of_lists(lists: Any, axes: int = 3) -> np.ndarray:
    """int64 array of lists of integers, nested up to `axes` deep; ValueError for anything else.

    >>> array_of_lists([[1, 2], [3, 4]]).shape
    (2, 2)
    """
    if isinstance(lists, list) and lists:
        if all(map(is_integer, lists)):
            with naming("a count", "too large", OverflowError):
                return np.array(lists, np.int64)
        if axes > 1 and all(isinstance(part, list) for part in lists):
            parts = [array_of_lists(part, axes - 1) for part in lists]
            if len({part.shape for part in parts}) > 1:
                raise ValueError("lists of unequal length")
            return np.stack(parts)
    raise ValueError(f"{brief(lists)} is no list of integers, nor of lists of them")


def counts_of_all_layers(recording: Recording, num_layers: int | None) -> np.ndarray:
    """int64[W, layers, E]: the counts by expert, with rows of zeros for dense layers.

    `num_layers`, of the model, defaults to the last recorded layer's id plus one.
    """
    counts = recording.expert_counts()
    layers = layer_count(recording.layer_ids, num_layers)
    all_layers = np.zeros((counts.shape[0], layers, counts.shape[2]), np.int64)
    all_layers[:, list(recording.layer_ids)] = counts
    return all_layers
