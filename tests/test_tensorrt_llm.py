"""TensorRT-LLM's moe_load_balancer.yaml."""

import dataclasses

import hypothesis.strategies as st
import pytest
import yaml
from hypothesis import given, settings

from jax_eplb.formats.tensorrt_llm import (
    load_layer_updates,
    load_placement,
    placement_to_dict,
    save_placement,
)
from jax_eplb.placement import Placement
from jax_eplb.tables import max_replicas


def check_yaml(path, *, num_ranks, num_experts, layer_ids):
    """What TensorRT-LLM asks of the file, by nothing of ours."""
    config = yaml.safe_load(path.read_text())
    assert set(config) == {"num_slots", "initial_global_assignments", "layer_updates_per_iter"}
    assert config["num_slots"] % num_ranks == 0
    assert type(config["layer_updates_per_iter"]) is int
    assert set(config["initial_global_assignments"]) == set(layer_ids)
    for experts in config["initial_global_assignments"].values():
        assert len(experts) == config["num_slots"]
        assert all(type(expert) is int for expert in experts)
        assert set(experts) == set(range(num_experts))


@st.composite
def placements(draw):
    num_ranks, per_rank = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    num_slots = num_ranks * per_rank
    num_experts = draw(st.integers(1, num_slots))
    layer_ids = sorted(draw(st.sets(st.integers(0, 60), min_size=1, max_size=3)))
    bound = max_replicas(num_experts, num_slots, num_ranks)
    rows = []
    for _ in layer_ids:
        row = list(range(num_experts))
        while len(row) < num_slots:
            row.append(
                draw(st.sampled_from([e for e in range(num_experts) if row.count(e) < bound]))
            )
        rows.append(draw(st.permutations(row)))
    return Placement.from_slots(
        rows, num_experts=num_experts, num_ranks=num_ranks, layer_ids=layer_ids
    )


@given(placements(), st.integers(0, 5))
@settings(derandomize=True, deadline=None, max_examples=40)
def test_a_written_placement_is_valid_and_read_back_the_same(tmp_path_factory, placement, updates):
    path = tmp_path_factory.mktemp("yaml") / "moe_load_balancer.yaml"
    save_placement(placement, path, layer_updates_per_iter=updates)
    sizes = {"num_ranks": placement.num_ranks, "num_experts": placement.num_experts}
    check_yaml(path, **sizes, layer_ids=placement.layer_ids)
    assert yaml.safe_load(path.read_text())["layer_updates_per_iter"] == updates
    read = load_placement(path, **sizes, layer_ids=placement.layer_ids)
    assert read.slot_to_expert.tolist() == placement.slot_to_expert.tolist()
    assert (read.num_experts, read.num_ranks) == (placement.num_experts, placement.num_ranks)
    assert read.layer_ids == placement.layer_ids


def test_the_file_has_one_line_a_layer(tmp_path):
    placement = Placement.default(num_experts=300, num_ranks=3, layer_ids=(3, 4))
    save_placement(placement, tmp_path / "a.yaml")
    lines = (tmp_path / "a.yaml").read_text().splitlines()
    row = ", ".join(map(str, range(300)))
    assert lines == [
        "num_slots: 300",
        "initial_global_assignments:",
        f"  3: [{row}]",
        f"  4: [{row}]",
        "layer_updates_per_iter: 0",
    ]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.yaml"
    path.write_text("old")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_placement(Placement.default(num_experts=2, num_ranks=1), path)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.yaml"]


@dataclasses.dataclass
class MoeLoadBalancerConfig:
    num_slots: int | None = None
    initial_global_assignments: dict | None = None
    layer_updates_per_iter: int = 0
    ep_rank: int | None = None


