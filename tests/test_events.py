"""Events: what is logged at which level, and what a file of them holds."""

import json
import logging

from jax_eplb.online import Failure, JsonLines, LayerUpdate, Look, Stall, StepSeen
from jax_eplb.online.events import as_dict, log_event

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
LOOK = Look(step=9, layers=(3, 5), changed=(3,), seconds=0.01)
QUIET = [Stall(1, 0.1), StepSeen(1, (0.5,), (3,), 100)]


def test_updates_and_failures_are_logged_as_json_and_what_each_step_brings_is_not(caplog):
    with caplog.at_level(logging.DEBUG, "jax_eplb.online"):
        for event in (UPDATE, FAILURE, LOOK, *QUIET):
            log_event(event)
    levels = [record.levelno for record in caplog.records]
    assert levels == [logging.INFO, logging.ERROR, logging.DEBUG]
    assert [json.loads(record.message)["event"] for record in caplog.records] == [
        "LayerUpdate",
        "Failure",
        "Look",
    ]
    assert json.loads(caplog.records[0].message) == as_dict(UPDATE)


def test_a_failure_is_seen_without_any_logging_set_up(caplog):
    log_event(FAILURE)
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


def test_a_file_has_a_line_for_each_update_and_failure_at_once(tmp_path):
    path = tmp_path / "events.jsonl"
    with JsonLines(path) as write:
        for event in (UPDATE, LOOK, FAILURE, *QUIET):
            write(event)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [json.loads(json.dumps(as_dict(event))) for event in (UPDATE, FAILURE)]
    assert lines[1] == {
        "event": "Failure",
        "step": 4,
        "stage": "planning",
        "layers": [3, 5],
        "error": "ValueError: no",
    }
