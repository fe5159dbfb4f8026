"""Heat maps of loads, relative to the mean.

Axes: W windows (iterations), L layers, E experts, P ranks.

The scale is logarithmic, from blue (few tokens) over white (the mean) to red (many); these can be
told apart with any common form of colour blindness.
"""

import math
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from jax_eplb import metrics
from jax_eplb.plot.style import label_ticks

_COLOURS = "RdBu_r"
# More layers than these would be too small to read: the most imbalanced are drawn.
_PANELS = 8
# Of the colour bar, for scales that reach up to so many times the mean.
_TICKS = {1.3: (0.8, 0.9, 1, 1.1, 1.25), 2.7: (0.4, 0.5, 2 / 3, 0.8, 1, 1.25, 1.5, 2, 2.5)}
_WIDE_TICKS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8, 16)


def tokens_by_iteration(
    tokens: np.ndarray,
    ranks: np.ndarray,
    layer_ids: Sequence[int],
    iterations: Sequence[int],
    name: str,
) -> Figure:
    """One map, name × iteration, of each layer: of the 8 most imbalanced where there are more.

    `tokens`, [W, L, name], is drawn; the imbalance is that of `ranks`, [W, L, P].
    """
    num_layers = len(layer_ids)
    layers = np.sort(np.argsort(-metrics.summarize(ranks).imbalance, kind="stable")[:_PANELS])
    rows = 1 if len(layers) <= 3 else 2
    columns = math.ceil(len(layers) / rows)
    panel_height = 2.7 if tokens.shape[-1] <= 64 else 3.6
    size = (6.5 if columns == 1 else 2 + 3.2 * columns, 1 + panel_height * rows)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    shown = relative(tokens[:, layers])
    limit = limit_of(shown)
    for axes in grid.flat[len(layers) :]:
        axes.set_visible(False)
    images = []
    for panel, layer in enumerate(layers):
        axes = grid.flat[panel]
        images.append(draw_map(axes, shown[:, panel].T, limit))
        axes.set_title(f"layer {layer_ids[layer]}", fontsize="medium")
        label_ticks(axes.xaxis, iterations, most=5)
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.tick_params(labelbottom=panel + columns >= len(layers))
    chosen = "" if num_layers <= _PANELS else f", {_PANELS} most imbalanced of {num_layers} layers"
    figure.suptitle(f"Tokens of each {name} by iteration{chosen}")
    figure.supxlabel("iteration")
    figure.supylabel(name)
    add_bar(figure, images[0], grid.ravel().tolist(), limit)
    return figure


def tokens_by_layer(maps: Mapping[str, np.ndarray], layer_ids: Sequence[int], name: str) -> Figure:
    """Maps, layer × name, of all iterations together, side by side.

    `maps`: tokens [W, L, name], by title.
    """
    figure = Figure(figsize=(10, 0.5 + map_height(len(layer_ids))), layout="constrained")
    fill_by_layer(figure, maps, layer_ids, name)
    return figure


def fill_by_layer(figure, maps: Mapping[str, np.ndarray], layer_ids: Sequence[int], name: str):
    """As `tokens_by_layer`, in a Figure or SubFigure; the maps have one colour scale."""
    # The mean of the relative loads would give an iteration of few tokens the same say.
    shown = [relative(tokens.sum(axis=0)) for tokens in maps.values()]
    limit = limit_of(*shown)
    grid = figure.subplots(1, len(maps), squeeze=False, sharey=True).ravel()
    images = []
    for axes, label, values in zip(grid, maps, shown, strict=True):
        images.append(draw_map(axes, values, limit))
        axes.set_title(label)
        axes.set_xlabel(name)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        label_ticks(axes.yaxis, layer_ids, most=12)
    grid[0].set_ylabel("layer")
    figure.suptitle(f"Tokens of each {name} by layer, all iterations together")
    add_bar(figure, images[0], grid.tolist(), limit)


def map_height(num_layers: int) -> float:
    """Of maps by layer, in inches."""
    return 2.4 + 0.06 * min(num_layers, 80)


def relative(tokens: np.ndarray) -> np.ma.MaskedArray:
    """Tokens over their mean along the last axis; masked where there are none at all."""
    values = np.asarray(tokens, np.float64)
    mean = np.broadcast_to(values.mean(axis=-1, keepdims=True), values.shape)
    empty = mean == 0
    return np.ma.masked_array(values / np.where(empty, 1, mean), empty)


def limit_of(*shown: np.ma.MaskedArray) -> float:
    """Colours reach from 1 / limit to limit, which 99.5% of all loads do not exceed: 1.1 to 16."""
    values = np.concatenate([v.compressed() for v in shown] + [np.ones(1)])
    return float(np.clip(np.quantile(values, 0.995), 1.1, 16))


def draw_map(axes: Axes, values: np.ma.MaskedArray, limit: float) -> AxesImage:
    """Relative loads, each a cell."""
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


def add_bar(figure, image: AxesImage, axes: list[Axes], limit: float) -> None:
    """The scale of maps drawn with this limit, beside their axes."""
    bar = figure.colorbar(image, ax=axes, label="tokens / mean", extend="both")
    ticks = next((ticks for reach, ticks in _TICKS.items() if limit <= reach), _WIDE_TICKS)
    # FixedLocator alone would draw those outside the scale on the arrows.
    shown = [tick for tick in ticks if 1 / limit <= tick <= limit]
    bar.ax.yaxis.set_major_locator(FixedLocator(shown))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
