"""Balancing while the model runs: the load is watched, a plan is made, and the weights move."""

from jax_eplb.online.balancer import Balancer as Balancer
from jax_eplb.online.config import BalancerConfig as BalancerConfig
from jax_eplb.online.errors import BalancerError as BalancerError
from jax_eplb.online.errors import DigestMismatch as DigestMismatch
from jax_eplb.online.events import CapacitySet as CapacitySet
from jax_eplb.online.events import Event as Event
from jax_eplb.online.events import Failure as Failure
from jax_eplb.online.events import JsonLines as JsonLines
from jax_eplb.online.events import LayerUpdate as LayerUpdate
from jax_eplb.online.events import Listener as Listener
from jax_eplb.online.events import Look as Look
from jax_eplb.online.events import Stall as Stall
from jax_eplb.online.events import StepSeen as StepSeen
from jax_eplb.online.state import BalancerState as BalancerState
from jax_eplb.online.state import kept_load as kept_load
from jax_eplb.online.worth import Costs as Costs
