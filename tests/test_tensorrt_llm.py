"""TensorRT-LLM's moe_load_balancer.yaml and its directory of expert statistics."""

import dataclasses
import json
import re
from typing import Any, cast

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import yaml
from hypothesis import given, settings

from jax_eplb.formats.tensorrt_llm import (
    load_placement,
    load_recording,
    placement_to_dict,
    save_placement,
    save_recording,
)
from jax_eplb.load import Recording
from jax_eplb.placement import Placement, max_replicas


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


# Recordings. A directory of 2 ranks, iterations 100 and 101, layers 3 and 4, 3 experts.


def _tensors(rank: int = 0, width: int = 3) -> dict[str, np.ndarray]:
    names = [f"{iteration}_{layer}" for iteration in (100, 101) for layer in (3, 4)]
    return {
        name: np.arange(width, dtype=np.int64) + 10 * k + 100 * rank for k, name in enumerate(names)
    }


def write_directory(path, ranks, meta=None):
    path.mkdir(exist_ok=True)
    for rank, tensors in ranks.items():
        (path / f"rank{rank}.safetensors").write_bytes(safetensors.numpy.save(tensors))
    if meta is None:
        meta = {"num_experts": 3, "num_experts_per_token": 2}
    (path / "meta_info.json").write_text(meta if isinstance(meta, str) else json.dumps(meta))
    return path


def test_the_load_is_the_sum_over_rank_files(tmp_path):
    ranks = {0: _tensors(0), 1: _tensors(1)}
    recording = load_recording(write_directory(tmp_path, ranks))
    assert recording.iterations == (100, 101)
    assert recording.layer_ids == (3, 4)
    assert (recording.num_experts, recording.experts_per_token) == (3, 2)
    assert recording.unit == "experts"
    for w, iteration in enumerate((100, 101)):
        for layer_at, layer in enumerate((3, 4)):
            expected = sum(tensors[f"{iteration}_{layer}"] for tensors in ranks.values())
            np.testing.assert_array_equal(recording.counts[w, layer_at], expected)


def test_iterations_are_ordered_as_numbers(tmp_path):
    tensors = {f"{i}_0": np.array([i, 0, 0]) for i in (9, 100, 20)}
    recording = load_recording(write_directory(tmp_path, {0: tensors}))
    assert recording.iterations == (9, 20, 100)
    assert recording.counts[:, 0, 0].tolist() == [9, 20, 100]


def test_other_files_of_the_recorder_are_left_alone(tmp_path):
    write_directory(tmp_path, {0: _tensors()})
    (tmp_path / "rank0_raw.safetensors").write_bytes(b"not read")
    (tmp_path / "rank0_numtokens.json").write_text("{}")
    assert load_recording(tmp_path).counts.shape == (2, 2, 3)


def test_tensors_longer_than_the_experts_are_slots(tmp_path):
    recording = load_recording(write_directory(tmp_path, {0: _tensors(width=4)}))
    assert recording.unit == "slots"
    assert recording.num_experts == 3


def test_the_caller_says_slots_where_their_number_is_that_of_experts(tmp_path):
    write_directory(tmp_path, {0: _tensors()})
    assert load_recording(tmp_path, unit="slots").unit == "slots"


def test_the_active_placement_says_slots_and_the_number_of_experts(tmp_path):
    # With a balancer on, TensorRT-LLM writes the number of slots as num_experts.
    meta = {"num_experts": 4, "num_experts_per_token": 2}
    write_directory(tmp_path, {0: _tensors(width=4)}, meta)
    assert load_recording(tmp_path).unit == "experts"
    rows = [[2, 0, 1, 0], [1, 2, 0, 1]]
    placement = Placement.from_slots(rows, num_experts=3, num_ranks=2, layer_ids=(3, 4))
    recording = load_recording(tmp_path, active_placement=placement)
    assert (recording.unit, recording.num_experts) == ("slots", 3)
    assert recording.expert_counts()[0].tolist() == [[1 + 3, 2, 0], [12, 10 + 13, 11]]


