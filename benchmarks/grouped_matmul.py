"""Time of each grouped matrix product beside the least that the device needs.

    python -m benchmarks.grouped_matmul [--shape GROUPS ROWS D F] [--gradients] [--json]

Group sizes are skewed: shares of a lognormal(0, 1) load. The floor of a product is the larger of
its bytes over the bandwidth and its operations over the rate of a large matrix product, both
measured in this run or given. `of ragged_dot` is lax.ragged_dot's time over this one's, `of floor`
the floor over it; higher is better in both. On a GPU the shapes are those of prefill and decoding
of Qwen3-30B, Mixtral 8x7B and DeepSeek-R1, in bfloat16, and JAX's own Mosaic kernel and PyTorch's
`torch._grouped_mm` run too, where they are installed.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from benchmarks.ceilings import (
    Ceilings,
    add_ceiling_options,
    burst_ms,
    compile_all,
    given_or_measured,
)
from benchmarks.machine import describe
from benchmarks.tables import Column, Table
from jax_eplb.kernels import grouped_matmul

# (groups, rows, D, F): prefill and decoding of the byte model on 8 ranks, then a wider layer.
CPU_SHAPES = ((8, 2048, 128, 64), (10, 64, 128, 64), (16, 1024, 256, 512))
# Qwen3-30B prefill and decoding, Mixtral, DeepSeek-R1: prefill on 8 ranks, decoding on 32 and 8.
GPU_SHAPES = (
    (128, 32768, 2048, 768),
    (128, 1024, 2048, 768),
    (8, 8192, 4096, 14336),
    (36, 32768, 7168, 2048),
    (9, 2048, 7168, 2048),
    (36, 1024, 7168, 2048),
)
_SEED = 20261124
_TORCH = "torch._grouped_mm"


def implementations(shape: tuple[int, ...]) -> dict:
    """Each product by name, of those that this backend runs in reasonable time."""
    names = ["ragged_dot"]
    if jax.default_backend() == "cpu":
        names += ["blocked", "reference"]
    elif jax.default_backend() == "gpu":
        names += ["mosaic", "triton"]
    ours = {name: functools.partial(grouped_matmul, implementation=name) for name in names}
    return {"default": grouped_matmul, **ours, **_of_jax(shape)}


def _of_jax(shape) -> dict:
    """JAX's own kernel for Hopper GPUs, which needs absl beside JAX."""
    if jax.default_backend() != "gpu":
        return {}
    try:
        from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot
    except ImportError:
        return {}

    def product(rows, weights, group_sizes):
        return ragged_dot(
            rows,
            weights,
            group_sizes=group_sizes,
            block_m=128,
            block_n=128,
            block_k=64,
            max_concurrent_steps=4,
            grid_block_n=2 if shape[3] % 256 == 0 else 1,
        )

    return {"jax ragged_dot_mgpu": product}


def draw_sizes(shape: tuple[int, ...]) -> np.ndarray:
    """Skewed group sizes that sum to the rows."""
    groups, num_rows, *_ = shape
    load = np.random.default_rng([_SEED, *shape]).lognormal(0, 1, groups)
    ends = np.rint(np.cumsum(load) / load.sum() * num_rows).astype(np.int32)
    return np.diff(ends, prepend=np.int32(0)).astype(np.int32)


def draw(shape: tuple[int, ...], dtype: str):
    """Rows, weights, group sizes and a cotangent."""
    groups, num_rows, embed, hidden = shape
    keys = jax.random.split(jax.random.key(_SEED), 3)
    rows, weights, cotangent = (
        jax.random.normal(key, size, dtype)
        for key, size in zip(
            keys, ((num_rows, embed), (groups, embed, hidden), (num_rows, hidden)), strict=True
        )
    )
    return rows, weights, jnp.asarray(draw_sizes(shape)), cotangent


def floor_ms(shape, dtype: str, ceilings: Ceilings, *, gradients: bool) -> float:
    """Forward: read rows and weights, write results. The gradients take two products more."""
    _, num_rows, embed, hidden = shape
    used = int((draw_sizes(shape) > 0).sum())
    values = used * embed * hidden + num_rows * (embed + hidden)
    products = 3 if gradients else 1
    num_bytes = products * values * jnp.dtype(dtype).itemsize
    return ceilings.floor_ms(num_bytes, products * 2 * num_rows * embed * hidden)


