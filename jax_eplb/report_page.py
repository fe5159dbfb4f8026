"""A report as one HTML page, which needs nothing else: no script, no font, no other file.

Axes: W windows (iterations), L layers, E experts, S slots, P ranks.
"""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from jax_eplb.load import Recording
from jax_eplb.placement import Placement
from jax_eplb.plot import experts_by_slot, recording_figures
from jax_eplb.report import build_report
from jax_eplb.simulate import Advice, Outcome
from jax_eplb.simulate.plot import advice_figures
from jax_eplb.split import Split

# Enough for print at the width of a page.
_DPI = 144

_STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; color: #1a1a1a; background: #fff;
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
.answer { border-left: .3rem solid #0072b2; padding: .1rem 1rem; background: #f2f7fb; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: #444; padding-bottom: .3rem; }
th, td { padding: .15rem .7rem; text-align: right; border-bottom: 1px solid #ddd;
  white-space: nowrap; }
th:first-child, td:first-child, .words th, .words td { text-align: left; }
.words td { white-space: normal; min-width: 3rem; }
.words td + td { min-width: 10rem; }
.total tbody tr:last-child { font-weight: bold; border-top: 2px solid #666; }
figure { margin: 1.5rem 0; }
img { max-width: 100%; height: auto; }
figcaption { color: #444; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  .wide { overflow: visible; }
  th, td, .words td + td { padding: .1rem .35rem; white-space: normal; min-width: 0; }
  figure, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
}
"""

_CAPTIONS = {
    "before_after": "Imbalance of each layer before and after the plan, the floor of chance, and "
    "the ranks' loads.",
    "tokens_per_rank": "Tokens that each rank computes in the most imbalanced layer.",
    "by_layer": "All layers: red has more tokens than the mean, blue fewer.",
    "by_iteration": "The same over time.",
    "imbalance_over_time": "Policies replayed: each window by plans made from those before it.",
    "imbalance_by_redundancy": "What redundant experts bring, and what no policy is below.",
    "gain_by_interval": "How often to plan, and what moves take of the gain.",
}


def report_page(
    recording: Recording,
    *,
    num_ranks: int | None = None,
    placement: Placement | None = None,
    split: Split = "even",
    advice: Advice | str,
    compared: Sequence[Outcome] = (),
) -> str:
    """The page of a recording: what to do, the tables, the plan if there is one, the pictures.

    `split`: how the plan's replicas would divide an expert's tokens. `advice`: what the simulator
    recommends, with the policies `compared` beside it; or, in a sentence, why it could not. Raises
    ValueError as `report.rank_tokens` does.
    """
    if placement is not None:
        num_ranks = placement.num_ranks
    title = f"Load of {recording.num_experts} experts: {Path(recording.source).name}"
    parts = [f"<h1>{escape(title)}</h1>"]
    parts += _answer(advice, compared)
    parts += _balance(recording, num_ranks, placement, split)
    if placement is not None:
        parts += _plan(recording, placement)
    figures = recording_figures(recording, num_ranks=num_ranks, placement=placement, split=split)
    parts += ["<h2>Pictures</h2>", *_pictures(figures)]
    if not isinstance(advice, str):
        parts += ["<h2>The simulation</h2>", *_pictures(advice_figures(advice, compared))]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def _answer(advice: Advice | str, compared: Sequence[Outcome]) -> list[str]:
    if isinstance(advice, str):
        return ["<h2>Should it be balanced?</h2>", f"<p>{escape(advice)}</p>"]
    made = advice.recommendation
    chosen = advice.chosen
    parts = [
        f"<h2>Should it be balanced? {'Yes' if made.balance else 'No'}.</h2>",
        f'<div class="answer"><p>{escape(made.reason)}</p></div>',
    ]
    rows = [
        [
            outcome.policy.describe() + (" (recommended)" if outcome is chosen else ""),
            f"{outcome.mean_imbalance:.3f}",
            f"{100 * outcome.gain:+.1f}%",
            f"{outcome.moves.mean():.2f}",
            f"{100 * outcome.move_share:.2f}%",
        ]
        for outcome in compared
    ]
    head = ["policy", "imbalance", "throughput", "moves by window and layer", "time of moves"]
    caption = (
        f"{chosen.num_slots} slots on {chosen.num_ranks} ranks, replica choice "
        f"{chosen.replica_choice}; {len(chosen.seconds)} of {len(advice.recording.iterations)} "
        f"windows scored, {len(advice.outcomes)} settings tried"
    )
    costs = (
        "<p>The costs are those of bfloat16 experts on H200s, with the recorded numbers of tokens; "
        "<code>jax-eplb simulate</code> takes those of other models, devices and batches.</p>"
    )
    return [*parts, _table(head, rows, caption), costs]


def _balance(
    recording: Recording, num_ranks: int | None, placement: Placement | None, split: Split
) -> list[str]:
    """One table: what was, and beside it what the plan would have given."""
    reports = {"": build_report(recording, num_ranks=num_ranks)}
    if placement is not None:
        reports = {
            "before": reports[""],
            "planned": build_report(recording, placement=placement, split=split),
        }
    first = next(iter(reports.values()))
    layers = [str(layer) for layer in first.layer_ids]
    head, columns = ["layer", "mean"], [_column(first.summary.mean, 1)]
    totals = [f"{first.summary.average.mean:.1f}"]
    for name, report in reports.items():
        head += [f"std {name}".strip(), f"imbalance {name}".strip()]
        columns += [_column(report.summary.std, 1), _column(report.summary.imbalance, 6)]
        average = report.summary.average
        totals += [f"{average.std:.1f}", f"{average.imbalance:.6f}"]
    rows = [*map(list, zip(layers, *columns, strict=True)), ["average", *totals]]
    caption = (
        f"Tokens of each rank: {first.count} ranks, {first.iterations} iterations, {first.tokens} "
        f"tokens; {' and '.join(report.basis for report in reports.values())}"
    )
    notes = [
        f"{name + ': ' if name else ''}balancedness {report.balancedness_mean_of_ratios:.4f} "
        f"(mean of ratios), {report.balancedness_ratio_of_sums:.4f} (ratio of sums)"
        for name, report in reports.items()
    ]
    return [
        "<h2>How even the ranks are</h2>",
        "<p>Imbalance is (max - mean) / mean of the ranks' tokens, for each iteration and layer, "
        "then averaged: 0 is perfect, and 0.5 means that the fullest rank computes half as much "
        f"again as the mean; the others wait. Chance alone would leave {first.chance:.4f}.</p>",
        _table(head, rows, caption, "total"),
        f"<p>{escape('; '.join(notes))}.</p>",
    ]


def _plan(recording: Recording, placement: Placement) -> list[str]:
    spare = placement.num_slots - placement.num_experts
    parts = [
        "<h2>The plan</h2>",
        f"<p>{placement.num_slots} slots on {placement.num_ranks} ranks, "
        f"{placement.slots_per_rank} each; {spare} redundant experts.</p>",
    ]
    table = np.asarray(placement.slot_to_expert)
    counts = [np.bincount(row, minlength=placement.num_experts + 1)[:-1] for row in table]
    if spare:
        rows = []
        for layer, replicas in zip(placement.layer_ids, counts, strict=True):
            several = [int(e) for e in np.argsort(-replicas, kind="stable") if replicas[e] > 1]
            rows.append([str(layer), ", ".join(f"{e} (×{replicas[e]})" for e in several)])
        parts.append(_table(["layer", "experts with several replicas"], rows, "Replicas", "words"))
    by_rank = table.reshape(len(table), placement.num_ranks, -1)
    rows = [
        [str(layer), *(" ".join(map(str, slots)) for slots in ranks)]
        for layer, ranks in zip(placement.layer_ids, by_rank.tolist(), strict=True)
    ]
    head = ["layer", *(f"rank {rank}" for rank in range(placement.num_ranks))]
    parts.append(_table(head, rows, "Experts by slot", "words"))
    # The layer that has most to gain, as a picture.
    before = build_report(recording, num_ranks=placement.num_ranks).summary.imbalance
    figure = experts_by_slot(placement, recording.expert_counts().sum(axis=0), int(before.argmax()))
    caption = "The most imbalanced layer under the plan; experts with several replicas in bold."
    return [*parts, _picture(figure, caption)]


def _pictures(figures: Mapping[str, Figure]) -> Iterable[str]:
    for name, figure in figures.items():
        end = next(end for end in _CAPTIONS if name.endswith(end))
        yield _picture(figure, _CAPTIONS[end])


def _picture(figure: Figure, caption: str) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DPI, metadata={"Software": None})
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _table(
    head: Sequence[str], rows: Sequence[Sequence[str]], caption: str, kind: str = "figures"
) -> str:
    """Rows of text. `kind`: "figures", "total" where the last row sums up the others, "words"."""
    lines = [f'<div class="wide"><table class="{kind}"><caption>{escape(caption)}</caption>']
    lines.append("<thead><tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>")
    lines.append("</thead><tbody>")
    for row in rows:
        lines.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>")
    lines.append("</tbody></table></div>")
    return "\n".join(lines)


def _column(values: np.ndarray, digits: int) -> list[str]:
    return [f"{value:.{digits}f}" for value in values.tolist()]
