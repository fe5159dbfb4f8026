"""Draw the pictures of docs/concepts.md from the embedded model's recording.

    python scripts/concept_pictures.py [docs/images]
"""

import sys
from importlib import resources
from pathlib import Path

import numpy as np

from jax_eplb import Placement, Recording, frontier, load_recording, plan
from jax_eplb.metrics import imbalance
from jax_eplb.plot import (
    before_after,
    experts_by_slot,
    imbalance_by,
    save_figures,
    tokens_by_layer,
)
from jax_eplb.report import build_report, chance_by_layer, rank_tokens
from jax_eplb.split import balanced_split, even_split, sum_by_rank

NUM_RANKS, NUM_SLOTS = 8, 80
MIN_TOKENS = 4096  # prompts; steps of one token a sequence are mostly chance
SIZES = (64, 72, 80, 96, 128)
MOVES = (0, 2, 4, 8, 16, 32)


def main(directory: Path) -> None:
    file = resources.files("jax_eplb.models") / "byte_moe" / "recording.npz"
    recording = load_recording(str(file)).with_at_least(MIN_TOKENS)
    half = len(recording.iterations) // 2
    seen, unseen = (recording.keep(part) for part in (range(half), range(half, 2 * half)))
    counts, ids = seen.expert_counts(), recording.layer_ids
    initial = Placement.default(
        num_experts=recording.num_experts, num_ranks=NUM_RANKS, layer_ids=ids
    )
    planned = plan(counts, NUM_SLOTS, NUM_RANKS, layer_ids=ids).placement
    before = rank_tokens(unseen, num_ranks=NUM_RANKS)
    worst = int(build_report(recording, num_ranks=NUM_RANKS).summary.imbalance.argmax())
    chance = chance_by_layer(unseen, NUM_RANKS)
    pictures = {
        "experts": tokens_by_layer({"": recording.counts}, ids, "expert"),
        "initial": experts_by_slot(initial, counts.sum(axis=0), worst),
        "planned": experts_by_slot(planned, counts.sum(axis=0), worst),
        "before_after": before_after(before, rank_tokens(unseen, placement=planned), ids, chance),
        "slots": imbalance_by(
            "slots",
            {
                split: {size: _left(seen, unseen, size, split) for size in SIZES}
                for split in ("even", "balanced")
            },
            title="Imbalance of iterations that were not planned from",
            chance=float(chance.mean()),
        ),
        "moves": imbalance_by(
            f"slots of a layer that change, of {NUM_SLOTS}",
            {"from the plan in force": _by_moves(unseen, planned)},
            title="What so many moves would bring",
        ),
    }
    for file in save_figures(directory, {f"concepts_{k}": v for k, v in pictures.items()}):
        print(file)


def _left(seen: Recording, unseen: Recording, num_slots: int, split: str) -> float:
    """The mean imbalance of unseen iterations under a plan for this size and split."""
    table = plan(seen.expert_counts(), num_slots, NUM_RANKS, split=split).placement.slot_to_expert
    counts = unseen.expert_counts().astype(np.float32)
    if split == "even":
        slots = even_split(counts, table, seen.num_experts)
    else:
        slots = balanced_split(counts, table, seen.num_experts, NUM_RANKS)
    tokens = np.asarray(sum_by_rank(slots, NUM_RANKS))
    return float(imbalance(tokens).mean())


def _by_moves(recording: Recording, placement: Placement) -> dict[float, float]:
    plans = frontier(recording.expert_counts(), placement, MOVES)
    return {float(np.mean(p.moves)): float(np.mean(p.imbalance)) for p in plans}


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images"))
