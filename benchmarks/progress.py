"""What a long benchmark is doing, on standard error."""

import sys
import time

import jax

_BEGUN = time.perf_counter()


def say(doing: str) -> None:
    """A line with the seconds since the start; of several processes the first one speaks."""
    if jax.process_index() == 0:
        print(f"{time.perf_counter() - _BEGUN:6.1f} s  {doing}", file=sys.stderr, flush=True)
