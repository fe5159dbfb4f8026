"""vLLM: the placement of its EPLB state, as a JSON file.

`EplbModelState` keeps `physical_to_logical_map` [MoE layers, slots], with the numbers
`num_moe_layers`, `num_logical_experts` and `num_physical_experts` of the model. A file holds these
under their own names; the map alone, a list of lists or a tensor in a `.pt` file, is read as well.
Rows are MoE layers counted from 0. Slot r·N + i is rank r's i-th, of N on each rank.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from jax_eplb.formats.expert_locations import SLOTS, array_of
from jax_eplb.formats.files import check_suffix, replacing
from jax_eplb.formats.slot_tables import SlotTable, check_count, table_of_rows
from jax_eplb.placement import Placement

_LAYERS, EXPERTS, _SLOT_COUNT = "num_moe_layers", "num_logical_experts", "num_physical_experts"


def slots_of(content: Mapping[Any, Any] | list | np.ndarray) -> SlotTable:
    """The table of a state, or of the map alone; ValueError where its own numbers contradict it."""
    if not isinstance(content, Mapping):
        return table_of_rows(content, field=SLOTS, numbering="moe")
    if SLOTS not in content:
        raise ValueError(f"no {SLOTS!r}, the expert of each slot by MoE layer")
    num_experts = check_count(content.get(EXPERTS), EXPERTS)
    rows = array_of(content, SLOTS)
    table = table_of_rows(rows, field=SLOTS, numbering="moe", num_experts=num_experts)
    for name, held in ((_LAYERS, len(table.rows)), (_SLOT_COUNT, table.num_slots)):
        if name in content and check_count(content[name], name) != held:
            raise ValueError(f"{name} is {content[name]}, but {SLOTS} has {held}")
    return table


def save_placement(placement: Placement, path: str | os.PathLike) -> None:
    """Write the state as `.json`; layer ids, which vLLM does not have, are not kept."""
    check_suffix(path, (".json",), "vLLM's state")
    state = {
        _LAYERS: placement.num_layers,
        EXPERTS: placement.num_experts,
        _SLOT_COUNT: placement.num_slots,
        SLOTS: np.asarray(placement.slot_to_expert).tolist(),
    }
    with replacing(path) as file:
        file.write(json.dumps(state).encode())
