"""The sharded MoE layer: a functional core, and a Flax module around it."""

from jax_eplb.moe.config import MoEConfig as MoEConfig
from jax_eplb.moe.feed_forward import ExpertWeights as ExpertWeights
from jax_eplb.moe.feed_forward import SharedWeights as SharedWeights
from jax_eplb.moe.forward import MoEOutput as MoEOutput
from jax_eplb.moe.forward import MoEParams as MoEParams
from jax_eplb.moe.forward import moe_forward as moe_forward
from jax_eplb.moe.layer import MoE as MoE
from jax_eplb.moe.replica_gradients import tie_replicas as tie_replicas
