"""Plan and score on one load, even split: ours beside every opponent, and how far from optimal.

Axes: L layers, E experts, S slots, P ranks.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from benchmarks.loads import KINDS, SIZES, Size, draw_load
from benchmarks.recordings import window_imbalance
from benchmarks.setting import MATCHED_EFFORT, Setting, percent, plan_for, table_of
from benchmarks.tables import Column, Table
from tests.greedy_reference import greedy_plan

# Percentage points below which two plans are equally good: a unit of the last digit shown is 0.01.
TOLERANCE = 0.005


@dataclasses.dataclass(frozen=True)
class Comparison:
    """In how many cases ours is no worse, or better, and by how much it is worse at most."""

    cases: int
    no_worse: int
    better: int
    worst: float  # percentage points; negative where ours is always below


def compare(
    ours: Iterable[float | None],
    theirs: Iterable[float | None],
    tolerance: float = TOLERANCE,
) -> Comparison:
    """Count cases, lower being better; those without a figure do not count.

    >>> compare([1.0, 2.004, 3.0], [2.0, 2.0, 2.9])
    Comparison(cases=3, no_worse=2, better=1, worst=0.1)
    """
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    above = [round(a - b, 9) for a, b in pairs]
    return Comparison(
        len(pairs),
        sum(x <= tolerance for x in above),
        sum(x < -tolerance for x in above),
        max(above, default=0.0),
    )


def one_load(
    setting: Setting, sizes: Sequence[Size] = SIZES, kinds: Sequence[str] = KINDS
) -> list[Table]:
    """The imbalance of all planners in each case, and counts of who is better."""
    notes: list[str] = []
    cases = list(itertools.product(sizes, kinds))
    rows = [_measure(setting, *case, notes) for case in setting.track(cases, "one-load")]
    names = {peer.kind: peer.name for peer in setting.opponents}
    if "deepseek" not in names:
        names = {"greedy": "greedy (NumPy)"} | names
    columns = [
        Column("size", "E/S/P"),
        Column("load", "load"),
        *(Column(kind, name, 2) for kind, name in names.items()),
        *(Column(effort, effort, 2) for effort in setting.efforts),
        Column("bound", "lower bound", 2),
        Column("gap", f"{setting.efforts[-1]} at most above optimal", 2),
    ]
    title = f"One load, even split, {setting.num_layers} layers: imbalance, percent"
    return [Table(title, columns, rows, notes), _counts(setting, names, rows)]


def _measure(setting: Setting, size: Size, kind: str, notes: list[str]) -> dict:
    load = draw_load(kind, setting.num_layers, size.experts)
    row: dict = {"size": str(size), "load": kind}
    for peer in setting.opponents:
        result = setting.ask(peer, load, size, notes, f"{size}, {kind}")
        row[peer.kind] = result and percent(result.slot_to_expert, load, size.ranks)
    if "deepseek" not in row:
        row["greedy"] = percent(greedy_plan(load, size.slots, size.ranks), load, size.ranks)
    for effort in setting.efforts:
        result = plan_for(size, load, effort=effort)
        reached = window_imbalance(table_of(result), load[None], size.ranks)[0]  # [L]
        bound = np.asarray(result.lower_bound, np.float64)
        row[effort] = 100 * float(reached.mean())
        # Those of the last, most thorough one stay.
        row["bound"] = 100 * float(bound.mean())
        row["gap"] = 100 * float(((reached - bound) / (1 + bound)).mean())
    return row


def _counts(setting: Setting, names: dict[str, str], rows: list[dict]) -> Table:
    counted = []
    for kind, name in names.items():
        effort = MATCHED_EFFORT[kind]
        if effort in setting.efforts:
            found = compare([row[effort] for row in rows], [row[kind] for row in rows])
            counted.append({"ours": effort, "peer": name} | dataclasses.asdict(found))
    columns = [
        Column("ours", "ours"),
        Column("peer", "against"),
        Column("cases", "cases", 0),
        Column("no_worse", "no worse", 0),
        Column("better", "better", 0),
        Column("worst", "worst difference, points", 3),
    ]
    note = f"No worse: at most {TOLERANCE} percentage points above. Better: more than that below."
    return Table("One load: cases in which ours is no worse, and better", columns, counted, [note])
