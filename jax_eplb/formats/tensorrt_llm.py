"""Placements of TensorRT-LLM: its `moe_load_balancer.yaml`.

Keys, as TensorRT-LLM's MoeLoadBalancerConfig has them: `num_slots`; `initial_global_assignments`,
{layer id: [expert of each slot]}, absent for the default layout; `layer_updates_per_iter`, the
number of layers its online balancer renews in each iteration, 0 for a placement that stays.

Axes: L layers, E experts, S slots, P ranks.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from jax_eplb.formats.files import DAMAGE, brief, check_file, prefixing, read_limited, replacing
from jax_eplb.formats.slot_tables import SlotTable, check_row, is_integer
from jax_eplb.formats.tensorrt_llm_statistics import load_recording as load_recording
from jax_eplb.formats.tensorrt_llm_statistics import save_recording as save_recording
from jax_eplb.placement import Placement

ASSIGNMENTS = "initial_global_assignments"
_KEYS = ("num_slots", ASSIGNMENTS, "layer_updates_per_iter")
# A plan of 100 layers of 1024 slots has half a megabyte; YAML takes 180 bytes and more of memory
# for each byte of a file.
_MAX_BYTES = 4 << 20
_MAX_SLOTS = 1 << 20


def load_placement(
    source: Any,
    *,
    num_ranks: int | None,
    num_experts: int | None = None,
    layer_ids: Sequence[int] | None = None,
) -> Placement:
    """The placement in a YAML file (a path), a mapping, or an object with its keys as attributes.

    `num_experts` defaults to the largest expert id plus one. `layer_ids`, where given, are the
    MoE layers of the model or recording: the placement must name these and no others. Without
    `initial_global_assignments` it is the default layout, which needs both. Raises ValueError
    naming file, layer and value.

    >>> config = {"num_slots": 4, "initial_global_assignments": {3: [0, 1, 2, 0]}}
    >>> load_placement(config, num_ranks=2).layer_ids
    (3,)
    """
    place, config = _read_config(source)
    with prefixing(place):
        table = _slot_table(config)
        if not table.rows:
            return _default(table.num_slots, num_ranks, num_experts, layer_ids)
        return table.placement(num_ranks=num_ranks, num_experts=num_experts, layer_ids=layer_ids)


def read_slots(source: Any) -> SlotTable:
    """What `load_placement` reads, before ranks and layers are known; no rows: the default layout.

    Raises ValueError naming file, layer and value.
    """
    place, config = _read_config(source)
    with prefixing(place):
        return _slot_table(config)


def load_layer_updates(source: Any) -> int:
    """`layer_updates_per_iter` of what `load_placement` reads; 0 where it does not say.

    >>> load_layer_updates({"num_slots": 4, "layer_updates_per_iter": 2})
    2
    """
    place, config = _read_config(source)
    updates = config.get("layer_updates_per_iter", 0)
    with prefixing(place):
        _check_updates(updates)
    return int(updates)


def placement_to_dict(placement: Placement, *, layer_updates_per_iter: int = 0) -> dict[str, Any]:
    """The keys of `moe_load_balancer.yaml` as plain Python values."""
    _check_updates(layer_updates_per_iter)
    table = np.asarray(placement.slot_to_expert).tolist()
    return {
        "num_slots": placement.num_slots,
        "initial_global_assignments": dict(zip(placement.layer_ids, table, strict=True)),
        "layer_updates_per_iter": layer_updates_per_iter,
    }


def save_placement(
    placement: Placement, path: str | os.PathLike, *, layer_updates_per_iter: int = 0
) -> None:
    """Write `moe_load_balancer.yaml`, one line a layer, whole or not at all."""
    config = placement_to_dict(placement, layer_updates_per_iter=layer_updates_per_iter)
    text = yaml.dump(config, Dumper=_Dumper, width=float("inf"), sort_keys=False)
    with replacing(path) as file:
        file.write(text.encode())


class _Dumper(yaml.SafeDumper):
    """Mappings in blocks, lists each on one line."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    list,
    lambda dumper, row: dumper.represent_sequence("tag:yaml.org,2002:seq", row, flow_style=True),
)


def _unique_mapping(loader: Any, node: Any) -> Any:
    """Refuse a mapping that names a key twice, where YAML's readers keep the last."""
    seen = set()
    for key, _ in node.value:
        # Merging copies, so that mappings which merge each other twice grow without bound.
        if key.tag == "tag:yaml.org,2002:merge":
            raise yaml.constructor.ConstructorError(
                None, None, "merge keys (<<) are not read", key.start_mark
            )
        if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {key.value[:80]} stands twice", key.start_mark
            )
        if isinstance(key, yaml.ScalarNode):
            seen.add((key.tag, key.value))
    return loader.construct_mapping(node, deep=True)


