"""`jax-eplb run`: serve the user's own requests once, recording the load."""

import argparse
import contextlib
import dataclasses
import itertools
import json
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.progress import Progress

from jax_eplb.checkpoint import Checkpoints
from jax_eplb.commands.inputs import option_name
from jax_eplb.commands.kept_programs import keep_programs
from jax_eplb.commands.outputs import Outputs, open_outputs, read_rows
from jax_eplb.commands.processes import check_covered, is_first, joined
from jax_eplb.commands.progress import progress_bars
from jax_eplb.formats import load_layer_updates, load_placement, save_recording
from jax_eplb.load import Recorder, Recording
from jax_eplb.mesh import expert_mesh
from jax_eplb.models import DecoderConfig
from jax_eplb.models.weights import load_model
from jax_eplb.online import Balancer, BalancerConfig, JsonLines, Listener
from jax_eplb.online.digest import from_first_process
from jax_eplb.placement import Placement
from jax_eplb.report import build_report
from jax_eplb.serving import (
    Engine,
    Request,
    RunKeeper,
    RunResult,
    ServingConfig,
    Throughput,
    placement_to_begin_with,
    read_requests,
    read_run,
)


def run(arguments: argparse.Namespace) -> None:
    if not arguments.distributed:
        # Several processes must find the same programs, and who keeps them on a file system of
        # theirs only the user knows: by `JAX_COMPILATION_CACHE_DIR`.
        keep_programs()
    with joined(arguments):
        _serve_all(arguments)


def _serve_all(arguments: argparse.Namespace) -> None:
    if arguments.record is not None and is_first():
        arguments.record.parent.mkdir(parents=True, exist_ok=True)
    saved = load_model(arguments.model)
    requests = read_requests(
        arguments.dataset,
        vocab_size=saved.config.vocab_size,
        max_length=saved.config.max_length,
    )
    left = _still_to_serve(arguments, requests)
    balancer = _balancer(arguments)
    serving = ServingConfig(
        max_batch_size=arguments.max_batch_size,
        max_length=max(len(r.prompt) + r.output_length for r in requests),
        moe_max_num_tokens=arguments.moe_max_num_tokens,
        replica_choice=arguments.replica_choice or ("even" if balancer is None else "balanced"),
        temperature=arguments.temperature,
    )
    placement = _placement(arguments, saved.config)
    kept = None if arguments.checkpoint is None else read_run(arguments.checkpoint)
    if kept is not None:
        placement = placement_to_begin_with(kept, placement, serving.split)
    mesh = expert_mesh(arguments.ep_size)
    check_covered(mesh)
    start, stop = arguments.record_iters
    with contextlib.ExitStack() as open_files, progress_bars(shown=is_first()) as bars:
        engine = Engine(
            saved,
            mesh=mesh,
            placement=placement,
            serving=serving,
            dtype=activation_dtype(mesh),
            balancer=balancer,
            listeners=_listeners(arguments, open_files) if is_first() else (),
            kept=None if kept is None else kept.load,
        )
        outputs = None
        if arguments.output is not None and is_first():
            as_text = saved.config.vocab_size == 256
            opened = open_outputs(arguments.output, as_text=as_text, keep=arguments.resume)
            outputs = open_files.enter_context(opened)
        recorder = engine.recorder(start, stop)
        warm = list(itertools.islice(itertools.cycle(left), arguments.warmup))
        compile_steps(bars, engine, left + warm)
        if warm:
            serve(bars, "warming up", engine, warm)
        keeper = None
        if arguments.checkpoint is not None and engine.balancer is not None:
            checkpoints = open_files.enter_context(Checkpoints(arguments.checkpoint))
            keeper = RunKeeper(checkpoints, engine.balancer, arguments.checkpoint_interval)
        recorded_by = recorder if is_first() else None
        result = serve(bars, "serving", engine, left, recorded_by, outputs, keeper)
        if engine.balancer is not None:
            engine.balancer.flush()
        if keeper is not None:
            keeper.keep()
    if not is_first():
        return
    recording = recorder.recording()
    if arguments.record is not None:
        save_recording(recording, arguments.record)
    _print(result, recording, engine.balancer, arguments.json)


def compile_steps(bars: Progress, engine: Engine, requests: list[Request]) -> None:
    """Compile what serving the requests takes, so that no time measured contains it."""
    task = bars.add_task("compiling", total=1)
    engine.warm_up(requests)
    bars.update(task, completed=1)


def serve(
    bars: Progress,
    name: str,
    engine: Engine,
    requests: list[Request],
    recorder: Recorder | None = None,
    outputs: Outputs | None = None,
    keeper: RunKeeper | None = None,
) -> RunResult:
    """Serve the requests under a progress bar."""
    task = bars.add_task(name, total=len(requests))

    def note(index: int, tokens: np.ndarray) -> None:
        if outputs is not None:
            outputs.add(requests[index], tokens)
        bars.advance(task)

    def keep(_: int) -> None:
        if keeper is not None:
            keeper.keep_if_due()

    return engine.run(requests, recorder=recorder, on_finished=note, on_progress=keep)


