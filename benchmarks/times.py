"""Warm times of one plan: opponents and ours in the same run, one after the other in each round.

Axes: W windows, L layers, E experts, S slots, P ranks.

Opponents are timed inside their own process, without numba's bounds checks, from the arrays they
take to the table they return; ours from a NumPy load to the finished plan, checks and lower bound
included.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.loads import Size, draw_load, drifted
from benchmarks.peers import Peer, Peers
from benchmarks.setting import MATCHED_EFFORT, Setting, plan_for
from benchmarks.tables import Column, Table
from benchmarks.timing import Times, in_turn, time_warm, warm_ms

SIZES = tuple(
    Size(*size) for size in ((256, 288, 36), (256, 320, 64), (256, 320, 160), (64, 96, 32))
)
_KIND = "sigma 1"
# One size for the plans of other sorts; so many windows, and so many moves.
OTHER_SIZE = SIZES[0]
_FRESH_WINDOWS, _RECENT_WINDOWS = 64, 16


def times(
    setting: Setting, sizes: Sequence[Size] = SIZES, other_size: Size = OTHER_SIZE
) -> list[Table]:
    """Fresh plans beside the opponents', then ours of other sorts."""
    notes: list[str] = []
    rows = []
    with contextlib.ExitStack() as stack:
        peers = None
        if setting.opponents:
            peers = stack.enter_context(
                Peers(setting.opponents, setting.peer_threads, check_bounds=False)
            )
        for size in setting.track(sizes, "times"):
            rows += _beside_opponents(setting, size, peers, notes)
    columns = [
        Column("size", "E/S/P"),
        Column("planner", "planner"),
        Column("median_ms", "median, ms", 1),
        Column("least_ms", "least, ms", 1),
        Column("ours", "ours to compare"),
        Column("ours_ms", "its median, ms", 1),
        Column("ratio", "times as long as ours", 1),
    ]
    title = f"Time of one plan, {_KIND}, {setting.num_layers} layers, {setting.repeats} rounds"
    return [Table(title, columns, rows, notes), _other_sorts(setting, other_size)]


def _beside_opponents(
    setting: Setting, size: Size, peers: Peers | None, notes: list[str]
) -> list[dict]:
    load = draw_load(_KIND, setting.num_layers, size.experts)

    def peer_ms(peer: Peer) -> float:
        result = setting.ask(peer, load, size, notes, str(size), peers=peers, repeats=1)
        return math.nan if result is None else result.median_ms

    clocks: dict[str, Callable[[], float]] = {}
    ours = {
        effort: functools.partial(warm_ms, functools.partial(plan_for, size, load, effort=effort))
        for effort in setting.efforts
    }
    # Each opponent next to the one of ours that it is compared with.
    for peer in setting.opponents:
        clocks[peer.kind] = functools.partial(peer_ms, peer)
        effort = MATCHED_EFFORT[peer.kind]
        if effort in ours:
            clocks.setdefault(effort, ours[effort])
    measured = in_turn(clocks | ours, setting.repeats)
    rows = []
    for peer in setting.opponents:
        effort, theirs = MATCHED_EFFORT[peer.kind], measured[peer.kind]
        row = _row(size, peer.name, theirs) | {"ours": effort}
        own = measured.get(effort, Times(None, None))
        ratio = None
        if theirs.median_ms is not None and own.median_ms is not None:
            ratio = theirs.median_ms / own.median_ms
        rows.append(row | {"ours_ms": own.median_ms, "ratio": ratio})
    blank = {"ours": None, "ours_ms": None, "ratio": None}
    return rows + [_row(size, f"ours, {e}", measured[e]) | blank for e in setting.efforts]


def _row(size: Size, name: str, found: Times) -> dict[str, Any]:
    return {"size": str(size), "planner": name} | found._asdict()


def _other_sorts(setting: Setting, size: Size) -> Table:
    load = draw_load(_KIND, setting.num_layers, size.experts)
    later = drifted(load)
    many = drifted(load, windows=_FRESH_WINDOWS)
    recent = many[-_RECENT_WINDOWS:]
    spare = size.slots // 4
    before = plan_for(size, load).placement
    plans: dict[str, Callable[[], Any]] = {
        'method="deepseek"': functools.partial(plan_for, size, load, method="deepseek"),
        f"from previous, {spare} moves": functools.partial(
            plan_for, size, later, previous=before, max_moves=spare
        ),
        "from previous, no limit": functools.partial(plan_for, size, later, previous=before),
        f"{_RECENT_WINDOWS} windows": functools.partial(plan_for, size, recent),
        f"balanced, {_FRESH_WINDOWS} windows, best": functools.partial(
            plan_for, size, many, split="balanced", effort="best"
        ),
    }
    balanced = plan_for(size, many, split="balanced", effort="best").placement
    moves = size.ranks // 2
    plans[f"balanced from previous, {_RECENT_WINDOWS} windows, {moves} moves"] = functools.partial(
        plan_for, size, recent, split="balanced", previous=balanced, max_moves=moves
    )
    measured: dict[str, Times] = {}
    for name in setting.track(plans, "times of other plans"):
        measured[name] = time_warm(plans[name], setting.repeats)
    columns = [
        Column("size", "E/S/P"),
        Column("planner", "plan"),
        Column("median_ms", "median, ms", 1),
        Column("least_ms", "least, ms", 1),
    ]
    rows = [_row(size, name, found) for name, found in measured.items()]
    return Table(f"Time of other plans, {_KIND}, {setting.num_layers} layers", columns, rows)
