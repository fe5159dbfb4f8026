"""How many kernels a GPU is asked to run for one layer of a decoding step, and in what memory.

    python -m benchmarks.launches [--ranks P] [--tokens T] [--shapes NAME ...] [--json]

A decoding step waits for launches more than for what they do. Counted in the program that XLA
compiles, in the body of the loop over layers and in the branch of the exchange with most. Memory is
what the program needs beside its arguments and results, whatever is routed where. Where there are
too few GPUs the program is compiled for as many H100 that are not there; that takes
`jax-eplb[gpu]`, and CUDA's `ptxas` (XLA_FLAGS=--xla_gpu_cuda_data_dir=DIR where XLA does not find
it). It also shows that programs compile before a GPU is to run them.
"""

import argparse
import json
import re
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console

from benchmarks.layer_stack import (
    AXIS,
    DEEPSEEK_R1,
    GPT_OSS_20B,
    QWEN3_30B,
    Shape,
    params_spec,
    separate_layers,
)
from benchmarks.tables import Column, Table
from jax_eplb.moe.feed_forward import ExpertWeights
from jax_eplb.moe.forward import MoEParams
from jax_eplb.placement import Placement, fewest_slots

SHAPES = (GPT_OSS_20B, QWEN3_30B, DEEPSEEK_R1)
_LAYERS, _MORE_SLOTS = 4, 2  # slots more on each rank
_VARIANTS = (
    ("contiguous", "even", 0),
    *((choice, choice, _MORE_SLOTS) for choice in ("even", "balanced", "fewest")),
)
COLUMNS = [
    Column("shape", "layers of"),
    Column("variant", "replica choice"),
    Column("launches", "launches of a layer", 0),
    Column("collectives", "of them collectives", 0),
    Column("memory_mib", "memory MiB", 0),
]
# What stands for no launch of its own in a compiled program.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "partition-id")
# From NVIDIA's data sheet and the CUDA programming guide's table of compute capability 9.0.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3350000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 85899345920
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  name: "NVIDIA H100 80GB HBM3"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def gpu_mesh(num_ranks: int) -> Mesh:
    """Of this machine's GPUs, or of H100 that are not there.

    Raises RuntimeError where JAX cannot compile for them.
    """
    if jax.default_backend() == "gpu" and len(jax.devices()) >= num_ranks:
        devices = jax.devices()[:num_ranks]
    else:
        shape = f"1x1x{num_ranks}"
        try:
            found = topologies.get_topology_desc(
                platform="cuda", topology=shape, target_config=_H100
            )
        except NotImplementedError as error:
            raise RuntimeError(
                "this JAX cannot compile for CUDA (see the log above where its plugin is "
                "installed); install 'jax-eplb[gpu]'"
            ) from error
        devices = found.devices
    return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def measure(mesh: Mesh, shapes: tuple[Shape, ...], num_tokens: int) -> Iterator[dict[str, Any]]:
    """A row for each shape and variant."""
    for shape in shapes:
        for name, choice, more in _VARIANTS:
            # The code asks what it runs on; only the compiler is told otherwise.
            with mock.patch.object(jax, "default_backend", return_value="gpu"):
                program = compiled(mesh, shape, choice, more, num_tokens)
            launches, collectives = count_launches(program.as_text() or "")
            yield {
                "shape": shape.name,
                "variant": name,
                "launches": launches,
                "collectives": collectives,
                "memory_mib": program.memory_analysis().temp_size_in_bytes / 2**20,
            }


def compiled(mesh: Mesh, shape: Shape, choice: str, more: int, num_tokens: int):
    """The compiled program of four layers under `scan`."""
    num_ranks = mesh.size
    num_slots = fewest_slots(shape.experts + more * num_ranks, num_ranks)
    config = shape.config(num_slots, num_ranks, replica_choice=choice, kernel="mosaic")

    def described(array_shape, dtype, spec) -> Any:
        return jax.ShapeDtypeStruct(array_shape, dtype, sharding=NamedSharding(mesh, spec))

    tables = jax.eval_shape(
        lambda: Placement.default(
            num_experts=shape.experts,
            num_ranks=num_ranks,
            num_layers=_LAYERS,
            num_slots=num_slots,
        ).tables(with_leveling=config.needs_leveling)
    )
    tables = jax.tree.map(lambda x: described(x.shape, x.dtype, P()), tables)
    wide, narrow, specs = shape.embed, shape.hidden, params_spec()
    gate_up, down = (_LAYERS, num_slots, wide, 2 * narrow), (_LAYERS, num_slots, narrow, wide)
    params = MoEParams(
        described((_LAYERS, wide, shape.experts), jnp.float32, specs.router),
        ExpertWeights(
            described(gate_up, jnp.bfloat16, specs.experts.gate_up),
            described(down, jnp.bfloat16, specs.experts.down),
        ),
    )
    tokens = described((_LAYERS, num_ranks * num_tokens, wide), jnp.bfloat16, P(None, AXIS))
    return separate_layers(config, mesh).lower(params, tables, tokens).compile()


def count_launches(program: str) -> tuple[int, int]:
    """Of the largest loop's body in a compiled program: launches, and collectives among them.

    >>> count_launches('''
    ... %body (x: f32[]) -> f32[] {
    ...   %x = f32[] parameter(0)
    ...   %f = f32[] fusion(%x), kind=kLoop
    ...   ROOT %g = f32[8]{0} all-gather(%f), dimensions={0}
    ... }
    ... ENTRY %main () -> f32[] {
    ...   ROOT %w = f32[] while(%c), condition=%cond, body=%body
    ... }''')
    (2, 1)
    """
    parts = re.split(r"\n(?=%?[\w.-]+ \(|ENTRY )", program)
    computations = {part.split(" ", 1)[0].lstrip("%"): part for part in parts}

    def count(name: str) -> tuple[int, int]:
        launches = collectives = 0
        for line in computations.get(name, "").splitlines():
            found = re.match(r"\s+(?:ROOT )?%?[\w.-]+ = .*? ([a-z][\w-]*)\(", line)
            if not found or found[1] in _FREE or found[1].endswith("-done"):
                continue
            if found[1] == "conditional":
                listed = re.search(r"branch_computations=\{([^}]*)\}", line)
                names = listed[1] if listed else " ".join(re.findall(r"_computation=(\S+)", line))
                most = max(count(branch) for branch in re.findall(r"[\w.-]+", names))
                launches, collectives = launches + most[0], collectives + most[1]
                continue
            launches += 1
            collectives += found[1].startswith(("all-", "reduce-scatter", "collective-"))
        return launches, collectives

    return max(count(name) for name in re.findall(r"body=%?([\w.-]+)", program))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.launches",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ranks", type=int, default=4, metavar="P", help="GPUs (4)")
    parser.add_argument("--tokens", type=int, default=128, metavar="T", help="of each rank (128)")
    names = [shape.name for shape in SHAPES]
    parser.add_argument("--shapes", nargs="+", choices=names, default=names, help="layers of (all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    given = parser.parse_args(argv)
    try:
        mesh = gpu_mesh(given.ranks)
    except RuntimeError as error:
        parser.error(str(error))
    shapes = tuple(shape for shape in SHAPES if shape.name in given.shapes)
    rows = list(measure(mesh, shapes, given.tokens))
    if given.json:
        print(json.dumps({"jax": jax.__version__, "ranks": given.ranks, "rows": rows}))
        return
    title = f"Launches and memory of a layer, {given.ranks} GPUs, {given.tokens} tokens each"
    Console(width=100).print(Table(title, COLUMNS, rows).as_rich())


if __name__ == "__main__":
    main()