def test_a_placement_comes_from_a_path_a_mapping_or_an_object(tmp_path):
    rows = {3: [0, 1, 2, 0], 4: [2, 1, 0, 1]}
    config = {"num_slots": 4, "initial_global_assignments": rows, "layer_updates_per_iter": 1}
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(config))
    for source in (str(path), path, config, MoeLoadBalancerConfig(4, rows, 1)):
        placement = load_placement(source, num_ranks=2)
        assert placement.slot_to_expert.tolist() == list(rows.values())
        assert placement.layer_ids == (3, 4)
        assert placement.num_experts == 3


def test_a_placement_turns_into_a_mapping_and_back():
    placement = Placement.default(num_experts=3, num_slots=4, num_ranks=2, layer_ids=(5, 9))
    config = placement_to_dict(placement, layer_updates_per_iter=2)
    assert config == {
        "num_slots": 4,
        "initial_global_assignments": {5: [0, 1, 1, 2], 9: [0, 1, 1, 2]},
        "layer_updates_per_iter": 2,
    }
    assert (
        placement_to_dict(load_placement(config, num_ranks=2), layer_updates_per_iter=2) == config
    )


def test_layers_come_in_the_order_of_the_models():
    config = {"num_slots": 2, "initial_global_assignments": {"10": [0, 1], "9": [1, 0]}}
    assert load_placement(config, num_ranks=1).layer_ids == (9, 10)
    asked = load_placement(config, num_ranks=1, layer_ids=[10, 9])
    assert asked.layer_ids == (10, 9)
    assert asked.slot_to_expert.tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize("assignments", [{}, None, "absent"])
def test_without_assignments_the_default_layout_is_meant(assignments):
    config = {"num_slots": 6, "initial_global_assignments": assignments}
    if assignments == "absent":
        del config["initial_global_assignments"]
    placement = load_placement(config, num_ranks=2, num_experts=4, layer_ids=[3, 4])
    assert placement.slot_to_expert.tolist() == [[0, 1, 2, 2, 3, 0]] * 2
    with pytest.raises(ValueError, match=r"default layout; .* give num_experts and layer_ids"):
        load_placement(config, num_ranks=2, num_experts=4)
    with pytest.raises(ValueError, match="give num_experts and layer_ids"):
        load_placement(config, num_ranks=2, layer_ids=[3])


_FAULTY = [
    ("[1, 2]", "holds a list, expected a mapping"),
    ("num_slots: [1", "unparsable YAML: .* at line 1"),
    ("num_slots: 4\nnum_slots: 6", "unparsable YAML: key num_slots stands twice at line 2"),
    ("slots: 4", "unknown key 'slots'; the keys are num_slots"),
    ("layer_updates_per_iter: 0", "num_slots is missing"),
    ("num_slots: four", "num_slots is 'four'; expected an integer"),
    ("num_slots: true", "num_slots is True; expected an integer"),
    ("num_slots: 4\nlayer_updates_per_iter: -1", "layer_updates_per_iter is -1; expected"),
    ("num_slots: 4\nlayer_updates_per_iter: 1.5", "layer_updates_per_iter is 1.5; expected"),
    ("num_slots: 4\nlayer_updates_per_iter: yes", "layer_updates_per_iter is True; expected"),
    ("{A: [0, 1, 2, 3]}", "layer id 'A' in initial_global_assignments; expected an integer"),
    ("{-1: [0, 1, 2, 3]}", "layer id -1 in initial"),
    ("{3: [0, 1, 2, 3], '3': [0, 1, 2, 3]}", "layer 3 stands twice"),
    ("[[0, 1, 2, 3]]", "initial_global_assignments is a list; expected a mapping"),
    ("{3: 0}", "layer 3: holds a int, expected the list"),
    ("{3: [0, 1, 2]}", "layer 3: a list of 3 experts, but num_slots is 4"),
    ("{3: [0, 1, 2, 3], 4: [0, 1, 2, 3, 0]}", "layer 4: a list of 5 experts, but num_slots is 4"),
    ("{3: [0, 1, 2.0, 3]}", "layer 3, slot 2: 2.0 is no expert id"),
    ("{3: [0, 1, x, 3]}", "layer 3, slot 2: 'x' is no expert id"),
    ("{3: [0, 1, true, 3]}", "layer 3, slot 2: True is no expert id"),
    ("{3: [0, 1, 4, 3]}", "layer 3, slot 2: unknown expert 4; this model's experts are 0 to 3"),
    ("{3: [0, 1, -1, 3]}", "layer 3, slot 2: unknown expert -1"),
    ("{3: [0, 1, 0, 3]}", r"layer 3: expert 2 has no slot \(3 of 4 experts"),
]


