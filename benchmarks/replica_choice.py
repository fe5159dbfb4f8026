"""Replica choice on recordings: the fullest rank by policy, beside the best possible division.

    python -m benchmarks.replica_choice --recordings FILE.npz ... [--ranks P --slots S]
        [--split even|balanced] [--effort fast|default|best] [--windows N] [--json]

A plan for the first half of a recording is scored on windows of the second half, N of them evenly
spaced. Imbalance is (max - mean) / mean of the ranks' tokens, a fraction, mean over windows and
layers. The optimum is a linear programme's, which may cut tokens into parts; `whole` is the least
that whole tokens allow, the optimum's largest load rounded up. A recording does not say which rank
a token was on: each choice is put on a rank at random. `local` is the part of the choices that stay
on their rank, which `balanced, near` prefers, as layers do whose batches are small; `balanced`
prefers pairs of ranks that exchange alike. The time is that of a jitted pass over all layers,
divided by their number.

Axes: P ranks, W windows, L layers, E experts, S slots.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import Progress
from scipy import sparse
from scipy.optimize import linprog

from benchmarks.loads import Size
from benchmarks.machine import describe
from benchmarks.recording_files import Recording, RecordingError, read_recordings
from benchmarks.recordings import condense, splits
from benchmarks.setting import EFFORTS, plan_for
from benchmarks.tables import Column, Table
from benchmarks.timing import time_warm
from jax_eplb.commands.progress import progress_bars
from jax_eplb.placement import Placement, fewest_slots
from jax_eplb.routing import Ranks
from jax_eplb.routing.balanced import balanced_shares
from jax_eplb.routing.even import even_share
from jax_eplb.routing.fewest import fewest_shares
from jax_eplb.routing.local import local_share

# Slots and ranks by the number of experts; for others about a quarter more slots, on 8 ranks.
SIZES = {
    32: ((40, 8), (48, 16)),
    64: ((80, 8), (96, 16)),
    128: ((144, 16), (160, 32)),
}
_RANKS = 8
_SEED = 20261124


def _each(share: Callable) -> Callable:
    """All ranks' shares by what gives one of them from its own counts."""

    def shares(counts, tables, ranks):
        every = jnp.arange(ranks.num_ranks, dtype=jnp.int32)
        return jax.vmap(lambda own, rank: share(own, tables, rank, ranks))(counts, every)

    return shares


