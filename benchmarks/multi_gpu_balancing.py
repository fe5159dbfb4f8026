"""What balancing is worth on real devices: a layer's time with routing of real recordings.

Axes: L layers, P ranks, T tokens of a rank.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from benchmarks.ceilings import burst_ms, compile_all
from benchmarks.layer_stack import (
    AXIS,
    Shape,
    make_params,
    place_tables,
    separate_layers,
    spread,
)
from benchmarks.progress import say
from benchmarks.replayed_routing import Replay, count_ids, routers, tokens_for
from benchmarks.tables import Column, Table
from benchmarks.timing import in_turn
from jax_eplb.moe.config import MoEConfig
from jax_eplb.moe.forward import MoEParams
from jax_eplb.placement import Placement, fewest_slots
from jax_eplb.planner import plan
from jax_eplb.tables import PlacementTables

_SEED = 20261127
_LAYERS = 4  # of the recording
_FEW = 2048  # tokens of a rank; with more, `fewest` is `even`
COLUMNS = [
    Column("recording", "recording"),
    Column("shape", "layers of"),
    Column("tokens", "tokens a rank", 0),
    Column("variant", "placement, split"),
    Column("slots_per_rank", "slots a rank", 0),
    Column("imbalance", "imbalance", 3),
    Column("layer_ms", "ms a layer", 3),
    Column("speed_up", "times faster", 2),
    Column("of_perfect", "of the perfect gain", 2),
    Column("of_perfect_with_replicas", "with replicas", 2),
    Column("of_perfect_drawn", "drawn", 2),
]


class Variant(NamedTuple):
    """A placement with a way to divide tokens among replicas."""

    name: str
    choice: str | None = None  # of replicas; None: the contiguous placement, without any
    ahead: bool = False  # planned from what is then routed, not from what came before
    routing: str = "recorded"  # or, as bounds without skew, "uniform" and "drawn"

    @property
    def split(self) -> str | None:
        """What its plan is made for; `fewest` serves decoding beside `balanced`, by one plan."""
        return "balanced" if self.choice == "fewest" else self.choice


CONTIGUOUS, UNIFORM = Variant("contiguous"), Variant("uniform routing", routing="uniform")
# What replicas cost where there is nothing to balance: slots more, and their division.
WITH_REPLICAS = Variant("uniform, balanced", "balanced", routing="uniform")
# Experts that are equally likely, but whose tokens do not fill tiles exactly.
DRAWN = Variant("drawn uniformly", routing="drawn")
VARIANTS = (
    CONTIGUOUS,
    Variant("planned, even", "even"),
    Variant("planned, balanced", "balanced"),
    Variant("planned, fewest", "fewest"),
    Variant("planned ahead, balanced", "balanced", ahead=True),
    WITH_REPLICAS,
    DRAWN,
    UNIFORM,
)


class Prepared(NamedTuple):
    """A variant's layers on the mesh; those of one config share steps and parameters."""

    config: MoEConfig
    step: Callable
    params: MoEParams
    tables: PlacementTables


class Batch(NamedTuple):
    """Tokens on the mesh, and the experts that they are for."""

    expert_ids: np.ndarray  # [L, T of all ranks, K]
    tokens: jax.Array  # [L, T of all ranks, D]


def measure_balancing(
    mesh: Mesh,
    replays: Sequence[Replay],
    shapes: dict[int, Shape],
    batches: Sequence[int],
    *,
    windows: int,
    more_slots: int,
    effort: str,
    dtype,
    rounds: int,
) -> Iterator[dict[str, Any]]:
    """A row for each recording, number of tokens and variant; means over layers and windows.

    Plans have `more_slots` on each rank than without replicas. Raises RuntimeError where a layer
    did not route as the recording says.
    """
    for replay in replays:
        shape = shapes[replay.num_experts]._replace(top_k=replay.top_k)
        chosen = replay.spaced_layers(_LAYERS)
        kept = routers(_LAYERS, shape.embed, shape.experts)
        say(f"{replay.name}: planning")
        prepared = _prepare(replay, chosen, shape, mesh, kept, more_slots, effort, dtype)
        for num_tokens in batches:
            total = num_tokens * mesh.shape[AXIS]
            variants = [v for v in VARIANTS if v.choice != "fewest" or num_tokens <= _FEW]
            routed = {
                "uniform": _batch(replay.uniform(_LAYERS, total), kept, mesh, dtype),
                "drawn": _batch(replay.drawn(_LAYERS, total), kept, mesh, dtype),
            }
            say(f"{replay.name}: compiling for {num_tokens} tokens")
            compiled = compile_all(
                {
                    found.config: (found.step, (found.params, found.tables, routed["drawn"].tokens))
                    for found in (prepared[variant] for variant in variants)
                }
            )
            times = []
            for window in range(windows):
                say(f"{replay.name}: window {window + 1} of {windows}")
                recorded = replay.batch(chosen, total, window, windows)
                routed["recorded"] = _batch(recorded, kept, mesh, dtype)
                calls, imbalance = {}, {}
                for variant in variants:
                    config, _, params, tables = prepared[variant]
                    ids, tokens = routed[variant.routing]
                    call = functools.partial(compiled[config], params, tables, tokens)
                    imbalance[variant] = _imbalance(call(), ids, f"{replay.name}, {variant.name}")
                    calls[variant] = functools.partial(burst_ms, call, bursts=1)
                found = in_turn(calls, rounds)
                each = {v: (found[v].median_ms or 0.0) / _LAYERS for v in variants}
                times.append({v: (each[v], imbalance[v]) for v in variants})
            yield from _rows(replay, shape, num_tokens, prepared, times)


