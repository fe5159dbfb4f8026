import re
from pathlib import Path

import numpy as np
import pytest

from jax_eplb.checkpoint.expert_names import find_experts, tensor_name
from jax_eplb.checkpoint.tensor_files import Tensor, open_tensors, read_range
from tests.hugging_face_cases import (
    EXPERTS,
    FAMILIES,
    arrays_of,
    as_bytes,
    deepseek,
    mixtral,
    write,
)

# Banks of each family: name without numbers, layers, shape of an expert.
BANKS = {
    "mixtral": {
        "model.layers.block_sparse_moe.experts.w1.weight": ((0, 1), (4, 8)),
        "model.layers.block_sparse_moe.experts.w2.weight": ((0, 1), (8, 4)),
        "model.layers.block_sparse_moe.experts.w3.weight": ((0, 1), (4, 8)),
    },
    "deepseek": {
        f"model.layers.mlp.experts.{part}_proj.{kind}": ((1, 2), shape)
        for part in ("gate", "up", "down")
        for kind, shape in (
            ("weight", (8, 4) if part == "down" else (4, 8)),
            ("weight_scale_inv", (1, 1)),
        )
    },
    "gpt_oss": {
        "model.layers.mlp.experts.gate_up_proj_blocks": ((0, 1), (8, 2, 16)),
        "model.layers.mlp.experts.gate_up_proj_scales": ((0, 1), (8, 2)),
        "model.layers.mlp.experts.gate_up_proj_bias": ((0, 1), (8,)),
        "model.layers.mlp.experts.down_proj": ((0, 1), (4, 8)),
        "model.layers.mlp.experts.down_proj_bias": ((0, 1), (8,)),
    },
    "jax_eplb_decoder": {
        "sparse.moe.experts.gate_up": ((0, 1), (8, 8)),
        "sparse.moe.experts.down": ((0, 1), (4, 8)),
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_array_of_the_experts_is_found_and_no_other(tmp_path, family):
    tensors, _ = open_tensors(write(family, tmp_path / "model"))
    banks, others = find_experts(tensors)
    found = {name: (bank.bank.layers, bank.shape) for name, bank in banks.items()}
    assert found == BANKS[family.__name__]
    assert {bank.num_experts for bank in banks.values()} == {EXPERTS}
    assert all("experts." not in name.replace("shared_experts", "") for name in others)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_expert_is_where_the_bank_says(tmp_path, family):
    tensors, _ = open_tensors(write(family, tmp_path / "model"))
    arrays = arrays_of(family)
    for bank in find_experts(tensors)[0].values():
        for (row, expert), (tensor, at, name) in bank.tensors.items():
            template = bank.bank.template or name
            assert name == tensor_name(template, bank.bank.layers[row], expert)
            of_model = arrays[name]
            if bank.bank.template is None:
                of_model = of_model[row, expert]
            elif "{expert}" not in template:
                of_model = of_model[expert]
            size = of_model.nbytes
            found = read_range(tensor, at * size, size)
            np.testing.assert_array_equal(found, as_bytes(of_model))


def test_a_multimodal_models_language_part_is_found_too():
    names = [f"model.language_model.layers.0.mlp.experts.{e}.up_proj.weight" for e in range(2)]
    (bank,) = find_experts(dict.fromkeys(names, some((2, 3))))[0].values()
    assert (
        bank.bank.template
        == "model.language_model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"
    )


def some(shape, dtype="f4"):
    return Tensor(Path("file"), np.dtype(dtype), shape, 0)


def test_the_number_of_the_first_layer_may_be_given_where_names_have_none():
    tensors = {"sparse.moe.experts.down": some((2, 4, 3))}
    assert find_experts(tensors, first_layer=1)[0]["sparse.moe.experts.down"].bank.layers == (1, 2)


def without(family, dropped):
    return {name: some(shape) for name, (_, shape) in family().items() if name != dropped}


def test_a_missing_expert_is_named():
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    message = f"{name!r} is missing; the model has 6 experts in layers 1 to 2"
    with pytest.raises(ValueError, match=re.escape(message)):
        find_experts(without(deepseek, name))


def test_an_expert_of_another_shape_is_named():
    name = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
    tensors = without(mixtral, None) | {name: some((3, 8))}
    message = f"file: {name!r} is float32[3, 8], others are float32[4, 8]"
    with pytest.raises(ValueError, match=re.escape(message)):
        find_experts(tensors)


def test_a_model_without_known_experts_is_refused():
    with pytest.raises(ValueError, match=r"none of the 1 tensors .* Mixtral, Qwen3-MoE, DeepSeek"):
        find_experts({"model.layers.0.mlp.up_proj.weight": some((2, 2))})
