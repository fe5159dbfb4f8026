"""What one rank sends another, and what it reads, by replica choice.

    python -m benchmarks.pairs --recordings TRACE.npz [--ranks P ...] [--more-slots N ...]
        [--tokens T] [--json]

Each file holds a token trace, `expert_ids` [tokens, L, K]. Its first half is planned for, with N
slots more on each rank than without replicas; batches of its second half are dealt to the ranks in
their order, so that each rank has texts, and experts, of its own. "Pair" is the most that any rank
sends any other (or itself), in even shares of T·K/P rows: the mean of layers and batches, and the
largest. It decides the buffers. "Read" are the slots with tokens, of the rank with most, whose
weights it reads: they decide the time of a small batch.

Axes: L layers, P ranks, T tokens of a rank, K choices of a token, E experts, S slots.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.machine import describe
from benchmarks.replayed_routing import Replay, count_ids, read_traces
from benchmarks.replica_choice import all_shares
from benchmarks.setting import EFFORTS
from benchmarks.tables import Column, Table
from jax_eplb import metrics
from jax_eplb.placement import fewest_slots
from jax_eplb.planner import plan
from jax_eplb.routing import Ranks

_LAYERS = 4  # of the recording
# Replica choice, and what the plan is made for.
VARIANTS = (
    ("even", "even"),
    ("balanced, near", "balanced"),
    ("balanced", "balanced"),
    ("fewest", "balanced"),
)
COLUMNS = [
    Column("recording", "recording"),
    Column("ranks", "ranks", 0),
    Column("slots", "slots", 0),
    Column("tokens", "tokens a rank", 0),
    Column("policy", "replica choice"),
    Column("imbalance", "imbalance", 3),
    Column("pair", "pair, mean", 2),
    Column("fullest_pair", "fullest", 2),
    Column("stays", "stays on its rank", 2),
    Column("read", "slots read", 2),
]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.pairs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recordings", nargs="+", required=True, metavar="TRACE.npz")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8], metavar="P")
    parser.add_argument(
        "--more-slots",
        type=int,
        nargs="+",
        default=[2],
        metavar="N",
        help="on each rank than without replicas (2)",
    )
    parser.add_argument("--tokens", type=int, default=32768, help="of a batch, all ranks (32768)")
    parser.add_argument("--batches", type=int, default=2, help="of each recording (2)")
    parser.add_argument("--effort", choices=EFFORTS, default="default", help="of the planner")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    given = parser.parse_args(arguments)
    if min(given.more_slots) < 1:
        parser.error(f"--more-slots {min(given.more_slots)}: write 1 or more")
    rows = [
        row
        for replay in read_traces(given.recordings)
        for num_ranks in given.ranks
        for more in given.more_slots
        for row in measure(replay, num_ranks, more, given.tokens, given.batches, given.effort)
    ]
    if given.json:
        print(json.dumps({"machine": describe(), "rows": rows}, indent=1))
        return
    Console(width=120).print(Table("What one rank sends another", COLUMNS, rows).as_rich())


def measure(
    replay: Replay,
    num_ranks: int,
    more_slots: int,
    num_tokens: int,
    num_batches: int,
    effort: str,
) -> Iterator[dict[str, Any]]:
    """A row for each variant; `num_tokens` are of all ranks together."""
    chosen = replay.spaced_layers(_LAYERS)
    seen = replay.counts[: len(replay.counts) // 2, chosen]
    num_slots = fewest_slots(replay.num_experts + more_slots * num_ranks, num_ranks)
    counts = np.stack(
        [
            _by_rank(replay.batch(chosen, num_tokens, batch, num_batches), replay, num_ranks)
            for batch in range(num_batches)
        ],
        axis=1,
    )  # [L, batches, P, E]
    for policy, split in VARIANTS:
        placement = plan(seen, num_slots, num_ranks, split=split, effort=effort).placement
        ranks = Ranks("expert", num_ranks, placement.slots_per_rank)
        tables = placement.tables(with_leveling=True)
        share = all_shares(policy, ranks)
        found = np.stack(
            [share(counts[layer], tables.of_layer(layer)) for layer in range(_LAYERS)]
        )  # [L, batches, P, S]
        pairs = found.reshape(*found.shape[:3], num_ranks, -1).sum(axis=-1)  # [L, batches, P, P]
        loads, fullest = pairs.sum(axis=2), pairs.max(axis=(2, 3))
        even_share = counts.sum(axis=(2, 3)) / num_ranks**2
        is_read = found.sum(axis=2).reshape(*loads.shape, -1) > 0  # [L, batches, P, N]
        yield {
            "recording": replay.name,
            "ranks": num_ranks,
            "slots": num_slots,
            "tokens": num_tokens // num_ranks,
            "policy": policy,
            "imbalance": float(metrics.imbalance(loads).mean()),
            "pair": float((fullest / even_share).mean()),
            "fullest_pair": float((fullest / even_share).max()),
            "stays": float(pairs.trace(axis1=2, axis2=3).sum() / pairs.sum()),
            "read": float(is_read.sum(axis=3).max(axis=2).mean()),
        }


def _by_rank(ids: np.ndarray, replay: Replay, num_ranks: int) -> np.ndarray:
    """int32[L, P, E] from ids [L, T of all ranks, K], dealt to the ranks in their order."""
    of_ranks = np.array_split(ids.swapaxes(0, 1), num_ranks)
    return np.stack([count_ids(part, replay.num_experts) for part in of_ranks], axis=1).astype(
        np.int32
    )


if __name__ == "__main__":
    main()
