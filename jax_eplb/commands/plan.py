"""`jax-eplb plan`: from a recording to a load balancer file."""

import argparse
import json

import numpy as np

from jax_eplb.commands.inputs import read_recording
from jax_eplb.formats import save_placement
from jax_eplb.planner import Plan, plan


def run(arguments: argparse.Namespace) -> None:
    recording = read_recording(arguments)
    num_slots = arguments.num_slots or recording.num_experts
    result = plan(
        recording.expert_counts(),
        num_slots=num_slots,
        num_ranks=arguments.ep_size,
        layer_ids=recording.layer_ids,
    )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    save_placement(
        result.placement, arguments.output, layer_updates_per_iter=arguments.layer_updates_per_iter
    )
    figures = _figures(result, arguments.verbose)
    if arguments.json:
        print(json.dumps({"output": str(arguments.output), **figures}))
        return
    for layer, row in figures.get("layers", {}).items():
        print(
            f"layer {layer}: imbalance expected {row['imbalance']:.6f}, "
            f"no plan below {row['lower_bound']:.6f}"
        )
    print(
        f"{recording.num_experts} experts in {num_slots} slots on {arguments.ep_size} ranks, "
        f"{len(recording.layer_ids)} layers, from {len(recording.iterations)} iterations: "
        f"imbalance expected {figures['imbalance']:.6f}, no plan below "
        f"{figures['lower_bound']:.6f}"
    )
    print(arguments.output)


def _figures(result: Plan, by_layer: bool) -> dict:
    imbalance, bound = np.asarray(result.imbalance), np.asarray(result.lower_bound)
    figures: dict = {"imbalance": float(imbalance.mean()), "lower_bound": float(bound.mean())}
    if by_layer:
        rows = zip(result.placement.layer_ids, imbalance, bound, strict=True)
        figures["layers"] = {
            str(layer): {"imbalance": float(i), "lower_bound": float(b)} for layer, i, b in rows
        }
    return figures
