"""Policy: when to plan, from what, and how many slots a plan may change."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Policy:
    """Left alone: a static plan, made once from the windows known when scoring begins.

    A plan for window t knows the windows before t. What it is made for is their fading sum, as in
    `BalancerConfig`; it starts from the placement in force.
    """

    planned: bool = True  # False: the initial layout for good
    interval: int | None = None  # windows from one plan to the next; None: no second plan
    decay: float = 1.0  # what a window counts less with each one that follows
    max_moves: int | None = None  # slots of a layer in one plan after the first; None: all
    # Plan only where the window before had more imbalance than this, mean over the layers.
    threshold: float = 0.0
    # Plan for window t from window t itself: what no policy can know.
    foresight: bool = False

    def __post_init__(self):
        for name in ("interval", "max_moves"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} is {value!r}; use an integer of 1 or more, or None")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay is {self.decay}; use a number above 0, up to 1")
        if not 0 <= self.threshold < math.inf:
            raise ValueError(f"threshold is {self.threshold}; use an imbalance of 0 or more")
        if not self.planned and (self.interval is not None or self.foresight):
            raise ValueError("planned is False, the initial layout for good: leave the rest out")

    @property
    def follows(self) -> bool:
        """Whether there is more than one plan."""
        return self.interval is not None

    def describe(self) -> str:
        """In a few words, for tables.

        >>> Policy(interval=4, decay=0.8, max_moves=8).describe()
        'every 4 windows, decay 0.8, 8 moves'
        """
        if not self.planned:
            return "none"
        if self.foresight:
            return "oracle"
        if self.interval is None:
            return "static"
        words = ["every window" if self.interval == 1 else f"every {self.interval} windows"]
        if self.threshold:
            words.append(f"above {self.threshold:g}")
        if self.decay < 1:
            words.append(f"decay {self.decay:g}")
        if self.max_moves is not None:
            words.append(f"{self.max_moves} moves")
        return ", ".join(words)


NONE = Policy(planned=False)
STATIC = Policy()
ORACLE = Policy(interval=1, foresight=True)


def every(windows: int) -> Policy:
    """A plan every so many windows, from all that is known, with as many moves as help."""
    return Policy(interval=windows)


def threshold(imbalance: float, decay: float = 0.8) -> Policy:
    """A plan after each window with more imbalance than this."""
    return Policy(interval=1, threshold=imbalance, decay=decay)


def online(decay: float = 0.95, max_moves: int | None = None, interval: int = 1) -> Policy:
    """What the balancer does: few moves, for a load that fades."""
    return Policy(interval=interval, decay=decay, max_moves=max_moves)
