"""`jax-eplb run`: serve the user's own requests once, recording the load."""

import argparse
import contextlib
import dataclasses
import itertools
import json
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.progress import Progress

from jax_eplb.commands.progress import progress_bars
from jax_eplb.formats import load_placement, save_recording
from jax_eplb.formats.tensorrt_llm import load_layer_updates
from jax_eplb.load import Recorder, Recording
from jax_eplb.mesh import expert_mesh, simulate_devices
from jax_eplb.models import DecoderConfig
from jax_eplb.models.weights import load_model
from jax_eplb.online import Balancer, BalancerConfig, JsonLines, Listener
from jax_eplb.placement import Placement
from jax_eplb.report import build_report
from jax_eplb.serving import Engine, Request, RunResult, ServingConfig, Throughput, read_requests


def run(arguments: argparse.Namespace) -> None:
    for path in (arguments.record, arguments.output):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    simulate_devices(arguments.ep_size)
    saved = load_model(arguments.model)
    requests = read_requests(
        arguments.dataset,
        vocab_size=saved.config.vocab_size,
        max_length=saved.config.max_length,
    )
    balancer = _balancer(arguments)
    serving = ServingConfig(
        max_batch_size=arguments.max_batch_size,
        max_length=max(len(r.prompt) + r.output_length for r in requests),
        moe_max_num_tokens=arguments.moe_max_num_tokens,
        replica_choice=arguments.replica_choice or ("even" if balancer is None else "balanced"),
        temperature=arguments.temperature,
    )
    placement = _placement(arguments, saved.config)
    mesh = expert_mesh(arguments.ep_size)
    start, stop = arguments.record_iters
    with contextlib.ExitStack() as open_files, progress_bars() as bars:
        engine = Engine(
            saved,
            mesh=mesh,
            placement=placement,
            serving=serving,
            dtype=activation_dtype(mesh),
            balancer=balancer,
            listeners=_listeners(arguments, open_files),
        )
        recorder = engine.recorder(start, stop)
        warm = list(itertools.islice(itertools.cycle(requests), arguments.warmup))
        compile_steps(bars, engine, requests + warm)
        if warm:
            serve(bars, "warming up", engine, warm)
        result = serve(bars, "serving", engine, requests, recorder)
        if engine.balancer is not None:
            engine.balancer.flush()
    if arguments.output is not None:
        as_text = saved.config.vocab_size == 256
        _write_outputs(arguments.output, requests, result, as_text)
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
) -> RunResult:
    """Serve the requests under a progress bar."""
    task = bars.add_task(name, total=len(requests))
    return engine.run(
        requests,
        recorder=recorder,
        on_progress=lambda done: bars.update(task, completed=done),
    )


def activation_dtype(mesh: Mesh):
    """float32 on CPU, where bfloat16 is emulated; bfloat16 elsewhere."""
    return jnp.float32 if mesh.devices.flat[0].platform == "cpu" else jnp.bfloat16


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
    listening = [n for n in ("events", "prometheus_port") if getattr(arguments, n) is not None]
    for name in (*given, *listening):
        raise ValueError(
            f"--{name.replace('_', '-')} is for a placement that follows the load; give a "
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


def _write_outputs(path: Path, requests: list[Request], result: RunResult, as_text: bool) -> None:
    """One JSON object a request: the token ids written, and their text if they are bytes."""
    with path.open("w", encoding="utf-8") as file:
        for request, output in zip(requests, result.outputs, strict=True):
            row = {"line": request.seed, "token_ids": output.tolist()}
            if as_text:
                row["text"] = output.astype(np.uint8).tobytes().decode(errors="replace")
            file.write(json.dumps(row) + "\n")


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
