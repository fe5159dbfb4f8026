"""The planner: load in, placement out; pure, jitted, no I/O."""

from jax_eplb.planner.bound import lower_bound as lower_bound
from jax_eplb.planner.effort import EFFORTS as EFFORTS
from jax_eplb.planner.plan import Plan as Plan
from jax_eplb.planner.plan import frontier as frontier
from jax_eplb.planner.plan import plan as plan
