"""Peers are files with the interface of another engine's planner; these need NumPy only."""

import math
import sys
import time

import numpy as np
import pytest

from benchmarks import peer_process
from benchmarks.peers import KINDS, Peer, PeerError, Peers, parse_peers

# Slot s has expert s mod E.
IN_TURN = "np.tile(np.arange(num_slots) % load.shape[1], (len(load), 1))"
SIZES = dict(num_slots=6, num_ranks=3)
LOAD = np.arange(8).reshape(2, 4)


def deepseek_file(folder, body, imports=""):
    """A planner called as DeepSeek's is; `body` ends with `return TABLE, ...`."""
    lines = "\n    ".join(body.strip().splitlines())
    path = folder / "planner.py"
    path.write_text(
        f"import numpy as np\n{imports}\n"
        f"def rebalance_experts(load, num_slots, num_groups, num_nodes, num_ranks):\n    {lines}\n"
    )
    return Peer("deepseek", path)


def plan_once(peer, load=LOAD, **rest):
    with Peers([peer]) as peers:
        return peers.plan_with(peer, load, **SIZES | rest)


def in_turn(num_layers=2, num_slots=6, num_experts=4):
    return np.tile(np.arange(num_slots) % num_experts, (num_layers, 1)).tolist()


def test_each_kind_can_be_named_and_run():
    assert KINDS.keys() == peer_process.KINDS.keys()


@pytest.mark.parametrize(
    ("pythons", "used"),
    [
        ([], (sys.executable, sys.executable)),
        (["/bin/sh"], ("/bin/sh", "/bin/sh")),
        (["swift=/bin/sh"], (sys.executable, "/bin/sh")),
        (["swift=/bin/sh", "sh"], ("sh", "/bin/sh")),
    ],
)
def test_files_and_interpreters_are_read(tmp_path, pythons, used):
    path = tmp_path / "a=b.py"
    path.touch()
    peers = parse_peers([f"vllm={path}", f"swift={path}"], pythons)
    kinds = ("vllm", "swift")
    assert peers == [Peer(kind, path, python) for kind, python in zip(kinds, used, strict=True)]


def test_a_path_of_an_interpreter_may_contain_an_equals_sign(tmp_path):
    path, python = tmp_path / "planner.py", tmp_path / "python=3"
    path.touch()
    python.symlink_to(sys.executable)
    assert parse_peers([f"vllm={path}"], [str(python)]) == [Peer("vllm", path, str(python))]


@pytest.mark.parametrize(
    ("files", "pythons", "message"),
    [
        (["{file}"], [], "--peer .*: write NAME=..., NAME one of deepseek, vllm, "),
        (["greedy={file}"], [], "--peer greedy=.*: write NAME="),
        (["vllm={file}", "vllm={file}"], [], "--peer vllm: given twice"),
        (["vllm={file}.none"], [], "--peer vllm: no file .*none"),
        (["vllm={file}"], ["/none/python"], "--peer-python: /none/python is no program"),
        (["vllm={file}"], ["vllm=/none/python"], "--peer-python: /none/python is no program"),
        (["vllm={file}"], ["greedy=/bin/sh"], "--peer-python greedy=/bin/sh: write NAME="),
    ],
)
def test_wrong_options_are_explained(tmp_path, files, pythons, message):
    path = tmp_path / "planner.py"
    path.touch()
    with pytest.raises(PeerError, match=message):
        parse_peers([file.format(file=path) for file in files], pythons)


def test_a_missing_module_is_named(tmp_path):
    peer = deepseek_file(tmp_path, "pass", "import no_such_module.part")
    with pytest.raises(
        PeerError, match=r"has no module no_such_module\. Install it there .*-m pip"
    ):
        plan_once(peer)


def test_a_file_that_cannot_be_read_as_python_is_explained(tmp_path):
    with pytest.raises(
        PeerError, match=r"(?s)DeepSeek EPLB does not start: ended with code 1.*Syntax"
    ):
        plan_once(deepseek_file(tmp_path, "return ("))


def test_an_error_is_a_failure_with_its_message(tmp_path):
    result = plan_once(deepseek_file(tmp_path, "raise KeyError('no load')"))
    assert result.failure == "KeyError: 'no load'"
    assert result.slot_to_expert.size == 0
    assert math.isnan(result.median_ms)


