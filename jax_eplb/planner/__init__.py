"""The planner: load in, placement out; pure, jitted, no I/O."""

from jax_eplb.planner.plan import Plan as Plan
from jax_eplb.planner.plan import plan as plan
