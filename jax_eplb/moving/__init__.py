"""From one placement to another: the moves that it takes, and the weights that follow them."""

from jax_eplb.moving.banks import Banks as Banks
from jax_eplb.moving.banks import find_banks as find_banks
from jax_eplb.moving.errors import RebalanceError as RebalanceError
from jax_eplb.moving.host_copy import HostCopy as HostCopy
from jax_eplb.moving.moves import Moves as Moves
from jax_eplb.moving.moves import find_moves as find_moves
from jax_eplb.moving.prepare import prepare_moves as prepare_moves
from jax_eplb.moving.rebalance import check_held as check_held
from jax_eplb.moving.rebalance import rebalance as rebalance
from jax_eplb.moving.reshard import reshard as reshard
from jax_eplb.moving.staging import RowSource as RowSource
from jax_eplb.moving.staging import Staged as Staged
from jax_eplb.moving.staging import apply_moves as apply_moves
from jax_eplb.moving.staging import is_ready as is_ready
from jax_eplb.moving.staging import stage_moves as stage_moves
