"""Plans for the balanced split on recordings: held out, window by window, and with more slots.

Axes: W windows, L layers, E experts, S slots, P ranks.

Planned on the first half of a recording, scored on each window of the second. Figures are fractions
as in (max - mean) / mean, of windows divided by `balanced_split` until it no longer improves.
"""

import functools
from collections.abc import Callable, Iterable

import numpy as np

from benchmarks.loads import Size
from benchmarks.recordings import splits
from benchmarks.setting import Setting, percent, plan_for, table_of
from benchmarks.tables import Column, Table
from jax_eplb.split import balanced_split

NEEDS = (
    "Needs --recordings FILE.npz, with counts [windows, layers, experts] or a trace "
    "expert_ids [tokens, layers, choices]."
)
_STEPS = 200
# What a plan is made from while the recording goes on.
_RECENT = 8
_REDUNDANCY_RANKS = 16


def balanced(setting: Setting) -> list[Table]:
    """Three tables: held out, online, and for spare slots of P, 2 P and 4 P."""
    if not setting.recordings:
        return [Table("Recordings, balanced split", [], [], [NEEDS])]
    return [held_out_table(setting), online_table(setting), redundancy_table(setting)]


def balanced_imbalance(slot_to_expert: np.ndarray, windows: np.ndarray, num_ranks: int) -> float:
    """Mean over windows [W, L, E] and layers, summed up in float64."""
    tokens = balanced_split(windows, slot_to_expert, windows.shape[2], num_ranks, num_steps=_STEPS)
    ranks = np.asarray(tokens, np.float64)
    ranks = ranks.reshape(*ranks.shape[:2], num_ranks, -1).sum(axis=-1)  # [W, L, P]
    mean = ranks.mean(axis=-1)
    return float(((ranks.max(axis=-1) - mean) / np.where(mean > 0, mean, 1)).mean())


def even_imbalance(slot_to_expert: np.ndarray, windows: np.ndarray, num_ranks: int) -> float:
    """The same under the even split."""
    return percent(slot_to_expert, windows, num_ranks) / 100


def held_out_table(setting: Setting) -> Table:
    """Static plans: greedy's and ours for the even split, under both splits, then ours for it."""
    cases = [(r, size) for r in setting.recordings for size in r.balanced_sizes]
    rows = []
    for recording, size in setting.track(cases, "balanced, held out"):
        [(seen, later)] = splits(recording.windows, "half")
        greedy = table_of(plan_for(size, seen.sum(axis=0), method="deepseek"))
        even = table_of(plan_for(size, seen))
        row = {
            "recording": recording.name,
            "size": str(size),
            "even_greedy": even_imbalance(greedy, later, size.ranks),
            "even_ours": even_imbalance(even, later, size.ranks),
            "greedy": balanced_imbalance(greedy, later, size.ranks),
            "even": balanced_imbalance(even, later, size.ranks),
        }
        for effort in setting.efforts:
            table = table_of(plan_for(size, seen, split="balanced", effort=effort))
            row[effort] = balanced_imbalance(table, later, size.ranks)
        rows.append(row)
    columns = [
        *_where(),
        Column("even_greedy", "even split: greedy plan", 4),
        Column("even_ours", "even split: ours", 4),
        Column("greedy", "balanced split: greedy plan", 4),
        Column("even", "balanced split: ours, for the even one", 4),
        *(Column(effort, f"balanced split: {effort}", 4) for effort in setting.efforts),
    ]
    title = "Balanced split: imbalance on the second half of a recording, a fraction"
    return Table(title, columns, rows)


def online_table(setting: Setting) -> Table:
    """Static plans, and those that follow the recording."""
    cases = [(r, size) for r in setting.recordings for size in r.online_sizes]
    effort = setting.efforts[-1]
    rows = []
    for recording, size in setting.track(cases, "balanced, online"):
        windows, ranks = recording.windows, size.ranks
        [(seen, later)] = splits(windows, "half")
        even = table_of(plan_for(size, seen, effort=effort))
        start = table_of(plan_for(size, seen, split="balanced", effort=effort))
        follow = functools.partial(_replanned, windows, size)
        again = functools.partial(_plan_again, size)
        rows.append(
            {
                "recording": recording.name,
                "size": str(size),
                "even_static": even_imbalance(even, later, ranks),
                "even_every_window": follow(even, 1, _plan_even(size), even_imbalance),
                "static": balanced_imbalance(start, later, ranks),
                "few_moves": follow(start, 4, again(ranks // 8), balanced_imbalance),
                "many_moves": follow(start, 4, again(2 * ranks), balanced_imbalance),
                "every_window": follow(start, 1, again(2 * ranks), balanced_imbalance),
            }
        )
    columns = [
        *_where(),
        Column("even_static", "even split: static", 4),
        Column("even_every_window", "even split: new plan every window", 4),
        Column("static", "balanced split: static", 4),
        Column("few_moves", "P / 8 moves every 4 windows", 4),
        Column("many_moves", "2 P moves every 4 windows", 4),
        Column("every_window", "2 P moves every window", 4),
    ]
    title = "Online: mean imbalance over the second half of a recording, a fraction"
    note = f"The first plan is from the first half ({effort}), later ones from the last {_RECENT}"
    return Table(title, columns, rows, [f"{note} windows (default)."])


Planner = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _plan_even(size: Size) -> Planner:
    return lambda recent, _: table_of(plan_for(size, recent))


def _plan_again(size: Size, moves: int) -> Planner:
    return lambda recent, before: table_of(
        plan_for(size, recent, split="balanced", previous=before, max_moves=moves)
    )


def _replanned(
    windows: np.ndarray,
    size: Size,
    table: np.ndarray,
    every: int,
    planner: Planner,
    score: Callable[[np.ndarray, np.ndarray, int], float],
) -> float:
    """Mean imbalance over the second half, with a new table after every so many windows."""
    first = len(windows) // 2
    total = 0.0
    for start in range(first, len(windows), every):
        if start > first:
            table = planner(windows[start - _RECENT : start], table)
        scored = windows[start : start + every]
        total += score(table, scored, size.ranks) * len(scored)
    return total / (len(windows) - first)


def redundancy_table(setting: Setting) -> Table:
    """What spare slots are worth under either split."""
    ranks, effort = _REDUNDANCY_RANKS, setting.efforts[-1]
    fits = [r for r in setting.recordings if r.num_experts % ranks == 0]
    cases = [(recording, times) for recording in fits for times in (1, 2, 4)]
    rows = []
    for recording, times in setting.track(cases, "balanced, redundancy"):
        size = Size(recording.num_experts, recording.num_experts + times * ranks, ranks)
        [(seen, later)] = splits(recording.windows, "half")
        greedy = table_of(plan_for(size, seen.sum(axis=0), method="deepseek"))
        ours = table_of(plan_for(size, seen, split="balanced", effort=effort))
        rows.append(
            {
                "recording": recording.name,
                "size": str(size),
                "spare": f"{times} P",
                "even_greedy": even_imbalance(greedy, later, ranks),
                "greedy": balanced_imbalance(greedy, later, ranks),
                "ours": balanced_imbalance(ours, later, ranks),
            }
        )
    columns = [
        *_where(),
        Column("spare", "S - E"),
        Column("even_greedy", "even split: greedy plan", 4),
        Column("greedy", "balanced split: greedy plan", 4),
        Column("ours", f"balanced split: {effort}", 4),
    ]
    title = f"Redundancy, {ranks} ranks: imbalance on the second half of a recording, a fraction"
    return Table(title, columns, rows)


def _where() -> Iterable[Column]:
    return Column("recording", "recording"), Column("size", "E/S/P")
