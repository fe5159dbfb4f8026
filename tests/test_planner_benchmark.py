"""The planner's benchmark on tiny sizes: what it counts, what it prints, what it refuses."""

import json
import sys

import jax
import numpy as np
import pytest

from benchmarks import planner, scaling, scaling_point
from benchmarks.balanced import balanced_imbalance
from benchmarks.bounds import bounds
from benchmarks.devices import Case, devices
from benchmarks.held_out import held_out, run
from benchmarks.loads import KINDS, Size, draw_load, drifted
from benchmarks.moving import frontier_table, part_of_gain
from benchmarks.one_load import Comparison, compare, one_load
from benchmarks.peers import Peer, Peers
from benchmarks.recording_files import Recording, RecordingError, read_recordings, shuffle
from benchmarks.setting import Setting
from benchmarks.tables import Column, Table
from benchmarks.timing import in_turn
from benchmarks.topology import cross_node_part, on_one_node, time_imbalance

pytestmark = pytest.mark.light_compile

# One size for all, so that a plan compiles once.
SIZE = Size(32, 48, 16)


def tiny(**options):
    return Setting(repeats=1, num_layers=2, efforts=("fast",), **options)


def recording(num_windows=20):
    load = drifted(draw_load("sigma 1", 2, SIZE.experts), windows=num_windows)
    return Recording("drifting", load)


def save(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def greedy_peer(folder, body):
    path = folder / "planner.py"
    path.write_text(
        "import numpy as np\n"
        f"def rebalance_experts(load, num_slots, *_):\n    {body}\n"
        "    return (np.tile(np.arange(num_slots) % load.shape[1], (len(load), 1)),)\n"
    )
    return Peer("deepseek", path, sys.executable)


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ([1.0, 2.0, 3.0], [1.0, 2.5, 2.9], Comparison(3, 2, 1, 0.1)),
        ([1.005, 0.995, 1.006, 0.994], [1.0] * 4, Comparison(4, 3, 1, 0.006)),
        ([1.0, None, 2.0], [None, 1.0, 3.0], Comparison(1, 1, 1, -1.0)),
        ([], [], Comparison(0, 0, 0, 0.0)),
    ],
)
def test_cases_are_counted_with_a_tolerance_and_without_failures(ours, theirs, expected):
    assert compare(ours, theirs) == expected


def test_comparisons_need_a_figure_for_each_case():
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        compare([1.0], [])


def test_loads_are_those_of_the_published_tables():
    # First numbers of the generators that draw_load names.
    for index, kind in enumerate(KINDS[:4]):
        generator = np.random.default_rng([index, 64, 20261124])
        load = generator.lognormal(0, float(kind.split()[1]), (3, 64))
        expected = np.rint(load / load.sum(axis=1, keepdims=True) * 262_144)
        assert draw_load(kind, 3, 64).tolist() == expected.tolist()


def test_clocks_are_read_in_turn_and_not_after_a_failure():
    read = []

    def clock(name, *times):
        left = iter(times)

        def call():
            read.append(name)
            return next(left)

        return call

    found = in_turn({"a": clock("a", 3.0, 1.0, 2.0), "b": clock("b", 1.0, float("nan"))}, 3)
    assert read == ["a", "b", "a", "b", "a"]
    assert found == {"a": (2.0, 1.0), "b": (None, None)}


def test_a_table_reads_alike_in_all_forms():
    columns = [Column("name", "planner"), Column("ms", "time, ms", 1)]
    rows = [{"name": "ours", "ms": 1234.56}, {"name": "theirs", "ms": None}]
    table = Table("Times", columns, rows, ["theirs: died"])
    assert table.as_markdown().splitlines() == [
        "**Times**",
        "",
        "| planner | time, ms |",
        "| --- | ---: |",
        "| ours | 1,234.6 |",
        "| theirs | – |",
        "",
        "theirs: died",
    ]
    assert json.loads(json.dumps(table.as_data()))["rows"] == rows


@pytest.mark.slow
def test_one_load_without_opponents_has_greedy_beside_ours():
    table, counts = one_load(tiny(), [SIZE], ["sigma 1"])
    [row] = table.rows
    assert 0 <= row["bound"] <= row["fast"] < row["greedy"]
    assert row["gap"] == pytest.approx(row["fast"])  # the bound is 0
    assert counts.rows[0] | {"worst": 0} == {
        "ours": "fast",
        "peer": "greedy (NumPy)",
        "cases": 1,
        "no_worse": 1,
        "better": 1,
        "worst": 0,
    }


@pytest.mark.slow
def test_bounds_of_both_splits_and_their_time():
    [table] = bounds(tiny(), [SIZE], ["sigma 1"])
    [row] = table.rows
    assert 0 <= row["balanced"] <= row["even"]
    assert 0 < row["least_ms"] <= row["median_ms"]