def _prepare(
    replay: Replay, chosen, shape: Shape, mesh: Mesh, kept, more_slots: int, effort: str, dtype
) -> dict[Variant, Prepared]:
    num_ranks = mesh.shape[AXIS]

    def place(split: str | None, ahead: bool) -> Placement:
        more = 0 if split is None else more_slots * num_ranks
        num_slots = fewest_slots(shape.experts + more, num_ranks)
        if split is None:
            return Placement.default(
                num_experts=shape.experts,
                num_ranks=num_ranks,
                num_layers=_LAYERS,
                num_slots=num_slots,
            )
        half = len(replay.counts) // 2
        seen = replay.counts[half:] if ahead else replay.counts[:half]
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            planned = plan(seen[:, chosen], num_slots, num_ranks, split=split, effort=effort)
        return planned.placement

    kinds = list({(variant.split, variant.ahead): None for variant in VARIANTS})
    with ThreadPoolExecutor() as pool:  # planners are compiled
        placements = dict(zip(kinds, pool.map(lambda kind: place(*kind), kinds), strict=True))
    prepared, shared = {}, {}
    for variant in VARIANTS:
        placement = placements[variant.split, variant.ahead]
        choice = variant.choice or "even"
        config = shape.config(placement.num_slots, num_ranks, replica_choice=choice)
        if config not in shared:
            params = make_params(shape, config, mesh, _LAYERS, dtype, kept)
            shared[config] = separate_layers(config, mesh), params
        tables = place_tables(placement, config, mesh)
        step, params = shared[config]
        prepared[variant] = Prepared(config, step, params, tables)
    return prepared


def _batch(ids: np.ndarray, kept: np.ndarray, mesh: Mesh, dtype) -> Batch:
    return Batch(ids, _make_tokens(spread(ids.astype(np.int32), mesh, 1), kept, mesh, dtype))


@functools.partial(jax.jit, static_argnames=("mesh", "dtype"))
def _make_tokens(expert_ids, kept, mesh: Mesh, dtype) -> jax.Array:
    """Tokens [L, P·T, D], each rank's made where they stay."""

    def local(expert_ids, kept):
        key = jax.random.fold_in(jax.random.key(_SEED), jax.lax.axis_index(AXIS))

        def layer(arrays):
            ids, router = arrays
            return tokens_for(ids, router, key).astype(dtype)

        return jax.lax.map(layer, (expert_ids, kept))

    in_specs = (P(None, AXIS), P())
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=P(None, AXIS))(
        expert_ids, kept
    )


def _imbalance(counts, ids: np.ndarray, case: str) -> float:
    """(max - mean) / mean of the ranks' tokens, the mean of the layers; checks the routing."""
    _, (expert_tokens, rank_tokens) = counts
    routed = _read(expert_tokens).sum(axis=0)
    wanted = count_ids(ids.swapaxes(0, 1), routed.shape[1])
    if (routed != wanted).any():
        raise RuntimeError(
            f"{case}: the layer routed {np.abs(routed - wanted).sum() // 2} of {wanted.sum()} "
            "choices elsewhere than recorded"
        )
    loads = _read(rank_tokens).astype(float)  # [P, L]
    return float((loads.max(axis=0) / loads.mean(axis=0) - 1).mean())


def _read(x: jax.Array) -> np.ndarray:
    """The whole array on every process."""
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def _rows(
    replay: Replay,
    shape: Shape,
    num_tokens: int,
    prepared: dict[Variant, Prepared],
    times: list[dict],
) -> Iterator[dict]:
    mean = {v: np.mean([each[v] for each in times], axis=0) for v in times[0]}
    contiguous = mean[CONTIGUOUS][0]

    def part_of_gain(ms, bound: Variant) -> float | None:
        gain = contiguous - mean[bound][0]
        return float((contiguous - ms) / gain) if gain > 0 else None

    for variant, (ms, imbalance) in mean.items():
        yield {
            "recording": replay.name,
            "shape": shape.name,
            "tokens": num_tokens,
            "variant": variant.name,
            "slots_per_rank": prepared[variant].config.slots_per_rank,
            "imbalance": float(imbalance),
            "layer_ms": float(ms),
            "speed_up": float(contiguous / ms),
            "of_perfect": part_of_gain(ms, UNIFORM),
            "of_perfect_with_replicas": part_of_gain(ms, WITH_REPLICAS),
            "of_perfect_drawn": part_of_gain(ms, DRAWN),
        }


def balancing_table(rows: list[dict]) -> Table:
    notes = [
        "Planned from the recording's first half, or, ahead, from the second; timed on batches of "
        "the second. Imbalance is (max - mean) / mean of the ranks' tokens. Of the perfect gain: "
        "what was saved over what uniform routing saves; with replicas: over what it saves in the "
        "slots of the plan; drawn: over what routing without replicas saves where every expert is "
        "as likely as any other.",
    ]
    return Table("A layer's time with routing of recordings", COLUMNS, rows, notes)