# Each rank's share [P, S] from all counts [P, E], the layer's tables, and the ranks.
POLICIES: dict[str, Callable] = {
    "even": _each(lambda own, tables, rank, ranks: even_share(own, tables, rank)),
    "local": _each(local_share),
    "balanced": balanced_shares,
    "balanced, near": lambda counts, tables, ranks: balanced_shares(
        counts, tables, ranks._replace(prefers_near=True)
    ),
    "fewest": lambda counts, tables, ranks: fewest_shares(counts, tables),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 2 where an option cannot be followed."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if (given.ranks is None) != (given.slots is None):
        parser.error("--ranks and --slots go together")
    if given.windows < 1:
        parser.error(f"--windows {given.windows}: write 1 or more")
    rows: list[dict[str, Any]] = []
    try:
        recordings, notes = read_recordings(given.recordings, least_windows=2, any_experts=True)
        cases = [(recording, size) for recording in recordings for size in _sizes(recording, given)]
        with progress_bars() as bars:
            for recording, size in bars.track(cases, description="replica choice"):
                options = {"split": given.split, "effort": given.effort}
                rows += measure(recording, size, given.windows, options, bars)
    except (RecordingError, ValueError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    if given.json:
        print(json.dumps(rows, allow_nan=False))
        return 0
    about = "; ".join(f"{key}: {value}" for key, value in describe().items())
    Console(width=None if sys.stdout.isatty() else 200).print(
        table_of(rows, [*notes, f"Planned for the {given.split} split. {about}"]).as_rich()
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks.replica_choice",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--recordings",
        nargs="+",
        action="extend",
        required=True,
        metavar="FILE.npz",
        help="counts [windows, layers, experts], or a trace expert_ids [tokens, layers, choices]",
    )
    parser.add_argument("--ranks", type=int, metavar="P", help="for all recordings, with --slots")
    parser.add_argument("--slots", type=int, metavar="S")
    parser.add_argument(
        "--split", choices=("even", "balanced"), default="even", help="that the plan is made for"
    )
    parser.add_argument("--effort", choices=EFFORTS, default="default", help="of the planner")
    parser.add_argument("--windows", type=int, default=24, metavar="N", help="scored (24)")
    parser.add_argument("--json", action="store_true", help="print a list of objects")
    return parser


def _sizes(recording: Recording, given: argparse.Namespace) -> Iterator[Size]:
    experts = recording.num_experts
    if given.ranks is not None:
        yield Size(experts, given.slots, given.ranks)
        return
    ranks = min(_RANKS, experts)
    default = ((fewest_slots(experts + experts // 4, ranks), ranks),)
    for slots, ranks in SIZES.get(experts, default):
        yield Size(experts, slots, ranks)


def measure(
    recording: Recording, size: Size, num_windows: int, options: dict, bars: Progress
) -> list[dict[str, Any]]:
    """A row for each policy."""
    [(seen, later)] = splits(recording.windows, "half")
    seen = seen.sum(axis=0) if options["split"] == "even" else condense(seen)
    placement = plan_for(size, seen, **options).placement
    chosen = np.linspace(0, len(later) - 1, min(num_windows, len(later))).round().astype(int)
    windows = np.rint(later[chosen]).astype(np.int64)  # [W, L, E]
    counts = spread(windows, size.ranks)  # [L, W, P, E]

    slot_to_expert = np.asarray(placement.slot_to_expert)
    title = f"optimum, {recording.name}, {size}"
    optimum = np.array(
        [
            [least_largest_load(tokens, table, size.ranks) for tokens in layer]
            for layer, table in zip(
                bars.track(windows.swapaxes(0, 1), description=title), slot_to_expert, strict=True
            )
        ]
    )  # [L, W]
    total = windows.sum(axis=2).T
    optimum = np.maximum(optimum, total / size.ranks)  # the solver may miss by a rounding error
    whole = np.ceil(optimum - 1e-6 * np.maximum(optimum, 1))

    rows = []
    for policy in POLICIES:
        largest, local = score(policy, counts, placement)
        rows.append(
            {
                "recording": recording.name,
                "ranks": size.ranks,
                "slots": size.slots,
                "policy": policy,
                "imbalance": imbalance(largest, total, size.ranks),
                "optimum": imbalance(optimum, total, size.ranks),
                "whole": imbalance(whole, total, size.ranks),
                "local": local,
                "solve_us": solve_us(policy, counts[:, 0], placement),
                "windows": len(chosen),
                "experts": size.experts,
            }
        )
    return rows


def spread(windows: np.ndarray, num_ranks: int) -> np.ndarray:
    """int32[L, W, P, E] from the totals [W, L, E]: each choice on a rank at random."""
    generator = np.random.default_rng(_SEED)
    counts = generator.multinomial(windows, np.full(num_ranks, 1 / num_ranks))  # [W, L, E, P]
    return counts.transpose(1, 0, 3, 2).astype(np.int32)


def imbalance(largest: np.ndarray, total: np.ndarray, num_ranks: int) -> float:
    """(max - mean) / mean, the mean of layers and windows; 0 in a window without tokens.

    >>> imbalance(np.array([3.0, 0.0]), np.array([4, 0]), 2)
    0.25
    """
    mean = total / num_ranks
    return float(np.mean((largest - mean) / np.where(mean > 0, mean, 1)))


def score(policy: str, counts: np.ndarray, placement: Placement) -> tuple[np.ndarray, float]:
    """The largest rank load of each layer and window [L, W], and the part that stays local."""
    ranks = Ranks("expert", placement.num_ranks, placement.slots_per_rank)
    largest, stays = [], 0
    for layer, tables in enumerate(_layers(placement)):
        found = np.asarray(all_shares(policy, ranks)(counts[layer], tables), np.int64)
        by_rank = found.reshape(*found.shape[:2], ranks.num_ranks, -1).sum(axis=-1)  # [W, P, P]
        largest.append(by_rank.sum(axis=1).max(axis=1))
        stays += by_rank.trace(axis1=1, axis2=2).sum()
    return np.array(largest), float(stays / max(counts.sum(dtype=np.int64), 1))


def _layers(placement: Placement):
    tables = placement.tables(with_leveling=True)
    for layer in range(placement.num_layers):
        yield tables.of_layer(layer)


@functools.cache
def all_shares(policy: str, ranks: Ranks) -> Callable:
    """From counts [W, P, E] of a layer to what each rank sends to each slot, [W, P, S].

    One after the other, so that a kernel runs as it does in a layer.
    """

    share = POLICIES[policy]
    return jax.jit(lambda counts, tables: jax.lax.map(lambda c: share(c, tables, ranks), counts))


def solve_us(policy: str, counts: np.ndarray, placement: Placement) -> float:
    """Median time of a layer in a jitted pass over all of them, for all ranks, from [L, P, E]."""
    ranks = Ranks("expert", placement.num_ranks, placement.slots_per_rank)

    @jax.jit
    def every_layer(counts, tables):
        rows, tables_of = tables.in_one_array()
        return jax.lax.map(lambda x: POLICIES[policy](x[0], tables_of(x[1]), ranks), (counts, rows))

    arguments = jnp.asarray(counts), placement.tables(with_leveling=True)
    median_ms = time_warm(lambda: every_layer(*arguments), rounds=20).median_ms
    return 1e3 * (median_ms or 0.0) / placement.num_layers


def least_largest_load(tokens: np.ndarray, slot_to_expert: np.ndarray, num_ranks: int) -> float:
    """The largest rank load [tokens] of the best division, fractions allowed, by scipy's HiGHS.

    >>> least_largest_load(np.array([6, 1, 3]), np.array([0, 1, 2, 0]), 2)
    5.0
    """
    num_slots, num_experts = slot_to_expert.size, tokens.size
    count = np.bincount(slot_to_expert, minlength=num_experts)
    rank = np.arange(num_slots) // (num_slots // num_ranks)
    single = count[slot_to_expert] == 1
    fixed = np.bincount(rank, np.where(single, tokens[slot_to_expert], 0), minlength=num_ranks)
    several = np.flatnonzero(~single)
    if several.size == 0:
        return float(fixed.max())
    # The variables: tokens of each slot of a replicated expert, then the largest load.
    experts, position = np.unique(slot_to_expert[several], return_inverse=True)
    variable = np.arange(several.size)
    ones = np.ones(several.size)
    by_expert = sparse.csr_array(
        (ones, (position, variable)), shape=(experts.size, several.size + 1)
    )
    by_rank = sparse.csr_array((ones, (rank[several], variable)), shape=(num_ranks, several.size))
    below_largest = sparse.hstack([by_rank, np.full((num_ranks, 1), -1.0)], format="csr")
    found = linprog(
        np.append(np.zeros(several.size), 1),
        A_ub=below_largest,
        b_ub=-fixed,
        A_eq=by_expert,
        b_eq=tokens[experts],
    )
    if not found.success:
        raise RuntimeError(f"the linear programme failed: {found.message}")
    return float(found.fun)


def table_of(rows: list[dict[str, Any]], notes: list[str]) -> Table:
    shown = [row | {"size": f"{row['experts']}/{row['slots']}/{row['ranks']}"} for row in rows]
    columns = [
        Column("recording", "recording"),
        Column("size", "E/S/P"),
        Column("policy", "policy"),
        Column("imbalance", "imbalance", 4),
        Column("optimum", "optimum", 4),
        Column("whole", "in whole tokens", 4),
        Column("local", "local", 3),
        Column("solve_us", "µs a layer", 0),
        Column("windows", "windows", 0),
    ]
    return Table("Replica choice on the second half of a recording", columns, shown, notes)


if __name__ == "__main__":
    sys.exit(main())
