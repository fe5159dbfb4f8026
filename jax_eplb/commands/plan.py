"""`jax-eplb plan`: from a recording to a load balancer file, and what it should give."""

import argparse
import json
from typing import Any

import numpy as np

from jax_eplb.commands.inputs import read_recording
from jax_eplb.commands.kept_programs import keep_programs
from jax_eplb.commands.progress import progress_bars
from jax_eplb.formats import load_placement, save_placement
from jax_eplb.load import Recording
from jax_eplb.planner import Plan, frontier, plan


def run(arguments: argparse.Namespace) -> None:
    keep_programs()
    recording = read_recording(arguments)
    limits: list[int | None] = arguments.max_moves or [None]
    plans = _plans(arguments, recording, limits)
    num_slots = plans[-1].placement.num_slots
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    save_placement(
        plans[-1].placement,
        arguments.output,
        layer_updates_per_iter=arguments.layer_updates_per_iter,
    )
    figures = _figures(plans[-1], arguments.verbose)
    rows = [
        {"max_moves": "all" if limit is None else limit, **_figures(each, by_layer=False)}
        for limit, each in zip(limits, plans, strict=True)
    ]
    if arguments.json:
        frontier = {"frontier": rows} if len(rows) > 1 else {}
        print(json.dumps({"output": str(arguments.output), **figures, **frontier}))
        return
    for layer, row in figures.get("layers", {}).items():
        print(
            f"layer {layer}: imbalance expected {row['imbalance']:.6f}, "
            f"no plan below {row['lower_bound']:.6f}"
        )
    if len(rows) > 1:
        print("moves allowed  moved (mean)  imbalance")
        for row in rows:
            print(f"{row['max_moves']!s:>13}  {row['moves']:>12.1f}  {row['imbalance']:.6f}")
    print(
        f"{recording.num_experts} experts in {num_slots} slots on {arguments.ep_size} ranks, "
        f"{len(recording.layer_ids)} layers, from {len(recording.iterations)} iterations: "
        f"imbalance expected {figures['imbalance']:.6f}, no plan below "
        f"{figures['lower_bound']:.6f}: the fullest rank is at most "
        f"{100 * figures['gap']:.2f}% from optimal"
    )
    if "moves" in figures:
        print(f"{figures['moves']:.1f} slots of a layer change")
    if "cross_node" in figures:
        print(f"{100 * figures['cross_node']:.2f}% of the tokens are served off their group's node")
    print(arguments.output)


def _plans(
    arguments: argparse.Namespace, recording: Recording, limits: list[int | None]
) -> list[Plan]:
    """A plan for each limit of moves, with a progress bar where it may take long."""
    counts, num_ranks = recording.expert_counts(), arguments.ep_size
    options: dict[str, Any] = {
        "split": arguments.split,
        "effort": arguments.effort,
        "method": arguments.method,
        "num_nodes": arguments.num_nodes,
        "num_groups": arguments.num_groups,
        "cross_node_weight": arguments.cross_node_weight,
        "spread_replicas": arguments.spread_replicas,
        "capacity": arguments.capacity,
        "layer_ids": recording.layer_ids,
    }
    if arguments.previous is not None:
        previous = load_placement(
            arguments.previous,
            num_ranks=num_ranks,
            num_experts=recording.num_experts,
            layer_ids=recording.layer_ids,
        )
        if arguments.num_slots not in (None, previous.num_slots):
            raise ValueError(
                f"{arguments.previous} has {previous.num_slots} slots; a plan with "
                f"{arguments.num_slots} cannot start from it: leave out --num-slots or --previous"
            )
        planned = frontier(counts, previous, limits, **options)
    elif arguments.max_moves is not None:
        raise ValueError("--max-moves needs --previous, the load balancer file in force")
    else:
        num_slots = arguments.num_slots or recording.num_experts
        planned = (plan(counts, num_slots, num_ranks, **options) for _ in limits)
    plans = []
    # A single quick plan needs none.
    with progress_bars(shown=len(limits) > 1 or arguments.effort == "best") as bars:
        for one in bars.track(planned, total=len(limits), description="planning"):
            one.imbalance.block_until_ready()
            plans.append(one)
    return plans


def _figures(result: Plan, by_layer: bool) -> dict:
    imbalance, bound, gap = (
        np.asarray(values) for values in (result.imbalance, result.lower_bound, result.gap)
    )
    figures: dict = {
        "imbalance": float(imbalance.mean()),
        "lower_bound": float(bound.mean()),
        "gap": float(gap.mean()),
    }
    if result.moves is not None:
        figures["moves"] = float(np.asarray(result.moves).mean())
    if result.cross_node is not None:
        figures["cross_node"] = float(np.asarray(result.cross_node).mean())
    if by_layer:
        rows = zip(result.placement.layer_ids, imbalance, bound, strict=True)
        figures["layers"] = {
            str(layer): {"imbalance": float(i), "lower_bound": float(b)} for layer, i, b in rows
        }
    return figures
