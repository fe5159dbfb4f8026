"""vLLM-Ascend's expert map."""

import copy

import pytest

from jax_eplb.formats.vllm_ascend import save_placement, slots_of
from jax_eplb.placement import Placement

MAP = {
    "moe_layer_count": 2,
    "layer_list": [
        {
            "layer_id": 0,
            "device_count": 2,
            "device_list": [
                {"device_id": 0, "device_expert": [2, 1]},
                {"device_id": 1, "device_expert": [0, 1]},
            ],
        },
        {
            "layer_id": 1,
            "device_count": 2,
            "device_list": [
                {"device_id": 0, "device_expert": [0, 2]},
                {"device_id": 1, "device_expert": [1, 0]},
            ],
        },
    ],
}
ROWS = [[2, 1, 0, 1], [0, 2, 1, 0]]


def test_the_file_is_by_layer_and_device(tmp_path):
    placement = Placement.from_slots(ROWS, num_experts=3, num_ranks=2, layer_ids=[3, 60])
    save_placement(placement, tmp_path / "a.json")
    assert (tmp_path / "a.json").read_text() == (
        '{"moe_layer_count": 2, "layer_list": ['
        '{"layer_id": 0, "device_count": 2, "device_list": '
        '[{"device_id": 0, "device_expert": [2, 1]}, {"device_id": 1, "device_expert": [0, 1]}]}, '
        '{"layer_id": 1, "device_count": 2, "device_list": '
        '[{"device_id": 0, "device_expert": [0, 2]}, {"device_id": 1, "device_expert": [1, 0]}]}]}'
    )
    with pytest.raises(ValueError, match=r"a\.yaml: vLLM-Ascend must be .* named \.json"):
        save_placement(placement, tmp_path / "a.yaml")


def test_a_device_holds_an_expert_once(tmp_path):
    twice = Placement.from_slots([[0, 1, 2, 2]], num_experts=3, num_ranks=2, layer_ids=[5])
    with pytest.raises(ValueError, match="layer 5: rank 1 holds expert 2 twice, which vLLM-Ascend"):
        save_placement(twice, tmp_path / "a.json")
    assert not list(tmp_path.iterdir())


def test_a_map_is_read():
    table = slots_of(MAP)
    assert list(table.rows.values()) == ROWS
    assert (table.num_ranks, table.num_slots, table.numbering) == (2, 4, "moe")


def changed(path, value):
    content = copy.deepcopy(MAP)
    place = content
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return content


_DEVICES = ("layer_list", 1, "device_list")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("layer_list",), [], r"layer_list is \[\]; expected a list of layers"),
        (("layer_list",), None, "layer_list is None; expected a list of layers"),
        (("layer_list", 0), 3, "layer 0: no device_list"),
        (("layer_list", 1, "layer_id"), 4, "layer 1: layer_id is 4, but by its place .* it is 1"),
        (("layer_list", 1, "device_count"), 3, "layer 1: device_count is 3, but by its place"),
        (("moe_layer_count",), 3, "moe_layer_count is 3, but layer_list has 2 layers"),
        (("moe_layer_count",), None, "moe_layer_count is None; expected an integer"),
        (_DEVICES, "x", "layer 1: no device_list"),
        ((*_DEVICES, 1), None, "layer 1: device_count is 2, but by its place in the file it is 1"),
        ((*_DEVICES, 1), 7, "layer 1, device 1: no device_expert"),
        ((*_DEVICES, 0, "device_id"), 1, "layer 1: device_id is 1, but by its place"),
        ((*_DEVICES, 0, "device_expert"), None, "layer 1, device 0: no device_expert"),
        ((*_DEVICES, 1, "device_expert"), [1], "layer 1, device 1: 1 experts, but device 0 has 2"),
        ((*_DEVICES, 0, "device_expert"), ["a", 1], "layer 1, slot 0: 'a' is no expert id"),
        ((*_DEVICES, 0, "device_expert"), {}, "layer 1: holds a dict, expected the list"),
        (
            ("layer_list", 1),
            {"device_list": [{"device_expert": [0, 1, 2, 0]}]},
            "layer 1: 1 devices, but layer 0 has 2",
        ),
        (("layer_list", 1), {"device_list": []}, "layer 1: device_list is empty"),
    ],
)
def test_each_fault_has_its_message(path, value, message):
    with pytest.raises(ValueError, match=message):
        slots_of(changed(path, value))
