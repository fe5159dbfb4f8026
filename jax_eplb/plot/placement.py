"""A picture of a placement: which expert sits in each slot of a layer.

Axes: L layers, E experts, S slots, P ranks, N slots of a rank.
"""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jax_eplb.placement import Placement
from jax_eplb.plot.heat_maps import add_bar, draw_map, limit_of, relative
from jax_eplb.plot.style import AFTER

# More slots than these would have numbers too small to read.
_NUMBERED = 400


def experts_by_slot(placement: Placement, expert_tokens: np.ndarray, layer: int) -> Figure:
    """One layer's slots, a column for each rank, and above them what each rank computes.

    `expert_tokens`, [L, E], are divided evenly among an expert's replicas; a slot's colour is its
    part over the mean of all slots. A slot has its expert's number, in bold type where the expert
    has others. `layer` is the row of the table, whatever the layer's own number is.
    """
    row = np.asarray(placement.slot_to_expert)[layer]
    # Slots of a rank that is gone hold the id E, which has no tokens.
    replicas = np.bincount(row, minlength=placement.num_experts + 1)
    share = np.append(np.asarray(expert_tokens, np.float64)[layer], 0) / np.maximum(replicas, 1)
    by_rank = share[row].reshape(placement.num_ranks, -1)  # [P, N]
    figure = Figure(
        figsize=(min(14, 3 + 0.7 * placement.num_ranks), 3 + 0.3 * min(by_rank.shape[1], 16)),
        layout="constrained",
    )
    upper, lower = figure.subplots(
        2, 1, sharex=True, height_ratios=(1, 0.25 * min(by_rank.shape[1], 16) + 0.5)
    )
    total = relative(by_rank.sum(axis=1)).filled(0)
    upper.bar(np.arange(placement.num_ranks), total, color=AFTER)
    upper.axhline(1, color="black", linewidth=1, linestyle="--")
    upper.set_ylabel("tokens / mean")
    shown = relative(by_rank.ravel()).reshape(by_rank.shape).T  # [N, P]
    limit = limit_of(shown)
    image = draw_map(lower, shown, limit)
    lower.set_xlabel("rank")
    lower.set_ylabel("slot of the rank")
    lower.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    lower.yaxis.set_major_locator(MaxNLocator(10, integer=True))
    if len(row) <= _NUMBERED:
        load = shown.filled(1)
        for slot, expert in enumerate(row):
            rank, place = divmod(slot, by_rank.shape[1])
            several = expert < placement.num_experts and replicas[expert] > 1
            dark = abs(np.log(max(load[place, rank], 1 / limit))) > 0.6 * np.log(limit)
            lower.text(
                rank,
                place,
                "–" if expert == placement.num_experts else str(expert),
                ha="center",
                va="center",
                fontsize="small",
                weight="bold" if several else "normal",
                color="white" if dark else "black",
            )
    figure.suptitle(
        f"Experts by slot, layer {placement.layer_ids[layer]}: {len(row)} slots on "
        f"{placement.num_ranks} ranks"
    )
    add_bar(figure, image, [lower], limit)
    return figure
