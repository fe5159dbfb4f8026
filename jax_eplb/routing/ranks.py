"""The ranks that a layer's experts are spread over, as replica choice and exchange see them."""

from typing import NamedTuple


class Ranks(NamedTuple):
    """A mesh axis and what stands along it; static."""

    axis_name: str
    num_ranks: int  # P
    slots_per_rank: int  # N
    ranks_per_node: int | None = None  # None: all on one node
