"""Sizes: all that is static in a plan; another value of any compiles anew."""

from typing import NamedTuple

# Experts that may have several replicas, times ranks: so many numbers have the tables of a layer
# that the search for the balanced split goes through.
_MOST_PAIRS = 1 << 17


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

    def searched_split(self, num_experts: int) -> str:
        """The split that a search is for; of very many ranks always the even one.

        There the search for the balanced split takes a hundred times as long, and a placement that
        is good under the even split is as good under the balanced one: tokens shift from rank to
        rank in long chains, which the few steps of a division in a search do not follow.

        >>> sizes = Sizes(2000, 1000, "balanced", "default", "search", 1, 1, False)
        >>> sizes.searched_split(num_experts=1024)
        'even'
        """
        if (self.num_slots - num_experts) * self.num_ranks > _MOST_PAIRS:
            return "even"
        return self.split