def activation_dtype(mesh: Mesh):
    """float32 on CPU, where bfloat16 is emulated; bfloat16 elsewhere."""
    return jnp.float32 if mesh.devices.flat[0].platform == "cpu" else jnp.bfloat16


def _still_to_serve(arguments: argparse.Namespace, requests: list[Request]) -> list[Request]:
    """All requests, or with `--resume` those that the output does not have."""
    if not arguments.resume:
        return requests
    if arguments.output is None:
        raise ValueError("--resume goes on with an output: give --output FILE, too")
    done = read_rows(arguments.output) if is_first() else {}
    # Processes may not share the file.
    left = from_first_process(np.array([request.seed not in done for request in requests]))
    if not left.any():
        raise ValueError(f"{arguments.output} has all {len(requests)} requests: nothing to do")
    return [request for request, is_left in zip(requests, left, strict=True) if is_left]


def _placement(arguments: argparse.Namespace, config: DecoderConfig) -> Placement:
    if arguments.load_balancer is None:
        return Placement.default(
            num_experts=config.num_experts,
            num_ranks=arguments.ep_size,
            layer_ids=config.moe_layer_ids,
        )
    return load_placement(
        arguments.load_balancer,
        num_ranks=arguments.ep_size,
        num_experts=config.num_experts,
        layer_ids=config.moe_layer_ids,
    )


def _balancer(arguments: argparse.Namespace) -> BalancerConfig | None:
    """The balancer that the load balancer file asks for, as the options would have it."""
    names = ("window_size", "change_factor", "step_interval", "min_balancedness", "max_moves")
    names += ("horizon",)
    given = {name: getattr(arguments, name) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    updates = 0
    if arguments.load_balancer is not None:
        updates = load_layer_updates(arguments.load_balancer)
    if updates:
        return BalancerConfig(
            layer_updates_per_iter=updates,
            warm_up_iterations=arguments.balancer_warmup,
            **given,
        )
    others = ("events", "prometheus_port", "checkpoint")
    listening = [name for name in others if getattr(arguments, name) is not None]
    for name in (*given, *listening):
        raise ValueError(
            f"{option_name(name)} is for a placement that follows the load; give a "
            "--load-balancer file with layer_updates_per_iter above 0"
        )
    return None


def _listeners(arguments: argparse.Namespace, open_files: contextlib.ExitStack) -> list[Listener]:
    listeners: list[Listener] = []
    if arguments.events is not None:
        arguments.events.parent.mkdir(parents=True, exist_ok=True)
        listeners.append(open_files.enter_context(JsonLines(arguments.events)))
    if arguments.prometheus_port is not None:
        try:
            from jax_eplb.online import prometheus
        except ImportError as error:
            raise ValueError(f"--prometheus-port: {error}") from None
        open_files.enter_context(prometheus.served(arguments.prometheus_port))
        listeners.append(prometheus.BalancerMetrics())
    return listeners


def balancer_figures(balancer: Balancer) -> dict[str, float | int]:
    """What the balancer did, and how long it held the serving thread in a step."""
    held = np.quantile(balancer.stalls, [0.5, 0.99]) * 1e3
    return {
        "updates": balancer.updates,
        "moved_slots": balancer.moved_slots,
        "moved_bytes": balancer.moved_bytes,
        "failures": balancer.failures,
        "stall_ms_p50": float(held[0]),
        "stall_ms_p99": float(held[1]),
    }


def balancer_text(figures: Mapping[str, float | int]) -> str:
    return (
        f"{figures['updates']} updates of a layer moved {figures['moved_slots']} slots "
        f"({figures['moved_bytes'] / 1e6:.1f} MB); serving was held for "
        f"{figures['stall_ms_p50']:.2f} ms in a step (p99 {figures['stall_ms_p99']:.2f})"
    )


def _print(
    result: RunResult, recording: Recording, balancer: Balancer | None, as_json: bool
) -> None:
    report = build_report(recording)
    did = {} if balancer is None else {"balancer": balancer_figures(balancer)}
    if as_json:
        figures = dataclasses.asdict(result.throughput)
        print(json.dumps({"throughput": figures, "report": report.to_json(), **did}))
        return
    print(report.to_text())
    print()
    for figures in did.values():
        print(balancer_text(figures))
    print(throughput_text(result.throughput))


def throughput_text(figures: Throughput) -> str:
    return (
        f"{figures.requests} requests, {figures.output_tokens} output tokens in "
        f"{figures.seconds:.2f} s: {figures.requests_per_second:.1f} requests/s, "
        f"{figures.output_tokens_per_second:.0f} output tokens/s, latency "
        f"{figures.latency_mean:.2f} s (p50 {figures.latency_p50:.2f}, "
        f"p99 {figures.latency_p99:.2f})"
    )
