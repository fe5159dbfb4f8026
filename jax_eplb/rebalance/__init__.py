"""Balancing while the model runs: the load is watched, a plan is made, and the weights move."""

from jax_eplb.moving import Moves as Moves
from jax_eplb.moving import Staged as Staged
from jax_eplb.moving import apply_moves as apply_moves
from jax_eplb.moving import find_banks as find_banks
from jax_eplb.moving import find_moves as find_moves
from jax_eplb.moving import is_ready as is_ready
from jax_eplb.moving import prepare_moves as prepare_moves
from jax_eplb.moving import rebalance as rebalance
from jax_eplb.moving import stage_moves as stage_moves
from jax_eplb.rebalance.balancer import Balancer as Balancer
from jax_eplb.rebalance.config import BalancerConfig as BalancerConfig
from jax_eplb.rebalance.errors import BalancerError as BalancerError
from jax_eplb.rebalance.errors import DigestMismatch as DigestMismatch
from jax_eplb.rebalance.events import Event as Event
from jax_eplb.rebalance.events import Failure as Failure
from jax_eplb.rebalance.events import JsonLines as JsonLines
from jax_eplb.rebalance.events import LayerUpdate as LayerUpdate
from jax_eplb.rebalance.events import Listener as Listener
from jax_eplb.rebalance.events import Look as Look
from jax_eplb.rebalance.events import Stall as Stall
from jax_eplb.rebalance.events import StepSeen as StepSeen
from jax_eplb.rebalance.state import BalancerState as BalancerState
from jax_eplb.rebalance.worth import Costs as Costs
