"""The simulator: whether balancing pays, and how, replayed from a recording on a laptop."""

from jax_eplb.simulate.costs import Costs as Costs
from jax_eplb.simulate.costs import costs_of as costs_of
from jax_eplb.simulate.costs import read_device as read_device
from jax_eplb.simulate.costs import read_model as read_model
from jax_eplb.simulate.policy import NONE as NONE
from jax_eplb.simulate.policy import ORACLE as ORACLE
from jax_eplb.simulate.policy import STATIC as STATIC
from jax_eplb.simulate.policy import Policy as Policy
from jax_eplb.simulate.policy import every as every
from jax_eplb.simulate.policy import online as online
from jax_eplb.simulate.policy import threshold as threshold
from jax_eplb.simulate.recommend import Advice as Advice
from jax_eplb.simulate.recommend import Recommendation as Recommendation
from jax_eplb.simulate.recommend import recommend as recommend
from jax_eplb.simulate.simulation import Outcome as Outcome
from jax_eplb.simulate.simulation import bound_of as bound_of
from jax_eplb.simulate.simulation import simulate as simulate
from jax_eplb.simulate.simulation import sweep as sweep
