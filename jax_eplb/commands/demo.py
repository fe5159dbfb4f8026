"""`jax-eplb demo`: run, record, report, plan, run balanced, report; on the embedded model.

The plan is made from the first half of the embedded held-out text; both runs that are compared
serve the second half, which the plan has not seen. Plan and layer divide each batch among replicas
so that the fullest rank is lightest; what dealing in turn would leave is told beside it.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jax_eplb.commands.kept_programs import keep_programs
from jax_eplb.commands.progress import progress_bars
from jax_eplb.commands.run import activation_dtype, compile_steps, serve, throughput_text
from jax_eplb.commands.sample_text import sample_requests
from jax_eplb.formats import save_placement, save_recording
from jax_eplb.load import Recording
from jax_eplb.mesh import expert_mesh, simulate_devices
from jax_eplb.models.weights import load_decoder
from jax_eplb.placement import Placement, check_sizes
from jax_eplb.planner import plan
from jax_eplb.plot import before_after, recording_figures, save_figures
from jax_eplb.report import Report, build_report, rank_tokens
from jax_eplb.serving import Engine, Request, RunResult, ServingConfig

PROMPT_BYTES = 128
OUTPUT_TOKENS = 32
# The prompts of so many sequences make an iteration of 64 × 128 = 8,192 tokens, enough that chance
# does not hide the skew. Steps that write one token per sequence have 64 tokens: they are recorded
# too, but figures are taken where there are at least MIN_TOKENS.
SEQUENCES = 64
MIN_TOKENS = 4096


class Leg(NamedTuple):
    """One run of the engine."""

    result: RunResult
    recording: Recording

    def large(self) -> Recording:
        return self.recording.with_at_least(MIN_TOKENS)


def run(arguments: argparse.Namespace) -> None:
    keep_programs()
    if arguments.online:
        # Imported late, as commands are.
        from jax_eplb.commands import demo_online

        demo_online.run(arguments)
        return
    if arguments.num_slots is None:
        arguments.num_slots = 80
    arguments.out.mkdir(parents=True, exist_ok=True)
    simulate_devices(arguments.ep_size)
    mesh = expert_mesh(arguments.ep_size)
    saved = load_decoder()
    config = saved.config
    check_sizes(config.num_experts, arguments.num_slots, arguments.ep_size)
    per_rank = -(-SEQUENCES // arguments.ep_size)
    sequences = arguments.ep_size * per_rank
    history, held_out = (
        sample_requests(
            half,
            sequences * arguments.batches,
            prompt_bytes=PROMPT_BYTES,
            output_tokens=OUTPUT_TOKENS,
        )
        for half in ("first", "second")
    )
    serving = ServingConfig(
        max_batch_size=per_rank,
        max_prompts_per_step=per_rank,
        max_length=PROMPT_BYTES + OUTPUT_TOKENS,
        replica_choice="balanced",
    )
    default = Placement.default(
        num_experts=config.num_experts,
        num_ranks=arguments.ep_size,
        layer_ids=config.moe_layer_ids,
    )

    with progress_bars() as bars:

        def engine(placement: Placement) -> Engine:
            made = Engine(
                saved, mesh=mesh, placement=placement, serving=serving, dtype=activation_dtype(mesh)
            )
            compile_steps(bars, made, held_out)
            return made

        def leg(name: str, engine: Engine, requests: list[Request]) -> Leg:
            recorder = engine.recorder()
            result = serve(bars, name, engine, requests, recorder)
            return Leg(result, recorder.recording())

        unbalanced = engine(default)
        recorded = leg("text to plan from", unbalanced, history)
        planned, in_turn = (
            plan(
                # Steps of few tokens are mostly chance.
                recorded.large().expert_counts(),
                num_slots=arguments.num_slots,
                num_ranks=arguments.ep_size,
                layer_ids=config.moe_layer_ids,
                split=split,
            )
            for split in ("balanced", "even")
        )
        before = leg("held-out text, unbalanced", unbalanced, held_out)
        balanced = engine(planned.placement)
        after = leg("held-out text, balanced", balanced, held_out)

    compared = _compare(before, after, planned.placement, in_turn.placement)
    files = _write(arguments.out, recorded, planned.placement, compared)
    if arguments.json:
        print(json.dumps(compared.figures))
    else:
        print(_summary(compared, held_out[0], mesh.devices.flat[0].platform == "cpu"))
        print(f"In {arguments.out}: " + ", ".join(str(f.relative_to(arguments.out)) for f in files))
    if not compared.figures["identical_output"]:
        raise ValueError("the balanced run wrote other tokens than the unbalanced one")


class _Comparison(NamedTuple):
    """Both runs on the held-out text, and what they come to."""

    before: Leg
    after: Leg
    reports: tuple[Report, Report]
    figures: dict[str, Any]


def _compare(before: Leg, after: Leg, placement: Placement, in_turn: Placement) -> _Comparison:
    reports = build_report(before.large()), build_report(after.large())
    outputs = zip(before.result.outputs, after.result.outputs, strict=True)
    iterations = reports[0].iterations
    dealt_in_turn = build_report(before.large(), placement=in_turn)
    figures = {
        "imbalance_before": reports[0].summary.average.imbalance,
        "imbalance_after": reports[1].summary.average.imbalance,
        # Of the plan made for it, on the same choices of experts.
        "imbalance_in_turn": dealt_in_turn.summary.average.imbalance,
        "imbalance_chance": reports[0].chance,
        "identical_output": all(np.array_equal(a, b) for a, b in outputs),
        "ranks": placement.num_ranks,
        "experts": placement.num_experts,
        "slots": placement.num_slots,
        "iterations_compared": iterations,
        "tokens_per_iteration": reports[0].tokens // iterations,
    }
    for name, leg in (("before", before), ("after", after)):
        for field, value in dataclasses.asdict(leg.result.throughput).items():
            figures[f"{field}_{name}"] = value
    return _Comparison(before, after, reports, figures)


def _write(out: Path, recorded: Leg, placement: Placement, compared: _Comparison) -> list[Path]:
    """Leave recordings, plan, tables and pictures in `out`."""
    legs = {"": recorded, "_before": compared.before, "_after": compared.after}
    files = []
    for name, leg in legs.items():
        files.append(out / f"recording{name}.npz")
        save_recording(leg.recording, files[-1])
    files.append(out / "plan.yaml")
    save_placement(placement, files[-1])
    tables = dict(zip(("before", "after"), (r.to_json() for r in compared.reports), strict=True))
    files.append(out / "report.json")
    files[-1].write_text(json.dumps({**tables, **compared.figures}, indent=1) + "\n")
    balance = before_after(
        rank_tokens(compared.before.large()),
        rank_tokens(compared.after.large()),
        recorded.recording.layer_ids,
        chance=compared.reports[0].chance,
    )
    files += save_figures(out, {"balance": balance})
    figures = recording_figures(recorded.large(), placement=placement)
    return files + save_figures(out / "recording", figures)


def _summary(compared: _Comparison, request: Request, simulated: bool) -> str:
    before, after, (report_before, report_after), figures = compared
    left = figures["imbalance_after"]
    note = ""
    if simulated:
        note = (
            "\n(The devices are simulated and share this machine's cores, which are busy either "
            "way:\nwhat balance gains in speed shows on devices of their own.)"
        )
    same = "identical" if figures["identical_output"] else "NOT identical"
    prompt = request.prompt.astype(np.uint8).tobytes()[-48:].decode(errors="replace")
    output = after.result.outputs[0].astype(np.uint8).tobytes().decode(errors="replace")
    return f"""
Unbalanced, {figures["experts"]} experts on {figures["ranks"]} devices:
{report_before.to_text()}

Balanced, {figures["slots"]} slots, planned from other text:
{report_after.to_text()}

Imbalance {figures["imbalance_before"]:.3f} -> {left:.3f}, over \
{figures["iterations_compared"]} iterations of {figures["tokens_per_iteration"]} tokens.
With the replicas in turn, and a plan for that, it would be {figures["imbalance_in_turn"]:.3f}; \
chance alone leaves {figures["imbalance_chance"]:.3f} there.
Generated tokens: {same}.
Unbalanced: {throughput_text(before.result.throughput)}
Balanced:   {throughput_text(after.result.throughput)}{note}

…{prompt!r} continues as {output!r}
"""
