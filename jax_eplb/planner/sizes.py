"""Sizes: all that is static in a plan; another value of any compiles anew."""

from typing import NamedTuple


class Sizes(NamedTuple):
    """The arguments of `plan` that are not traced."""

    num_slots: int
    num_ranks: int
    split: str
    effort: str
    method: str
    num_nodes: int
    num_groups: int
    spread: bool
