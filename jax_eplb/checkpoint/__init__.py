"""Weights and training states on disk, experts in expert order."""

from jax_eplb.checkpoint.checkpoints import Checkpoints as Checkpoints
from jax_eplb.checkpoint.checkpoints import Restored as Restored
from jax_eplb.checkpoint.checkpoints import restore as restore
from jax_eplb.checkpoint.weights import load_weights as load_weights
from jax_eplb.checkpoint.weights import save_weights as save_weights
