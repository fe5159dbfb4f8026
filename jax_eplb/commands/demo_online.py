"""`jax-eplb demo --online`: text whose kind changes half-way, and a placement that follows.

Three placements meet the same tokens: a static one, planned from other text of the first kind; the
balancer's, which starts from that; and an oracle's, planned anew in every iteration from the ten
before it, and in force at once and for nothing. The run is also made without any balancing, and its
outputs must be the same.

Axes: W iterations, L layers, E experts, S slots, P ranks.
"""

import argparse
import contextlib
import functools
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_eplb import metrics
from jax_eplb.commands.progress import progress_bars
from jax_eplb.commands.run import (
    activation_dtype,
    balancer_figures,
    balancer_text,
    compile_steps,
    serve,
)
from jax_eplb.commands.sample_text import sample_requests
from jax_eplb.formats import save_placement, save_recording
from jax_eplb.load import Recording
from jax_eplb.mesh import expert_mesh, simulate_devices
from jax_eplb.models.weights import load_decoder
from jax_eplb.online import BalancerConfig, Event, JsonLines, LayerUpdate
from jax_eplb.placement import Placement, check_sizes
from jax_eplb.planner import plan
from jax_eplb.plot import imbalance_by_iteration, save_figures
from jax_eplb.report import rank_tokens
from jax_eplb.routing import Ranks
from jax_eplb.routing.balanced import balanced_shares
from jax_eplb.serving import Engine, Request, ServingConfig
from jax_eplb.tables import derive_tables

FIRST, SECOND = "python", "bible"
# A batch of sequences makes one iteration of prompts, then one for each further token of all.
PROMPT_BYTES, OUTPUT_TOKENS, SEQUENCES = 16, 24, 128
TEMPERATURE = 0.7
HISTORY_BATCHES = 4
CONFIG = BalancerConfig(layer_updates_per_iter=2, window_size=32, change_factor=2.0)
ORACLE_ITERATIONS = 10
_TOGETHER = 32  # iterations replayed by one program


class _Online(NamedTuple):
    """The run that the balancer had its hands in."""

    outputs: list[np.ndarray]
    recording: Recording
    updates: list[LayerUpdate]
    compiled: list[str]
    figures: dict[str, Any]


