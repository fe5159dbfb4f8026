"""The ranks that a layer's experts are spread over, as replica choice and exchange see them."""

from typing import NamedTuple


class Ranks(NamedTuple):
    """A mesh axis and what stands along it; static."""

    axis_name: str
    num_ranks: int  # P
    slots_per_rank: int  # N
    ranks_per_node: int | None = None  # None: all on one node
    # Whether a row that stays on its rank or node costs less than one that travels. Not where
    # buffers travel whole: then what one rank sends another should rather be alike for all pairs.
    prefers_near: bool = False