@pytest.mark.slow
def test_a_failing_opponent_is_a_dash_and_a_note(tmp_path):
    peer = greedy_peer(tmp_path, "assert load.max() > load.shape[1] * 262_144, 'too even'")
    with Peers([peer]) as peers:
        table, counts = one_load(tiny(opponents=[peer], peers=peers), [SIZE], ["sigma 1"])
    assert table.rows[0]["deepseek"] is None
    assert "| – |" in table.as_markdown()
    assert table.notes == ["DeepSeek EPLB, 32/48/16, sigma 1: AssertionError: too even"]
    assert counts.rows[0]["cases"] == 0


@pytest.mark.slow
def test_an_opponent_plans_recordings_from_its_own_table(tmp_path):
    peer = greedy_peer(tmp_path, "assert load.shape == (2, 32)")
    with Peers([peer]) as peers:
        setting = tiny(opponents=[peer], peers=peers, recordings=[recording()])
        table, fetched, _ = held_out(setting)
    assert [row["protocol"] for row in table.rows] == ["half", "interleaved", "online"] * 2
    assert all(row["DeepSeek EPLB"] > 0 for row in table.rows)
    assert [row["DeepSeek EPLB"] for row in fetched.rows] == [0, 0]  # it never changes its table


def test_a_perfect_table_scores_nothing_and_fetches_nothing():
    windows = np.ones((20, 1, 4))
    before = []

    def planner(seen, previous):
        before.append(previous is None)
        return np.array([[0, 1, 2, 3]])

    assert run(planner, windows, Size(4, 4, 2), "online") == (0, 0)
    assert before == [True] + [False] * 8
    assert run(planner, windows, Size(4, 4, 2), "half") == (0, None)
    assert run(lambda *_: None, windows, Size(4, 4, 2), "half") == (None, None)


@pytest.mark.slow
def test_moves_of_a_frontier_stay_within_their_limits():
    table = frontier_table(tiny(), SIZE, [0, 4])
    none, few = table.rows
    assert (none["moved"], none["gain"]) == (0, 0)
    assert few["most"] <= 4
    assert few["imbalance"] < none["imbalance"]


@pytest.mark.parametrize(
    ("figures", "part"), [((10, 4, 2), 0.75), ((2, 1, 4), None), ((3, 3, 3), None)]
)
def test_the_part_of_a_gain(figures, part):
    assert part_of_gain(*figures) == part


@pytest.mark.slow
def test_balanced_windows_of_a_divisible_load_are_level():
    # 6 tokens of expert 0 go to either rank as needed.
    windows = np.array([[[6, 1, 3]], [[6, 5, 1]]])
    assert balanced_imbalance(np.array([[0, 1, 2, 0]]), windows, 2) == pytest.approx(0, abs=1e-6)
    assert balanced_imbalance(np.array([[0, 1, 2, 0]]), 0 * windows, 2) == 0


def test_topology_figures_of_small_tables():
    table = np.array([[0, 1, 2, 3], [0, 2, 1, 3]])  # two nodes; 0 and 1 are one group, 2 and 3 too
    assert cross_node_part(table, np.ones((2, 4)), 2, 2) == 0.25  # of none, and all of half a group
    assert on_one_node(np.array([[0, 1, 0, 2], [0, 0, 1, 2]]), 3, 2) == (0.5, 2.5)
    gone = np.array([[0, 1, 2, 2]])  # 2 is the empty slot's id
    assert time_imbalance(gone, np.array([[2, 2]]), np.array([0.5, 1, 0, 0])) == 0.5


@pytest.mark.slow
def test_a_point_of_the_scale_has_times_and_memory():
    found = scaling_point.measure(2, SIZE, "fast", repeats=1)
    assert found["memory_peak_mb"] >= found["memory_before_mb"] > 0
    assert 0 < found["least_ms"] <= found["median_ms"]
    assert 0 <= found["bound"] <= found["imbalance"]


@pytest.mark.slow
def test_a_point_that_fails_in_its_process_is_noted():
    wrong = scaling.Point(1, Size(4, 5, 2))
    [table] = scaling.scaling(tiny(), {"slots": (wrong,)}, [])
    assert table.rows == [{"layers": "1", "size": "4/5/2"}]
    assert "1 layers, 4/5/2: ValueError: 5 slots cannot be divided among 2" in table.notes[0]