@pytest.mark.parametrize(("text", "message"), _FAULTY)
def test_each_faulty_placement_has_its_message(tmp_path, text, message):
    path = tmp_path / "balancer.yaml"
    bare = text.startswith(("{", "[["))
    path.write_text(f"num_slots: 4\ninitial_global_assignments: {text}" if bare else text)
    with pytest.raises(ValueError, match=rf"balancer\.yaml: {message}"):
        load_placement(path, num_ranks=2, num_experts=4)


def _config(rows, num_slots=4):
    return {"num_slots": num_slots, "initial_global_assignments": rows}


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ({3: [0, 1, 2, 3]}, {"num_ranks": 3}, "4 slots cannot be divided among 3 ranks"),
        ({3: [0, 1, 2, 3]}, {"num_ranks": 2, "num_experts": 5}, "4 slots cannot hold 5 experts"),
        ({3: [0, 1, 2, 9]}, {"num_ranks": 2}, "4 slots cannot hold 10 experts"),
        (
            {3: [0, 1, 2, 3], 4: [0, 1, 2, 0]},
            {"num_ranks": 2},
            "layer 4: expert 3 has no slot",
        ),
        (
            {3: [0, 1, 2, 3]},
            {"num_ranks": 2, "layer_ids": [3, 4, 5]},
            "layer 4, 5 missing from initial_global_assignments, which has layer 3",
        ),
        (
            {3: [0, 1, 2, 3], 61: [0, 1, 2, 3]},
            {"num_ranks": 2, "layer_ids": [3]},
            "layer 61 in initial_global_assignments, but the MoE layers are 3",
        ),
    ],
)
def test_a_placement_that_does_not_fit_has_its_message(rows, options, message):
    with pytest.raises(ValueError, match=message):
        load_placement(_config(rows), **options)


def test_a_missing_file_and_another_object_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"a\.yaml: no such file"):
        load_placement(tmp_path / "a.yaml", num_ranks=1)
    with pytest.raises(ValueError, match="is a directory; give a file"):
        load_placement(tmp_path, num_ranks=1)
    with pytest.raises(ValueError, match="cannot be read from a int; give a path"):
        load_placement(4, num_ranks=1)
    with pytest.raises(ValueError, match="cannot be read from a Placement"):
        load_placement(Placement.default(num_experts=2, num_ranks=1), num_ranks=1)


def test_a_placement_with_wrong_updates_is_not_written(tmp_path):
    placement = Placement.default(num_experts=2, num_ranks=1)
    with pytest.raises(ValueError, match="layer_updates_per_iter is -1"):
        save_placement(placement, tmp_path / "a.yaml", layer_updates_per_iter=-1)
    assert not list(tmp_path.iterdir())


def test_the_layers_to_update_are_read_by_themselves(tmp_path):
    placement = Placement.default(num_experts=4, num_ranks=2)
    save_placement(placement, tmp_path / "a.yaml", layer_updates_per_iter=3)
    assert load_layer_updates(tmp_path / "a.yaml") == 3
    assert load_layer_updates({"num_slots": 4}) == 0
    (tmp_path / "b.yaml").write_text("num_slots: 4\nlayer_updates_per_iter: two\n")
    with pytest.raises(ValueError, match=r"b.yaml: layer_updates_per_iter is 'two'; expected"):
        load_layer_updates(tmp_path / "b.yaml")
