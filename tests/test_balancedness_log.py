"""Balancedness read from logs, and the report of it."""

import json

import numpy as np
import pytest

from jax_eplb.formats.balancedness_log import load_balancedness
from tests.command_line import fail, succeed

# As `logger.info` of vllm/distributed/eplb/eplb_state.py has them, old and new.
VLLM = """\
INFO 08-22 03:12:30 [core.py:1] Initializing a V1 LLM engine
(EngineCore_DP0 pid=749) INFO 08-22 03:12:31 [eplb_state.py:494] Rearranged experts (profile) in 0.50 s.
(EngineCore_DP0 pid=749) INFO 08-22 03:12:31 [eplb_state.py:551] EPLB step: 7 for model Qwen/Qwen3: avg_tokens=10.00, max_tokens=40, balancedness=0.2500, steps until the next rearrangement: 3
(EngineCore_DP0 pid=749) INFO 08-22 03:12:32 [eplb_state.py:551] EPLB step: 8 for model Qwen/Qwen3: avg_tokens=30.00, max_tokens=60, balancedness=0.5000, steps until the next rearrangement: 2
(EngineCore_DP0 pid=749) INFO 08-22 03:12:32 [eplb_state.py:551] EPLB step: 8 for model draft: avg_tokens=8.00, max_tokens=10, balancedness=0.8000, steps until the next rearrangement: 2
(EngineCore_DP0 pid=749) INFO 08-22 03:12:33 [eplb_state.py:600] Rearranged experts   in 1.25 s.
(EngineCore_DP0 pid=749) INFO 08-22 03:12:34 [eplb_state.py:551] EPLB step: 0 for model Qwen/Qwen3: avg_tokens=90.00, max_tokens=100, balancedness=0.9000, steps until the next rearrangement: 10
"""  # noqa: E501
OLD_VLLM = "INFO EPLB step: avg_tokens=512.50, max_tokens=1025, balancedness=0.5000\n"
SGLANG = """\
[2026-08-01 12:00:00 TP0] [Expert Balancedness] forward_pass_id=41 current_pass_balancedness=0.543 \
last_10_average_balancedness=0.610 last_100_average_balancedness=0.610 gpu_physical_count_sum=4096
[2026-08-01 12:00:01 TP0] [Expert Balancedness] forward_pass_id=42 current_pass_balancedness=0.75 \
last_10_average_balancedness=0.610 gpu_physical_count_sum=8
"""


def test_vllms_lines_are_read_by_model(tmp_path):
    (tmp_path / "a.log").write_text(VLLM)
    main, draft = load_balancedness(tmp_path / "a.log")
    assert (main.model, draft.model) == ("Qwen/Qwen3", "draft")
    assert main.steps.tolist() == [7, 8, 0]
    assert main.balancedness.tolist() == [0.25, 0.5, 0.9]
    assert main.by_tokens == pytest.approx(130 / 200)
    assert (main.rearranged, main.seconds) == ((2,), (1.25,))
    assert (draft.steps.tolist(), draft.rearranged) == ([8], (1,))


def test_lines_without_step_or_tokens_are_read(tmp_path):
    (tmp_path / "a.log").write_text(OLD_VLLM)
    (old,) = load_balancedness(tmp_path / "a.log")
    assert (old.model, old.steps.tolist(), old.by_tokens) == ("", [-1], 0.5)
    (tmp_path / "b.log").write_text(SGLANG)
    (sglang,) = load_balancedness(tmp_path / "b.log")
    assert sglang.steps.tolist() == [41, 42]
    assert sglang.balancedness.tolist() == [0.543, 0.75]
    assert np.isnan(sglang.by_tokens)


def test_any_bytes_are_passed_over(tmp_path):
    (tmp_path / "a.log").write_bytes(
        b"\xff\xfe" + b"x" * 200_000 + b"\nEPLB step: avg_tokens=1e9999, max_tokens=1\n"
        b"EPLB step: avg_tokens=1, max_tokens=" + b"9" * 5000 + b", balancedness=0.5\n\0\n"
    )
    assert load_balancedness(tmp_path / "a.log") == []
    with pytest.raises(ValueError, match="gone: no such file"):
        load_balancedness(tmp_path / "gone")


def test_the_report_shows_it_over_time(capsys, tmp_path):
    lines = [VLLM] * 10
    (tmp_path / "a.log").write_text("".join(lines))
    text = succeed(capsys, "report", tmp_path / "a.log")
    assert "0 - 2          0.5500  0.2500" in text
    assert "all            0.5500  0.2500" in text
    assert "weighted by tokens 0.6500: the ranks wait 35.0% of the time" in text
    assert "10 rearrangements, 12.50 s, after lines 2, 5, 8" in text
    report = json.loads(succeed(capsys, "report", tmp_path / "a.log", "--json"))
    figures = report["models"][0]
    assert (figures["model"], figures["lines"]) == ("Qwen/Qwen3", 30)
    assert figures["balancedness"] == pytest.approx(0.55)
    assert figures["balancedness_by_tokens"] == pytest.approx(0.65)
    assert figures["over_time"][:3] == [0.25, 0.5, 0.9]


def test_sglangs_report_has_no_tokens(capsys, tmp_path):
    (tmp_path / "server.log").write_text(SGLANG)
    text = succeed(capsys, "report", tmp_path / "server.log")
    assert "all            0.6465  0.5430" in text
    assert "weighted" not in text
    report = json.loads(succeed(capsys, "report", tmp_path / "server.log", "--json"))
    assert report["models"][0]["balancedness_by_tokens"] is None


def test_a_log_without_such_lines_is_no_recording(capsys, tmp_path):
    (tmp_path / "a.log").write_text("INFO nothing here\n")
    assert "unknown format '.log'" in fail(capsys, "report", tmp_path / "a.log")
    (tmp_path / "b.log").write_text(SGLANG)
    error = fail(capsys, "report", tmp_path / "b.log", "--ep-size", 4)
    assert "b.log: a log, which --ep-size cannot use" in error