def test_a_crash_is_a_failure_and_the_next_call_starts_anew(tmp_path):
    body = f"if load.sum() == 0:\n    os.kill(os.getpid(), signal.SIGSEGV)\nreturn ({IN_TURN},)"
    peer = deepseek_file(tmp_path, body, "import os, signal")
    with Peers([peer]) as peers:
        assert peers.plan_with(peer, 0 * LOAD, **SIZES).failure == "died of SIGSEGV"
        assert peers.plan_with(peer, LOAD, **SIZES).slot_to_expert.tolist() == in_turn()


def test_an_exit_is_a_failure_with_the_last_words(tmp_path):
    body = "print('about to go')\nsys.exit(3)"
    result = plan_once(deepseek_file(tmp_path, body, "import sys"))
    assert result.failure == "ended with code 3\nabout to go"


def test_too_long_is_a_failure_and_the_process_does_not_stay(tmp_path):
    body = f"""
pathlib.Path({str(tmp_path / "id")!r}).write_text(str(os.getpid()))
if load.sum() == 0:
    time.sleep(60)
return ({IN_TURN},)
"""
    peer = deepseek_file(tmp_path, body, "import os, pathlib, time")
    start = time.monotonic()
    with Peers([peer]) as peers:
        result = peers.plan_with(peer, 0 * LOAD, **SIZES, timeout=0.5)
        first = (tmp_path / "id").read_text()
        again = peers.plan_with(peer, LOAD, **SIZES)
    assert result.failure == "no answer in 0.5 s"
    assert again.slot_to_expert.tolist() == in_turn()
    assert (tmp_path / "id").read_text() != first
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    ("table", "fault"),
    [
        ("[[0, 1, 2, 3, 0, 4]] * 2", "layer 0, slot 5: expert 4 of 4"),
        ("[[0, 1, 2, 3, 0, 1], [0, -1, 1, 2, 3, 0]]", "layer 1, slot 1: expert -1 of 4"),
        ("[[0, 1, 2, 3, 0, 1], [0, 0, 1, 2, 2, 0]]", "layer 1: expert 3 has no slot"),
        ("[[0, 1, 2, 3]] * 2", "shape (2, 4) in place of (2, 6)"),
        ("[[0, 1, 2, 3, 0, 1]]", "shape (1, 6) in place of (2, 6)"),
    ],
)
def test_a_table_that_is_no_placement_is_a_failure(tmp_path, table, fault):
    result = plan_once(deepseek_file(tmp_path, f"return (np.array({table}),)"))
    assert result.failure == f"no valid table: {fault}"
    assert result.slot_to_expert.size == 0


@pytest.mark.parametrize("repeats", [0, 1, 4])
def test_calls_are_repeated_after_one_that_is_not_timed(tmp_path, repeats):
    body = f"""
calls.append(0)
time.sleep(0.5 if len(calls) == 1 else 0.01)
pathlib.Path({str(tmp_path / "calls")!r}).write_text(str(len(calls)))
return ({IN_TURN},)
"""
    peer = deepseek_file(tmp_path, body, "import pathlib, time\ncalls = []")
    result = plan_once(peer, repeats=repeats)
    assert (tmp_path / "calls").read_text() == str(1 + repeats)
    assert result.slot_to_expert.tolist() == in_turn()
    if repeats:
        assert 10 <= result.least_ms <= result.median_ms < 500
    else:
        assert math.isnan(result.median_ms)


def test_what_a_planner_prints_is_not_taken_for_an_answer(tmp_path):
    body = f"print('hello', flush=True)\nos.system('echo hello')\nreturn ({IN_TURN},)"
    result = plan_once(deepseek_file(tmp_path, body, "import os"))
    assert result.slot_to_expert.tolist() == in_turn()


def test_deepseek_gets_the_sum_of_the_windows_in_whole_tokens(tmp_path):
    body = f"""
assert load.tolist() == [[6, 0, 0, 0], [0, 0, 0, 15]], load
assert load.dtype == np.int64, load.dtype
assert (num_slots, num_groups, num_nodes, num_ranks) == (6, 4, 2, 3)
return ({IN_TURN},)
"""
    windows = np.zeros((3, 2, 4), np.float32)
    windows[:, 0, 0], windows[:, 1, 3] = [1, 2, 3], [4, 5, 6]
    result = plan_once(deepseek_file(tmp_path, body), windows, num_nodes=2, num_groups=4)
    assert not result.failure


