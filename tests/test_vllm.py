"""vLLM's EPLB state as a file."""

import json

import numpy as np
import pytest

from jax_eplb.formats.vllm import save_placement, slots_of
from jax_eplb.placement import Placement

STATE = {
    "num_moe_layers": 2,
    "num_logical_experts": 3,
    "num_physical_experts": 4,
    "physical_to_logical_map": [[2, 1, 0, 1], [0, 2, 1, 0]],
}


def test_the_file_is_the_states_own_names(tmp_path):
    rows = STATE["physical_to_logical_map"]
    placement = Placement.from_slots(rows, num_experts=3, num_ranks=2, layer_ids=[3, 60])
    save_placement(placement, tmp_path / "a.json")
    assert (tmp_path / "a.json").read_text() == (
        '{"num_moe_layers": 2, "num_logical_experts": 3, "num_physical_experts": 4, '
        '"physical_to_logical_map": [[2, 1, 0, 1], [0, 2, 1, 0]]}'
    )
    with pytest.raises(ValueError, match=r"a\.pt: vLLM's state must be .* named \.json"):
        save_placement(placement, tmp_path / "a.pt")


def test_a_state_a_list_and_a_tensor_are_read():
    rows = STATE["physical_to_logical_map"]
    for content in (STATE, rows, np.array(rows)):
        table = slots_of(content)
        assert list(table.rows.values()) == rows
        assert (table.num_slots, table.numbering) == (4, "moe")
    assert slots_of(STATE).num_experts == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_moe_layers": 3}, "num_moe_layers is 3, but physical_to_logical_map has 2"),
        ({"num_physical_experts": 5}, "num_physical_experts is 5, but physical_to_logical_map"),
        ({"num_logical_experts": 0}, "num_logical_experts is 0; expected an integer, 1 or more"),
        ({"num_logical_experts": "3"}, "num_logical_experts is '3'; expected an integer"),
        ({"num_moe_layers": True}, "num_moe_layers is True; expected an integer"),
        ({"physical_to_logical_map": []}, r"physical_to_logical_map is \[\]; expected a list with"),
        ({"physical_to_logical_map": 7}, "physical_to_logical_map is 7; expected a list with"),
        ({"physical_to_logical_map": [1]}, "layer 0: holds a int, expected the list of each"),
        ({"physical_to_logical_map": [[]]}, "layer 0: physical_to_logical_map has 0 slots there"),
        ({"physical_to_logical_map": [[1], [1, 2]]}, "layer 1: physical_to_logical_map has 2"),
        ({"physical_to_logical_map": [[1, None]]}, "layer 0, slot 1: None is no expert id"),
        ({"physical_to_logical_map": [[1, 1.0]]}, "layer 0, slot 1: 1.0 is no expert id"),
        ({"physical_to_logical_map": np.ones((2, 2))}, r"is float64 of shape \(2, 2\); expected"),
        ({"physical_to_logical_map": np.ones(2, int)}, r"is int64 of shape \(2,\); expected"),
    ],
)
def test_each_fault_has_its_message(change, message):
    with pytest.raises(ValueError, match=message):
        slots_of({**STATE, **change})
    no_map = json.loads('{"num_logical_experts": 3}')
    with pytest.raises(ValueError, match="no 'physical_to_logical_map'"):
        slots_of(no_map)