def test_a_placement_of_other_layers_is_refused(tmp_path):
    write_directory(tmp_path, {0: _tensors()})
    placement = Placement.default(num_experts=3, num_ranks=1, layer_ids=(0, 1))
    with pytest.raises(ValueError, match=r"layers \(0, 1\) are not the recording's \(3, 4\)"):
        load_recording(tmp_path, active_placement=placement)


@given(
    st.lists(st.integers(0, 2**40), min_size=12, max_size=12),
    st.sampled_from(["experts", "slots"]),
    st.sets(st.integers(0, 10**6), min_size=2, max_size=2).map(sorted),
)
@settings(derandomize=True, deadline=None, max_examples=25)
def test_a_written_directory_is_read_back_the_same(tmp_path_factory, counts, unit, iterations):
    directory = tmp_path_factory.mktemp("statistics") / "new"
    table = np.array(counts).reshape(2, 2, 3)
    recording = Recording(table, 3, 2, unit, layer_ids=(3, 60), iterations=tuple(iterations))
    save_recording(recording, directory)
    read = load_recording(directory)
    np.testing.assert_array_equal(read.counts, table)
    assert (read.unit, read.num_experts, read.experts_per_token) == (unit, 3, 2)
    assert (read.layer_ids, read.iterations) == ((3, 60), tuple(iterations))


def test_a_directory_is_written_as_tensorrt_llm_reads_it(tmp_path):
    table = np.arange(12).reshape(2, 2, 3)
    save_recording(Recording(table, 3, 2, layer_ids=(3, 4), iterations=(7, 8)), tmp_path)
    meta = json.loads((tmp_path / "meta_info.json").read_text())
    assert meta["num_experts"] == 3
    assert meta["num_experts_per_token"] == 2
    tensors = safetensors.numpy.load_file(tmp_path / "rank0.safetensors")
    assert sorted(tensors) == ["7_3", "7_4", "8_3", "8_4"]
    assert tensors["8_3"].tolist() == [6, 7, 8]
    assert tensors["8_3"].dtype == np.int64


def test_a_directory_with_other_ranks_files_is_not_written_to(tmp_path):
    write_directory(tmp_path, {0: _tensors(), 1: _tensors()})
    with pytest.raises(ValueError, match=r"holds rank1\.safetensors already; choose an empty"):
        save_recording(Recording(np.ones((1, 1, 3), int), 3, 1), tmp_path)


def test_numbers_that_repeat_are_not_written(tmp_path):
    recording = Recording(np.ones((2, 1, 3), int), 3, 1, iterations=(4, 4))
    with pytest.raises(ValueError, match=r"iteration numbers \(4, 4\) repeat"):
        save_recording(recording, tmp_path)


def test_a_directory_that_is_not_there_or_a_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="missing: no such directory"):
        load_recording(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file: is a file, expected a directory"):
        load_recording(tmp_path / "file")


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ("{", "unparsable JSON"),
        ("[]", "holds a list, expected an object"),
        ({"num_experts_per_token": 2}, "the key num_experts is missing"),
        ({"num_experts": 3}, "the key num_experts_per_token is missing"),
        ({"num_experts": "3", "num_experts_per_token": 2}, "num_experts is '3', expected"),
        ({"num_experts": 3, "num_experts_per_token": 0}, "num_experts_per_token is 0, expected"),
        ({"num_experts": True, "num_experts_per_token": 1}, "num_experts is True"),
        (
            {"num_experts": 3, "num_experts_per_token": 2, "unit": "tokens"},
            "unit is 'tokens', expected",
        ),
    ],
)
def test_each_fault_of_meta_info_has_its_message(tmp_path, meta, message):
    write_directory(tmp_path, {0: _tensors()}, meta)
    with pytest.raises(ValueError, match=rf"meta_info\.json: {message}"):
        load_recording(tmp_path)


