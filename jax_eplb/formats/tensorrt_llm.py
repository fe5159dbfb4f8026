"""Placements of TensorRT-LLM: its `moe_load_balancer.yaml`.

Keys, as TensorRT-LLM's MoeLoadBalancerConfig has them: `num_slots`; `initial_global_assignments`,
{layer id: [expert of each slot]}, absent for the default layout; `layer_updates_per_iter`, the
number of layers its online balancer renews in each iteration, 0 for a placement that stays.

Axes: L layers, E experts, S slots, P ranks.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from jax_eplb.formats.files import check_file, prefixing, replacing
from jax_eplb.formats.tensorrt_llm_statistics import load_recording as load_recording
from jax_eplb.formats.tensorrt_llm_statistics import save_recording as save_recording
from jax_eplb.placement import Placement, check_sizes

_KEYS = ("num_slots", "initial_global_assignments", "layer_updates_per_iter")


def load_placement(
    source: Any,
    *,
    num_ranks: int,
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
    unknown = next((key for key in config if key not in _KEYS), None)
    if unknown is not None:
        raise ValueError(f"{place}: unknown key {unknown!r}; the keys are {', '.join(_KEYS)}")
    with prefixing(place):
        num_slots = _check_num_slots(config.get("num_slots"))
        _check_updates(config.get("layer_updates_per_iter", 0))
        assignments = config.get("initial_global_assignments")
        if assignments is None or (isinstance(assignments, Mapping) and not assignments):
            return _default(num_slots, num_ranks, num_experts, layer_ids)
        rows = _check_assignments(assignments, num_slots)
        if num_experts is None:
            num_experts = max(map(max, rows.values())) + 1
        check_sizes(num_experts, num_slots, num_ranks)
        ids = sorted(rows) if layer_ids is None else [int(layer) for layer in layer_ids]
        _check_layers(rows, ids)
        return Placement.from_slots(
            [rows[layer] for layer in ids],
            num_experts=num_experts,
            num_ranks=num_ranks,
            layer_ids=ids,
        )


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
        if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {key.value} stands twice", key.start_mark
            )
        if isinstance(key, yaml.ScalarNode):
            seen.add((key.tag, key.value))
    return loader.construct_mapping(node, deep=True)


# The reader in C, where PyYAML was built with it, is six times faster.
_Loader: Any = type("_Loader", (getattr(yaml, "CSafeLoader", yaml.SafeLoader),), {})
yaml.add_constructor("tag:yaml.org,2002:map", _unique_mapping, Loader=_Loader)


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
        return yaml.load(path.read_bytes(), _Loader)
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        detail = " ".join(str(error).split()).replace(' in "<byte string>",', " at")
        raise ValueError(f"{path}: unparsable YAML: {detail}") from error


def _check_num_slots(num_slots: Any) -> int:
    if num_slots is None:
        raise ValueError("num_slots is missing; give the number of slots of all ranks")
    if not _is_integer(num_slots):
        raise ValueError(f"num_slots is {num_slots!r}; expected an integer")
    return int(num_slots)


def _check_updates(updates: Any) -> None:
    if not _is_integer(updates) or updates < 0:
        raise ValueError(f"layer_updates_per_iter is {updates!r}; expected an integer, 0 or more")


def _default(
    num_slots: int,
    num_ranks: int,
    num_experts: int | None,
    layer_ids: Sequence[int] | None,
) -> Placement:
    if num_experts is None or layer_ids is None:
        raise ValueError(
            "no initial_global_assignments, which means the default layout; it depends on the "
            "model, so give num_experts and layer_ids as well"
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
        rows[layer] = _check_row(layer, experts, num_slots)
    return rows


def _layer_id(name: Any) -> int:
    if isinstance(name, str) and name.strip().isdecimal():
        return int(name)
    if isinstance(name, str) or not _is_integer(name) or name < 0:
        raise ValueError(
            f"layer id {name!r} in initial_global_assignments; expected an integer, 0 or more"
        )
    return int(name)


def _check_row(layer: int, experts: Any, num_slots: int) -> list[int]:
    if isinstance(experts, np.ndarray):
        experts = experts.tolist()
    if not isinstance(experts, (list, tuple)):
        raise ValueError(
            f"layer {layer}: holds a {type(experts).__name__}, expected the list of each slot's "
            "expert"
        )
    if len(experts) != num_slots:
        raise ValueError(
            f"layer {layer}: a list of {len(experts)} experts, but num_slots is {num_slots}; "
            "name one expert for each slot"
        )
    for slot, expert in enumerate(experts):
        if not _is_integer(expert):
            raise ValueError(
                f"layer {layer}, slot {slot}: {expert!r} is no expert id; expected an integer"
            )
    return [int(expert) for expert in experts]


def _check_layers(rows: Mapping[int, Any], ids: Sequence[int]) -> None:
    missing = [layer for layer in ids if layer not in rows]
    if missing:
        raise ValueError(
            f"layer {_listing(missing)} missing from initial_global_assignments, which has layer "
            f"{_listing(sorted(rows))}; plan for all layers of the model"
        )
    extra = sorted(set(rows) - set(ids))
    if extra:
        raise ValueError(
            f"layer {_listing(extra)} in initial_global_assignments, but the MoE layers are "
            f"{_listing(ids)}; use the placement of this model"
        )


def _listing(ids: Sequence[int]) -> str:
    """
    >>> _listing([3, 4, 5, 6, 7]), _listing([1, 2])
    ('3, 4, 5, ... 7 (5 layers)', '1, 2')
    """
    if len(ids) <= 4:
        return ", ".join(map(str, ids))
    return f"{ids[0]}, {ids[1]}, {ids[2]}, ... {ids[-1]} ({len(ids)} layers)"


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