def test_the_figure_is_drawn_without_the_points_that_failed(tmp_path):
    points = [scaling.Point(1, Size(4, slots, 2)) for slots in (4, 6, 8)]
    measured = {points[0]: {"median_ms": 1.5}, points[1]: {}, points[2]: {"median_ms": 3.0}}
    scaling.draw(tmp_path / "scale.png", {"slots": tuple(points)}, measured)
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_devices_that_are_alike_give_the_same_tables():
    loads = [draw_load(kind, 2, SIZE.experts) for kind in KINDS[:2]]
    case = Case("greedy", SIZE, loads, {"method": "deepseek"})
    [table] = devices(tiny(), [case], tuple(jax.devices()[:2]))
    [row] = table.rows
    assert (row["layers"], row["identical"]) == (4, 4)
    assert row["first_imbalance"] == row["second_imbalance"] > 0
    assert row["first_ms"] > 0


def test_a_trace_is_shuffled_and_counted_in_windows():
    ids = np.zeros((40_960, 2, 3), np.uint8)
    ids[:, 1] = [1, 2, 31]
    ids[:20_480, 0] = 7
    found = shuffle("trace", ids)
    assert found.shuffled
    assert found.windows.shape == (40, 2, 32)
    assert (found.windows.sum(axis=-1) == 3 * 1024).all()
    assert (found.windows[:, 1, [1, 2, 31]] == 1024).all()
    seven = found.windows[:, 0, 7] / (3 * 1024)  # in every window, not in the first half alone
    assert (abs(seven - 0.5) < 0.1).all()


def test_recordings_that_are_too_short_are_left_out_with_a_note(tmp_path):
    path = save(
        tmp_path / "some.npz",
        long=np.ones((20, 1, 32)),
        short=np.ones((19, 1, 32)),
        few=np.ones((20, 1, 8)),
        names=np.array(["a", "b"]),
    )
    found, notes = read_recordings([path])
    assert [one.name for one in found] == ["long"]
    assert [str(size) for size in found[0].even_sizes] == ["32/40/8", "32/48/16"]
    assert len(notes) == 2
    assert "array short left out: 19 windows" in notes[0]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"flat": np.ones((20, 32))}, r"array flat: shape \[20, 32\]; expected \[windows, "),
        ({"none": np.ones((0, 2, 32))}, r"array none: shape \[0, 2, 32\]; expected .* none of"),
        ({"text": np.full((20, 1, 32), "a")}, r"array text: <U1; expected counts of tokens"),
        ({"expert_ids": np.ones((20, 1, 2))}, r"array expert_ids: float64; expected ids of"),
        ({"bad": np.full((20, 1, 32), -1)}, r"array bad, at \[0, 0, 0\]: -1; expected 0 or more"),
        ({"few": np.ones((20, 1, 8))}, r"no array with 20 windows or more of 32, 64 or 128"),
    ],
)
def test_a_file_that_is_no_recording_is_refused_with_a_remedy(tmp_path, arrays, message):
    path = save(tmp_path / "wrong.npz", **arrays)
    with pytest.raises(RecordingError, match=f"(?s)--recordings .*wrong.npz.*{message}"):
        read_recordings([path])


@pytest.mark.parametrize("content", [None, b"no archive"])
def test_a_file_that_cannot_be_read_ends_the_command_with_2(tmp_path, capsys, content):
    path = tmp_path / "missing.npz"
    if content is not None:
        path.write_bytes(content)
    assert planner.main(["--recordings", str(path)]) == 2
    error = capsys.readouterr().err
    assert "missing.npz: no .npz file can be read there" in error
    assert "give one that np.savez wrote" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "scale,speed"], "no section speed; there are one-load, times, "),
        (["--only", ","], "no section named"),
        (["--repeats", "0"], "--repeats 0: write 1 or more"),
        (["--only", "bounds", "--figure", "a.png"], "--figure shows the section scale"),
    ],
)
def test_wrong_options_end_the_command_with_2(capsys, options, message):
    with pytest.raises(SystemExit) as ended:
        planner.main(options)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_an_opponent_that_is_not_there_ends_the_command_with_2(capsys):
    assert planner.main(["--peer", "vllm=/none/default.py"]) == 2
    assert "--peer vllm: no file" in capsys.readouterr().err


def test_the_forms_of_the_command(capsys):
    options = ["--only", "windows,balanced,devices"]  # without recordings, on a CPU: notes alone
    assert planner.main([*options, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["sections"].keys() == {"windows", "balanced", "devices"}
    [table] = printed["sections"]["windows"]
    assert table["notes"] == [
        "Needs --recordings FILE.npz, with counts [windows, layers, experts]."
    ]
    assert printed["machine"]["cores"] > 0
    assert planner.main([*options, "--markdown"]) == 0
    markdown = capsys.readouterr().out
    assert planner.main(options) == 0
    for text in (markdown, capsys.readouterr().out):
        for made in printed["sections"].values():
            assert made[0]["title"] in text
            assert made[0]["notes"][0] in text
