"""The inference loop: requests in, tokens and figures out."""

from jax_eplb.serving.engine import Engine as Engine
from jax_eplb.serving.engine import RunResult as RunResult
from jax_eplb.serving.engine import ServingConfig as ServingConfig
from jax_eplb.serving.request import Request as Request
from jax_eplb.serving.request import read_requests as read_requests
from jax_eplb.serving.schedule import Throughput as Throughput
