"""The pictures of a recording, as the report shows them."""

from matplotlib.figure import Figure

from jax_eplb.load import Recording
from jax_eplb.placement import Placement
from jax_eplb.plot.heat_maps import tokens_by_iteration, tokens_by_layer
from jax_eplb.plot.imbalance import before_after, tokens_per_rank
from jax_eplb.report import chance_by_layer, rank_tokens
from jax_eplb.split import Split


def recording_figures(
    recording: Recording,
    *,
    num_ranks: int | None = None,
    placement: Placement | None = None,
    split: Split = "even",
) -> dict[str, Figure]:
    """A recording's pictures by name.

    `rank_by_iteration` and `expert_by_iteration`: heat maps, one panel per layer, of the 8 most
    imbalanced layers where there are more; `rank_by_layer` and `expert_by_layer`: all layers,
    averaged over the iterations; `tokens_per_rank`: the most imbalanced layer. All of them show
    what was measured, or the default layout (see `report.rank_tokens`). With a `placement`, which
    may be for another number of ranks than was measured, they show what there was before on as
    many ranks; `tokens_per_rank` has both, and `before_after` is added. `split`: how each expert's
    tokens are then divided.

    Raises ValueError as `report.rank_tokens` does.
    """
    after = None
    if placement is not None:
        after = rank_tokens(recording, num_ranks=num_ranks, placement=placement, split=split)
        num_ranks = placement.num_ranks
    before = rank_tokens(recording, num_ranks=num_ranks)
    ids = recording.layer_ids
    figures = {}
    for name, tokens in {"rank": before, recording.unit[:-1]: recording.counts}.items():
        figures[f"{name}_by_iteration"] = tokens_by_iteration(
            tokens, before, ids, recording.iterations, name
        )
        figures[f"{name}_by_layer"] = tokens_by_layer({"": tokens}, ids, name)
    figures["tokens_per_rank"] = tokens_per_rank(before, after, ids)
    if after is not None:
        chance = chance_by_layer(recording, before.shape[-1])
        figures["before_after"] = before_after(before, after, ids, chance)
    return figures
