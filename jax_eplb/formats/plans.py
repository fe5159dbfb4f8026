"""Plans of any engine: read by what is in them, written for the engine that is to read them."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_eplb.formats import (
    expert_locations,
    sglang,
    sglang_jax,
    tensorrt_llm,
    vllm,
    vllm_ascend,
)
from jax_eplb.formats.files import prefixing, read_json
from jax_eplb.formats.kinds import Kind, kind_of
from jax_eplb.formats.slot_tables import SlotTable
from jax_eplb.formats.torch_file import read_torch_file
from jax_eplb.placement import Placement

_SAVERS: dict[str, Callable[..., None]] = {
    "trtllm": tensorrt_llm.save_placement,
    "sglang": sglang.save_placement,
    "sglang-jax": sglang_jax.save_placement,
    "vllm": vllm.save_placement,
    "vllm-ascend": vllm_ascend.save_placement,
}
ENGINES = tuple(_SAVERS)


def load_placement(
    source: Any,
    *,
    num_ranks: int | None = None,
    num_experts: int | None = None,
    layer_ids: Sequence[int] | None = None,
    unsafe_pickle: bool = False,
) -> Placement:
    """The placement in a file of any engine's form, told by its content; or in a mapping.

    Files: TensorRT-LLM's `moe_load_balancer.yaml`; SGLang's `physical_to_logical_map` as `.json` or
    `.pt`; SGLang-JAX's as `.json` or `.npy`, which needs `unsafe_pickle` where it is a pickle;
    vLLM's EPLB state; vLLM-Ascend's expert map. A mapping has the keys of one of these, or is an
    object with TensorRT-LLM's as attributes.

    `num_ranks` is needed wherever the file does not say it; vLLM-Ascend's does. `num_experts`
    defaults to what the file says, or to the largest expert id plus one. `layer_ids`, where given,
    are the MoE layers of the model: rows of dense layers are left out, rows that a file numbers
    from its first MoE layer are theirs in this order, and layers that it names must be these.
    Raises ValueError naming file, layer and value.

    >>> state = {"num_logical_experts": 2, "physical_to_logical_map": [[0, 1, 0, 1]]}
    >>> load_placement(state, num_ranks=2, layer_ids=[3]).layer_ids
    (3,)
    """
    place, content = _read(source, unsafe_pickle)
    if content is None:
        return tensorrt_llm.load_placement(
            source, num_ranks=num_ranks, num_experts=num_experts, layer_ids=layer_ids
        )
    with prefixing(place):
        return _slots_of(content).placement(
            num_ranks=num_ranks, num_experts=num_experts, layer_ids=layer_ids
        )


def load_slots(source: Any, *, unsafe_pickle: bool = False) -> SlotTable:
    """What `load_placement` reads, before ranks and layers are known."""
    place, content = _read(source, unsafe_pickle)
    if content is None:
        return tensorrt_llm.read_slots(source)
    with prefixing(place):
        return _slots_of(content)


def load_layer_updates(source: Any) -> int:
    """The layers that TensorRT-LLM's online balancer may update in an iteration; 0 of others'."""
    _, content = _read(source, unsafe_pickle=True)
    return tensorrt_llm.load_layer_updates(source) if content is None else 0


def save_placement(
    placement: Placement,
    path: str | os.PathLike,
    *,
    engine: str = "trtllm",
    layer_updates_per_iter: int = 0,
    num_layers: int | None = None,
) -> None:
    """Write the placement for "trtllm", "sglang", "sglang-jax", "vllm" or "vllm-ascend".

    `layer_updates_per_iter` is TensorRT-LLM's. `num_layers`, of the whole model, is of the files
    that have a row for each layer, SGLang's and SGLang-JAX's: by default up to the last MoE layer.
    The file is written whole or not at all. Raises ValueError for an unknown engine, an option that
    is another's, a suffix by which the engine would not know the format, and what it cannot serve.
    """
    if engine not in _SAVERS:
        raise ValueError(f"engine is {engine!r}; use one of {', '.join(ENGINES)}")
    options: dict[str, int] = {}
    if layer_updates_per_iter:
        _check_owner("layer_updates_per_iter", engine, ("trtllm",))
        options["layer_updates_per_iter"] = layer_updates_per_iter
    if num_layers is not None:
        _check_owner("num_layers", engine, ("sglang", "sglang-jax"))
        options["num_layers"] = num_layers
    _check_full(placement)
    _SAVERS[engine](placement, path, **options)


def _check_full(placement: Placement) -> None:
    """Raise ValueError where a slot is empty: it holds the id E, which no engine knows."""
    empty = np.argwhere(np.asarray(placement.slot_to_expert) >= placement.num_experts)
    if empty.size:
        position, slot = empty[0].tolist()
        raise ValueError(
            f"layer {placement.layer_ids[position]}, slot {slot}: is empty, which no engine's file "
            "can say; plan for the ranks that are there"
        )


def holds_plan(path: Path, *, unsafe_pickle: bool = False) -> bool:
    """Whether a path has a plan, not a recording; ValueError where it cannot be read.

    An array without a name is a plan where each row holds all experts from 0 to the largest.
    """
    kind = kind_of(path)
    if kind in (Kind.DIRECTORY, Kind.NPZ, Kind.SAFETENSORS, Kind.UNKNOWN):
        return False
    content = _read_file(path, kind, unsafe_pickle)
    if isinstance(content, np.ndarray):
        return _is_table(content)
    return not (isinstance(content, Mapping) and _is_recording(content))


def _is_recording(content: Mapping[Any, Any]) -> bool:
    plan = (expert_locations.SLOTS, vllm_ascend.LAYERS, tensorrt_llm.ASSIGNMENTS, "num_slots")
    return not any(key in content for key in plan)


def _is_table(array: np.ndarray) -> bool:
    if array.ndim != 2 or not array.size or not np.issubdtype(array.dtype, np.integer):
        return False
    largest = int(array.max())
    if not 0 <= largest < array.shape[1]:
        return False
    return all(np.array_equal(np.unique(row), np.arange(largest + 1)) for row in array)


def _read(source: Any, unsafe_pickle: bool) -> tuple[str, Any]:
    """What to name in errors, and the content; None of it where it is TensorRT-LLM's to read."""
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if not path.is_file():  # named there
            return str(path), None
        content = _read_file(path, kind := kind_of(path), unsafe_pickle)
        if kind is Kind.NPY and isinstance(content, np.ndarray):
            content = {expert_locations.SLOTS: content}  # as SGLang-JAX takes it
        return str(path), content
    if isinstance(source, Mapping) and (
        expert_locations.SLOTS in source or vllm_ascend.LAYERS in source
    ):
        return "placement", source
    return "placement", None


