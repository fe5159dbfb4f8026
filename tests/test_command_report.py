import json
import re

import numpy as np
import pytest
import yaml

from jax_eplb import Placement, save_placement, save_recording
from jax_eplb.commands import report as command
from tests.command_line import (
    LAYERS,
    fail,
    skewed_counts,
    skewed_recording,
    succeed,
    write_statistics,
)

pytestmark = pytest.mark.light_compile

# Twelve experts in sixteen slots on four ranks.
ROWS = {layer: [(slot * 5 + layer) % 12 for slot in range(16)] for layer in LAYERS}


@pytest.fixture
def recorded(tmp_path):
    save_recording(skewed_recording(), tmp_path / "recording.npz")
    return tmp_path / "recording.npz"


@pytest.fixture
def balancer(tmp_path):
    config = {"num_slots": 16, "initial_global_assignments": ROWS, "layer_updates_per_iter": 0}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "plan.yaml"


def recount(rank_tokens):
    """{layer: (mean, std, imbalance)} and the average, from [W, L, P], by loops."""
    table = {}
    for position, layer in enumerate(LAYERS):
        rows = []
        for tokens in rank_tokens[:, position]:
            mean = sum(tokens) / len(tokens)
            variance = sum((t - mean) ** 2 for t in tokens) / (len(tokens) - 1)
            rows.append((mean, variance**0.5, (max(tokens) - mean) / mean))
        table[str(layer)] = np.mean(rows, axis=0)
    return table, np.mean(list(table.values()), axis=0)