def run(arguments: argparse.Namespace) -> None:
    arguments.out.mkdir(parents=True, exist_ok=True)
    num_ranks, num_slots = arguments.ep_size, arguments.num_slots or 72
    simulate_devices(num_ranks)
    mesh = expert_mesh(num_ranks)
    saved = load_decoder()
    config = saved.config
    check_sizes(config.num_experts, num_slots, num_ranks)
    per_rank = -(-SEQUENCES // num_ranks)
    batches = -(-arguments.iterations // (2 * OUTPUT_TOKENS))  # of each kind
    sample = functools.partial(
        sample_requests, prompt_bytes=PROMPT_BYTES, output_tokens=OUTPUT_TOKENS
    )
    size = num_ranks * per_rank
    history = sample("first", HISTORY_BATCHES * size, kinds=[FIRST])
    requests = sample("second", batches * size, kinds=[FIRST])
    requests += sample("second", batches * size, kinds=[SECOND], first_seed=len(requests))
    serving = ServingConfig(
        max_batch_size=per_rank,
        max_prompts_per_step=per_rank,
        max_length=PROMPT_BYTES + OUTPUT_TOKENS,
        replica_choice="balanced",
        temperature=TEMPERATURE,
    )
    default = Placement.default(
        num_experts=config.num_experts, num_ranks=num_ranks, layer_ids=config.moe_layer_ids
    )
    make = functools.partial(
        Engine, saved, mesh=mesh, serving=serving, dtype=activation_dtype(mesh)
    )

    with progress_bars() as bars:
        unbalanced = make(placement=default)
        compile_steps(bars, unbalanced, requests)
        recorder = unbalanced.recorder()
        serve(bars, "text to plan from", unbalanced, history, recorder)
        static = plan(
            recorder.recording().expert_counts(),
            num_slots,
            num_ranks,
            split="balanced",
            layer_ids=config.moe_layer_ids,
        ).placement
        recorder = unbalanced.recorder()
        expected = serve(bars, "unbalanced", unbalanced, requests, recorder)
        unbalanced_recording = recorder.recording()

        with JsonLines(arguments.out / "events.jsonl") as events:
            online = _serve_online(bars, make, static, requests, events)

        counts = online.recording.expert_counts()
        oracle = np.stack(
            list(
                bars.track(
                    _oracle_tables(counts, num_slots, num_ranks),
                    total=len(counts),
                    description="the oracle",
                )
            )
        )
    tables = np.broadcast_to(np.asarray(static.slot_to_expert), oracle.shape)
    tokens = {
        "static": replay(counts, tables, num_ranks),
        "online": rank_tokens(online.recording),
        "oracle": replay(counts, oracle, num_ranks),
    }
    figures = _figures(tokens, online, 2 * batches * OUTPUT_TOKENS)
    figures |= {
        "imbalance_unbalanced": _average(rank_tokens(unbalanced_recording)),
        "identical_output": all(
            np.array_equal(a, b) for a, b in zip(expected.outputs, online.outputs, strict=True)
        ),
        "requests": len(requests),
        "ranks": num_ranks,
        "experts": config.num_experts,
        "slots": num_slots,
    }
    save_placement(static, arguments.out / "static.yaml", layer_updates_per_iter=2)
    save_recording(online.recording, arguments.out / "recording_online.npz")
    figure = imbalance_by_iteration(
        {name: metrics.imbalance(each).mean(axis=1) for name, each in tokens.items()},
        change=batches * OUTPUT_TOKENS,
        updates=[update.step for update in online.updates],
    )
    (picture,) = save_figures(arguments.out, {"online": figure})
    (arguments.out / "online.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures) if arguments.json else _summary(figures, str(picture)))
    if not figures["identical_output"]:
        raise ValueError("the balanced run wrote other tokens than the unbalanced one")


def replay(counts: np.ndarray, tables: np.ndarray, num_ranks: int) -> np.ndarray:
    """What the replica choice `balanced` makes of counts [W, L, E], int64[W, L, P].

    `tables`, [W, L, S], are the placements in force, one for each iteration. The fullest rank may
    have a token more or less than in a run, where each rank sends its own.
    """
    missing = -len(counts) % _TOGETHER
    padded = np.concatenate([counts, np.zeros_like(counts[:missing])]).astype(np.int32)
    placed = np.concatenate([tables, tables[:missing]]).astype(np.int32)
    parts = []
    for start in range(0, len(padded), _TOGETHER):
        some = slice(start, start + _TOGETHER)
        parts.append(np.asarray(_replay(padded[some], placed[some], num_ranks), np.int64))
    return np.concatenate(parts)[: len(counts)]


@functools.partial(jax.jit, static_argnames="num_ranks")
def _replay(counts, tables, num_ranks: int):
    num_experts, num_slots = counts.shape[-1], tables.shape[-1]
    ranks = Ranks("expert", num_ranks, num_slots // num_ranks)

    def one_layer(counts, tables):
        everything = jnp.zeros((num_ranks, num_experts), jnp.int32).at[0].set(counts)
        share = balanced_shares(everything, tables, ranks)
        return share.reshape(num_ranks, num_ranks, -1).sum(axis=(0, 2))

    def one_iteration(counts, table):
        tables = derive_tables(
            table,
            num_experts=num_experts,
            num_ranks=num_ranks,
            with_leveling=True,
        )
        return jax.vmap(one_layer)(counts, tables)

    return jax.vmap(one_iteration)(counts, tables)


def _oracle_tables(counts: np.ndarray, num_slots: int, num_ranks: int) -> Iterator[np.ndarray]:
    """For each iteration a plan from the ten before it; the first knows itself alone."""
    for iteration in range(len(counts)):
        # Windows without tokens count as the mean of the others.
        window = np.zeros((ORACLE_ITERATIONS, *counts.shape[1:]), np.int64)
        seen = counts[max(iteration - ORACLE_ITERATIONS, 0) : max(iteration, 1)]
        window[: len(seen)] = seen
        found = plan(window, num_slots, num_ranks, split="balanced", effort="fast")
        yield np.asarray(found.placement.slot_to_expert)


def _serve_online(bars, make, static: Placement, requests: list[Request], events) -> _Online:
    updates: list[LayerUpdate] = []

    def keep(event: Event) -> None:
        if isinstance(event, LayerUpdate):
            updates.append(event)

    engine = make(placement=static, balancer=CONFIG, listeners=[keep, events])
    compile_steps(bars, engine, requests)
    recorder = engine.recorder()
    with _compilations() as compiled:
        result = serve(bars, "online", engine, requests, recorder)
        engine.balancer.flush()
    figures = balancer_figures(engine.balancer)
    engine.balancer.close()
    return _Online(result.outputs, recorder.recording(), updates, compiled, figures)


@contextlib.contextmanager
def _compilations() -> Iterator[list[str]]:
    """The names of the programs that XLA compiles within the block, by JAX's own events."""
    compiled: list[str] = []

    def note(event: str, duration_secs: float, **facts: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(str(facts.get("fun_name", event)))

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def _average(tokens: np.ndarray) -> float:
    return metrics.summarize(tokens).average.imbalance


def _figures(tokens: dict[str, np.ndarray], online: _Online, iterations: int) -> dict[str, Any]:
    figures: dict[str, Any] = {"iterations": iterations, "recompilations": len(online.compiled)}
    for name, each in tokens.items():
        figures[f"imbalance_{name}"] = _average(each)
    for half, part in (
        ("first", slice(None, iterations // 2)),
        ("second", slice(iterations // 2, None)),
    ):
        for name, each in tokens.items():
            figures[f"imbalance_{name}_{half}_half"] = _average(each[part])
    figures["online_over_oracle"] = figures["imbalance_online"] / figures["imbalance_oracle"]
    return figures | online.figures


def _summary(figures: dict[str, Any], picture: str) -> str:
    same = "identical" if figures["identical_output"] else "NOT identical"
    rows = [
        f"{name:<8} {figures[f'imbalance_{name}']:>8.4f} "
        f"{figures[f'imbalance_{name}_first_half']:>12.4f} "
        f"{figures[f'imbalance_{name}_second_half']:>12.4f}"
        for name in ("static", "online", "oracle")
    ]
    return f"""
{figures["iterations"]} iterations, {figures["requests"]} requests, {figures["experts"]} experts \
in {figures["slots"]} slots on {figures["ranks"]} devices; {FIRST} text, then {SECOND}.

imbalance     all   {FIRST:>9} {SECOND:>12}
{chr(10).join(rows)}

Online over oracle: {figures["online_over_oracle"]:.2f} (unbalanced: \
{figures["imbalance_unbalanced"]:.4f}).
{balancer_text(figures)}.
Programs compiled while serving: {figures["recompilations"]}. Generated tokens: {same}.
{picture}
"""
