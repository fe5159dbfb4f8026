import json

import numpy as np
import pytest
import yaml

from jax_eplb import Placement, save_placement, save_recording
from tests.command_line import (
    LAYERS,
    fail,
    skewed_counts,
    skewed_recording,
    succeed,
    write_statistics,
)

pytestmark = pytest.mark.light_compile

# What compiles in a third of the time, where the quality of the plan is not looked at.
FAST = ("--effort", "fast")


@pytest.fixture
def recorded(tmp_path):
    save_recording(skewed_recording(), tmp_path / "recording.npz")
    return tmp_path / "recording.npz"


def validated(path, num_experts, num_ranks, layers=LAYERS):
    """What TensorRT-LLM asks of its file, checked without this package; [L, S]."""
    config = yaml.safe_load(path.read_text())
    assert set(config) == {"num_slots", "initial_global_assignments", "layer_updates_per_iter"}
    slots, rows = config["num_slots"], config["initial_global_assignments"]
    assert slots >= num_experts
    assert slots % num_ranks == 0
    assert list(rows) == list(layers)
    for row in rows.values():
        assert len(row) == slots
        assert set(row) == set(range(num_experts))
    return np.array(list(rows.values())), config["layer_updates_per_iter"]


def imbalance(table, counts, num_ranks):
    """[L], the mean over iterations, each expert's tokens dealt evenly over its slots."""
    ratios = []
    for row, windows in zip(table.tolist(), counts.swapaxes(0, 1), strict=True):
        tokens = np.zeros((len(windows), num_ranks))
        for slot, expert in enumerate(row):
            tokens[:, slot * num_ranks // len(row)] += windows[:, expert] / row.count(expert)
        ratios.append((tokens.max(axis=1) / tokens.mean(axis=1) - 1).mean())
    return ratios


def test_the_file_is_valid_and_the_figures_are_a_numpy_recount(capsys, tmp_path, recorded):
    path = tmp_path / "plan.yaml"
    arguments = ["--ep-size", 4, "--num-slots", 16, *FAST, "-o", path, "--json", "--verbose"]
    figures = json.loads(succeed(capsys, "plan", recorded, *arguments))
    table, updates = validated(path, 12, 4)
    assert updates == 0
    expected = imbalance(table, skewed_counts(), 4)
    by_layer = [figures["layers"][str(layer)]["imbalance"] for layer in LAYERS]
    np.testing.assert_allclose(by_layer, expected, atol=1e-6)
    assert figures["imbalance"] == pytest.approx(np.mean(expected), abs=1e-6)
    bounds = [row["lower_bound"] for row in figures["layers"].values()]
    assert all(low <= got + 1e-6 for low, got in zip(bounds, by_layer, strict=True))
    assert figures["output"] == str(path)


@pytest.mark.slow
def test_a_plan_beats_the_default_layout(capsys, tmp_path, recorded):
    path = tmp_path / "plan.yaml"
    succeed(capsys, "plan", recorded, "--ep-size", 4, "--num-slots", 16, "-o", path)
    default = np.tile(np.arange(12), (3, 1))
    planned = imbalance(validated(path, 12, 4)[0], skewed_counts(), 4)
    assert np.mean(planned) < np.mean(imbalance(default, skewed_counts(), 4)) / 4


@pytest.mark.slow
def test_slots_default_to_the_experts_and_updates_are_written(capsys, tmp_path, recorded):
    path = tmp_path / "plan.yaml"
    arguments = ["--ep-size", 4, *FAST, "-o", path, "--layer-updates-per-iter", 2]
    out = succeed(capsys, "plan", recorded, *arguments)
    table, updates = validated(path, 12, 4)
    assert (table.shape, updates) == ((3, 12), 2)
    assert "12 experts in 12 slots on 4 ranks, 3 layers, from 4 iterations" in out
    assert out.endswith(f"{path}\n")


@pytest.mark.slow
def test_verbose_has_a_line_for_each_layer(capsys, tmp_path, recorded):
    arguments = ["--ep-size", 4, *FAST, "-o", tmp_path / "plan.yaml"]
    assert len(succeed(capsys, "plan", recorded, *arguments).splitlines()) == 2
    lines = succeed(capsys, "plan", recorded, *arguments, "--verbose").splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == [f"layer {layer}" for layer in LAYERS]


@pytest.mark.slow
def test_a_plan_of_some_iterations_is_made_from_those(capsys, tmp_path, recorded):
    sizes = ["--ep-size", 4, *FAST]
    limits = ["--iter-start", 11, "--iter-stop", 13]
    succeed(capsys, "plan", recorded, *sizes, *limits, "-o", tmp_path / "part.yaml")
    part = skewed_recording().between(11, 13)
    save_recording(part, tmp_path / "part.npz")
    succeed(capsys, "plan", tmp_path / "part.npz", *sizes, "-o", tmp_path / "whole.yaml")
    assert (tmp_path / "part.yaml").read_text() == (tmp_path / "whole.yaml").read_text()


def test_a_directory_goes_through_plan_and_report(capsys, tmp_path):
    directory, path = (
        write_statistics(tmp_path / "statistics", skewed_counts()),
        tmp_path / "plan.yaml",
    )
    sizes = ["--ep-size", 4]
    succeed(capsys, "plan", directory, *sizes, *FAST, "--num-slots", 16, "-o", path)
    before = json.loads(succeed(capsys, "report", directory, *sizes, "--json"))
    after = json.loads(
        succeed(capsys, "report", directory, *sizes, "--load-balancer", path, "--json")
    )
    assert after["average"]["imbalance"] < before["average"]["imbalance"] / 2


@pytest.mark.slow
def test_counts_by_slot_are_not_planned_from_without_the_active_balancer(capsys, tmp_path):
    counts, path = skewed_counts(16), tmp_path / "plan.yaml"
    directory = write_statistics(tmp_path / "statistics", counts)
    sizes = ["--num-experts", 12, "--ep-size", 4, *FAST, "-o", path]
    error = fail(capsys, "plan", directory, *sizes)
    assert "counts are by slot (16 slots, 12 experts)" in error
    assert "--active-load-balancer FILE" in error
    assert not path.exists()
    active = Placement.default(num_experts=12, num_slots=16, num_ranks=4, layer_ids=LAYERS)
    save_placement(active, tmp_path / "active.yaml")
    given = ["--active-load-balancer", tmp_path / "active.yaml", "--recorded-ep-size", 4]
    figures = json.loads(succeed(capsys, "plan", directory, *sizes, *given, "--json"))
    by_expert = np.zeros((4, 3, 12), int)
    for slot, expert in enumerate(np.asarray(active.slot_to_expert)[0]):
        by_expert[:, :, expert] += counts[:, :, slot]
    expected = np.mean(imbalance(validated(path, 12, 4)[0], by_expert, 4))
    assert figures["imbalance"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ep-size", 5], "12 slots cannot be divided among 5 ranks; use a multiple of 5"),
        (["--ep-size", 4, "--num-slots", 8], "8 slots cannot hold 12 experts; use at least 12"),
        (["--ep-size", 4, "--num-slots", 18], "18 slots cannot be divided among 4 ranks"),
        (["--ep-size", 4, "--iter-stop", 10], "no iteration is left"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused_and_write_nothing(
    capsys, tmp_path, recorded, arguments, message
):
    path = tmp_path / "plan.yaml"
    assert message in fail(capsys, "plan", recorded, *arguments, "-o", path)
    assert not path.exists()


def test_a_folder_that_is_not_there_is_made(capsys, tmp_path, recorded):
    path = tmp_path / "new" / "plan.yaml"
    sizes = ["--ep-size", 4, "--num-slots", 16, *FAST]  # which another test compiles, too
    succeed(capsys, "plan", recorded, *sizes, "-o", path)
    validated(path, 12, 4)
    arguments = [*sizes, "-o", path / "under.yaml"]
    assert str(path) in fail(capsys, "plan", recorded, *arguments)


@pytest.mark.slow
def test_limits_of_moves_print_what_each_would_give_and_the_last_is_written(
    capsys, tmp_path, recorded
):
    before, path = tmp_path / "before.yaml", tmp_path / "plan.yaml"
    default = Placement.default(num_experts=12, num_slots=16, num_ranks=4, layer_ids=LAYERS)
    save_placement(default, before)
    arguments = ["--ep-size", 4, *FAST, "--previous", before, "-o", path, "--max-moves"]
    figures = json.loads(succeed(capsys, "plan", recorded, *arguments, "0,4,all", "--json"))
    none, some, most = figures["frontier"]
    assert [row["max_moves"] for row in figures["frontier"]] == [0, 4, "all"]
    unmoved = np.mean(imbalance(np.asarray(default.slot_to_expert), skewed_counts(), 4))
    assert (none["moves"], none["imbalance"]) == (0, pytest.approx(unmoved, abs=1e-6))
    assert 0 < some["moves"] <= 4
    assert most["imbalance"] <= some["imbalance"] < none["imbalance"]
    table = validated(path, 12, 4)[0]
    assert figures["moves"] == (table != np.asarray(default.slot_to_expert)).sum() / 3
    expected = np.mean(imbalance(table, skewed_counts(), 4))
    assert figures["imbalance"] == most["imbalance"] == pytest.approx(expected, abs=1e-6)
    out = succeed(capsys, "plan", recorded, *arguments, "0,4")
    assert [line.split()[0] for line in out.splitlines()[1:3]] == ["0", "4"]
    assert f"{some['moves']:.1f} slots of a layer change" in out


@pytest.mark.slow
def test_groups_on_nodes_and_speeds_reach_the_plan(capsys, tmp_path, recorded):
    path = tmp_path / "plan.yaml"
    sizes = ["--ep-size", 4, "--num-slots", 16, *FAST, "-o", path]
    groups = ["--num-nodes", 2, "--num-groups", 4, "--capacity", "1,1,2,2"]
    out = succeed(capsys, "plan", recorded, *sizes, *groups)
    assert "0.00% of the tokens are served off their group's node" in out
    table = validated(path, 12, 4)[0]
    tokens = np.zeros(2)
    for row, counts in zip(table, skewed_counts().sum(axis=0), strict=True):
        # Experts 3 g to 3 g + 2 are group g.
        nodes = [set((row[:8] // 3).tolist()), set((row[8:] // 3).tolist())]
        assert not nodes[0] & nodes[1]
        tokens += [counts.reshape(4, 3)[sorted(node)].sum() for node in nodes]
    # The second node is twice as fast.
    assert tokens[1] > 1.4 * tokens[0]


@pytest.mark.slow
def test_the_balanced_split_promises_less_imbalance(capsys, tmp_path, recorded):
    sizes = ["--ep-size", 4, "--num-slots", 16, *FAST, "-o", tmp_path / "plan.yaml"]
    even, balanced = (
        json.loads(succeed(capsys, "plan", recorded, *sizes, "--json", "--split", split))
        for split in ("even", "balanced")
    )
    assert balanced["imbalance"] < even["imbalance"]
    validated(tmp_path / "plan.yaml", 12, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-moves", 4], "--max-moves needs --previous, the load balancer file in force"),
        (["--num-groups", 5], "12 experts cannot be divided into 5 groups"),
        (["--num-nodes", 3], "4 ranks cannot be divided among 3 nodes"),
        (["--num-groups", 3, "--num-nodes", 2], "3 groups cannot be divided among 2 nodes"),
        (["--cross-node-weight", 0.1], "give num_nodes and num_groups"),
        (["--spread-replicas"], "spread_replicas needs two nodes or more"),
        (["--capacity", "1,2"], r"capacity has shape (2,); expected (4,), a rank each"),
        (["--method", "deepseek", "--capacity", "1,1,1,2"], "method 'deepseek' knows no capacity"),
    ],
)
def test_options_that_do_not_fit_are_explained(capsys, tmp_path, recorded, arguments, message):
    path = tmp_path / "plan.yaml"
    sizes = ["--ep-size", 4, "--num-slots", 16, "-o", path]
    assert message in fail(capsys, "plan", recorded, *sizes, *arguments)
    assert not path.exists()


def test_a_placement_in_force_must_fit(capsys, tmp_path, recorded):
    before, path = tmp_path / "before.yaml", tmp_path / "plan.yaml"
    save_placement(Placement.default(num_experts=12, num_ranks=4, layer_ids=(3, 4, 5)), before)
    arguments = ["--ep-size", 4, "-o", path, "--previous", before]
    assert "before.yaml" in fail(capsys, "plan", recorded, *arguments)
    save_placement(Placement.default(num_experts=12, num_ranks=4, layer_ids=LAYERS), before)
    error = fail(capsys, "plan", recorded, *arguments, "--num-slots", 16)
    assert "before.yaml has 12 slots; a plan with 16 cannot start from it" in error
    assert not path.exists()
