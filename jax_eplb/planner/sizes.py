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

    def least(self, num_experts: int) -> int:
        """Replicas of every expert: two, for two nodes, where there are slots enough."""
        return 2 if self.spread and self.num_slots >= 2 * num_experts else 1
