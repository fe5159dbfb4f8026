"""Experts moved between real devices: bytes a second, and what a step loses while they move.

Axes: L layers, S slots, P ranks, N slots of a rank.
"""

import functools
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from benchmarks.layer_stack import (
    AXIS,
    Shape,
    draw_tokens,
    layers_that_fit,
    make_params,
    place_tables,
    stack_step,
)
from benchmarks.progress import say
from benchmarks.tables import Column, Table
from jax_eplb.moving import apply_moves, find_moves, prepare_moves, stage_moves
from jax_eplb.placement import Placement, fewest_slots

_LAYERS_AT_ONCE = (1, 2, 8)
_MOST_SLOTS = 8  # of a rank at once, as `rebalance` has it
_STEPS = 60
_COMPILED = "/jax/core/compile/backend_compile_duration"
COLUMNS = [
    Column("shape", "layers of"),
    Column("tokens", "tokens a rank", 0),
    Column("layers", "layers moved at once", 0),
    Column("slots", "slots of a rank", 0),
    Column("megabytes", "MB to a rank", 1),
    Column("still_ms", "step without ms", 3),
    Column("step_ms", "step with ms", 3),
    Column("stall_ms_p50", "stall p50 ms", 3),
    Column("stall_ms_p99", "p99 ms", 3),
    Column("move_ms", "moves alone ms", 3),
    Column("gigabytes_per_second", "GB/s", 0),
    Column("of_link", "of the link", 2),
    Column("compilations", "compilations", 0),
]


