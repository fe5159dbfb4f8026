"""Router scores to experts, and experts to the slots of their replicas."""

from collections.abc import Callable

from jaxtyping import Array, Int

from jax_eplb.routing.balanced import balanced as balanced
from jax_eplb.routing.even import even as even
from jax_eplb.routing.fewest import fewest as fewest
from jax_eplb.routing.local import local as local
from jax_eplb.routing.losses import balance as balance
from jax_eplb.routing.losses import load_balancing_loss as load_balancing_loss
from jax_eplb.routing.losses import masked_mean as masked_mean
from jax_eplb.routing.losses import normalized_scores as normalized_scores
from jax_eplb.routing.losses import router_z_loss as router_z_loss
from jax_eplb.routing.losses import sequence_balance_loss as sequence_balance_loss
from jax_eplb.routing.losses import top_k_counts as top_k_counts
from jax_eplb.routing.losses import update_selection_bias as update_selection_bias
from jax_eplb.routing.ranks import Ranks as Ranks
from jax_eplb.routing.ranks import SlotTokens as SlotTokens
from jax_eplb.routing.router import RouterConfig as RouterConfig
from jax_eplb.routing.router import Routes as Routes
from jax_eplb.routing.router import route as route
from jax_eplb.routing.router import route_and_sort as route_and_sort
from jax_eplb.routing.slot_order import SlotOrder as SlotOrder
from jax_eplb.routing.slot_order import order_by_slot as order_by_slot
from jax_eplb.routing.slot_order import order_without_replicas as order_without_replicas
from jax_eplb.routing.slot_order import segment_of as segment_of
from jax_eplb.tables import PlacementTables

ReplicaChoice = Callable[[Int[Array, "E"], PlacementTables, Ranks], SlotTokens]
# How many choices go to each slot.
POLICIES: dict[str, ReplicaChoice] = {
    "even": even,
    "local": local,
    "balanced": balanced,
    "fewest": fewest,
}
# By the size of the batch: `fewest` or `balanced`.
REPLICA_CHOICES = (*POLICIES, "auto")


def split_of(replica_choice: str) -> str:
    """What plans for a replica choice are made for: "balanced" if it may divide by load, or "even".

    >>> [split_of(choice) for choice in ("even", "balanced", "fewest", "auto")]
    ['even', 'balanced', 'even', 'balanced']
    """
    return "balanced" if replica_choice in ("balanced", "auto") else "even"
