"""Report: the tokens of each rank under a placement, and the table that says how even they are.

Axes: W windows (iterations), L layers, E experts, S slots, P ranks.

On the host, in float64, where a recording may hold more tokens than float32 counts one by one;
but for the balanced split, which is only followed to a thousandth of the mean anyway.
"""

import dataclasses
from typing import Any, Literal

import numpy as np

from jax_eplb import metrics
from jax_eplb.load import Recording
from jax_eplb.placement import Placement
from jax_eplb.split import Split, balanced_split

# Draws of `chance_imbalance`, each a few microseconds per rank: enough for the fourth digit, and
# shared among the iterations where there are many of different size.
_CHANCE_DRAWS = 12_800

Over = Literal["ranks", "experts", "slots"]


def rank_tokens(
    recording: Recording,
    *,
    num_ranks: int | None = None,
    placement: Placement | None = None,
    split: Split = "even",
) -> np.ndarray:
    """Choices computed by each rank, float64[W, L, P].

    With a `placement`, what it would have given on these counts: each expert's tokens dealt evenly
    over its replicas, or with the split "balanced" so that the fullest rank is as light as can be
    in each iteration, as with the layer's replica choice of that name. Otherwise what was recorded,
    where that is known for `num_ranks` ranks; otherwise the default layout in the fewest slots.
    Counts by slot whose placement is not known are added up by consecutive blocks of slots, the
    ranks of every engine.

    Raises ValueError where the placement is for other layers, experts or ranks, or where neither
    the recording nor `num_ranks` says how many ranks there are, or for another split.

    >>> recording = Recording(np.array([[[6, 1, 2]]]), num_experts=3, experts_per_token=1)
    >>> rank_tokens(recording, num_ranks=3).tolist()
    [[[6.0, 1.0, 2.0]]]
    >>> placement = Placement.from_slots([[0, 1, 2, 0]], num_experts=3, num_ranks=2)
    >>> rank_tokens(recording, placement=placement).tolist()
    [[[4.0, 5.0]]]
    """
    return _rank_tokens(recording, num_ranks, placement, split)[0]