def measure_moves(
    mesh: Mesh,
    shapes: Sequence[Shape],
    batches: Sequence[int],
    *,
    num_layers: int,
    link: float,
    dtype,
    rounds: int,
) -> Iterator[dict[str, Any]]:
    """Rows of moves alone, of one slot and of several of each rank, then of steps with moves."""
    num_ranks = mesh.shape[AXIS]
    holders = max(num_ranks, 2)  # a device alone has the slots of two
    compiled = _count_compilations()
    for shape in shapes:
        num_slots = fewest_slots(shape.experts + holders, holders)
        config = shape.config(num_slots, num_ranks)
        stack = layers_that_fit(shape, num_slots, num_layers, mesh, dtype)
        placement = Placement.default(
            num_experts=shape.experts,
            num_ranks=num_ranks,
            num_layers=stack,
            num_slots=num_slots,
        )
        table = np.asarray(placement.slot_to_expert)
        say(f"moves, {shape.name}")
        params = None  # the last shape's, before there are others
        params = make_params(shape, config, mesh, stack, dtype)
        most, own = min(_MOST_SLOTS, num_slots // holders), holders // num_ranks
        megabytes = own * shape.expert_bytes(dtype) / 1e6  # a slot of each holder
        prepare_moves(params, own * most)
        for slots in sorted({1, most}):
            turned = turn(table, holders, slots, [0])
            there = find_moves(table, turned, num_ranks=num_ranks)
            back = find_moves(turned, table, num_ranks=num_ranks)
            times = []
            before = len(compiled)
            for moves in itertools.islice(itertools.cycle((there, back)), 2 + 2 * rounds):
                start = time.perf_counter()
                params = apply_moves(params, stage_moves(params, moves))
                jax.block_until_ready(params)
                times.append(1e3 * (time.perf_counter() - start))
            ms = float(np.median(times[2:]))
            yield {
                "shape": shape.name,
                "layers": 1,
                "slots": slots,
                "megabytes": slots * megabytes,
                "move_ms": ms,
                "gigabytes_per_second": slots * megabytes / ms,
                "of_link": 1e9 * slots * megabytes / ms / link if num_ranks > 1 else None,
                "compilations": len(compiled) - before,
            }
        step = stack_step(config, mesh)
        for num_tokens in batches:
            tokens = draw_tokens(shape, num_ranks * num_tokens, mesh, dtype)
            for layers in (n for n in _LAYERS_AT_ONCE if n <= stack):
                cycle = _cycle(placement, layers, holders, config, mesh)
                # Warm: the first round fills the caches of everything that is dispatched.
                params, _ = _steps(step, params, tokens, cycle, len(cycle), moving=True)
                before = len(compiled)
                still, moving = [], []
                for _ in range(3):
                    params, times = _steps(step, params, tokens, cycle, _STEPS, moving=False)
                    still += times
                    count = _STEPS // len(cycle) * len(cycle) or len(cycle)
                    params, times = _steps(step, params, tokens, cycle, count, moving=True)
                    moving += times
                usual, with_moves = np.median(still), np.percentile(moving, [50, 99])
                yield {
                    "shape": shape.name,
                    "tokens": num_tokens,
                    "layers": layers,
                    "slots": 1,
                    "megabytes": layers * megabytes,
                    "still_ms": float(usual),
                    "step_ms": float(with_moves[0]),
                    "stall_ms_p50": float(with_moves[0] - usual),
                    "stall_ms_p99": float(with_moves[1] - np.percentile(still, 99)),
                    "compilations": len(compiled) - before,
                }


def turn(table: np.ndarray, holders: int, slots: int, layers: Sequence[int]) -> np.ndarray:
    """The table [L, S] with the first slots of each of its holders handed on to the next one.

    >>> turn(np.array([[0, 1, 2, 3]]), holders=2, slots=1, layers=[0]).tolist()
    [[2, 1, 0, 3]]
    """
    turned = table.reshape(len(table), holders, -1).copy()
    for layer in layers:
        turned[layer, :, :slots] = np.roll(turned[layer, :, :slots], 1, axis=0)
    return turned.reshape(table.shape)


def _cycle(placement: Placement, layers: int, holders: int, config, mesh: Mesh):
    """Moves of so many layers at once, and the tables that follow, until all is as it was."""
    num_layers, num_ranks = placement.num_layers, placement.num_ranks
    table = np.asarray(placement.slot_to_expert)
    groups = [range(i, min(i + layers, num_layers)) for i in range(0, num_layers, layers)]
    # A turn in as many steps as there are holders comes back to where it began.
    cycle = []
    for group in groups * holders:
        turned = turn(table, holders, 1, group)
        moved = Placement.from_slots(turned, num_experts=placement.num_experts, num_ranks=num_ranks)
        tables = place_tables(moved, config, mesh)
        cycle.append((find_moves(table, turned, num_ranks=num_ranks), tables))
        table = turned
    return cycle


def _steps(step, params, tokens, cycle, count: int, *, moving: bool):
    """Parameters after so many steps, and the time of each in ms.

    As a loop that reads the result of each step, with what a balancer does between and behind them.
    """
    tables, times = cycle[-1][1], []
    staged = after = None
    turns = itertools.cycle(cycle)
    for _ in range(count):
        start = time.perf_counter()
        if staged is not None:
            params, tables = apply_moves(params, staged), after
        out, counts = step(params, tables, tokens)
        if moving:
            moves, after = next(turns)
            staged = stage_moves(params, moves)
        jax.block_until_ready((out, counts))
        times.append(1e3 * (time.perf_counter() - start))
    params = apply_moves(params, *filter(None, [staged]))
    jax.block_until_ready(params)
    return params, times


@functools.cache
def _count_compilations() -> list[float]:
    """Grows by an element with each compilation."""
    seen: list[float] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILED:
            seen.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return seen


def moves_table(rows: list[dict], link: float) -> Table:
    note = (
        "Each rank hands so many slots of a layer to the next rank, or within a rank alone from "
        "one half of its slots to the other. GB/s: what comes to a rank, over the time of the "
        f"moves alone; of the link: over {link / 1e9:.0f} GB/s. The stall is the time of a step "
        "with moves less that of one without."
    )
    return Table("Experts moved while layers run", COLUMNS, rows, [note])