def _read_file(path: Path, kind: Kind, unsafe_pickle: bool) -> Any:
    """What is in the file; None for text of TensorRT-LLM's."""
    if kind is Kind.TORCH:
        return read_torch_file(path)
    if kind is Kind.NPY:
        return sglang_jax.read_content(path, unsafe_pickle=unsafe_pickle)
    if kind is Kind.JSON:
        content = read_json(path)
        return None if isinstance(content, dict) and "num_slots" in content else content
    if kind in (Kind.NPZ, Kind.SAFETENSORS):
        raise ValueError(f"{path}: a recording, where a plan was expected")
    return None


def _slots_of(content: Any) -> SlotTable:
    if isinstance(content, Mapping):
        if vllm_ascend.LAYERS in content:
            return vllm_ascend.slots_of(content)
        if vllm.EXPERTS in content:
            return vllm.slots_of(content)
        if expert_locations.SLOTS in content:
            return expert_locations.slots_of(content)
        if expert_locations.COUNTS in content:
            raise ValueError("a recording, where a plan was expected")
        raise ValueError(
            f"no plan of any engine: none of {expert_locations.SLOTS}, {vllm_ascend.LAYERS} and "
            "num_slots is in it"
        )
    return vllm.slots_of(content)


def _check_owner(option: str, engine: str, owners: tuple[str, ...]) -> None:
    if engine not in owners:
        raise ValueError(f"{option} is an option of {' and '.join(owners)}; {engine} has none")
