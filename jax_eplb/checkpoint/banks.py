"""Banks of experts as a checkpoint knows them: which layers they hold, and who writes what.

In memory a bank has a slot axis: [S, …] for one layer, [L, S, …] for a stack of layers. On disk it
is [E, …] or [L, E, …], in expert order.
"""

from typing import Any, NamedTuple

import numpy as np

from jax_eplb import moving
from jax_eplb.placement import Placement


class Bank(NamedTuple):
    """How an array holds experts."""

    layers: tuple[int, ...]  # the model's own numbers
    stacked: bool  # the layers are its first axis
    template: str | None = None  # the name of its tensors in safetensors, where they are many

    @property
    def expert_axis(self) -> int:
        return int(self.stacked)

    def outer(self, layer: int, expert: int) -> tuple[int, ...]:
        """Layer and expert along the first axes: of one expert's place, or of the bank's sizes."""
        return (layer, expert) if self.stacked else (expert,)

    def rows(self, placement: Placement) -> np.ndarray:
        """int32[L, S]: the placement of this bank's layers."""
        at = {layer: row for row, layer in enumerate(placement.layer_ids)}
        return np.asarray(placement.slot_to_expert)[[at[layer] for layer in self.layers]]


def banks_of(tree: Any, placement: Placement, axis_name: str) -> dict[int, Bank]:
    """The banks among the leaves of a tree, by their position.

    Raises ValueError where there is none, or where its layer cannot be told.
    """
    found = moving.find_banks(
        tree,
        num_slots=placement.num_slots,
        layer_ids=placement.layer_ids,
        axis_name=axis_name,
    )
    banks = {}
    for group in found.groups:
        bank = Bank(placement.layer_ids, True)
        if group.layer is not None:
            bank = Bank((placement.layer_ids[group.layer],), False)
        banks |= dict.fromkeys(group.leaves, bank)
    return banks


def first_slots(table: np.ndarray, num_experts: int) -> np.ndarray:
    """int[L, E]: the lowest slot of each expert, from int32[L, S]; S where it has none.

    >>> first_slots(np.array([[2, 0, 0, 1]]), 3).tolist()
    [[1, 3, 0]]
    """
    layers, slots = table.shape
    first = np.full((layers, num_experts + 1), slots)  # an id of E is an empty slot
    rows = np.arange(layers)[:, None]
    np.minimum.at(first, (rows, table), np.arange(slots)[None])
    return first[:, :num_experts]
