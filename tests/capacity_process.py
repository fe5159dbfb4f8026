"""One process of a run over several: serves while a rank is emptied, and while it comes back.

python -m tests.capacity_process PROCESS PROCESSES PORT

Prints as JSON what was generated, and the placements that were in force.
"""

import json
import sys

import jax

RANKS = 4
# Of calls that say how far the run has come, one an iteration.
LOST, BACK = 8, 40


def main(process: int, processes: int, port: int) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", RANKS // processes)
    if processes > 1:
        jax.distributed.initialize(f"localhost:{port}", processes, process)

    import numpy as np

    from jax_eplb import Placement, expert_mesh
    from jax_eplb.online import Balancer, BalancerConfig
    from jax_eplb.serving import Engine, ServingConfig
    from tests.tiny_model import CONFIG, random_requests, tiny_decoder

    requests = random_requests([(5, 20), (9, 18), (16, 22), (3, 24)] * 8)
    placement = Placement.default(
        num_experts=16, num_slots=24, num_ranks=RANKS, layer_ids=CONFIG.moe_layer_ids
    )
    engine = Engine(
        tiny_decoder(),
        mesh=expert_mesh(RANKS),
        placement=placement,
        serving=ServingConfig(max_batch_size=4, max_length=40, replica_choice="balanced"),
    )
    engine.warm_up(requests)
    balancer = Balancer(placement, BalancerConfig(layer_updates_per_iter=1), split="balanced")
    balancer.prepare(engine._params)
    engine.balancer = balancer
    tables = []

    def on_progress(_) -> None:
        tables.append(np.asarray(engine.placement.slot_to_expert).tolist())
        if len(tables) == LOST:
            balancer.set_capacity([1, 1, 0, 1])
        elif len(tables) == BACK:
            balancer.set_capacity([1, 1, 1, 0.5])

    outputs = engine.run(requests, on_progress=on_progress).outputs
    balancer.flush()
    print(json.dumps({"outputs": [output.tolist() for output in outputs], "tables": tables}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