def _integer(loader: Any, node: Any) -> int:
    """A decimal integer. YAML's to base 60 would take time squared in their length."""
    text = loader.construct_scalar(node)
    if not re.fullmatch(r"[-+]?(0|[1-9][0-9]{0,17})", text):
        raise yaml.constructor.ConstructorError(
            None, None, f"{text[:80]} is no decimal integer of 18 digits at most", node.start_mark
        )
    return int(text)


def _float(loader: Any, node: Any) -> float:
    return float(loader.construct_scalar(node))


# The reader in C, where PyYAML was built with it, is six times faster.
_Loader: Any = type("_Loader", (getattr(yaml, "CSafeLoader", yaml.SafeLoader),), {})
for _name, _construct in (("map", _unique_mapping), ("int", _integer), ("float", _float)):
    yaml.add_constructor(f"tag:yaml.org,2002:{_name}", _construct, Loader=_Loader)


def _slot_table(config: Mapping[str, Any]) -> SlotTable:
    unknown = next((key for key in config if key not in _KEYS), None)
    if unknown is not None:
        raise ValueError(f"unknown key {brief(unknown)}; the keys are {', '.join(_KEYS)}")
    num_slots = _check_num_slots(config.get("num_slots"))
    _check_updates(config.get("layer_updates_per_iter", 0))
    assignments = config.get(ASSIGNMENTS)
    if assignments is None:
        assignments = {}
    rows = _check_assignments(assignments, num_slots)
    return SlotTable(rows, num_slots, "names", ASSIGNMENTS)


def _read_config(source: Any) -> tuple[str, Mapping[str, Any]]:
    """What to name in errors, and the keys with their values."""
    if isinstance(source, (str, os.PathLike)):
        path = check_file(source)
        config = _read_yaml(path)
        if not isinstance(config, Mapping):
            raise ValueError(
                f"{path}: holds a {type(config).__name__}, expected a mapping with {_KEYS[0]}"
            )
        return str(path), config
    if isinstance(source, Mapping):
        return "placement", source
    if not all(hasattr(source, key) for key in _KEYS):
        raise ValueError(
            f"a placement cannot be read from a {type(source).__name__}; give a path, a mapping, "
            f"or an object with {', '.join(_KEYS)}"
        )
    config = {key: getattr(source, key) for key in _KEYS if hasattr(source, key)}
    return type(source).__name__, config


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.load(read_limited(path, _MAX_BYTES), _Loader)
    except (yaml.YAMLError, *DAMAGE) as error:
        detail = " ".join(str(error).split()).replace(' in "<byte string>",', " at")
        raise ValueError(f"{path}: unparsable YAML: {detail}") from error


def _check_num_slots(num_slots: Any) -> int:
    if num_slots is None:
        raise ValueError("num_slots is missing; give the number of slots of all ranks")
    if not is_integer(num_slots):
        raise ValueError(f"num_slots is {brief(num_slots)}; expected an integer")
    if num_slots > _MAX_SLOTS:
        raise ValueError(f"num_slots is {num_slots}; at most {_MAX_SLOTS} are read")
    return int(num_slots)


def _check_updates(updates: Any) -> None:
    if not is_integer(updates) or updates < 0:
        raise ValueError(
            f"layer_updates_per_iter is {brief(updates)}; expected an integer, 0 or more"
        )


def _default(
    num_slots: int,
    num_ranks: int | None,
    num_experts: int | None,
    layer_ids: Sequence[int] | None,
) -> Placement:
    if num_experts is None or layer_ids is None or num_ranks is None:
        raise ValueError(
            "no initial_global_assignments, which means the default layout; it depends on the "
            "model, so give num_experts and layer_ids as well as num_ranks"
        )
    return Placement.default(
        num_experts=num_experts, num_slots=num_slots, num_ranks=num_ranks, layer_ids=layer_ids
    )


def _check_assignments(assignments: Any, num_slots: int) -> dict[int, list[int]]:
    """Rows of `num_slots` integers by layer id."""
    if not isinstance(assignments, Mapping):
        raise ValueError(
            f"initial_global_assignments is a {type(assignments).__name__}; expected a mapping "
            "from layer id to the list of each slot's expert"
        )
    rows: dict[int, list[int]] = {}
    for name, experts in assignments.items():
        layer = _layer_id(name)
        if layer in rows:
            raise ValueError(f"layer {layer} stands twice in initial_global_assignments")
        rows[layer] = check_row(layer, experts)
        if len(rows[layer]) != num_slots:
            raise ValueError(
                f"layer {layer}: a list of {len(experts)} experts, but num_slots is {num_slots}; "
                "name one expert for each slot"
            )
    return rows


def _layer_id(name: Any) -> int:
    if isinstance(name, str) and name.strip().isdecimal():
        return int(name)
    if isinstance(name, str) or not is_integer(name) or name < 0:
        raise ValueError(f"layer id {brief(name)} in {ASSIGNMENTS}; expected an integer, 0 or more")
    return int(name)
