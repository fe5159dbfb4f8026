"""`jax-eplb convert`, and that the other commands take a plan of any engine."""

import json

import numpy as np
import pytest

from jax_eplb import Placement, Recording, load_placement, load_recording, save_placement
from jax_eplb import save_recording as save
from jax_eplb.formats import ENGINES, sglang
from tests.command_line import (
    LAYERS,
    fail,
    skewed_counts,
    skewed_recording,
    succeed,
    write_statistics,
)
from tests.engine_readers import FORMS, READERS, SUFFIXES
from tests.placement_cases import random_tables_without_duplicates


@pytest.fixture(scope="module")
def placement() -> Placement:
    table = random_tables_without_duplicates(np.random.default_rng(3), 3, 12, 16, 4)
    return Placement.from_slots(table, num_experts=12, num_ranks=4, layer_ids=LAYERS)


@pytest.fixture
def yaml(tmp_path, placement):
    save_placement(placement, tmp_path / "plan.yaml", layer_updates_per_iter=2)
    return tmp_path / "plan.yaml"


@pytest.mark.parametrize(("engine", "suffix"), FORMS)
def test_a_plan_goes_to_each_engine_and_back(capsys, tmp_path, yaml, placement, engine, suffix):
    out = tmp_path / "folder" / f"out{suffix}"
    ranks = ["--ep-size", 4] if engine == "vllm-ascend" else []
    succeed(capsys, "convert", yaml, out, "--to", engine, *ranks)
    model = {"num_experts": 12, "num_redundant": 4, "num_ranks": 4, "num_layers": 8}
    rows = READERS[engine](out, moe_layers=list(LAYERS), **model)
    assert rows == placement.slot_to_expert.tolist()
    back = tmp_path / "back.yaml"
    text = succeed(capsys, "convert", out, back, "--to", "trtllm", "--layers", "3-4,7")
    assert "slots: 16, redundant experts: 4" in text
    read = load_placement(back, num_ranks=4, layer_ids=LAYERS)
    assert read.slot_to_expert.tolist() == placement.slot_to_expert.tolist()


def test_layer_updates_stay_with_tensorrt_llm(capsys, tmp_path, yaml):
    succeed(capsys, "convert", yaml, tmp_path / "a.yaml", "--to", "trtllm")
    assert "layer_updates_per_iter: 2" in (tmp_path / "a.yaml").read_text()
    more = ["--layer-updates-per-iter", 5]
    succeed(capsys, "convert", yaml, tmp_path / "a.yaml", "--to", "trtllm", *more)
    assert "layer_updates_per_iter: 5" in (tmp_path / "a.yaml").read_text()


def test_the_models_layers_can_be_given(capsys, tmp_path, yaml):
    out = tmp_path / "a.json"
    printed = succeed(capsys, "convert", yaml, out, "--to", "sglang", "--num-layers", 10, "--json")
    assert json.loads(printed) == {
        "output": str(out),
        "to": "sglang",
        "kind": "plan",
        "layers": 3,
        "experts": 12,
        "slots": 16,
        "redundant_experts": 4,
    }
    assert len(json.loads(out.read_text())["physical_to_logical_map"]) == 10


@pytest.mark.parametrize("engine", ENGINES)
def test_report_takes_a_plan_of_any_engine(capsys, tmp_path, placement, engine):
    save(skewed_recording(), tmp_path / "a.npz")
    reports = []
    for name, suffix in (("trtllm", ".yaml"), (engine, SUFFIXES[engine][-1])):
        save_placement(placement, tmp_path / f"plan{suffix}", engine=name)
        options = ["--load-balancer", tmp_path / f"plan{suffix}", "--ep-size", 4, "--json"]
        reports.append(json.loads(succeed(capsys, "report", tmp_path / "a.npz", *options)))
    assert reports[0] == reports[1]


def test_a_recording_goes_to_sglang_and_back(capsys, tmp_path):
    write_statistics(tmp_path / "statistics", skewed_counts())
    for name in ("a.pt", "a.json"):
        succeed(capsys, "convert", tmp_path / "statistics", tmp_path / name, "--to", "sglang")
        known = ["--experts-per-token", 2]
        out = tmp_path / f"{name}.npz"
        text = succeed(capsys, "convert", tmp_path / name, out, "--to", "jax-eplb", *known)
        assert "kind: recording, iterations: 4, layers: 3, experts: 12" in text
        read = load_recording(out)
        np.testing.assert_array_equal(read.counts, skewed_counts())
        assert (read.layer_ids, read.experts_per_token) == (LAYERS, 2)


