"""Router scores to experts, and experts to the slots of their replicas."""

from jax_eplb.routing.occurrence import occurrence as occurrence
from jax_eplb.routing.replicas import even as even
from jax_eplb.routing.router import Routes as Routes
from jax_eplb.routing.router import softmax_top_k as softmax_top_k
