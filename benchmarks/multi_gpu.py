"""Expert parallelism and balancing end to end on the GPUs of this machine, or of several.

    python -m benchmarks.multi_gpu [--ranks P] [--parts PART ...] [--recordings FILE.npz ...]
        [--json FILE]

Parts: `exchange` compares the ways that tokens travel; `balancing` times a layer with the routing
of recordings, unbalanced, balanced and perfect; `moves` moves experts while layers run; `checks`
compares the bytes that placements give. With several processes, one or more GPUs each, start the
same command in all of them with --coordinator-address, --num-processes and --process-id (or
--distributed alone where JAX finds them: SLURM, Open MPI, Kubernetes). Without GPUs the sizes are
small, and devices are simulated: that shows that all of it runs, not how fast.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console

from benchmarks.layer_stack import (
    DEEPSEEK_R1,
    GPT_OSS_20B,
    QWEN3_30B,
    small,
    usable_exchanges,
)
from benchmarks.machine import describe
from benchmarks.multi_gpu_balancing import balancing_table, measure_balancing
from benchmarks.multi_gpu_checks import checks_table, run_checks
from benchmarks.multi_gpu_exchange import exchange_table, measure_exchange
from benchmarks.multi_gpu_moves import measure_moves, moves_table
from benchmarks.replayed_routing import read_replays
from benchmarks.setting import EFFORTS
from benchmarks.tables import Table
from jax_eplb.mesh import expert_mesh, simulate_devices
from jax_eplb.moe.exchange_sizes import IMPLEMENTATIONS

PARTS = ("exchange", "balancing", "moves", "checks")
# NVLink 4 of an H100 or H200: 900 GB/s, half of it each way (NVIDIA's data sheets).
_LINK = 450e9
SHAPES = (QWEN3_30B, DEEPSEEK_R1)
# Of a recording, by its number of experts. There is none of DeepSeek-R1: one of 64 experts is
# replayed in experts of its size.
REPLAYED = {
    128: QWEN3_30B,
    64: DEEPSEEK_R1._replace(name="64 of DeepSeek-R1", experts=64),
    32: GPT_OSS_20B,
}


def main(argv: list[str] | None = None) -> None:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if "balancing" in arguments.parts and not arguments.recordings:
        parser.error("the part 'balancing' replays recordings: give --recordings, or other --parts")
    if min(arguments.waves, default=1) < 1:
        parser.error(f"--waves {min(arguments.waves)}: write 1 or more")
    if arguments.more_slots < 1:
        parser.error(f"--more-slots {arguments.more_slots}: write 1 or more")
    _start(arguments)
    mesh = expert_mesh(arguments.ranks)
    results, tables = {}, []
    for part in arguments.parts:
        rows = []
        for row in _parts(arguments, mesh)[part]():
            rows.append(row)
            if jax.process_index() == 0:  # a part takes minutes
                print(json.dumps({part: row}), flush=True)
        results[part] = rows
        tables.append(_table(part, rows, arguments))
    if jax.process_index() != 0:
        return
    machine = describe() | {"ranks": mesh.size, "processes": jax.process_count()}
    found = {"machine": machine, "link_bytes_per_second": arguments.link, **results}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    console = Console(width=150)
    console.print(f"{mesh.size} × {machine['device']}, jax {machine['jax']}")
    for table in tables:
        console.print(table.as_rich())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks.multi_gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ranks", type=int, metavar="P", help="devices (all)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--recordings", nargs="+", default=[], metavar="FILE.npz")
    names = [shape.name for shape in SHAPES]
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=names,
        default=names,
        help="layers of the parts exchange and moves (all)",
    )
    parser.add_argument(
        "--tokens", nargs="+", type=int, metavar="T", help="of a rank (8192 and 128; small: 64, 8)"
    )
    parser.add_argument("--windows", type=int, default=3, help="batches of each recording (3)")
    parser.add_argument(
        "--more-slots",
        type=int,
        default=2,
        metavar="N",
        help="slots more on each rank than without replicas (2)",
    )
    parser.add_argument("--effort", choices=EFFORTS, default="default", help="of the planner")
    parser.add_argument(
        "--layers", type=int, default=8, help="in a stack (8; fewer if memory asks)"
    )
    parser.add_argument(
        "--exchanges", nargs="+", choices=IMPLEMENTATIONS, help="(all that are usable here)"
    )
    parser.add_argument(
        "--waves", nargs="+", type=int, default=[], metavar="N", help="also `waves` in N parts"
    )
    parser.add_argument("--placements", type=int, default=200, help="that are checked (200)")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each (5)")
    parser.add_argument(
        "--link", type=float, default=_LINK, help="bytes/s each way between GPUs (450e9)"
    )
    parser.add_argument("--small", action="store_true", help="small sizes, as without GPUs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    several = parser.add_argument_group("several processes")
    several.add_argument("--distributed", action="store_true", help="as the cluster says")
    several.add_argument("--coordinator-address", metavar="HOST:PORT")
    several.add_argument("--num-processes", type=int)
    several.add_argument("--process-id", type=int)
    return parser


def _start(arguments: argparse.Namespace) -> None:
    """Join the other processes, or simulate devices where there are too few."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    if arguments.distributed or arguments.coordinator_address:
        jax.distributed.initialize(
            arguments.coordinator_address, arguments.num_processes, arguments.process_id
        )
    elif arguments.ranks is not None:
        simulate_devices(arguments.ranks)


def _parts(arguments: argparse.Namespace, mesh: Mesh) -> dict[str, Callable[[], Iterator[dict]]]:
    """What each part measures, in the sizes that fit the devices."""
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    scaled = small if on_cpu or arguments.small else lambda shape: shape
    shapes = [scaled(shape) for shape in SHAPES if shape.name in arguments.shapes]
    batches = arguments.tokens or ((64, 8) if on_cpu or arguments.small else (8192, 128))
    common: dict[str, Any] = {
        "dtype": jnp.float32 if on_cpu else jnp.bfloat16,
        "rounds": arguments.rounds,
    }
    layers = {"num_layers": arguments.layers, **common}
    ways = {
        "exchanges": arguments.exchanges or usable_exchanges(),
        "waves": arguments.waves,
        "link": arguments.link,
    }

    def balancing():
        replayed = {experts: scaled(shape) for experts, shape in REPLAYED.items()}
        top_k = {experts: shape.top_k for experts, shape in replayed.items()}
        replays = list(read_replays(arguments.recordings, top_k))
        return measure_balancing(
            mesh,
            replays,
            replayed,
            batches,
            windows=arguments.windows,
            more_slots=arguments.more_slots,
            effort=arguments.effort,
            **common,
        )

    return {
        "exchange": lambda: measure_exchange(mesh, shapes, batches, **ways, **layers),
        "balancing": balancing,
        "moves": lambda: measure_moves(mesh, shapes, batches, link=arguments.link, **layers),
        "checks": lambda: run_checks(mesh, arguments.placements, common["dtype"]),
    }


def _table(part: str, rows: list[dict], arguments: argparse.Namespace) -> Table:
    if part == "exchange":
        return exchange_table(rows, arguments.link)
    if part == "moves":
        return moves_table(rows, arguments.link)
    return balancing_table(rows) if part == "balancing" else checks_table(rows)


if __name__ == "__main__":
    main()
