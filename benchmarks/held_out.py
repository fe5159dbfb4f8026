"""Plan on windows of a recording, score on later ones, even split.

Axes: W windows, L layers, E experts, S slots, P ranks.

All planners see the same windows, condensed to 64 at most. Online, each chunk's plan is scored on
the next one; an opponent that starts from the table in force is given it.
"""

import functools
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.loads import Size
from benchmarks.one_load import compare
from benchmarks.peers import Peer
from benchmarks.recording_files import Recording
from benchmarks.recordings import (
    PROTOCOLS,
    condense,
    fetched_experts,
    held_out_imbalance,
    splits,
)
from benchmarks.setting import Setting, plan_for, table_of
from benchmarks.tables import Column, Table

NEEDS = "Needs --recordings FILE.npz, with counts [windows, layers, experts]."
_MOVES_PER_RANK = 2

# From windows [W, L, E] and the table in force [L, S], or None, to a table; None for a failure.
Planner = Callable[[np.ndarray, np.ndarray | None], np.ndarray | None]


def held_out(setting: Setting) -> list[Table]:
    """Held-out imbalance by recording, size and protocol; experts fetched when re-planning."""
    cases = [(r, size) for r in setting.recordings for size in r.even_sizes]
    title = "Recordings, even split: imbalance on windows not planned for, percent"
    if not cases:
        return [Table(title, [], [], [NEEDS])]
    rows, fetches, notes = [], [], []
    for recording, size in setting.track(cases, "windows"):
        case = {"recording": recording.name, "size": str(size)}
        cells: dict[str, dict] = {protocol: {} for protocol in PROTOCOLS}
        fetch: dict[str, float | None] = {}
        for name, (planner, online_only) in _planners(setting, recording, size, notes).items():
            for protocol in PROTOCOLS:
                if online_only and protocol != "online":
                    continue
                cells[protocol][name], fetched = run(planner, recording.windows, size, protocol)
                if protocol == "online":
                    fetch[name] = fetched
        rows += [case | {"protocol": protocol} | cells[protocol] for protocol in PROTOCOLS]
        fetches.append(case | fetch)
    names = {name: None for row in rows for name in row if name not in ("recording", "size")}
    names.pop("protocol")
    where = [Column("recording", "recording"), Column("size", "E/S/P")]
    columns = [*where, Column("protocol", "protocol"), *(Column(name, name, 1) for name in names)]
    fetch_title = "Recordings, online: experts fetched by the ranks, per layer and re-plan"
    fetch_columns = [*where, *(Column(name, name, 1) for name in names)]
    return [
        Table(title, columns, rows, notes),
        Table(fetch_title, fetch_columns, fetches),
        _counts(setting, rows),
    ]


def _planners(
    setting: Setting, recording: Recording, size: Size, notes: list[str]
) -> dict[str, tuple[Planner, bool]]:
    """By name; with True for those that differ from another one online only."""
    found: dict[str, tuple[Planner, bool]] = {}

    def theirs(peer: Peer, windows, previous, history: bool = False):
        result = setting.ask(
            peer,
            windows,
            size,
            notes,
            f"{recording.name}, {size}",
            previous=previous,
            keep_history=history and previous is not None,
        )
        return result and result.slot_to_expert

    def ours(windows, previous, effort: str, moves: int | None = None):
        options = {}
        if moves is not None and previous is not None:
            options = {"previous": previous, "max_moves": moves}
        return table_of(plan_for(size, windows, effort=effort, **options))

    for peer in setting.opponents:
        found[peer.name] = functools.partial(theirs, peer), False
        if peer.kind.startswith("flashlb"):
            found[f"{peer.name}, with history"] = (
                functools.partial(theirs, peer, history=True),
                True,
            )
    moves = _MOVES_PER_RANK * size.ranks
    for effort in setting.efforts:
        if effort == "fast":  # it adds the windows up
            continue
        found[effort] = functools.partial(ours, effort=effort), False
        found[f"{effort}, {_MOVES_PER_RANK} P moves"] = (
            functools.partial(ours, effort=effort, moves=moves),
            True,
        )
    return found


def run(
    planner: Planner, windows: np.ndarray, size: Size, protocol: str
) -> tuple[float | None, float | None]:
    """Held-out imbalance in percent; and online, the experts fetched per layer and re-plan."""
    tables, tests = [], []
    for seen, later in splits(windows, protocol):
        previous = tables[-1] if tables else None
        table = planner(condense(seen), previous)
        if table is None:
            return None, None
        tables.append(table)
        tests.append(later)
    fetched = [
        fetched_experts(old, new, size.experts, size.ranks)
        for old, new in itertools.pairwise(tables)
    ]
    mean = float(np.mean(fetched)) if fetched else None
    return 100 * held_out_imbalance(tables, tests, size.ranks), mean


def _counts(setting: Setting, rows: Sequence[dict]) -> Table:
    counted = []
    for peer in setting.opponents:
        for name, effort in itertools.product(
            (peer.name, f"{peer.name}, with history"), setting.efforts
        ):
            if any(name in row for row in rows) and any(effort in row for row in rows):
                found = compare([r.get(effort) for r in rows], [r.get(name) for r in rows])
                counted.append({"ours": effort, "peer": name} | vars(found))
    columns = [
        Column("ours", "ours"),
        Column("peer", "against"),
        Column("cases", "cells", 0),
        Column("no_worse", "no worse", 0),
        Column("better", "better", 0),
        Column("worst", "worst difference, points", 2),
    ]
    title = "Recordings: cells of the first table in which ours is no worse, and better"
    return Table(title, columns, counted)
