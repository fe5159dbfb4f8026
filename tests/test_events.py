"""Events: what is logged at which level, and what a file of them holds."""

import json
import logging
from pathlib import Path

import pytest

from jax_eplb.online import CapacitySet, Failure, JsonLines, LayerUpdate, Look, Stall, StepSeen
from jax_eplb.online.events import Tell, as_dict, log_event

UPDATE = LayerUpdate(
    step=12,
    decided_at=9,
    layer=3,
    moves=2,
    bytes=2048,
    imbalance_before=0.5,
    imbalance_after=None,
    planned_before=0.4,
    imbalance_expected=0.1,
    seconds_saved=1e-5,
    seconds_to_move=1e-3,
    seconds_to_plan=0.01,
    seconds_in_flight=0.002,
)
FAILURE = Failure(step=4, stage="planning", layers=(3, 5), error="ValueError: no")
SPEEDS = CapacitySet(step=5, capacity=(1.0, 0.0), lost_ranks=(1,))
LOOK = Look(step=9, layers=(3, 5), changed=(3,), seconds=0.01)
QUIET = [Stall(1, 0.1), StepSeen(1, (0.5,), (3,), 100)]


def test_updates_and_failures_are_logged_as_json_and_what_each_step_brings_is_not(caplog):
    with caplog.at_level(logging.DEBUG, "jax_eplb.online"):
        for event in (UPDATE, FAILURE, LOOK, SPEEDS, *QUIET):
            log_event(event)
    levels = [record.levelno for record in caplog.records]
    assert levels == [logging.INFO, logging.ERROR, logging.DEBUG, logging.WARNING]
    assert [json.loads(record.message)["event"] for record in caplog.records] == [
        "LayerUpdate",
        "Failure",
        "Look",
        "CapacitySet",
    ]
    assert json.loads(caplog.records[0].message) == as_dict(UPDATE)


def test_a_failure_is_seen_without_any_logging_set_up(caplog):
    log_event(FAILURE)
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


def test_a_file_has_a_line_for_each_update_failure_and_change_of_speeds_at_once(tmp_path):
    path = tmp_path / "events.jsonl"
    with JsonLines(path) as write:
        for event in (UPDATE, LOOK, FAILURE, *QUIET, SPEEDS):
            write(event)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [json.loads(json.dumps(as_dict(event))) for event in (UPDATE, FAILURE, SPEEDS)]
    assert lines[1] == {
        "event": "Failure",
        "step": 4,
        "stage": "planning",
        "layers": [3, 5],
        "error": "ValueError: no",
    }


def test_a_listener_that_fails_is_left_out_and_the_others_hear_of_it(caplog):
    heard, tried = [], []

    def broken(event):
        tried.append(event)
        raise OSError("No space left on device")

    tell = Tell((log_event, broken, heard.append))
    with caplog.at_level(logging.ERROR):
        tell(UPDATE)
        tell(UPDATE)
    assert tried == [UPDATE]
    failure = heard[1]
    assert heard == [UPDATE, failure, UPDATE]
    assert (failure.step, failure.stage) == (UPDATE.step, "listener")
    assert "broken" in failure.error
    assert "OSError: No space left on device" in failure.error
    assert any("No space left" in record.message for record in caplog.records)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's device that is full")
def test_a_full_disk_ends_the_log_and_nothing_else(caplog):
    heard = []
    with JsonLines("/dev/full") as write:
        tell = Tell((write, heard.append))
        tell(UPDATE)
        tell(UPDATE)
    assert [type(event) for event in heard] == [LayerUpdate, Failure, LayerUpdate]
    assert "JsonLines('/dev/full') is told nothing more: OSError: [Errno 28]" in heard[1].error
