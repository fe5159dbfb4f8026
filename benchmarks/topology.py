"""Nodes and unequal ranks: groups kept together, replicas kept apart, slow and lost ranks.

Axes: L layers, E experts, S slots, P ranks, Q nodes, G groups.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.loads import KINDS, SIZES, Size, draw_load
from benchmarks.setting import Setting, percent, plan_for, table_of
from benchmarks.tables import Column, Table

_SIZE = SIZES[1]
_SPREAD_SIZES = (SIZES[1], Size(256, 512, 32))
_CAPACITY_SIZE = Size(256, 324, 36)
_NODES, _GROUPS = 4, 8
_WEIGHTS = (3.0, 1.0, 0.2, 0.0)


def topology(
    setting: Setting,
    size: Size = _SIZE,
    spread_sizes: Sequence[Size] = _SPREAD_SIZES,
    capacity_size: Size = _CAPACITY_SIZE,
    kinds: Sequence[str] = KINDS,
) -> list[Table]:
    """Three tables: groups on nodes, replicas over nodes, capacity."""
    return [
        groups_table(setting, size, kinds),
        spread_table(setting, spread_sizes, kinds),
        capacity_table(setting, capacity_size, kinds),
    ]


def groups_table(setting: Setting, size: Size, kinds: Sequence[str]) -> Table:
    """Groups of experts as a constraint, and at several prices of leaving the node."""
    notes: list[str] = []
    rows = []
    on_nodes: dict[str, Any] = {"num_nodes": _NODES, "num_groups": _GROUPS}
    for kind in setting.track(kinds, "topology, groups"):
        load = draw_load(kind, setting.num_layers, size.experts)
        tables: dict[str, np.ndarray] = {}
        for peer in setting.opponents:
            if peer.kind in ("deepseek", "vllm", "sglang", "snake"):  # the others know no groups
                result = setting.ask(peer, load, size, notes, f"{size}, {kind}", **on_nodes)
                if result is not None:
                    tables[peer.name] = result.slot_to_expert
        tables['ours, method="deepseek"'] = table_of(
            plan_for(size, load, method="deepseek", **on_nodes)
        )
        for effort in setting.efforts:
            result = plan_for(size, load, effort=effort, **on_nodes)
            tables[f"ours, {effort}"] = table_of(result)
        for weight in _WEIGHTS:
            result = plan_for(size, load, cross_node_weight=weight, **on_nodes)
            tables[f"ours, weight {weight:g}"] = table_of(result)
        rows += [
            {
                "load": kind,
                "planner": name,
                "imbalance": percent(table, load, size.ranks),
                "cross": 100 * cross_node_part(table, load),
            }
            for name, table in tables.items()
        ]
    columns = [
        Column("load", "load"),
        Column("planner", "planner"),
        Column("imbalance", "imbalance, percent", 2),
        Column("cross", "tokens served off their group's node, percent", 2),
    ]
    title = f"{_GROUPS} groups on {_NODES} nodes, {size}, {setting.num_layers} layers"
    return Table(title, columns, rows, notes)


def cross_node_part(
    slot_to_expert: np.ndarray, load: np.ndarray, num_nodes: int = _NODES, num_groups: int = _GROUPS
) -> float:
    """The part of the tokens served off the node that serves most of their group, mean of layers.

    >>> cross_node_part(np.array([[0, 2, 1, 3]]), np.array([[4, 2, 1, 1]]), 2, 2)
    0.375
    """
    parts = []
    for slots, tokens in zip(slot_to_expert, load, strict=True):
        share = (tokens / np.maximum(np.bincount(slots, minlength=len(tokens)), 1))[slots]
        served = np.zeros((num_groups, num_nodes))
        node = np.arange(len(slots)) // (len(slots) // num_nodes)
        np.add.at(served, (slots // (len(tokens) // num_groups), node), share)
        parts.append(1 - served.max(axis=1).sum() / max(served.sum(), 1e-30))
    return float(np.mean(parts))


def spread_table(setting: Setting, sizes: Sequence[Size], kinds: Sequence[str]) -> Table:
    """Without and with `spread_replicas`."""
    rows = []
    cases = [(size, kind) for size in sizes for kind in kinds]
    for size, kind in setting.track(cases, "topology, replicas"):
        load = draw_load(kind, setting.num_layers, size.experts)
        row: dict = {"size": str(size), "load": kind}
        for name, spread in (("free", False), ("spread", True)):
            table = table_of(plan_for(size, load, num_nodes=_NODES, spread_replicas=spread))
            row[f"{name}_imbalance"] = percent(table, load, size.ranks)
            row[f"{name}_together"], row[f"{name}_one"] = on_one_node(table, size.experts)
        rows.append(row)
    columns = [Column("size", "E/S/P"), Column("load", "load")]
    for name in ("free", "spread"):
        columns += [
            Column(f"{name}_imbalance", f"{name}: imbalance, percent", 2),
            Column(f"{name}_together", "several replicas, all on one node", 1),
            Column(f"{name}_one", "all experts on one node only", 1),
        ]
    title = (
        f"Replicas spread over {_NODES} nodes; experts as the mean of {setting.num_layers} layers"
    )
    return Table(title, columns, rows)


def on_one_node(
    slot_to_expert: np.ndarray, num_experts: int, num_nodes: int = _NODES
) -> tuple[float, float]:
    """Experts of a layer that one node holds alone: those of several replicas, and all.

    >>> on_one_node(np.array([[0, 0, 1, 2]]), 3, 2)
    (1.0, 3.0)
    """
    by_node = slot_to_expert.reshape(len(slot_to_expert), num_nodes, -1)
    count = (by_node[..., None] == np.arange(num_experts)).sum(axis=2)  # [L, Q, E]
    alone = count.max(axis=1) == count.sum(axis=1)
    several = alone & (count.sum(axis=1) > 1)
    return float(several.sum(axis=1).mean()), float(alone.sum(axis=1).mean())


def capacity_table(setting: Setting, size: Size, kinds: Sequence[str]) -> Table:
    """All ranks of speed 1 but one of a half and one that is gone."""
    speeds = np.ones(size.ranks)
    speeds[-2:] = 0.5, 0
    half = np.where(speeds > 0, speeds, 1)
    moves = 2 * size.ranks
    rows = []
    for kind in setting.track(kinds, "topology, capacity"):
        load = draw_load(kind, setting.num_layers, size.experts)
        row: dict = {"load": kind}
        equal = plan_for(size, load)
        row["blind"] = 100 * time_imbalance(table_of(equal), load, half)
        for effort in setting.efforts:
            table = table_of(plan_for(size, load, capacity=speeds, effort=effort))
            row[effort] = 100 * time_imbalance(table, load, speeds)
        again = plan_for(size, load, capacity=speeds, previous=equal.placement, max_moves=moves)
        row["again"] = 100 * time_imbalance(table_of(again), load, speeds)
        row["moved"] = float(np.asarray(again.moves).mean())
        rows.append(row)
    columns = [
        Column("load", "load"),
        Column("blind", "planned as if equal (none gone)", 2),
        *(Column(effort, effort, 2) for effort in setting.efforts),
        Column("again", f"from that plan, {moves} moves", 2),
        Column("moved", "slots moved", 1),
    ]
    title = (
        f"One rank of half the speed, one gone: imbalance of the ranks' times, percent, {size}, "
        f"{setting.num_layers} layers"
    )
    return Table(title, columns, rows)


def time_imbalance(slot_to_expert: np.ndarray, load: np.ndarray, speeds: np.ndarray) -> float:
    """Slowest rank's tokens / speed over those of a perfect division, less 1; mean of layers.

    The id E is an empty slot.

    >>> time_imbalance(np.array([[0, 1, 2, 2]]), np.array([[5, 3]]), np.array([1, 1, 0, 0]))
    0.25
    """
    found = []
    live = speeds > 0
    for slots, tokens in zip(slot_to_expert, load, strict=True):
        count = np.maximum(np.bincount(slots, minlength=len(tokens) + 1), 1)
        share = np.append(tokens, 0) / count
        ranks = share[slots].reshape(len(speeds), -1).sum(axis=1)
        found.append((ranks[live] / speeds[live]).max() / (tokens.sum() / speeds.sum()) - 1)
    return float(np.mean(found))
