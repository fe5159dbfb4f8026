"""Time of each grouped matrix product, forward and with gradients, beside its ceilings.

    python -m benchmarks.grouped_matmul [--shape GROUPS ROWS D F] [--dtype bfloat16] [--json]

Group sizes are skewed: shares of a lognormal(0, 1) load. The ceilings are what arithmetic and
memory leave: one dense product of all rows with one matrix, and a batched product in which every
group has equally many rows. `of ragged_dot` is lax.ragged_dot's time over this one's, `of ceiling`
that of the slower ceiling; higher is better in both. Times are medians of warm calls; the first
compiles.
"""

import argparse
import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from jax_eplb.kernels import IMPLEMENTATIONS, grouped_matmul

# (groups, rows, D, F): prefill and decoding of the byte model on 8 ranks, then a wider layer.
SHAPES = ((8, 2048, 128, 64), (10, 64, 128, 64), (16, 1024, 256, 512))
_SEED = 20261124


def one_matrix(rows, weights, sizes):
    """Ceiling where arithmetic limits: one dense product of the same size."""
    return rows @ weights[0]


def even_groups(rows, weights, sizes):
    """Ceiling where memory limits: each group's weights read once, rows dealt evenly."""
    each = -(-len(rows) // len(weights))
    padded = jnp.pad(rows, ((0, each * len(weights) - len(rows)), (0, 0)))
    blocks = padded.reshape(len(weights), each, -1)
    return jnp.einsum("gmd,gdf->gmf", blocks, weights).reshape(-1, weights.shape[2])[: len(rows)]


CEILINGS = {"one matrix": one_matrix, "even groups": even_groups}


def implementations():
    """Each product by name: the default, every implementation, and the ceilings."""
    every = {
        name: functools.partial(grouped_matmul, implementation=name) for name in IMPLEMENTATIONS
    }
    return {"default": grouped_matmul} | every | CEILINGS


def draw(shape: tuple[int, ...], dtype: str):
    """Rows, weights, skewed group sizes that sum to the rows, and a cotangent."""
    groups, num_rows, embed, hidden = shape
    generator = np.random.default_rng([_SEED, *shape])
    load = generator.lognormal(0, 1, groups)
    ends = np.rint(np.cumsum(load) / load.sum() * num_rows).astype(np.int32)
    rows, weights, cotangent = (
        jnp.asarray(generator.normal(size=size), dtype)
        for size in ((num_rows, embed), (groups, embed, hidden), (num_rows, hidden))
    )
    return rows, weights, jnp.asarray(np.diff(ends, prepend=np.int32(0))), cotangent


def median_ms(call, arguments, repeats: int) -> float:
    """Median time of one warm call, in ms."""
    jax.block_until_ready(call(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call(*arguments))
        times.append(1e3 * (time.perf_counter() - start))
    return float(np.median(times))


def measure(shape: tuple[int, ...], dtype: str, repeats: int) -> list[dict]:
    """One row for each implementation: times in ms and their ratios to the references."""
    arguments = draw(shape, dtype)
    times = {}
    for name, product in implementations().items():

        def with_gradients(rows, weights, sizes, cotangent, product=product):
            out, transpose = jax.vjp(lambda r, w: product(r, w, sizes), rows, weights)
            return out, transpose(cotangent)

        times[name] = (
            median_ms(jax.jit(product), arguments[:3], repeats),
            median_ms(jax.jit(with_gradients), arguments, repeats),
        )
    ceiling = np.max([times[name] for name in CEILINGS], axis=0)
    rows = []
    for name, measured in times.items():
        row: dict = {"shape": shape, "implementation": name}
        for part, ms, bound, plain in zip(
            ("forward", "with_gradients"), measured, ceiling, times["ragged_dot"], strict=True
        ):
            row |= {
                f"{part}_ms": ms,
                f"{part}_of_ragged_dot": plain / ms,
                f"{part}_of_ceiling": float(bound) / ms,
            }
        rows.append(row)
    return rows


def print_table(rows: list[dict], dtype: str) -> None:
    """One table for a shape."""
    title = "{} groups, {} rows, {} × {}".format(*rows[0]["shape"])
    table = Table(title=f"{title}, {dtype}, {jax.devices()[0].device_kind}")
    table.add_column("implementation")
    for part in ("forward", "with gradients"):
        for column in (f"{part} ms", "of ragged_dot", "of ceiling"):
            table.add_column(column, justify="right")
    for row in rows:
        cells = [
            text
            for part in ("forward", "with_gradients")
            for text in (
                f"{row[f'{part}_ms']:.3f}",
                f"{row[f'{part}_of_ragged_dot']:.2f}",
                f"{row[f'{part}_of_ceiling']:.2f}",
            )
        ]
        table.add_row(row["implementation"], *cells)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of the grouped matrix products.")
    parser.add_argument(
        "--shape",
        type=int,
        nargs=4,
        action="append",
        metavar=("GROUPS", "ROWS", "D", "F"),
        help="measure this one instead; may be repeated",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of each")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    arguments = parser.parse_args()
    shapes = [tuple(shape) for shape in arguments.shape or SHAPES]
    tables = [measure(shape, arguments.dtype, arguments.repeats) for shape in shapes]
    if arguments.json:
        device = jax.devices()[0].device_kind
        rows = [row for table in tables for row in table]
        print(json.dumps({"device": device, "dtype": arguments.dtype, "rows": rows}))
        return
    for table in tables:
        print_table(table, arguments.dtype)


if __name__ == "__main__":
    main()