def by_plan(counts):
    """Tokens of four ranks under ROWS, each expert's dealt evenly over its slots."""
    tokens = np.zeros((*counts.shape[:2], 4))
    for position, row in enumerate(ROWS.values()):
        for slot, expert in enumerate(row):
            tokens[:, position, slot // 4] += counts[:, position, expert] / row.count(expert)
    return tokens


def assert_same(report, expected):
    table, average = expected
    keys = ("mean", "std", "imbalance")
    assert report["layers"].keys() == table.keys()
    for layer, row in report["layers"].items():
        np.testing.assert_allclose([row[key] for key in keys], table[layer], rtol=1e-12)
    np.testing.assert_allclose([report["average"][key] for key in keys], average, rtol=1e-12)


def test_json_is_one_object_with_the_figures_of_each_layer(capsys, recorded):
    report = json.loads(succeed(capsys, "report", recorded, "--ep-size", 4, "--json"))
    by_rank = skewed_counts().reshape(4, 3, 4, 3).sum(axis=3)
    assert_same(report, recount(by_rank))


def test_the_table_has_a_row_for_each_layer_and_the_average(capsys, recorded):
    lines = succeed(capsys, "report", recorded, "--ep-size", 4).splitlines()
    assert lines[0].split() == ["layer", "mean", "std", "imbalance"]
    table, average = recount(skewed_counts().reshape(4, 3, 4, 3).sum(axis=3))
    expected = [*table.items(), ("average", average)]
    for line, (name, (mean, std, imbalance)) in zip(lines[1:], expected, strict=False):
        assert line.split() == [name, f"{mean:.1f}", f"{std:.6f}", f"{imbalance:.6f}"]
    assert re.match(r"4 ranks, 4 iterations, ", lines[5])


def test_a_load_balancer_predicts_what_numpy_recounts(capsys, recorded, balancer):
    out = succeed(capsys, "report", recorded, "--ep-size", 4, "--load-balancer", balancer, "--json")
    assert_same(json.loads(out), recount(by_plan(skewed_counts())))


@pytest.mark.slow
def test_replicas_that_divide_by_load_leave_less(capsys, tmp_path, recorded):
    rows = {}
    for position, layer in enumerate(LAYERS):  # the four hottest are on two ranks each
        order = np.argsort(-skewed_counts()[:, position].sum(axis=0)).tolist()
        ranks = ((order[r], order[4 + r], order[8 + r], order[(r + 1) % 4]) for r in range(4))
        rows[layer] = [expert for rank in ranks for expert in rank]
    config = {"num_slots": 16, "initial_global_assignments": rows}
    (tmp_path / "doubled.yaml").write_text(yaml.safe_dump(config))
    plan = ["report", recorded, "--ep-size", 4, "--load-balancer", tmp_path / "doubled.yaml"]
    even = json.loads(succeed(capsys, *plan, "--json"))
    divided = json.loads(succeed(capsys, *plan, "--split", "balanced", "--json"))
    assert divided["basis"] == "predicted, balanced split"
    assert divided["average"]["mean"] == pytest.approx(even["average"]["mean"])
    assert divided["average"]["imbalance"] < 0.9 * even["average"]["imbalance"]
    page = ["--html", tmp_path / "page.html", "--iter-stop", 12]  # too few to simulate
    average = succeed(capsys, *plan, "--split", "balanced", *page).splitlines()[-3]
    assert average.startswith("average")
    assert average.split()[-1] in (tmp_path / "page.html").read_text()


def test_a_directory_of_two_ranks_is_the_sum_of_both(capsys, tmp_path, recorded, balancer):
    directory = write_statistics(tmp_path / "statistics", skewed_counts())
    plan = ["--ep-size", 4, "--load-balancer", balancer, "--json"]
    assert succeed(capsys, "report", directory, *plan) == succeed(capsys, "report", recorded, *plan)


def test_iterations_are_taken_from_start_to_before_stop(capsys, recorded):
    limits = ["--iter-start", 11, "--iter-stop", 13]
    report = json.loads(succeed(capsys, "report", recorded, "--ep-size", 4, "--json", *limits))
    assert report["iterations"] == 2
    assert_same(report, recount(skewed_counts()[1:3].reshape(2, 3, 4, 3).sum(axis=3)))


def test_per_expert_takes_the_figures_over_experts(capsys, recorded):
    report = json.loads(succeed(capsys, "report", recorded, "--per-expert", "--json"))
    assert report["experts"] == 12
    assert_same(report, recount(skewed_counts()))


@pytest.mark.slow
def test_a_plot_writes_pictures_and_names_them(capsys, tmp_path, recorded, balancer):
    folder = tmp_path / "pictures"
    arguments = ["--ep-size", 4, "--load-balancer", balancer, "--plot", folder]
    lines = succeed(capsys, "report", recorded, *arguments).splitlines()
    named = [line for line in lines if line.endswith(".png")]
    assert sorted(named) == sorted(str(path) for path in folder.iterdir())
    assert len(named) >= 3
    for path in folder.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_html_is_one_page_with_the_tables_and_says_what_it_lacks(capsys, tmp_path, recorded):
    page = tmp_path / "new" / "page.html"
    arguments = ["--ep-size", 4, "--iter-stop", 13, "--html", page]
    assert succeed(capsys, "report", recorded, *arguments).splitlines()[-1] == str(page)
    text = page.read_text(encoding="utf-8")
    _, average = recount(skewed_counts()[:3].reshape(3, 3, 4, 3).sum(axis=3))
    assert f"<td>average</td><td>{average[0]:.1f}</td>" in text
    assert f"<td>{average[2]:.6f}</td>" in text
    assert "The recording has 3 iterations; with 4 or more this page says" in text


def test_html_has_what_the_simulator_recommends(capsys, monkeypatch, tmp_path, recorded, balancer):
    given = []
    monkeypatch.setattr(command, "recommend", lambda held, num_ranks: given.append(num_ranks))
    monkeypatch.setattr(command, "compare", lambda advice: ["compared"])
    monkeypatch.setattr(command, "report_page", lambda held, **told: json.dumps(list(told)))
    arguments = ["--ep-size", 4, "--load-balancer", balancer, "--html", tmp_path / "page.html"]
    succeed(capsys, "report", recorded, *arguments)
    assert given == [4]
    told = json.loads((tmp_path / "page.html").read_text())
    assert set(told) == {"advice", "compared", "num_ranks", "placement", "split"}


def test_counts_by_slot_are_read_with_the_balancer_that_was_active(capsys, tmp_path):
    active = Placement.default(num_experts=12, num_slots=16, num_ranks=4, layer_ids=LAYERS)
    save_placement(active, tmp_path / "active.yaml")
    counts = skewed_counts(16)
    directory = write_statistics(tmp_path / "statistics", counts)
    arguments = ["--active-load-balancer", tmp_path / "active.yaml", "--recorded-ep-size", 4]
    report = json.loads(succeed(capsys, "report", directory, *arguments, "--json"))
    assert_same(report, recount(counts.reshape(4, 3, 4, 4).sum(axis=3)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the number of ranks (--ep-size)"),
        (["--ep-size", 4, "--iter-start", 20], "no iteration is left; it holds iterations 10 to 1"),
        (["--ep-size", 4, "--min-tokens", 10**9], "no iteration is left"),
        (["--load-balancer", "plan.yaml"], "--load-balancer needs --ep-size"),
        (["--ep-size", 4, "--split", "balanced"], "--split needs --load-balancer"),
        (["--ep-size", 4, "--load-balancer", "none.yaml"], "none.yaml: no such file"),
        (["--ep-size", 3, "--load-balancer", "plan.yaml"], "16 slots cannot be divided among 3"),
        (["--active-load-balancer", "plan.yaml"], "needs --recorded-ep-size"),
    ],
)
def test_what_cannot_be_reported_is_refused(
    capsys, monkeypatch, recorded, balancer, arguments, message
):
    monkeypatch.chdir(recorded.parent)
    assert message in fail(capsys, "report", recorded, *arguments)


def test_a_balancer_of_other_layers_is_refused_by_name(capsys, tmp_path, recorded):
    config = {"num_slots": 16, "initial_global_assignments": {3: ROWS[3], 4: ROWS[4]}}
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(config))
    error = fail(
        capsys, "report", recorded, "--ep-size", 4, "--load-balancer", tmp_path / "short.yaml"
    )
    assert "short.yaml" in error
    assert "layer 7 missing" in error
