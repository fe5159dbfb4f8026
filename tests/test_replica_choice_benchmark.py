"""The benchmark of replica choice on a tiny recording: what it prints and what it refuses."""

import json

import numpy as np
import pytest

from benchmarks import pairs
from benchmarks.recording_files import RecordingError
from benchmarks.replica_choice import POLICIES, least_largest_load, main, spread

pytestmark = pytest.mark.light_compile


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    generator = np.random.default_rng(0)
    windows = generator.poisson(generator.lognormal(3, 1, (1, 2, 6)), (6, 2, 6))
    path = tmp_path_factory.mktemp("recording") / "tiny.npz"
    np.savez(path, tiny=windows)
    return str(path)


SIZE = ["--ranks", "4", "--slots", "8", "--effort", "fast", "--windows", "2"]


@pytest.mark.slow
def test_json_is_a_row_for_each_policy_and_balanced_reaches_the_optimum(file, capsys):
    assert main(["--recordings", file, *SIZE, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["policy"] for row in rows] == list(POLICIES)
    for row in rows:
        assert (row["recording"], row["ranks"], row["slots"]) == ("tiny", 4, 8)
        assert row["optimum"] <= row["whole"] <= row["imbalance"]
        assert row["solve_us"] > 0
    even, local, balanced, near, fewest = rows
    assert balanced["imbalance"] == balanced["whole"] < even["imbalance"] <= fewest["imbalance"]
    assert near["imbalance"] == balanced["imbalance"]
    assert max(even["local"], balanced["local"]) < near["local"] <= local["local"]


@pytest.mark.slow
def test_without_json_it_prints_a_table(file, capsys):
    assert main(["--recordings", file, *SIZE]) == 0
    printed = capsys.readouterr().out
    assert "6/8/4" in printed
    assert "balanced" in printed


def test_choices_are_spread_over_ranks_and_none_is_lost():
    windows = np.arange(12).reshape(2, 3, 2)
    counts = spread(windows, 4)
    assert counts.shape == (3, 2, 4, 2)
    np.testing.assert_array_equal(counts.sum(axis=2).swapaxes(0, 1), windows)


def test_the_linear_programme_finds_the_best_division():
    # Ranks hold 0 1, 2 0 and 3 1: nothing can leave the third while expert 3 fills it.
    table = np.array([0, 1, 2, 0, 3, 1])
    assert least_largest_load(np.array([6, 2, 2, 9]), table, 3) == pytest.approx(9)
    assert least_largest_load(np.array([6, 2, 2, 0]), table, 3) == pytest.approx(4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "4"], "--ranks and --slots go together"),
        (["--windows", "0"], "--windows 0: write 1 or more"),
    ],
)
def test_options_that_do_not_fit_are_refused(file, arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--recordings", file, *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("slots", "message"),
    [("7", "7 slots cannot be divided among 4 ranks"), ("4", "4 slots cannot hold 6 experts")],
)
def test_sizes_that_do_not_fit_are_refused(file, slots, message, capsys):
    arguments = ["--recordings", file, "--ranks", "4", "--slots", slots]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_is_none_is_refused(tmp_path, capsys):
    assert main(["--recordings", str(tmp_path / "none.npz")]) == 2
    assert "no .npz file can be read there" in capsys.readouterr().err


@pytest.mark.slow
def test_pairs_are_of_a_trace_in_its_order(tmp_path, capsys):
    generator = np.random.default_rng(0)
    # Two kinds of text, each with experts of its own, in turn.
    weights = np.repeat([[9, 9, 4, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 4, 9, 9]], 64, axis=0)
    keys = generator.exponential(size=(2**14, 2, 8)) / np.tile(weights, (128, 1))[:, None]
    trace = str(tmp_path / "trace.npz")
    np.savez(trace, expert_ids=np.argsort(keys, axis=-1)[..., :2].astype(np.int32))
    options = ["--ranks", "2", "--more-slots", "2", "4", "--tokens", "256", "--effort", "fast"]
    pairs.main(["--recordings", trace, *options, "--json"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    policies = [name for name, *_ in pairs.VARIANTS]
    assert [(row["slots"], row["policy"]) for row in rows] == [
        (slots, policy) for slots in (12, 16) for policy in policies
    ]
    _, near, alike, few = rows[:4]
    assert near["imbalance"] == alike["imbalance"]
    assert near["stays"] > alike["stays"]
    assert near["pair"] >= alike["pair"] >= 1
    assert few["read"] == 4 < alike["read"] == 6  # of 8 experts, in 12 slots, on two ranks


def test_pairs_of_counts_alone_are_refused(tmp_path):
    np.savez(tmp_path / "counts.npz", counts=np.ones((8, 2, 6), int))
    with pytest.raises(RecordingError, match="has counts alone; give a trace"):
        pairs.main(["--recordings", str(tmp_path / "counts.npz")])


def test_pairs_need_slots_for_replicas(capsys):
    with pytest.raises(SystemExit):
        pairs.main(["--recordings", "trace.npz", "--more-slots", "2", "0"])
    assert "--more-slots 0: write 1 or more" in capsys.readouterr().err
