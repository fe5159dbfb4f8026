"""vLLM-Ascend: the placement of its static EPLB, the file of `expert_map_path`.

{`moe_layer_count`, `layer_list` [{`layer_id`, `device_count`, `device_list` [{`device_id`,
`device_expert` [expert of each slot]}]}]}. The engine goes by position: the i-th of `layer_list` is
the i-th MoE layer, the r-th of `device_list` is rank r, and all devices have as many slots. It
finds an expert's slot on a device by the expert's id, so a device holds an expert once.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from jax_eplb.formats.files import brief, check_suffix, replacing
from jax_eplb.formats.slot_tables import SlotTable, check_count, check_row, table_of_rows
from jax_eplb.placement import Placement

LAYERS = "layer_list"
_COUNT = "moe_layer_count"


def slots_of(content: Mapping[Any, Any]) -> SlotTable:
    """The table of an expert map; ValueError naming layer and device where it is faulty."""
    layers = content.get(LAYERS)
    if not isinstance(layers, list) or not layers:
        raise ValueError(f"{LAYERS} is {brief(layers)}; expected a list of layers")
    if check_count(content.get(_COUNT), _COUNT) != len(layers):
        raise ValueError(f"{_COUNT} is {content[_COUNT]}, but {LAYERS} has {len(layers)} layers")
    devices = [_devices(position, layer) for position, layer in enumerate(layers)]
    num_ranks = len(devices[0])
    for position, held in enumerate(devices):
        if len(held) != num_ranks:
            raise ValueError(f"layer {position}: {len(held)} devices, but layer 0 has {num_ranks}")
    rows = [[expert for held in layer for expert in held] for layer in devices]
    return table_of_rows(rows, field=LAYERS, numbering="moe", num_ranks=num_ranks)


def _devices(position: int, layer: Any) -> list[list[int]]:
    """The experts of each device of a layer, by rank."""
    if not isinstance(layer, Mapping) or not isinstance(layer.get("device_list"), list):
        raise ValueError(f"layer {position}: no device_list; expected a list of devices")
    for key, expected in (("layer_id", position), ("device_count", len(layer["device_list"]))):
        if layer.get(key, expected) != expected:
            raise ValueError(
                f"layer {position}: {key} is {brief(layer[key])}, but by its place in the "
                f"file it is {expected}; the engine goes by the place"
            )
    held = []
    for rank, device in enumerate(layer["device_list"]):
        if not isinstance(device, Mapping) or "device_expert" not in device:
            raise ValueError(f"layer {position}, device {rank}: no device_expert")
        if device.get("device_id", rank) != rank:
            raise ValueError(
                f"layer {position}: device_id is {brief(device['device_id'])}, but by its "
                f"place in the file it is {rank}; the engine goes by the place"
            )
        held.append(check_row(position, device["device_expert"]))
        if len(held[rank]) != len(held[0]):
            raise ValueError(
                f"layer {position}, device {rank}: {len(held[rank])} experts, but device 0 has "
                f"{len(held[0])}; every device needs the same number of slots"
            )
    if not held:
        raise ValueError(f"layer {position}: device_list is empty")
    return held


def save_placement(placement: Placement, path: str | os.PathLike) -> None:
    """Write the expert map as `.json`; layer ids, which the engine does not have, are not kept.

    Raises ValueError where a rank holds an expert twice, which the engine cannot serve.
    """
    check_suffix(path, (".json",), "vLLM-Ascend")
    shape = (placement.num_layers, placement.num_ranks, placement.slots_per_rank)
    table = np.asarray(placement.slot_to_expert).reshape(shape)
    for layer, ranks in zip(placement.layer_ids, table, strict=True):
        for rank, held in enumerate(ranks):
            experts, counts = np.unique(held, return_counts=True)
            if counts.max() > 1:
                raise ValueError(
                    f"layer {layer}: rank {rank} holds expert {experts[counts.argmax()]} twice, "
                    "which vLLM-Ascend cannot serve; plan with fewer slots, or for more ranks"
                )
    layers = [
        {
            "layer_id": position,
            "device_count": placement.num_ranks,
            "device_list": [
                {"device_id": rank, "device_expert": held} for rank, held in enumerate(ranks)
            ],
        }
        for position, ranks in enumerate(table.tolist())
    ]
    with replacing(path) as file:
        file.write(json.dumps({_COUNT: len(layers), LAYERS: layers}).encode())
