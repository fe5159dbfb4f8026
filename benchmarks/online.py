"""What balancing while serving costs a step: with updates, watching only, and without a balancer.

The three take turns in one process, batch by batch and in changing order, so that whatever else the
machine does falls on all of them alike. The text changes its kind half-way. Wall time and CPU time
of the process, by iteration:

    python -m benchmarks.online [--batches 24] [--window-size 32 --change-factor 2]
"""

import argparse
import json
import time

import numpy as np

from jax_eplb.commands.demo_online import (
    FIRST,
    OUTPUT_TOKENS,
    PROMPT_BYTES,
    SECOND,
    SEQUENCES,
    TEMPERATURE,
)
from jax_eplb.commands.run import activation_dtype
from jax_eplb.commands.sample_text import sample_requests
from jax_eplb.mesh import expert_mesh, simulate_devices
from jax_eplb.models.weights import load_decoder
from jax_eplb.online import Balancer, BalancerConfig
from jax_eplb.placement import Placement
from jax_eplb.planner import plan
from jax_eplb.routing import split_of
from jax_eplb.serving import Engine, ServingConfig

WAYS = ("none", "watching", "updates")


def measure(arguments: argparse.Namespace) -> dict:
    num_ranks, num_slots = arguments.ep_size, arguments.num_slots
    simulate_devices(num_ranks)
    mesh, saved = expert_mesh(num_ranks), load_decoder()
    split = split_of(arguments.replica_choice)
    per_rank = -(-SEQUENCES // num_ranks)
    size = per_rank * num_ranks
    kinds = [
        sample_requests(
            "second",
            size * -(-arguments.batches // 2),
            kinds=[kind],
            prompt_bytes=PROMPT_BYTES,
            output_tokens=OUTPUT_TOKENS,
        )
        for kind in (FIRST, SECOND)
    ]
    requests = kinds[0] + kinds[1]
    batches = [requests[i : i + size] for i in range(0, len(requests), size)]
    layer_ids = saved.config.moe_layer_ids
    placement = Placement.default(
        num_experts=saved.config.num_experts,
        num_ranks=num_ranks,
        num_slots=num_slots,
        layer_ids=layer_ids,
    )
    serving = ServingConfig(
        max_batch_size=per_rank,
        max_prompts_per_step=per_rank,
        max_length=PROMPT_BYTES + OUTPUT_TOKENS,
        replica_choice=arguments.replica_choice,
        temperature=TEMPERATURE,
    )
    config = BalancerConfig(
        layer_updates_per_iter=arguments.layer_updates_per_iter,
        window_size=arguments.window_size,
        change_factor=arguments.change_factor,
    )
    engine = Engine(
        saved,
        mesh=mesh,
        placement=placement,
        serving=serving,
        dtype=activation_dtype(mesh),
        balancer=config,
    )
    updating, engine.balancer = engine.balancer, None
    engine.warm_up(batches[0])
    recorder = engine.recorder()
    engine.run(batches[0], recorder=recorder)
    # Begin with a plan for the first kind, as one who serves would.
    counts = recorder.recording().expert_counts()
    planned = plan(counts, num_slots, num_ranks, split=split, layer_ids=layer_ids).placement
    engine.balancer = updating
    engine.use_placement(planned)
    watching = Balancer(planned, BalancerConfig(), split=split)
    balancers = {"none": None, "watching": watching, "updates": updating}
    wall, cpu = ({way: [] for way in WAYS} for _ in range(2))
    for number, batch in enumerate(batches):
        for turn in range(len(WAYS)):
            way = WAYS[(number + turn) % len(WAYS)]
            engine.balancer = balancers[way]
            begun = time.perf_counter(), time.process_time()
            engine.run(batch)
            wall[way].append(time.perf_counter() - begun[0])
            cpu[way].append(time.process_time() - begun[1])
    return _figures(wall, cpu, balancers)


def _figures(wall, cpu, balancers) -> dict:
    figures: dict = {"batches": len(wall["none"])}
    for way in WAYS:
        figures[way] = {
            "ms": 1e3 * float(np.median(wall[way])) / OUTPUT_TOKENS,
            "cpu_ms": 1e3 * float(np.mean(cpu[way])) / OUTPUT_TOKENS,
            # Of neighbours in time, so that a busy minute does not count for one side alone.
            "slow_down": float(np.median(np.array(wall[way]) / np.array(wall["none"]))) - 1,
            "cpu_slow_down": sum(cpu[way]) / sum(cpu["none"]) - 1,
        }
        balancer = balancers[way]
        if balancer is not None:
            held = 1e3 * np.quantile(balancer.stalls, [0.5, 0.99])
            figures[way] |= {"stall_ms_p50": float(held[0]), "stall_ms_p99": float(held[1])}
            figures[way] |= {"updates": balancer.updates, "moved_slots": balancer.moved_slots}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--batches", type=int, default=24, help="of 24 iterations, three ways each")
    parser.add_argument("--ep-size", type=int, default=8)
    parser.add_argument("--num-slots", type=int, default=72)
    parser.add_argument("--layer-updates-per-iter", type=int, default=2)
    parser.add_argument("--window-size", type=int)
    parser.add_argument("--change-factor", type=float)
    parser.add_argument("--replica-choice", default="balanced", choices=("even", "balanced"))
    print(json.dumps(measure(parser.parse_args()), indent=1))


if __name__ == "__main__":
    main()