def measure(
    shapes: list[tuple[int, ...]], dtype: str, ceilings: Ceilings, *, gradients: bool
) -> tuple[list[dict], list[str]]:
    """One row for each shape and implementation, with its time; and why some have none."""

    def part_of(product):
        def with_gradients(rows, weights, sizes, cotangent):
            out, transpose = jax.vjp(lambda r, w: product(r, w, sizes), rows, weights)
            return out, transpose(cotangent)

        return (
            with_gradients
            if gradients
            else lambda rows, weights, sizes, _: product(rows, weights, sizes)
        )

    compiled = compile_all(
        {
            (shape, name): (part_of(product), jax.eval_shape(lambda s=shape: draw(s, dtype)))
            for shape in shapes
            for name, product in implementations(shape).items()
        }
    )
    rows, notes = [], []
    for shape in shapes:
        arguments = draw(shape, dtype)
        floor = floor_ms(shape, dtype, ceilings, gradients=gradients)
        for name in implementations(shape):
            call = compiled[shape, name]
            if isinstance(call, str):
                notes.append(f"{name}, {shape}: {call}"[:200])
            ms = None if isinstance(call, str) else burst_ms(call, *arguments)
            rows.append({"shape": shape, "implementation": name, "ms": ms, "floor_ms": floor})
    return rows, notes


def torch_times(request: dict) -> dict | None:
    """What `torch_peer` measures, or None without PyTorch or a GPU that it sees."""
    program = Path(__file__).with_name("torch_peer.py")
    found = subprocess.run(
        [sys.executable, program], input=json.dumps(request), capture_output=True, text=True
    )
    if found.stderr and "--verbose" in sys.argv:
        print(found.stderr, file=sys.stderr)
    return json.loads(found.stdout.splitlines()[-1]) if found.returncode == 0 else None


def compare(rows: list[dict]) -> None:
    """Add the ratios: higher is better in both."""
    plain = {row["shape"]: row["ms"] for row in rows if row["implementation"] == "ragged_dot"}
    for row in rows:
        if row["ms"] is not None:
            row["of_floor"] = row["floor_ms"] / row["ms"]
            if plain.get(row["shape"]) is not None:
                row["of_ragged_dot"] = plain[row["shape"]] / row["ms"]


COLUMNS = (
    Column("groups × rows × D × F", "groups × rows × D × F"),
    Column("implementation", "implementation"),
    Column("ms", "ms", 3),
    Column("of_ragged_dot", "of ragged_dot", 2),
    Column("of_floor", "of floor", 2),
)


def main(argv: list[str] | None = None) -> None:
    # Else JAX would take the memory that PyTorch needs.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    parser = argparse.ArgumentParser(description="Time of the grouped matrix products.")
    parser.add_argument(
        "--shape",
        type=int,
        nargs=4,
        action="append",
        metavar=("GROUPS", "ROWS", "D", "F"),
        help="measure this one instead; may be repeated",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="by backend")
    parser.add_argument("--gradients", action="store_true", help="forward and backward")
    add_ceiling_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument("--verbose", action="store_true", help="why a peer could not be timed")
    arguments = parser.parse_args(argv)
    on_gpu = jax.default_backend() == "gpu"
    shapes = [tuple(shape) for shape in arguments.shape or (GPU_SHAPES if on_gpu else CPU_SHAPES)]
    dtype = arguments.dtype or ("bfloat16" if on_gpu else "float32")
    ceilings = given_or_measured(arguments, dtype)
    rows, notes = measure(shapes, dtype, ceilings, gradients=arguments.gradients)
    if on_gpu and dtype == "bfloat16" and not arguments.gradients:
        request = {"product": [[*shape, draw_sizes(shape).tolist()] for shape in shapes]}
        found = torch_times(request) or {"times": [None] * len(shapes)}
        for shape, ms in zip(shapes, found["times"], strict=True):
            floor = floor_ms(shape, dtype, ceilings, gradients=False)
            rows.append({"shape": shape, "implementation": _TORCH, "ms": ms, "floor_ms": floor})
    compare(rows)
    machine = describe() | {"dtype": dtype} | ceilings._asdict()
    if arguments.json:
        print(json.dumps({"machine": machine, "rows": rows}))
        return
    for row in rows:
        row["groups × rows × D × F"] = " × ".join(map(str, row["shape"]))
    rows.sort(key=lambda row: shapes.index(row["shape"]))
    part = "forward and gradients" if arguments.gradients else "forward"
    title = (
        f"Grouped products, {part}, {dtype}, {machine['device']}; ceilings "
        f"{ceilings.bandwidth / 1e12:.2f} TB/s, {ceilings.flops / 1e12:.1f} TFLOP/s"
    )
    Console(width=110).print(Table(title, list(COLUMNS), rows, notes).as_rich())


if __name__ == "__main__":
    main()
