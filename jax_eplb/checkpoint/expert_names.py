"""Which tensors of a safetensors checkpoint are experts, by the names that models give them.

Axes: L layers, E experts.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jax_eplb.checkpoint.banks import Bank
from jax_eplb.checkpoint.tensor_files import Tensor


class Family(NamedTuple):
    """Names of one family of models: before the layer's number, between, after the expert's."""

    name: str
    pattern: re.Pattern[str]


# Scales of quantised weights (DeepSeek-V3's `weight_scale_inv`, gpt-oss's `_scales`) are arrays by
# expert like the weights, and so go along with them.
FAMILIES = (
    Family(
        "Mixtral",
        re.compile(r"(.*\blayers\.)(?P<layer>\d+)(\.block_sparse_moe\.experts\.)(?P<expert>\d+)"
                   r"(\.w[123]\..+)"),
    ),
    Family(
        "Qwen3-MoE, DeepSeek-V3",
        re.compile(r"(.*\blayers\.)(?P<layer>\d+)(\.mlp\.experts\.)(?P<expert>\d+)"
                   r"(\.(?:gate|up|down)_proj\..+)"),
    ),
    Family(  # [E, …] for each layer
        "gpt-oss",
        re.compile(r"(.*\blayers\.)(?P<layer>\d+)(\.mlp\.experts\.(?:gate_up|down)_proj"
                   r"(?:_bias|_blocks|_scales)?)"),
    ),
    Family(  # [L, E, …]
        "jax_eplb", re.compile(r"((?:.*\.)?experts\.(?:gate_up|down)(?:_bias)?)")
    ),
)  # fmt: skip


class ExpertTensors(NamedTuple):
    """A bank's experts: an own tensor for each, or rows of tensors with a leading axis."""

    bank: Bank
    num_experts: int
    shape: tuple[int, ...]  # of one expert
    dtype: np.dtype
    # (row of layers, expert) -> tensor, its row, and its name
    tensors: dict[tuple[int, int], tuple[Tensor, int, str]]


def find_experts(
    tensors: Mapping[str, Tensor],
    first_layer: int = 0,
    known: Mapping[str, Bank] | None = None,
) -> tuple[dict[str, ExpertTensors], dict[str, Tensor]]:
    """The banks of experts by name, and all other tensors.

    `first_layer` is the number of the first layer where names do not say it; `known` are banks of
    one tensor each that need not be told by their names. Raises ValueError where no tensor is an
    expert's, an expert's is missing, or those of a bank differ in shape.

    >>> from pathlib import Path
    >>> one = Tensor(Path("a"), np.dtype("f4"), (2, 3), 0)
    >>> names = [f"model.layers.5.mlp.experts.{e}.up_proj.weight" for e in (0, 1)]
    >>> banks, others = find_experts({name: one for name in [*names, "model.norm.weight"]})
    >>> list(banks), list(others)
    (['model.layers.mlp.experts.up_proj.weight'], ['model.norm.weight'])
    """
    groups: dict[str, dict[tuple[int, int], Tensor]] = {}
    templates: dict[str, str] = {}
    banks, others = {}, {}
    for name, tensor in tensors.items():
        if name in (known or {}):
            banks[name] = _known_bank(name, (known or {})[name], tensor)
            continue
        found = next((m for f in FAMILIES if (m := f.pattern.fullmatch(name))), None)
        if found is None:
            others[name] = tensor
            continue
        numbers = found.groupdict()
        template = name
        for field in ("expert", "layer"):  # from the end, so that positions hold
            if field in numbers:
                begin, end = found.span(field)
                template = f"{template[:begin]}{{{field}}}{template[end:]}"
        bank = template.replace("{layer}.", "").replace("{expert}.", "")
        templates[bank] = template
        place = (int(numbers.get("layer", -1)), int(numbers.get("expert", -1)))
        groups.setdefault(bank, {})[place] = tensor
    if not groups and not banks:
        raise ValueError(
            f"none of the {len(tensors)} tensors is an expert's by its name; known are those of "
            f"{', '.join(family.name for family in FAMILIES)}"
        )
    for name, group in groups.items():
        banks[name] = _bank(name, templates[name], group, first_layer)
    return banks, others


def tensor_name(template: str, layer: int, expert: int) -> str:
    """The name of one tensor; a template without a number stands for all of them.

    >>> tensor_name("layers.{layer}.mlp.experts.{expert}.w", 3, 7)
    'layers.3.mlp.experts.7.w'
    """
    return template.replace("{layer}", str(layer)).replace("{expert}", str(expert))


def _bank(
    name: str, template: str, group: dict[tuple[int, int], Tensor], first_layer: int
) -> ExpertTensors:
    first = next(iter(group.values()))
    leading = ("{layer}" not in template) + ("{expert}" not in template)
    for place, tensor in group.items():
        if (tensor.shape, tensor.dtype) != (first.shape, first.dtype):
            raise ValueError(
                f"{tensor.file}: {tensor_name(template, *place)!r} is {tensor.dtype}"
                f"{list(tensor.shape)}, others are {first.dtype}{list(first.shape)}; the experts "
                "of a model must be alike"
            )
    if len(first.shape) < leading:
        raise ValueError(f"{first.file}: {name!r} has shape {list(first.shape)}; no experts in it")
    layers = tuple(sorted({layer for layer, _ in group}))
    if leading == 2:  # one tensor [L, E, …]
        layers = tuple(range(first_layer, first_layer + first.shape[0]))
        return _known_bank(name, Bank(layers, True), first)
    if leading == 1:  # [E, …] for each layer
        num_experts = first.shape[0]
        where = {
            (row, expert): (group[layer, -1], expert, tensor_name(template, layer, 0))
            for row, layer in enumerate(layers)
            for expert in range(num_experts)
        }
    else:
        num_experts = 1 + max(expert for _, expert in group)
        where = {}
        for row, layer in enumerate(layers):
            for expert in range(num_experts):
                own_name = tensor_name(template, layer, expert)
                if (layer, expert) not in group:
                    raise ValueError(
                        f"{own_name!r} is missing; the model has "
                        f"{num_experts} experts in layers {layers[0]} to {layers[-1]}"
                    )
                where[row, expert] = (group[layer, expert], 0, own_name)
    bank = Bank(layers, True, template)
    return ExpertTensors(bank, num_experts, first.shape[leading:], first.dtype, where)


def _known_bank(name: str, bank: Bank, tensor: Tensor) -> ExpertTensors:
    """A bank of one tensor: [L, E, …], or [E, …] of one layer."""
    axis = bank.expert_axis
    if len(tensor.shape) <= axis or (axis and tensor.shape[0] != len(bank.layers)):
        raise ValueError(
            f"{tensor.file}: {name!r} has shape {list(tensor.shape)}, which is not that of experts "
            f"in {len(bank.layers)} layers"
        )
    num_experts = tensor.shape[axis]
    where = {
        (row, expert): (tensor, row * num_experts + expert, name)
        for row in range(len(bank.layers))
        for expert in range(num_experts)
    }
    return ExpertTensors(bank, num_experts, tensor.shape[axis + 1 :], tensor.dtype, where)
