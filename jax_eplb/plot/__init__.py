"""Every picture but the simulator's: one function each, which returns the figure."""

from jax_eplb.plot.heat_maps import tokens_by_iteration as tokens_by_iteration
from jax_eplb.plot.heat_maps import tokens_by_layer as tokens_by_layer
from jax_eplb.plot.imbalance import before_after as before_after
from jax_eplb.plot.imbalance import imbalance_by as imbalance_by
from jax_eplb.plot.imbalance import imbalance_by_iteration as imbalance_by_iteration
from jax_eplb.plot.imbalance import tokens_per_rank as tokens_per_rank
from jax_eplb.plot.placement import experts_by_slot as experts_by_slot
from jax_eplb.plot.recording import recording_figures as recording_figures
from jax_eplb.plot.style import save_figures as save_figures
