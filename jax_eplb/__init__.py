"""Load balancing for Mixture-of-Experts models in JAX."""

from jax_eplb.formats import load_placement as load_placement
from jax_eplb.formats import load_recording as load_recording
from jax_eplb.formats import save_placement as save_placement
from jax_eplb.formats import save_recording as save_recording
from jax_eplb.load import Recorder as Recorder
from jax_eplb.load import Recording as Recording
from jax_eplb.load import count_experts as count_experts
from jax_eplb.mesh import expert_mesh as expert_mesh
from jax_eplb.moe import MoE as MoE
from jax_eplb.moe import MoEConfig as MoEConfig
from jax_eplb.moving import HostCopy as HostCopy
from jax_eplb.moving import rebalance as rebalance
from jax_eplb.moving import reshard as reshard
from jax_eplb.placement import Placement as Placement
from jax_eplb.planner import Plan as Plan
from jax_eplb.planner import frontier as frontier
from jax_eplb.planner import plan as plan
from jax_eplb.routing import RouterConfig as RouterConfig
