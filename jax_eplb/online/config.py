"""The balancer's settings, checked once."""

import dataclasses
import math

from jax_eplb.planner import EFFORTS


@dataclasses.dataclass(frozen=True)
class BalancerConfig:
    """When to plan, from which load, and what is worth moving.

    Left alone it does as TensorRT-LLM's balancer: each iteration the load fades by `decay` and the
    counts are added, and `layer_updates_per_iter` layers, in turn, get a plan for it. Names are
    those of TensorRT-LLM, vLLM (`window_size`, `step_interval`) and SGLang where the meaning is
    theirs.
    """

    # K: layers looked at each time; 0: the placement stays as it is.
    layer_updates_per_iter: int = 0
    warm_up_iterations: int = 0  # counted, but without updates
    decay: float = 0.95
    # Plan for the last so many iterations instead of the fading load.
    window_size: int | None = None
    # With a window: where the measured imbalance has suddenly become more than so many times what
    # it was, the text is another, and the iterations before that are forgotten. None: never.
    change_factor: float | None = None
    # Look every so many iterations ...
    step_interval: int = 1
    # ... and only where balancedness, mean / max over the ranks, averaged over the layers and the
    # iterations since the last look, is below this.
    min_balancedness: float | None = None
    max_moves: int | None = None  # slots of a layer in one update; None: as many as help
    effort: str = "fast"  # of the planner
    # A move must pay for itself within so many iterations; None: all that lowers imbalance moves.
    horizon: int | None = None
    # What a token on a rank takes in one layer, and how fast weights move; None: measured.
    seconds_per_token: float | None = None
    bytes_per_second: float | None = None
    # Relative speed of each rank: 1 is that which seconds_per_token is of, 0 holds no expert; None:
    # all alike. `Balancer.set_capacity` changes it while the model serves.
    capacity: tuple[float, ...] | None = None
    # So many iterations lie between the last that a plan knows of and the dispatch of its moves,
    # and it is in force so many later. Who needs longer is waited for.
    planning_iterations: int = 2
    moving_iterations: int = 2
    # Whether a failure ends the run. If not it is logged, and the old placement serves on.
    stop_on_failure: bool = True

    def __post_init__(self):
        for name, least in (
            ("layer_updates_per_iter", 0),
            ("warm_up_iterations", 0),
            ("step_interval", 1),
            ("planning_iterations", 0),
            ("moving_iterations", 1),
        ):
            self._check_whole(name, least)
        for name in ("window_size", "max_moves", "horizon"):
            if getattr(self, name) is not None:
                self._check_whole(name, 1)
        if not 0 < self.decay < 1:
            raise ValueError(f"decay is {self.decay}; use a number between 0 and 1, as 0.95")
        if self.change_factor is not None:
            if self.window_size is None:
                raise ValueError("change_factor cuts the window short: give window_size, too")
            if not 1 < self.change_factor < math.inf:
                raise ValueError(
                    f"change_factor is {self.change_factor}; use a number above 1, as 2.0"
                )
        if self.min_balancedness is not None and not 0 < self.min_balancedness <= 1:
            raise ValueError(
                f"min_balancedness is {self.min_balancedness}; it is mean / max: use a number "
                "above 0, up to 1"
            )
        for rank, speed in enumerate(self.capacity or ()):
            if not 0 <= speed < math.inf:
                raise ValueError(f"capacity of rank {rank} is {speed}; use a number of 0 or more")
        if self.effort not in EFFORTS:
            raise ValueError(f"effort {self.effort!r} must be one of: {', '.join(EFFORTS)}")
        for name in ("seconds_per_token", "bytes_per_second"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; use a number above 0, or None to measure it")

    def _check_whole(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} is {value!r}; use an integer of {least} or more")