# A policy of vLLM-Ascend is given slots by rank, and the tokens of each slot. This one turns the
# order of the slots in each rank, and checks what it has seen so far.
FLASHLB = """
import os
import numpy as np
from vllm.logger import logger
from vllm_ascend.distributed.parallel_state import get_dynamic_eplb_group
from .policy_abstract import EplbPolicy

class FlashLB(EplbPolicy):
    def __init__(self):
        self.seen = []

    def rebalance_experts(self, current, tokens):
        logger.info("planning")
        assert os.environ["NUMBA_BOUNDSCHECK"] == os.environ["OMP_NUM_THREADS"] == "1"
        assert get_dynamic_eplb_group().world_size == current.shape[1] == 3
        assert (self.depth, self.width) == DEPTH_AND_WIDTH
        assert current.shape == tokens.shape[1:]
        load = np.zeros((len(tokens), len(current), 4))
        for window, layer, rank, slot in np.ndindex(tokens.shape):
            load[window, layer, current[layer, rank, slot]] += tokens[window, layer, rank, slot]
        self.seen.append(load.tolist())
        assert self.seen == EXPECTED.pop(0), self.seen
        return True, [], current[:, :, ::-1]
"""


@pytest.mark.parametrize(
    ("kind", "depth_and_width"), [("flashlb", (4, 8)), ("flashlb-deep", (8, 32))]
)
def test_flashlb_gets_windows_by_slot_and_keeps_a_history_if_asked(tmp_path, kind, depth_and_width):
    first = np.arange(16).reshape(2, 2, 4)
    second = first + 100
    # A call of each problem is timed. What the first problem left is the history of the second.
    histories = [[first]] * 2 + [[first, second]] * 2 + [[second]] * 2
    expected = [[windows.tolist() for windows in history] for history in histories]
    path = tmp_path / "policy.py"
    path.write_text(f"EXPECTED = {expected}\nDEPTH_AND_WIDTH = {depth_and_width}\n{FLASHLB}")
    peer = Peer(kind, path)
    previous = np.array([[3, 2, 1, 0, 3, 2], [0, 1, 2, 3, 0, 1]])
    with Peers([peer], threads=1) as peers:
        plan = peers.plan_with(peer, first, **SIZES, repeats=1)
        assert plan.failure == ""
        assert plan.slot_to_expert.tolist() == [[1, 0, 3, 2, 1, 0]] * 2
        again = peers.plan_with(
            peer, second, **SIZES, previous=previous, keep_history=True, repeats=1
        )
        assert again.failure == ""
        assert again.slot_to_expert.tolist() == [[2, 3, 0, 1, 2, 3], [1, 0, 3, 2, 1, 0]]
        assert peers.plan_with(peer, second, **SIZES, repeats=1).failure == ""


@pytest.mark.parametrize(
    ("nodes", "groups", "hierarchical"), [(1, 4, False), (2, 4, True), (3, 4, False)]
)
def test_sglang_is_told_whether_groups_stay_on_a_node(tmp_path, nodes, groups, hierarchical):
    path = tmp_path / "deepseek.py"
    path.write_text(
        "import numpy as np\n"
        "def rebalance_experts(load, num_slots, num_groups, num_nodes, num_ranks, "
        "enable_hierarchical):\n"
        f"    assert enable_hierarchical is {hierarchical}\n"
        f"    return {IN_TURN}, None, None\n"
    )
    assert not plan_once(Peer("sglang", path), num_nodes=nodes, num_groups=groups).failure


def test_a_greedy_planner_from_end_to_end(tmp_path):
    # Spare slots to the largest share, then slots by falling share to the lightest rank with room.
    body = """
table = []
for row in load:
    count, experts = np.ones(len(row)), list(range(len(row)))
    while len(experts) < num_slots:
        experts.append(int((row / count).argmax()))
        count[experts[-1]] += 1
    ranks, height = [[] for _ in range(num_ranks)], np.zeros(num_ranks)
    for expert in sorted(experts, key=lambda e: -row[e] / count[e]):
        rank = height.argmin()
        ranks[rank].append(expert)
        height[rank] += row[expert] / count[expert]
        if len(ranks[rank]) == num_slots // num_ranks:
            height[rank] = np.inf
    table.append(sum(ranks, []))
return np.array(table), None, None
"""
    path = deepseek_file(tmp_path, body).path
    [peer] = parse_peers([f"deepseek={path}"])
    load = np.array([[12, 6, 3, 3], [1, 1, 1, 9]])
    with Peers([peer], threads=1) as peers:
        result = peers.plan_with(peer, load, **SIZES, repeats=3)
    assert result.failure == ""
    assert peer.name == "DeepSeek EPLB"
    assert result.slot_to_expert.tolist() == [[1, 3, 0, 0, 0, 2], [3, 0, 3, 1, 3, 2]]
    assert 0 < result.least_ms <= result.median_ms
