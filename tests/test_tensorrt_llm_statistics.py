"""TensorRT-LLM's directory of expert statistics.

Where nothing else is said: 2 ranks, iterations 100 and 101, layers 3 and 4, 3 experts.
"""

import json
import re
from typing import Any, cast

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings

from jax_eplb.formats.tensorrt_llm_statistics import load_recording, save_recording
from jax_eplb.load import Recording
from jax_eplb.placement import Placement


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
