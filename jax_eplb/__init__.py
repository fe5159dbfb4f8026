"""Load balancing for Mixture-of-Experts models in JAX."""

from jax_eplb.load import Recording as Recording
from jax_eplb.load import count_experts as count_experts
from jax_eplb.moe import MoE as MoE
from jax_eplb.moe import MoEConfig as MoEConfig
from jax_eplb.moe.layer import expert_mesh as expert_mesh
from jax_eplb.placement import Placement as Placement