def test_a_directory_without_meta_info_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"meta_info\.json: no such file"):
        load_recording(tmp_path)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({}, r"no file rank0\.safetensors; nothing was recorded here"),
        ({0: _tensors(), 2: _tensors()}, r"no file rank1\.safetensors, but rank2"),
        ({1: _tensors()}, r"no file rank0\.safetensors, but rank1"),
        ({0: {}}, r"rank0\.safetensors: holds no tensor"),
        ({0: {"100": np.arange(3)}}, r"rank0\.safetensors: tensor '100': expected a name"),
        ({0: {"100_None": np.arange(3)}}, r"tensor '100_None': expected a name"),
        ({0: {"0100_3": np.arange(3)}}, r"tensor '0100_3': expected a name"),
        ({0: {"1_3": np.ones(3, np.float32)}}, r"tensor '1_3' is float32, expected integer"),
        ({0: {"1_3": np.ones(3, bool)}}, r"tensor '1_3' is bool, expected integer"),
        ({0: {"1_3": np.ones((1, 3), int)}}, r"tensor '1_3' has shape \(1, 3\), expected one"),
        ({0: {"1_3": np.ones(0, int)}}, r"tensor '1_3' has shape \(0,\)"),
        (
            {0: {"1_3": np.arange(3), "1_4": np.arange(4)}},
            r"rank0\.safetensors: tensor '1_4' has 4 counts, but others have 3",
        ),
        (
            {0: {"1_3": np.arange(3), "1_4": np.array([0, -5, 1])}},
            r"rank0\.safetensors: tensor '1_4': negative count -5 at 1",
        ),
        (
            {0: {"1_3": np.arange(3), "1_4": np.arange(3), "2_3": np.arange(3)}},
            r"rank0\.safetensors: no tensor '2_4' \(iteration 2, layer 4\); all layers",
        ),
        (
            {0: _tensors(), 1: {"100_3": np.arange(3)}},
            r"rank1\.safetensors: no tensor '100_4' .*, which rank0\.safetensors has",
        ),
        (
            {0: {"1_3": np.arange(3)}, 1: {"1_3": np.arange(3), "1_4": np.arange(3)}},
            r"rank0\.safetensors: no tensor '1_4' .*, which rank1\.safetensors has",
        ),
        (
            {0: {"1_3": np.arange(3)}, 1: {"1_3": np.arange(4)}},
            r"rank1\.safetensors: tensors of 4 counts, but 3 in rank0",
        ),
        ({0: {"1_3": np.arange(2)}}, r"tensors of 2 counts cannot hold 3 experts"),
    ],
)
def test_each_fault_of_the_rank_files_has_its_message(tmp_path, ranks, message):
    with pytest.raises(ValueError, match=re.escape(str(tmp_path)) + ".*" + message):
        load_recording(write_directory(tmp_path, ranks))


def test_a_tensor_of_bfloat16_is_refused(tmp_path):
    write_directory(tmp_path, {0: {"1_3": np.ones(3, jnp.bfloat16)}})
    with pytest.raises(ValueError, match=r"rank0\.safetensors: .*(bfloat16|BF16)"):
        load_recording(tmp_path)


def test_every_truncation_of_a_rank_file_is_refused(tmp_path):
    path = write_directory(tmp_path, {0: _tensors()}) / "rank0.safetensors"
    whole = path.read_bytes()
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"rank0\.safetensors: damaged \.safetensors file"):
            load_recording(tmp_path)


def test_wrong_options_are_named(tmp_path):
    write_directory(tmp_path, {0: _tensors()})
    with pytest.raises(ValueError, match="unit is 'tokens'; use 'experts' or 'slots'"):
        load_recording(tmp_path, unit=cast(Any, "tokens"))
    with pytest.raises(ValueError, match="experts_per_token is 0; it must be at least 1"):
        load_recording(tmp_path, experts_per_token=0)
