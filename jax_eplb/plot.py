"""Plot: every picture, as PNG files, without a display and without pyplot's global state.

Axes: W windows (iterations), L layers, E experts, P ranks.

Loads are drawn relative to the mean of their iteration, on a logarithmic scale from blue (few
tokens) over white (the mean) to red (many). That scale and the two colours of before and after,
from Okabe and Ito's palette, can be told apart with any common form of colour blindness.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from jax_eplb import metrics
from jax_eplb.load import Recording
from jax_eplb.placement import Placement
from jax_eplb.report import chance_by_layer, rank_tokens

BEFORE, AFTER, CHANCE = "#D55E00", "#0072B2", "#666666"
_SERIES = (BEFORE, AFTER, "#009E73", "#CC79A7")
_COLOURS = "RdBu_r"
# More layers than these would be too small to read: the most imbalanced are drawn.
_PANELS = 8
_DPI = 110
# Of the colour bar, for scales that reach up to so many times the mean.
_TICKS = {1.3: (0.8, 0.9, 1, 1.1, 1.25), 2.7: (0.4, 0.5, 2 / 3, 0.8, 1, 1.25, 1.5, 2, 2.5)}
_WIDE_TICKS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8, 16)


def plot_recording(
    directory: str | os.PathLike,
    recording: Recording,
    *,
    num_ranks: int | None = None,
    placement: Placement | None = None,
) -> list[Path]:
    """Draw a recording into `directory`, made if need be, and return the files.

    `rank_by_iteration.png` and `expert_by_iteration.png`: heat maps, one panel per layer, of the
    8 most imbalanced layers where there are more; `rank_by_layer.png` and `expert_by_layer.png`:
    all layers, averaged over the iterations; `tokens_per_rank.png`: the most imbalanced layer. All
    of them show what was measured, or the default layout (see `report.rank_tokens`). With a
    `placement`, which may be for another number of ranks than was measured, they show what there
    was before on as many ranks; `tokens_per_rank.png` has both, and `before_after.png` is added.

    Raises ValueError as `report.rank_tokens` does.
    """
    after = None
    if placement is not None:
        after = rank_tokens(recording, num_ranks=num_ranks, placement=placement)
        num_ranks = placement.num_ranks
    before = rank_tokens(recording, num_ranks=num_ranks)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    ids = recording.layer_ids
    names = {"rank": before, recording.unit[:-1]: recording.counts}
    files = []
    for name, tokens in names.items():
        figures = {
            "iteration": _by_iteration(tokens, before, recording, name),
            "layer": _by_layer({"": tokens}, ids, name),
        }
        for axis, figure in figures.items():
            files.append(_save(figure, directory / f"{name}_by_{axis}.png"))
    files.append(_save(_tokens_per_rank(before, after, ids), directory / "tokens_per_rank.png"))
    if after is not None:
        chance = chance_by_layer(recording, before.shape[-1])
        files.append(plot_before_after(directory / "before_after.png", before, after, ids, chance))
    return files


def plot_before_after(
    path: str | os.PathLike,
    before: np.ndarray,
    after: np.ndarray,
    layer_ids: Sequence[int],
    chance: float | np.ndarray | None = None,
) -> Path:
    """Draw the imbalance of each layer before and after, and the ranks' loads on one scale.

    `before` and `after` are tokens, [W, L, P]; they may be of different iterations. `chance`, one
    figure or one for each layer, float64[L], is the imbalance that chance alone would leave.
    Raises ValueError where the layers do not agree.
    """
    for name, tokens in (("before", before), ("after", after)):
        if tokens.ndim != 3 or tokens.shape[1] != len(layer_ids):
            raise ValueError(
                f"{name}: tokens have shape {tokens.shape}; expected "
                f"[iterations, {len(layer_ids)} layers, ranks]"
            )
    figure = Figure(figsize=(10, 4 + _map_height(len(layer_ids))), layout="constrained")
    heights = (4, _map_height(len(layer_ids)))
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
    _draw_imbalances(upper.subplots(), before, after, layer_ids, chance)
    _fill_by_layer(lower, {"before": before, "after": after}, layer_ids, "rank")
    return _save(figure, Path(path))


def plot_over_time(
    path: str | os.PathLike,
    series: Mapping[str, np.ndarray],
    *,
    change: int | None = None,
    updates: Sequence[int] = (),
    smooth: int = 20,
) -> Path:
    """Draw imbalances, float[W] by name, over the iterations: each one, and a running mean.

    `change`: an iteration to mark with a line; `updates`: iterations to mark on the axis.
    """
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    axes = figure.subplots()
    for number, (name, values) in enumerate(series.items()):
        values, colour = np.asarray(values, np.float64), _SERIES[number % len(_SERIES)]
        axes.plot(values, color=colour, linewidth=0.5, alpha=0.25)
        count = np.minimum(np.arange(1, len(values) + 1), smooth)
        total = np.concatenate([np.zeros(1), np.cumsum(values)])
        end = np.arange(1, len(values) + 1)
        mean = (total[end] - total[end - count]) / count
        axes.plot(mean, color=colour, linewidth=1.6, label=f"{name} (mean {values.mean():.3f})")
    if change is not None:
        axes.axvline(change, color="black", linestyle="--", linewidth=1, label="other text")
    if len(updates):
        axes.plot(
            updates,
            np.zeros(len(updates)),
            "|",
            color="black",
            markersize=7,
            label=f"a layer changes ({len(updates)} times)",
            clip_on=False,
        )
    axes.set_title(f"Imbalance over time, mean over the layers; thick: mean of {smooth} iterations")
    axes.set_xlabel("iteration")
    axes.set_ylabel("(max - mean) / mean")
    axes.set_ylim(bottom=0)
    axes.margins(x=0)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False)
    return _save(figure, Path(path))


def _draw_imbalances(
    axes: Axes,
    before: np.ndarray,
    after: np.ndarray,
    layer_ids: Sequence[int],
    chance: float | np.ndarray | None,
) -> None:
    """One dumbbell per layer: where its imbalance was, and where it is."""
    place = np.arange(len(layer_ids))
    high, low = metrics.summarize(before), metrics.summarize(after)
    axes.vlines(place, low.imbalance, high.imbalance, color="0.8", zorder=1)
    for table, label, colour, marker in ((high, "before", BEFORE, "o"), (low, "after", AFTER, "s")):
        text = f"{label} (average {table.average.imbalance:.3f})"
        axes.plot(place, table.imbalance, marker, color=colour, label=text)
    if chance is not None:
        floor = np.broadcast_to(chance, place.shape)
        edges = np.append(place - 0.5, place[-1] + 0.5)
        text = f"chance alone (average {floor.mean():.3f})"
        axes.stairs(floor, edges, baseline=None, color=CHANCE, linestyle="--", label=text)
    axes.set_title("Imbalance of the ranks by layer")
    axes.set_xlabel("layer")
    axes.set_ylabel("(max - mean) / mean")
    axes.set_xlim(-0.5, len(layer_ids) - 0.5)
    axes.set_ylim(bottom=0, top=None if axes.get_ylim()[1] > 0 else 1)
    _label_ticks(axes.xaxis, layer_ids, most=20)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    # Beside the points, which may be anywhere in the frame.
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False)


def _by_iteration(tokens: np.ndarray, ranks: np.ndarray, recording: Recording, name: str) -> Figure:
    """Heat maps name × iteration of the layers, at most `_PANELS`, most imbalanced ranks first."""
    num_layers = len(recording.layer_ids)
    layers = np.sort(np.argsort(-metrics.summarize(ranks).imbalance, kind="stable")[:_PANELS])
    rows = 1 if len(layers) <= 3 else 2
    columns = math.ceil(len(layers) / rows)
    panel_height = 2.7 if tokens.shape[-1] <= 64 else 3.6
    size = (6.5 if columns == 1 else 2 + 3.2 * columns, 1 + panel_height * rows)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    relative = _relative(tokens[:, layers])
    limit = _limit(relative)
    for axes in grid.flat[len(layers) :]:
        axes.set_visible(False)
    images = []
    for panel, layer in enumerate(layers):
        axes = grid.flat[panel]
        images.append(_draw_map(axes, relative[:, panel].T, limit))
        axes.set_title(f"layer {recording.layer_ids[layer]}", fontsize="medium")
        _label_ticks(axes.xaxis, recording.iterations, most=5)
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.tick_params(labelbottom=panel + columns >= len(layers))
    chosen = "" if num_layers <= _PANELS else f", {_PANELS} most imbalanced of {num_layers} layers"
    figure.suptitle(f"Tokens of each {name} by iteration{chosen}")
    figure.supxlabel("iteration")
    figure.supylabel(name)
    _add_bar(figure, images[0], grid.ravel().tolist(), limit)
    return figure


def _by_layer(maps: dict[str, np.ndarray], layer_ids: Sequence[int], name: str) -> Figure:
    figure = Figure(figsize=(10, 0.5 + _map_height(len(layer_ids))), layout="constrained")
    _fill_by_layer(figure, maps, layer_ids, name)
    return figure


def _fill_by_layer(figure, maps: dict[str, np.ndarray], layer_ids: Sequence[int], name: str):
    """Heat maps layer × name, averaged over iterations, side by side on one colour scale.

    `figure` is a Figure or SubFigure.
    """
    # The mean of the relative loads would give an iteration of few tokens the same say.
    relative = [_relative(tokens.sum(axis=0)) for tokens in maps.values()]
    limit = _limit(*relative)
    grid = figure.subplots(1, len(maps), squeeze=False, sharey=True).ravel()
    images = []
    for axes, label, values in zip(grid, maps, relative, strict=True):
        images.append(_draw_map(axes, values, limit))
        axes.set_title(label)
        axes.set_xlabel(name)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        _label_ticks(axes.yaxis, layer_ids, most=12)
    grid[0].set_ylabel("layer")
    figure.suptitle(f"Tokens of each {name} by layer, all iterations together")
    _add_bar(figure, images[0], grid.tolist(), limit)


def _tokens_per_rank(
    before: np.ndarray, after: np.ndarray | None, layer_ids: Sequence[int]
) -> Figure:
    """Bars of the layer that was most imbalanced before, averaged over iterations."""
    layer = int(metrics.summarize(before).imbalance.argmax())
    series = {"before": before} if after is None else {"before": before, "after": after}
    num_ranks = before.shape[-1]
    figure = Figure(figsize=(min(14, 5 + 0.15 * num_ranks), 4.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(series)
    for i, (label, tokens) in enumerate(series.items()):
        place = np.arange(num_ranks) - 0.4 + width * (i + 0.5)
        height = tokens[:, layer].mean(axis=0)
        axes.bar(place, height, width, color=(BEFORE, AFTER)[i], label=label)
    mean = before[:, layer].mean()
    axes.axhline(mean, color="black", linewidth=1, linestyle="--", label=f"mean ({mean:,.1f})")
    axes.set_title(f"Tokens of each rank, layer {layer_ids[layer]} (the most imbalanced)")
    axes.set_xlabel("rank")
    axes.set_ylabel("tokens per iteration")
    axes.set_xlim(-0.6, num_ranks - 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False)
    return figure


def _relative(tokens: np.ndarray) -> np.ma.MaskedArray:
    """Tokens over their mean along the last axis; masked where there are none at all."""
    values = np.asarray(tokens, np.float64)
    mean = np.broadcast_to(values.mean(axis=-1, keepdims=True), values.shape)
    empty = mean == 0
    return np.ma.masked_array(values / np.where(empty, 1, mean), empty)


def _limit(*relative: np.ma.MaskedArray) -> float:
    """Colours reach from 1 / limit to limit, which 99.5% of all loads do not exceed: 1.1 to 16."""
    values = np.concatenate([v.compressed() for v in relative] + [np.ones(1)])
    return float(np.clip(np.quantile(values, 0.995), 1.1, 16))


def _draw_map(axes: Axes, values: np.ma.MaskedArray, limit: float) -> AxesImage:
    colours = matplotlib.colormaps[_COLOURS].with_extremes(bad="0.75")
    return axes.imshow(
        np.ma.clip(values, 1 / limit, limit),  # 0 tokens are the lowest colour, not a hole
        cmap=colours,
        norm=LogNorm(1 / limit, limit),
        aspect="auto",
        origin="lower",
        # Cells of about a pixel would be blurred; of many more cells than pixels, some be lost.
        interpolation="nearest" if max(values.shape) <= 300 else "auto",
    )


def _add_bar(figure, image: AxesImage, axes: list[Axes], limit: float) -> None:
    bar = figure.colorbar(image, ax=axes, label="tokens / mean", extend="both")
    ticks = next((ticks for reach, ticks in _TICKS.items() if limit <= reach), _WIDE_TICKS)
    # FixedLocator alone would draw those outside the scale on the arrows.
    shown = [tick for tick in ticks if 1 / limit <= tick <= limit]
    bar.ax.yaxis.set_major_locator(FixedLocator(shown))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))


def _label_ticks(axis, labels: Sequence[int], most: int) -> None:
    """Name positions 0, 1, ... by layer id or iteration, at most so many of them."""
    axis.set_major_locator(MaxNLocator(most, integer=True, min_n_ticks=1))

    def name(position, _):
        index = round(position)
        return str(labels[index]) if 0 <= index < len(labels) else ""

    axis.set_major_formatter(FuncFormatter(name))


def _map_height(num_layers: int) -> float:
    return 2.4 + 0.06 * min(num_layers, 80)


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=_DPI)
    return path