@dataclasses.dataclass(frozen=True, eq=False)
class Report:
    """The table of a recording, by layer, and the figures for all of it."""

    layer_ids: tuple[int, ...]
    summary: metrics.Summary
    balancedness_mean_of_ratios: float  # SGLang's, averaged over iterations
    balancedness_ratio_of_sums: float  # vLLM's, averaged over iterations
    chance: float  # the imbalance that chance alone would leave, averaged like the real one
    basis: str  # "measured", "predicted", "default layout", ...: where the counts come from
    over: Over  # what the figures are taken over, and how many of them there are
    count: int
    iterations: int
    tokens: int  # in all iterations together

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and strings: `layers` {layer id: {mean, std, imbalance}}, `average`, ...

        The key `ranks` (or `experts`, or `slots`) says how many of them the figures are taken over.
        """
        return {
            "layers": {
                str(layer): {"mean": mean, "std": std, "imbalance": imbalance}
                for layer, mean, std, imbalance in self._rows()
            },
            "average": self.summary.average._asdict(),
            "balancedness_mean_of_ratios": self.balancedness_mean_of_ratios,
            "balancedness_ratio_of_sums": self.balancedness_ratio_of_sums,
            "imbalance_chance": self.chance,
            "basis": self.basis,
            self.over: self.count,
            "iterations": self.iterations,
            "tokens": self.tokens,
        }

    def to_text(self) -> str:
        """The table, the `average` row last, and a line on what it is; no newline at the end."""
        rows = [*self._rows(), ("average", *self.summary.average)]
        cells = [("layer", "mean", "std", "imbalance")] + [
            (str(label), f"{mean:.1f}", f"{std:.6f}", f"{imbalance:.6f}")
            for label, mean, std, imbalance in rows
        ]
        wide = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            f"{a:<{wide[0]}} {b:>{wide[1]}}  {c:>{wide[2]}}  {d:>{wide[3]}}" for a, b, c, d in cells
        ]
        return "\n".join([*lines, self._closing_line()])

    def _rows(self) -> list[tuple[int, float, float, float]]:
        table = self.summary
        columns = (table.mean.tolist(), table.std.tolist(), table.imbalance.tolist())
        return list(zip(self.layer_ids, *columns, strict=True))

    def _closing_line(self) -> str:
        over = self.over if self.count != 1 else self.over[:-1]
        iterations = "iteration" if self.iterations == 1 else "iterations"
        return (
            f"{self.count} {over}, {self.iterations} {iterations}, {self.tokens} tokens; "
            f"{self.basis}; "
            f"balancedness {self.balancedness_mean_of_ratios:.4f} (mean of ratios), "
            f"{self.balancedness_ratio_of_sums:.4f} (ratio of sums); "
            f"chance alone would leave an imbalance of {self.chance:.4f}"
        )


def build_report(
    recording: Recording,
    *,
    num_ranks: int | None = None,
    placement: Placement | None = None,
    split: Split = "even",
    per_expert: bool = False,
) -> Report:
    """The report of a recording, measured or predicted as in `rank_tokens`.

    With `per_expert` the same figures over the experts instead of the ranks; over the slots where
    the recording counts slots, or where a `placement` is given: its replicas then count apart.
    """
    if per_expert:
        tokens, basis, over = _column_tokens(recording, num_ranks, placement, split)
    else:
        tokens, basis = _rank_tokens(recording, num_ranks, placement, split)
        over: Over = "ranks"
    routed = recording.counts.sum(axis=-1)  # [W, L]
    seen = routed.any(axis=1)
    held = tokens[seen] if seen.any() else tokens  # an empty iteration says nothing of balance
    return Report(
        layer_ids=recording.layer_ids,
        summary=metrics.summarize(tokens),
        balancedness_mean_of_ratios=float(metrics.balancedness_mean_of_ratios(held).mean()),
        balancedness_ratio_of_sums=float(metrics.balancedness_ratio_of_sums(held).mean()),
        chance=float(_average(chance_by_layer(recording, tokens.shape[-1]), routed.any(axis=0))),
        basis=basis,
        over=over,
        count=tokens.shape[-1],
        iterations=len(recording.iterations),
        tokens=round(int(routed.max(axis=1).sum()) / recording.experts_per_token),
    )


def chance_by_layer(recording: Recording, num_ranks: int) -> np.ndarray:
    """The imbalance that chance alone would leave in each layer, float64[L].

    `metrics.chance_imbalance` for the choices of each iteration, averaged over the iterations in
    which the layer saw tokens.
    """
    routed = recording.counts.sum(axis=-1)  # [W, L]
    samples = int(np.clip(_CHANCE_DRAWS // np.unique(routed).size, 8, 200))
    chance = metrics.chance_imbalance(routed, num_ranks, samples=samples)
    return np.array([_average(*column) for column in zip(chance.T, routed.T > 0, strict=True)])


def _rank_tokens(
    recording: Recording, num_ranks: int | None, placement: Placement | None, split: Split
) -> tuple[np.ndarray, str]:
    """float64[W, L, P], and in words where the counts come from."""
    if split not in ("even", "balanced"):
        raise ValueError(f"split is {split!r}; expected 'even' or 'balanced'")
    if placement is not None:
        tokens = _predict_slots(recording, placement, split)
        if num_ranks not in (None, placement.num_ranks):
            raise ValueError(
                f"the placement is for {placement.num_ranks} ranks, but {num_ranks} were asked "
                f"for (--ep-size); leave it out, or plan again for {num_ranks} ranks"
            )
        return _sum_blocks(tokens, placement.num_ranks), _predicted(split)
    measured = recording.rank_tokens
    if measured is not None and num_ranks in (None, measured.shape[-1]):
        return measured.astype(np.float64), "measured"
    active = recording.placement
    if active is not None and num_ranks in (None, active.num_ranks):
        if recording.unit == "slots":
            return _sum_blocks(recording.counts.astype(np.float64), active.num_ranks), "measured"
        tokens = _predict_slots(recording, active)
        return _sum_blocks(tokens, active.num_ranks), "predicted, placement of the recording"
    if num_ranks is None:
        raise ValueError(
            f"{recording.source}: the recording does not say on how many ranks its tokens were "
            "computed; give the number of ranks (--ep-size)"
        )
    if recording.unit == "slots" and active is None:
        _check_blocks(recording, num_ranks)
        return _sum_blocks(recording.counts.astype(np.float64), num_ranks), "measured"
    layout = Placement.default(
        num_experts=recording.num_experts, num_ranks=num_ranks, layer_ids=recording.layer_ids
    )
    return _sum_blocks(_predict_slots(recording, layout), num_ranks), "default layout"


def _column_tokens(
    recording: Recording, num_ranks: int | None, placement: Placement | None, split: Split
) -> tuple[np.ndarray, str, Over]:
    """float64[W, L, E] or float64[W, L, S], whence it comes, and which of the two it is."""
    if placement is None:
        return recording.counts.astype(np.float64), "measured", recording.unit
    _rank_tokens(recording, num_ranks, placement, "even")  # for its checks
    return _predict_slots(recording, placement, split), _predicted(split), "slots"


def _predicted(split: Split) -> str:
    return "predicted" if split == "even" else f"predicted, {split} split"


def _predict_slots(recording: Recording, placement: Placement, split: Split = "even") -> np.ndarray:
    """Tokens of each slot, float64[W, L, S].

    The even split is `split.even_split` on the host: that one is float32, which from 2**24 tokens
    on rounds.
    """
    if placement.num_experts != recording.num_experts:
        raise ValueError(
            f"the placement is for {placement.num_experts} experts, {recording.source} has "
            f"{recording.num_experts}; give a placement planned for this model"
        )
    if placement.layer_ids != recording.layer_ids:
        raise ValueError(
            f"the placement is for the layers {_shorten(placement.layer_ids)}, "
            f"{recording.source} has {_shorten(recording.layer_ids)}; "
            "give a placement planned for this model"
        )
    counts = recording.expert_counts()
    slot_to_expert = np.asarray(placement.slot_to_expert)
    if split == "balanced":
        sizes = placement.num_experts, placement.num_ranks
        return np.asarray(balanced_split(counts, slot_to_expert, *sizes), np.float64)
    tokens = np.empty((*counts.shape[:2], placement.num_slots))
    for layer, row in enumerate(slot_to_expert):
        share = counts[:, layer] / np.bincount(row, minlength=placement.num_experts)
        tokens[:, layer] = share[:, row]
    return tokens


def _sum_blocks(slot_tokens: np.ndarray, num_ranks: int) -> np.ndarray:
    """[W, L, S] to [W, L, P]: rank r has the slots r·N .. r·N + N - 1."""
    return slot_tokens.reshape(*slot_tokens.shape[:2], num_ranks, -1).sum(axis=-1)


def _check_blocks(recording: Recording, num_ranks: int) -> None:
    num_slots = recording.counts.shape[-1]
    if num_ranks < 1 or num_slots % num_ranks:
        raise ValueError(
            f"{recording.source}: {num_slots} slots cannot be divided among {num_ranks} ranks "
            "(--ep-size); give the number of ranks of the recorded run"
        )


def _average(values: np.ndarray, counted: np.ndarray) -> float:
    return float(values[counted].mean()) if counted.any() else 0.0


def _shorten(ids: tuple[int, ...]) -> str:
    """All of a few ids; of many the first, the last and their number.

    >>> _shorten((3, 4)), _shorten(tuple(range(3, 61)))
    ('3, 4', '3 .. 60 (58 layers)')
    """
    few = len(ids) <= 4
    return ", ".join(map(str, ids)) if few else f"{ids[0]} .. {ids[-1]} ({len(ids)} layers)"
