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
from jax_eplb.report import chance_by_layer, rank_tokens
from jax_eplb.split import balanced_split, even_split, sum_by_rank

NUM_RANKS, NUM_SLOTS = 8, 80
SIZES = (64, 72, 80, 96)
MOVES = (0, 2, 4, 8, 16, 32)


def main(directory: Path) -> None:
    file = resources.files("jax_eplb.models") / "byte_moe" / "recording.npz"
    recording = load_recording(str(file))
    # Sixteen iterations of each kind of text: a plan from half of the first, then for other text.
    seen, unseen, later = (recording.keep(range(i, i + 8)) for i in (0, 8, 32))
    ids, load = recording.layer_ids, seen.expert_counts().sum(axis=0)
    initial = Placement.default(
        num_experts=recording.num_experts, num_ranks=NUM_RANKS, layer_ids=ids
    )
    plans = {
        size: plan(seen.expert_counts(), size, NUM_RANKS, effort="fast", layer_ids=ids).placement
        for size in SIZES
    }
    before = rank_tokens(unseen, num_ranks=NUM_RANKS)
    after = rank_tokens(unseen, placement=plans[NUM_SLOTS])
    chance = chance_by_layer(unseen, NUM_RANKS)
    pictures = {
        "experts": tokens_by_layer({"": seen.counts}, ids, "expert"),
        "initial": experts_by_slot(initial, load, 0),
        "planned": experts_by_slot(plans[NUM_SLOTS], load, 0),
        "before_after": before_after(before, after, ids, chance),
        "slots": imbalance_by(
            "slots",
            {
                split: {size: _left(unseen, placement, split) for size, placement in plans.items()}
                for split in ("even", "balanced")
            },
            title="Imbalance of iterations that were not planned from",
            chance=float(chance.mean()),
        ),
        "moves": imbalance_by(
            f"slots of a layer that change, of {NUM_SLOTS}",
            {"from the plan in force": _by_moves(later, plans[NUM_SLOTS])},
            title="The text has changed: what so many moves would bring",
        ),
    }
    for path in save_figures(directory, {f"concepts_{k}": v for k, v in pictures.items()}):
        print(path)


def _left(recording: Recording, placement: Placement, split: str) -> float:
    """The mean imbalance under a placement whose replicas are chosen so."""
    counts, table = recording.expert_counts().astype(np.float32), placement.slot_to_expert
    if split == "even":
        slots = even_split(counts, table, placement.num_experts)
    else:
        slots = balanced_split(counts, table, placement.num_experts, NUM_RANKS)
    return float(imbalance(np.asarray(sum_by_rank(slots, NUM_RANKS))).mean())


def _by_moves(recording: Recording, placement: Placement) -> dict[float, float]:
    found = {}
    for each in frontier(recording.expert_counts(), placement, MOVES, effort="fast"):
        found[float(np.asarray(each.moves).mean())] = float(each.imbalance.mean())
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images"))
