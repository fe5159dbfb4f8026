"""Counters and gauges: what a scrape says after a few events."""

import builtins
import importlib
import sys
import urllib.request

import prometheus_client
import pytest

from jax_eplb.online.events import Look, Stall, StepSeen
from jax_eplb.online.prometheus import BalancerMetrics, served
from tests.test_events import FAILURE, UPDATE


@pytest.fixture
def registry():
    return prometheus_client.CollectorRegistry()


def test_events_are_counted_and_measured(registry):
    metrics = BalancerMetrics(registry)
    events = [StepSeen(0, (0.5, 0.1), (3, 4), 60), StepSeen(1, (0.25, 0.2), (3, 4), 40)]
    events += [Look(1, (3,), (3,), 0.02), UPDATE, UPDATE, FAILURE, Stall(1, 0.002), Stall(2, 0.2)]
    for event in events:
        metrics(event)

    def value(name, **labels):
        return registry.get_sample_value(f"jax_eplb_{name}", labels)

    assert value("steps_total") == 2
    assert value("tokens_total") == 100
    assert (value("imbalance", layer="3"), value("imbalance", layer="4")) == (0.25, 0.2)
    assert value("looks_total") == 1
    assert value("updates_total", layer="3") == 2
    assert value("moved_slots_total", layer="3") == 2 * UPDATE.moves
    assert value("moved_bytes_total") == 2 * UPDATE.bytes
    assert value("imbalance_expected", layer="3") == UPDATE.imbalance_expected
    assert value("last_update_step") == UPDATE.step
    assert value("failures_total", stage="planning") == 1
    assert value("stall_seconds_count") == 2
    assert value("stall_seconds_sum") == pytest.approx(0.202)
    assert value("stall_seconds_bucket", le="0.003") == 1
    assert value("planning_seconds_sum") == pytest.approx(0.02)


def test_every_name_has_help(registry):
    BalancerMetrics(registry)
    families = list(registry.collect())
    assert len(families) == 12
    assert all(family.documentation and family.name.startswith("jax_eplb_") for family in families)


def test_the_registry_is_served():
    with (
        served(0) as port,
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer,
    ):
        assert answer.status == 200


def test_without_the_extra_the_error_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "prometheus_client":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delitem(sys.modules, "jax_eplb.online.prometheus")
    with pytest.raises(ImportError, match=r"install jax-eplb\[prometheus\]"):
        importlib.import_module("jax_eplb.online.prometheus")
