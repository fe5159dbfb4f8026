"""Weights and training states on disk, experts in expert order."""

from jax_eplb.checkpoint.training_state import TrainingCheckpoints as TrainingCheckpoints
from jax_eplb.checkpoint.weights import load_weights as load_weights
from jax_eplb.checkpoint.weights import save_weights as save_weights