def test_a_recording_goes_to_tensorrt_llm_and_sglang_jax(capsys, tmp_path):
    sglang.save_recording(skewed_recording(), tmp_path / "a.pt")
    arguments = [tmp_path / "a.pt", tmp_path / "statistics", "--to", "trtllm"]
    succeed(capsys, "convert", *arguments, "--experts-per-token", 2, "--iter-stop", 3)
    read = load_recording(tmp_path / "statistics")
    np.testing.assert_array_equal(read.counts, skewed_counts()[:3])
    assert read.layer_ids == LAYERS
    succeed(capsys, "convert", tmp_path / "statistics", tmp_path / "b.json", "--to", "sglang-jax")
    total = np.array(json.loads((tmp_path / "b.json").read_text())["logical_count"])
    np.testing.assert_array_equal(total[list(LAYERS)], skewed_counts()[:3].sum(axis=0))


def test_a_pickle_is_read_where_the_option_says_so(capsys, tmp_path):
    counts = skewed_counts()[0]
    np.save(tmp_path / "a.npy", np.array({"logical_count": counts}, object))
    arguments = ["convert", tmp_path / "a.npy", tmp_path / "b.npz", "--to", "jax-eplb"]
    assert "holds a pickle" in fail(capsys, *arguments)
    succeed(capsys, *arguments, "--unsafe-pickle")
    np.testing.assert_array_equal(load_recording(tmp_path / "b.npz").counts[0], counts)
    assert "holds a pickle" in fail(capsys, "report", tmp_path / "a.npy", "--ep-size", 4)
    succeed(capsys, "report", tmp_path / "a.npy", "--ep-size", 4, "--unsafe-pickle")


def recording_file(tmp_path):
    save(skewed_recording(), tmp_path / "a.npz")
    return tmp_path / "a.npz"


def slots_file(tmp_path):
    save(Recording(np.ones((1, 1, 4), int), 3, 1, "slots"), tmp_path / "a.npz")
    return tmp_path / "a.npz"


def plan_file(tmp_path):
    placement = Placement.default(num_experts=12, num_ranks=4, num_slots=16, layer_ids=LAYERS)
    save_placement(placement, tmp_path / "a.yaml")
    return tmp_path / "a.yaml"


def default_plan(tmp_path):
    (tmp_path / "a.yaml").write_text("num_slots: 16\nlayer_updates_per_iter: 2\n")
    return tmp_path / "a.yaml"


@pytest.mark.parametrize(
    ("source", "out", "options", "message"),
    [
        (plan_file, "b.json", ["--to", "vllm-ascend"], "needs --ep-size: its file lists each rank"),
        (plan_file, "b.json", ["--to", "jax-eplb"], "own form of it is TensorRT-LLM's: use"),
        (plan_file, "b.yaml", ["--to", "sglang"], "must be written to a file named .json or .pt"),
        (plan_file, "a.yaml", ["--to", "trtllm"], "is read from; give another path"),
        (plan_file, "b.json", ["--to", "vllm", "--layers", "3,4"], "layer 7 in initial_global"),
        (plan_file, "b.json", ["--to", "vllm", "--ep-size", "3"], "16 slots cannot be divided"),
        (plan_file, "b.json", ["--to", "vllm", "--num-layers", "9"], "num_layers is an option of"),
        (default_plan, "b.json", ["--to", "sglang"], "the default layout; it depends on the model"),
        (recording_file, "b.json", ["--to", "vllm"], "a recording, of which vllm reads no form"),
        (recording_file, "b.json", ["--to", "sglang", "--layers", "3"], "--layers is for plans"),
        (recording_file, "b", ["--to", "trtllm", "--num-layers", "9"], "--num-layers is an option"),
        (slots_file, "b.pt", ["--to", "sglang"], "which expert sat in a slot is not recorded"),
        (lambda folder: folder / "gone", "b", ["--to", "trtllm"], "gone: no such file"),
    ],
)
def test_what_cannot_be_converted_is_refused(capsys, tmp_path, source, out, options, message):
    path = source(tmp_path)
    assert message in fail(capsys, "convert", path, tmp_path / out, *options)
    assert {file for file in tmp_path.iterdir()} <= {path}


def test_the_default_layout_is_written_out_where_all_is_given(capsys, tmp_path):
    known = ["--num-experts", 12, "--layers", "3-4", "--ep-size", 4]
    path = default_plan(tmp_path)
    succeed(capsys, "convert", path, tmp_path / "b.json", "--to", "vllm", *known)
    default = Placement.default(num_experts=12, num_slots=16, num_ranks=4, num_layers=2)
    written = load_placement(tmp_path / "b.json", num_ranks=4)
    assert written.slot_to_expert.tolist() == default.slot_to_expert.tolist()
