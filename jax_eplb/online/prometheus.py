"""The balancer's figures for Prometheus; needs the extra `prometheus`.

metrics = BalancerMetrics()
prometheus_client.start_http_server(9100)
engine = Engine(..., balancer=config, listeners=[metrics])
"""

import contextlib
from collections.abc import Iterator
from typing import Any

try:
    import prometheus_client
except ImportError as error:
    raise ImportError("prometheus_client is not installed; install jax-eplb[prometheus]") from error

from jax_eplb.online.events import Event, Failure, LayerUpdate, Look, Stall, StepSeen

_SECONDS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1, 3)


@contextlib.contextmanager
def served(port: int) -> Iterator[int]:
    """Serve the global registry at `/metrics` while the block runs; yields the port."""
    server, thread = prometheus_client.start_http_server(port)
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class BalancerMetrics:
    """A listener that keeps counters, gauges and histograms in a registry (default: the global)."""

    def __init__(self, registry: Any = None):
        registry = prometheus_client.REGISTRY if registry is None else registry

        def make(kind: type, name: str, text: str, labels: tuple[str, ...] = (), **options) -> Any:
            return kind(f"jax_eplb_{name}", text, labels, registry=registry, **options)

        counter, gauge = prometheus_client.Counter, prometheus_client.Gauge
        histogram, layer = prometheus_client.Histogram, ("layer",)
        self._steps = make(counter, "steps", "Iterations whose counts were read")
        self._tokens = make(counter, "tokens", "Choices of experts computed, all layers and ranks")
        self._looks = make(counter, "looks", "Times that layers were looked at for a better plan")
        self._updates = make(counter, "updates", "Changes of a layer's placement", layer)
        self._slots = make(counter, "moved_slots", "Slots whose expert was changed", layer)
        self._bytes = make(counter, "moved_bytes", "Bytes of expert weights moved")
        self._failures = make(
            counter, "failures", "Failures of the balancer, by what failed", ("stage",)
        )
        self._imbalance = make(
            gauge,
            "imbalance",
            "(max - mean) / mean of the ranks' tokens in the last iteration read",
            layer,
        )
        self._expected = make(
            gauge, "imbalance_expected", "What the layer's last plan expected, of its load", layer
        )
        self._last = make(gauge, "last_update_step", "First iteration of the newest placement")
        self._stall = make(
            histogram,
            "stall_seconds",
            "Time between two steps that the balancer held the serving thread",
            buckets=_SECONDS,
        )
        self._planning = make(
            histogram,
            "planning_seconds",
            "Time of the worker for one look, plan included",
            buckets=_SECONDS,
        )

    def __call__(self, event: Event) -> None:
        match event:
            case StepSeen():
                self._steps.inc()
                self._tokens.inc(event.tokens)
                for layer, value in zip(event.layers, event.imbalance, strict=True):
                    self._imbalance.labels(layer).set(value)
            case Look():
                self._looks.inc()
                self._planning.observe(event.seconds)
            case LayerUpdate():
                self._updates.labels(event.layer).inc()
                self._slots.labels(event.layer).inc(event.moves)
                self._bytes.inc(event.bytes)
                self._expected.labels(event.layer).set(event.imbalance_expected)
                self._last.set(event.step)
            case Failure():
                self._failures.labels(event.stage).inc()
            case Stall():
                self._stall.observe(event.seconds)
