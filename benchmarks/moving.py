"""Plans that start from the placement in force: what few moves bring, and that idle ones are rare.

Axes: W windows, L layers, E experts, S slots, P ranks.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.loads import KINDS, SIZES, Size, draw_load, drifted
from benchmarks.recordings import condense, fetched_experts, splits
from benchmarks.setting import Setting, percent, plan_for, table_of
from benchmarks.tables import Column, Table
from benchmarks.timing import time_warm
from jax_eplb.planner import Plan

_SIZE = SIZES[0]
_KIND = "sigma 1"
_DRIFT = 0.3
_UNCHANGED_SIZES = (SIZES[0], SIZES[2], SIZES[7])
_WAYS = ("stay", "again", "fresh")
_LIMITS = (0, 8, 16, 32, 36, 72, None)


def moving(
    setting: Setting,
    size: Size = _SIZE,
    limits: Sequence[int | None] = _LIMITS,
    unchanged_sizes: Sequence[Size] = _UNCHANGED_SIZES,
) -> list[Table]:
    """Four tables: limits of moves, unchanged loads, opponents after a drift, recordings."""
    return [
        frontier_table(setting, size, limits),
        unchanged_table(setting, unchanged_sizes),
        drift_table(setting, size),
        recordings_table(setting),
    ]


def _plan(setting: Setting, size: Size, load: np.ndarray, **options: Any) -> Plan:
    return plan_for(size, load, effort=setting.usual_effort, **options)


def part_of_gain(stay: float, reached: float, fresh: float) -> float | None:
    """How much of what a fresh plan gains was gained; None where it gains nothing.

    >>> part_of_gain(10, 4, 2), part_of_gain(1, 1, 1)
    (0.75, None)
    """
    return (stay - reached) / (stay - fresh) if stay > fresh else None


def frontier_table(setting: Setting, size: Size, limits: Sequence[int | None]) -> Table:
    """After the load has drifted: what each limit of moves brings."""
    load = draw_load(_KIND, setting.num_layers, size.experts)
    later = drifted(load, _DRIFT)
    before = _plan(setting, size, load).placement
    stay = percent(np.asarray(before.slot_to_expert), later, size.ranks)
    fresh = percent(table_of(_plan(setting, size, later)), later, size.ranks)
    rows = []
    for limit in setting.track(limits, "moves"):
        again = functools.partial(_plan, setting, size, later, previous=before, max_moves=limit)
        result = again()
        reached = percent(table_of(result), later, size.ranks)
        moves = np.asarray(result.moves)
        rows.append(
            {
                "limit": "none" if limit is None else str(limit),
                "imbalance": reached,
                "moved": float(moves.mean()),
                "most": int(moves.max()),
                "gain": part_of_gain(stay, reached, fresh),
                **time_warm(again, setting.repeats)._asdict(),
            }
        )
    columns = [
        Column("limit", "moves allowed"),
        Column("imbalance", "imbalance, percent", 2),
        Column("moved", "slots moved, mean", 1),
        Column("most", "most in a layer", 0),
        Column("gain", "part of a fresh plan's gain", 3),
        Column("median_ms", "median, ms", 1),
        Column("least_ms", "least, ms", 1),
    ]
    title = (
        f"Moves after a drift of {_DRIFT}: {size}, {_KIND}, {setting.num_layers} layers; a fresh "
        f"plan reaches {fresh:.2f}"
    )
    return Table(title, columns, rows)


def unchanged_table(setting: Setting, sizes: Sequence[Size]) -> Table:
    """Planned again for the load that the placement in force was planned for."""
    rows = []
    cases = list(itertools.product(sizes, KINDS))
    for size, kind in setting.track(cases, "moves, unchanged"):
        load = draw_load(kind, setting.num_layers, size.experts)
        before = _plan(setting, size, load)
        row = {"size": str(size), "load": kind}
        for name, limit in (("limited", 2 * size.ranks), ("free", None)):
            again = _plan(setting, size, load, previous=before.placement, max_moves=limit)
            moves = np.asarray(again.moves)
            row |= {f"{name}_moved": float(moves.mean()), f"{name}_layers": int((moves > 0).sum())}
        rows.append(row)
    columns = [
        Column("size", "E/S/P"),
        Column("load", "load"),
        Column("limited_moved", "slots moved, 2 P allowed", 2),
        Column("limited_layers", "layers that move", 0),
        Column("free_moved", "slots moved, no limit", 2),
        Column("free_layers", "layers that move", 0),
    ]
    title = f"Moves after no change of the load, {setting.num_layers} layers"
    return Table(title, columns, rows)


def drift_table(setting: Setting, size: Size) -> Table:
    """All planners, each from its own table: the imbalance reached, and what it fetches."""
    load = draw_load(_KIND, setting.num_layers, size.experts)
    later = drifted(load, _DRIFT)
    notes: list[str] = []
    rows = []

    def add(name: str, old: np.ndarray, new: np.ndarray) -> None:
        rows.append(
            {
                "planner": name,
                "before": percent(old, load, size.ranks),
                "stay": percent(old, later, size.ranks),
                "after": percent(new, later, size.ranks),
                "fetched": fetched_experts(old, new, size.experts, size.ranks),
            }
        )

    for peer in setting.track(setting.opponents, "moves, opponents"):
        first = setting.ask(peer, load, size, notes, f"{size}, {_KIND}")
        if first is None:
            continue
        old = first.slot_to_expert
        again = setting.ask(peer, later, size, notes, f"{size}, drifted", previous=old)
        if again is not None:
            add(peer.name, old, again.slot_to_expert)
    before = _plan(setting, size, load)
    old = table_of(before)
    for limit in (size.ranks, 2 * size.ranks):
        again = _plan(setting, size, later, previous=before.placement, max_moves=limit)
        add(f"ours, {limit} moves", old, table_of(again))
    add("ours, no limit", old, table_of(_plan(setting, size, later, previous=before.placement)))
    add("ours, fresh", old, table_of(_plan(setting, size, later)))
    columns = [
        Column("planner", "planner"),
        Column("before", "on the first load", 2),
        Column("stay", "kept, on the drifted load", 2),
        Column("after", "planned again", 2),
        Column("fetched", f"experts fetched a layer, of {size.slots}", 1),
    ]
    title = f"After a drift of {_DRIFT}: {size}, {_KIND}, imbalance in percent"
    return Table(title, columns, rows, notes)


def recordings_table(setting: Setting) -> Table:
    """Each chunk planned from the table before with 2 P moves, beside fresh plans."""
    cases = [(r, size) for r in setting.recordings for size in r.even_sizes]
    title = "Recordings, online, 2 P moves from the table before: imbalance, percent"
    if not cases:
        return Table(title, [], [], ["Needs --recordings FILE.npz."])
    rows = []
    for recording, size in setting.track(cases, "moves, recordings"):
        figures: dict[str, list[float]] = {}
        table = None
        for seen, later in splits(recording.windows, "online"):
            windows = condense(seen)
            if table is None:
                table = table_of(_plan(setting, size, windows))
                continue
            again = _plan(setting, size, windows, previous=table, max_moves=2 * size.ranks)
            new, fresh = table_of(again), table_of(_plan(setting, size, windows))
            found = {"moved": float(np.asarray(again.moves).mean())}
            for name, scored in (("seen", windows), ("next", later)):
                for which, slots in (("stay", table), ("again", new), ("fresh", fresh)):
                    found[f"{name}_{which}"] = percent(slots, scored, size.ranks)
            for key, value in found.items():
                figures.setdefault(key, []).append(value)
            table = new
        row: dict = {key: float(np.mean(values)) for key, values in figures.items()}
        for name in ("seen", "next"):
            row[f"{name}_gain"] = part_of_gain(*(row[f"{name}_{w}"] for w in _WAYS))
        rows.append({"recording": recording.name, "size": str(size)} | row)
    columns = [Column("recording", "recording"), Column("size", "E/S/P")]
    for name, words in (("seen", "chunk planned for"), ("next", "next chunk")):
        for way, word in zip(_WAYS, ("kept", "2 P moves", "fresh"), strict=True):
            columns.append(Column(f"{name}_{way}", f"{words}: {word}", 1))
        columns.append(Column(f"{name}_gain", "part of the gain", 2))
    columns.append(Column("moved", "slots moved", 1))
    return Table(title, columns, rows)
