"""A recording from a bare array of counts, as other tools and users keep them.

Axes: W windows, L layers, E experts, S slots.
"""

from typing import Literal, TypedDict, Unpack

import numpy as np

from jax_eplb.load import Recording
from jax_eplb.placement import Placement


class Options(TypedDict, total=False):
    """What a file may leave unsaid; None is the same as absent."""

    unit: Literal["experts", "slots"] | None  # what the counts' last axis is
    num_experts: int | None
    experts_per_token: int | None
    active_placement: Placement | None  # in force while the counts were recorded
    unsafe_pickle: bool  # whether a pickled `.npy` file may be read at all


def check_options(options: Options) -> Options:
    """The options that were given, checked by themselves."""
    unit = options.get("unit")
    if unit not in (None, "experts", "slots"):
        raise ValueError(f"unit is {unit!r}; use 'experts' or 'slots'")
    for name in ("num_experts", "experts_per_token"):
        value = options.get(name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    return options


def known_experts(options: Options) -> int | None:
    """The number of experts where the options say it, by itself or by the placement."""
    placement = options.get("active_placement")
    return options.get("num_experts") or (placement.num_experts if placement else None)


def recording_from_array(
    counts: np.ndarray, *, source: str, drop_idle: bool = False, **options: Unpack[Options]
) -> Recording:
    """Wrap integer counts [W, L, E or S], or [L, E or S] of one window.

    An array does not say what its last axis is: without `unit` it is slots where the number of
    experts is known (given, or from the placement) and smaller, and experts otherwise. Nor does it
    say how many experts a token chooses: without `experts_per_token` that is 1, so that its
    "tokens" are choices. Layers take their ids from a placement of as many layers, and are
    0 .. L - 1 otherwise.

    `drop_idle` leaves out windows and layers that counted nothing at all; what stays keeps its
    number. Raises ValueError naming `source` for any other shape or dtype, and negative counts.

    >>> recording_from_array(np.array([[3, 1], [0, 4]]), source="a.npy").counts.shape
    (1, 2, 2)
    """
    check_options(options)
    if counts.ndim not in (2, 3) or 0 in counts.shape:
        raise ValueError(
            f"{source}: the counts have shape {counts.shape}; expected [windows, layers, experts], "
            "or [layers, experts] of one window, none of them 0"
        )
    if not np.issubdtype(counts.dtype, np.integer):
        raise ValueError(f"{source}: the counts are {counts.dtype}; expected integers")
    counts = counts.reshape(-1, *counts.shape[-2:])
    iterations, layer_ids = tuple(range(counts.shape[0])), tuple(range(counts.shape[1]))
    if drop_idle:
        counts, iterations, layer_ids = _without_idle(counts, source)
    placement = options.get("active_placement")
    if placement is not None and placement.num_layers == counts.shape[1]:
        layer_ids = placement.layer_ids
    width = counts.shape[2]
    num_experts = known_experts(options) or width
    return Recording(
        counts=counts,
        num_experts=num_experts,
        experts_per_token=options.get("experts_per_token") or 1,
        unit=options.get("unit") or ("slots" if width > num_experts else "experts"),
        layer_ids=layer_ids,
        iterations=iterations,
        placement=placement,
        source=source,
    )


def _without_idle(counts: np.ndarray, source: str):
    """counts[W', L', E] of what counted anything, with the numbers of its windows and layers."""
    used = np.any(counts, axis=2)  # [W, L]
    windows, layers = np.flatnonzero(np.any(used, axis=1)), np.flatnonzero(np.any(used, axis=0))
    if not windows.size:
        raise ValueError(f"{source}: all counts are 0; nothing was recorded")
    kept = counts[np.ix_(windows, layers)]
    return kept, tuple(windows.tolist()), tuple(layers.tolist())
