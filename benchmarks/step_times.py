"""Predicted and measured times of the byte model's fullest ranks, with and without balancing.

The engine serves text on simulated devices, which share the machine's cores: their own step times
do not show what balance is worth. So what each rank has to compute in a served iteration is taken
from the recording, and what the fullest one has is computed alone, with the model's weights. The
prediction knows the imbalance and one number, measured beforehand on other rows: the time of a row.

Axes: W windows, L layers, E experts, S slots, P ranks, N slots of a rank.
"""

import functools
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.tables import Column, Table
from jax_eplb import metrics
from jax_eplb.commands.demo import MIN_TOKENS, OUTPUT_TOKENS, PROMPT_BYTES, SEQUENCES
from jax_eplb.commands.sample_text import sample_requests
from jax_eplb.load import Recording
from jax_eplb.mesh import expert_mesh
from jax_eplb.models.weights import load_decoder
from jax_eplb.moe.feed_forward import ExpertWeights, expert_feed_forward
from jax_eplb.placement import Placement
from jax_eplb.planner import plan
from jax_eplb.serving import Engine, ServingConfig
from jax_eplb.simulate import Costs
from jax_eplb.split import balanced_split, even_split

RANKS = 8
_SLOTS = 80
_TIMES = 40
_ROWS = 512


def step_times() -> Table:
    """A row for each placement: milliseconds of all MoE layers in one iteration.

    Needs `RANKS` devices, simulated ones if there are fewer.
    """
    saved = load_decoder()
    recording = _served(saved).with_at_least(MIN_TOKENS)
    middle = len(recording.iterations) // 2
    counts = recording.expert_counts()
    known, later = counts[:middle], counts[middle:]
    experts = jax.tree.map(
        lambda bank: jnp.asarray(bank, jnp.float32), saved.params.sparse.moe.experts
    )
    config = saved.config.moe(num_slots=_SLOTS, num_ranks=RANKS)
    rate = _rows_per_second(experts, known, config.activation)
    costs = Costs(rate, memory_bytes_per_second=float("inf"), attention_share=0.0)
    rows = []
    for name, num_slots, split in (
        ("none", config.num_experts, "even"),
        ("planned, even", _SLOTS, "even"),
        ("planned, balanced", _SLOTS, "balanced"),
    ):
        if name == "none":
            table = Placement.default(
                num_experts=config.num_experts, num_ranks=RANKS, layer_ids=recording.layer_ids
            ).slot_to_expert
        else:
            table = plan(known, num_slots, RANKS, split=split).placement.slot_to_expert
        sizes = _whole_rows(later, table, split)
        imbalance = metrics.imbalance(sizes.sum(axis=-1))
        predicted = costs.step_seconds(
            imbalance, later.sum(axis=-1), num_ranks=RANKS, num_slots=num_slots
        ).mean()
        measured = _measure(experts, np.asarray(table), sizes, config.activation)
        rows.append(
            {
                "placement": f"{name}, {num_slots} slots",
                "imbalance": imbalance.mean(),
                "predicted": 1e3 * predicted,
                "measured": 1e3 * measured,
                "ratio": predicted / measured,
            }
        )
    for row in rows:
        row["gain"] = 100 * (rows[0]["predicted"] / row["predicted"] - 1)
        row["gained"] = 100 * (rows[0]["measured"] / row["measured"] - 1)
    columns = [
        Column("placement", "placement"),
        Column("imbalance", "imbalance", 3),
        Column("predicted", "predicted, ms", 2),
        Column("measured", "measured, ms", 2),
        Column("ratio", "predicted / measured", 2),
        Column("gain", "gain predicted, %", 1),
        Column("gained", "measured, %", 1),
    ]
    title = "Byte model, experts of one iteration, each rank computed alone on this CPU"
    return Table(title, columns, rows)


def _served(saved) -> Recording:
    """The load of the demo's text, served by the engine."""
    per_rank = -(-SEQUENCES // RANKS)
    config = saved.config
    engine = Engine(
        saved,
        mesh=expert_mesh(RANKS),
        placement=Placement.default(
            num_experts=config.num_experts, num_ranks=RANKS, layer_ids=config.moe_layer_ids
        ),
        serving=ServingConfig(
            max_batch_size=per_rank,
            max_prompts_per_step=per_rank,
            max_length=PROMPT_BYTES + OUTPUT_TOKENS,
        ),
    )
    sample = functools.partial(
        sample_requests, prompt_bytes=PROMPT_BYTES, output_tokens=OUTPUT_TOKENS
    )
    requests = sample("first", 2 * SEQUENCES) + sample("second", 2 * SEQUENCES)
    recorder = engine.recorder()
    engine.run(requests, recorder=recorder)
    return recorder.recording()


def _whole_rows(counts: np.ndarray, table, split: str) -> np.ndarray:
    """Rows of each slot, int64[W, L, P, N]; what cannot be divided goes to the first replicas."""
    num_experts = counts.shape[2]
    if split == "balanced":
        tokens = balanced_split(counts, table, num_experts, RANKS)
    else:
        tokens = even_split(counts, table, num_experts)
    rows = np.floor(np.asarray(tokens, np.float64) + 1e-3).astype(np.int64)
    for layer, slots in enumerate(np.asarray(table)):
        for expert in range(num_experts):
            places = np.flatnonzero(slots == expert)
            left = counts[:, layer, expert] - rows[:, layer, places].sum(axis=1)
            for turn in range(int(left.max(initial=0))):
                rows[:, layer, places[turn % len(places)]] += left > turn
    return rows.reshape(*rows.shape[:2], RANKS, -1)


def _rows_per_second(experts: ExpertWeights, known: np.ndarray, activation: str) -> float:
    """Measured on the mean rank's rows, dealt evenly to the first experts of the first layer."""
    held = jax.tree.map(lambda bank: bank[0, : _SLOTS // RANKS], experts)
    rows = int(known.sum(axis=-1).mean()) // RANKS
    each = np.full(_SLOTS // RANKS, rows * RANKS // _SLOTS, np.int32)
    return each.sum() / _seconds(held, each, activation)


def _measure(
    experts: ExpertWeights, table: np.ndarray, sizes: np.ndarray, activation: str
) -> float:
    """CPU seconds of an iteration: of each layer its fullest rank's, mean over the windows."""
    slots = table.reshape(len(table), RANKS, -1)
    total = 0.0
    for window, layer in itertools.product(range(len(sizes)), range(len(table))):
        # Only this one: the slowest of several equal ones would be that with most noise.
        rank = sizes[window, layer].sum(axis=-1).argmax()
        here = slots[layer, rank]
        held = ExpertWeights(experts.gate_up[layer][here], experts.down[layer][here])
        total += _seconds(held, sizes[window, layer, rank], activation)
    return total / len(sizes)


def _seconds(held: ExpertWeights, sizes: np.ndarray, activation: str) -> float:
    """CPU seconds of so many rows, the best of some times: other processes do not count."""
    # Rounded up, so that few programs do for all.
    rows = -(-int(sizes.sum()) // _ROWS) * _ROWS
    tokens = jnp.ones((rows, held.gate_up.shape[1]), jnp.float32)
    groups = jnp.asarray(sizes, jnp.int32)
    jax.block_until_ready(_feed_forward(tokens, held, groups, activation=activation))
    times = []
    for _ in range(_TIMES):
        begun = time.process_time()
        jax.block_until_ready(_feed_forward(tokens, held, groups, activation=activation))
        times.append(time.process_time() - begun)
    return min(times)


_feed_forward = jax.jit(expert_feed_forward, static_argnames="activation")
