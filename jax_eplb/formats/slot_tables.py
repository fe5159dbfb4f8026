"""A plan as a file has it: the expert of each slot, by layer. What all plan formats share.

Axes: L layers, E experts, S slots, P ranks.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jax_eplb.formats.files import brief
from jax_eplb.placement import Placement, check_sizes

# What the numbers of a file's layers mean:
# "names": ids of MoE layers of the model, and of no other layers (TensorRT-LLM);
# "all": every layer of the model has a row, dense layers too (SGLang, SGLang-JAX);
# "moe": MoE layers counted from 0, whatever their ids are (vLLM, vLLM-Ascend).
Numbering = Literal["names", "all", "moe"]


@dataclasses.dataclass(frozen=True)
class SlotTable:
    """Rows of S expert ids by layer, and what else the file says; ids are checked later."""

    rows: Mapping[int, Sequence[int]]
    num_slots: int
    numbering: Numbering
    field: str  # where the rows stand in the file, for messages
    num_experts: int | None = None
    num_ranks: int | None = None

    def placement(
        self,
        *,
        num_ranks: int | None,
        num_experts: int | None = None,
        layer_ids: Sequence[int] | None = None,
    ) -> Placement:
        """The placement of these rows, checked.

        `num_ranks` may be None where the file says it. `num_experts` defaults to the file's, or to
        the largest id plus one. `layer_ids`, where given, are the MoE layers of the model: rows of
        dense layers are left out, rows without ids are theirs in this order. Without them the
        layers are those of the file. Raises ValueError naming layer and value.
        """
        num_ranks = _agree("ranks", self.num_ranks, num_ranks)
        if num_ranks is None:
            raise ValueError("the file does not say for how many ranks it is; give num_ranks")
        num_experts = _agree("experts", self.num_experts, num_experts)
        if num_experts is None:
            num_experts = max(max(row, default=-1) for row in self.rows.values()) + 1
        check_sizes(num_experts, self.num_slots, num_ranks)
        ids, rows = self._select(layer_ids)
        return Placement.from_slots(
            rows, num_experts=num_experts, num_ranks=num_ranks, layer_ids=ids
        )

    def _select(self, layer_ids: Sequence[int] | None) -> tuple[list[int], list[Sequence[int]]]:
        held = sorted(self.rows)
        if layer_ids is None:
            return held, [self.rows[layer] for layer in held]
        ids = [int(layer) for layer in layer_ids]
        if self.numbering == "moe":
            if len(ids) != len(held):
                raise ValueError(
                    f"{self.field} has {len(held)} MoE layers, but there are {len(ids)}: "
                    f"{listing(ids)}; use the placement of this model"
                )
            return ids, [self.rows[layer] for layer in held]
        missing = [layer for layer in ids if layer not in self.rows]
        if missing:
            raise ValueError(
                f"layer {listing(missing)} missing from {self.field}, which has layer "
                f"{listing(held)}; plan for all layers of the model"
            )
        extra = sorted(set(held) - set(ids))
        if extra and self.numbering == "names":
            raise ValueError(
                f"layer {listing(extra)} in {self.field}, but the MoE layers are {listing(ids)}; "
                "use the placement of this model"
            )
        return ids, [self.rows[layer] for layer in ids]


def table_of_rows(
    rows: Any,
    *,
    field: str,
    numbering: Numbering,
    num_experts: int | None = None,
    num_ranks: int | None = None,
) -> SlotTable:
    """A table from a list of rows, or an array [L, S]: its layers are 0 .. L - 1.

    Raises ValueError naming layer and slot where these are no rows of integers, all of one length.

    >>> table_of_rows([[0, 1, 0]], field="map", numbering="all").num_slots
    3
    """
    if isinstance(rows, np.ndarray):
        if rows.ndim != 2 or not np.issubdtype(rows.dtype, np.integer):
            raise ValueError(
                f"{field} is {rows.dtype} of shape {rows.shape}; expected integers "
                "[layers, slots], the expert of each slot"
            )
        rows = rows.tolist()
    if not isinstance(rows, (list, tuple)) or not rows:
        raise ValueError(
            f"{field} is {brief(rows)}; expected a list with the experts of each layer"
        )
    checked = {}
    num_slots = len(rows[0]) if isinstance(rows[0], (list, tuple)) else 0
    for layer, row in enumerate(rows):
        checked[layer] = check_row(layer, row)
        if len(row) != num_slots or not num_slots:
            raise ValueError(
                f"layer {layer}: {field} has {len(row)} slots there and {num_slots} in layer 0; "
                "every layer needs the same number of slots, 1 or more"
            )
    return SlotTable(checked, num_slots, numbering, field, num_experts, num_ranks)


def check_row(layer: int, row: Any) -> list[int]:
    """The row as a list of integers; ValueError naming layer and slot where it is none."""
    if isinstance(row, np.ndarray):
        row = row.tolist()
    if not isinstance(row, (list, tuple)):
        raise ValueError(
            f"layer {layer}: holds a {type(row).__name__}, expected the list of each slot's expert"
        )
    for slot, expert in enumerate(row):
        if not is_integer(expert):
            raise ValueError(
                f"layer {layer}, slot {slot}: {brief(expert)} is no expert id; expected an integer"
            )
    return [int(expert) for expert in row]


def rows_of_all_layers(placement: Placement, num_layers: int | None) -> list[list[int]]:
    """[layers][S]: a row for each layer of the model, with dense layers' in expert order.

    `num_layers`, of the model, defaults to the last MoE layer's id plus one. A dense layer's row is
    never read; it is what SGLang itself calls trivial, slot s holding expert s mod E.

    >>> placement = Placement.default(num_experts=2, num_ranks=1, layer_ids=[1])
    >>> rows_of_all_layers(placement, 3)
    [[0, 1], [0, 1], [0, 1]]
    """
    count = layer_count(placement.layer_ids, num_layers)
    rows = (np.arange(placement.num_slots) % placement.num_experts).tolist()
    table = [list(rows) for _ in range(count)]
    for layer, row in zip(
        placement.layer_ids, np.asarray(placement.slot_to_expert).tolist(), strict=True
    ):
        table[layer] = row
    return table


def layer_count(layer_ids: Sequence[int], num_layers: int | None) -> int:
    """The layers of the model: `num_layers`, or up to the last MoE layer."""
    if min(layer_ids) < 0:
        raise ValueError(f"layer {min(layer_ids)}: layers are numbered from 0")
    least = max(layer_ids) + 1
    if num_layers is not None and num_layers < least:
        raise ValueError(
            f"the model is said to have {num_layers} layers, but the plan has layer {least - 1}; "
            f"give {least} or more"
        )
    return least if num_layers is None else num_layers


def listing(ids: Sequence[int]) -> str:
    """
    >>> listing([3, 4, 5, 6, 7]), listing([1, 2])
    ('3, 4, 5, ... 7 (5 layers)', '1, 2')
    """
    if len(ids) <= 4:
        return ", ".join(map(str, ids))
    return f"{ids[0]}, {ids[1]}, {ids[2]}, ... {ids[-1]} ({len(ids)} layers)"


def is_integer(value: Any) -> bool:
    """Whether it is an integer and no bool."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def check_count(value: Any, name: str) -> int:
    """A count of 1 or more as a file gives it; ValueError naming it otherwise."""
    if not is_integer(value) or value < 1:
        raise ValueError(f"{name} is {brief(value)}; expected an integer, 1 or more")
    return int(value)


def _agree(what: str, of_file: int | None, given: int | None) -> int | None:
    if None not in (of_file, given) and of_file != given:
        raise ValueError(f"the file is for {of_file} {what}, but {given} were asked for")
    return given if of_file is None else of_file
