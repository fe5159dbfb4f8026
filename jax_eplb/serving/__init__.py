"""The inference loop: requests in, tokens and figures out."""

from jax_eplb.serving.engine import Engine as Engine
from jax_eplb.serving.engine import RunResult as RunResult
from jax_eplb.serving.engine import ServingConfig as ServingConfig
from jax_eplb.serving.kept_runs import RunKeeper as RunKeeper
from jax_eplb.serving.kept_runs import keep_run as keep_run
from jax_eplb.serving.kept_runs import placement_to_begin_with as placement_to_begin_with
from jax_eplb.serving.kept_runs import read_run as read_run
from jax_eplb.serving.request import Request as Request
from jax_eplb.serving.request import read_requests as read_requests
from jax_eplb.serving.schedule import Throughput as Throughput
