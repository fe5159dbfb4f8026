"""Placements on real devices: the same bytes whatever the placement, every expert where it belongs.

Axes: L layers, E experts, S slots, P ranks.
"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from benchmarks.layer_stack import AXIS, spread, usable_exchanges
from benchmarks.tables import Column, Table
from jax_eplb import MoE, MoEConfig, Placement
from jax_eplb.mesh import lay_out
from jax_eplb.moving import rebalance

_SEED = 20261126
_OUTPUTS = 20  # placements whose output is compared
_EMBED, _HIDDEN, _TOKENS, _TOP_K = 256, 128, 32, 4
COLUMNS = [
    Column("check", "check"),
    Column("placements", "placements", 0),
    Column("wrong", "wrong", 0),
]


def run_checks(mesh: Mesh, placements: int, dtype) -> Iterator[dict[str, Any]]:
    """A row for each check: how many placements, and how many were wrong."""
    num_ranks = mesh.shape[AXIS]
    num_experts, num_slots = 4 * num_ranks, 6 * num_ranks
    generator = np.random.default_rng(_SEED)

    def draw() -> Placement:
        return random_placement(generator, num_experts, num_slots, num_ranks)

    yield _moves_check(mesh, [draw() for _ in range(placements)], dtype)
    ways: dict[str, dict[str, Any]] = {name: {"exchange": name} for name in usable_exchanges()}
    ways["waves in parts"] = {"moe_max_num_tokens": _TOKENS * _TOP_K // 3}
    for name, options in ways.items():
        for choice in ("even", "balanced", "fewest"):
            config = MoEConfig(
                _EMBED,
                _HIDDEN,
                num_experts,
                _TOP_K,
                num_slots,
                num_ranks,
                replica_choice=choice,
                **options,
            )
            chosen = [draw() for _ in range(min(placements, _OUTPUTS))]
            wrong = _wrong_outputs(mesh, config, chosen, dtype)
            check = f"same output, {name}, {choice} split"
            yield {"check": check, "placements": len(chosen), "wrong": wrong}
    wrong = _skewed_differs(mesh, num_experts, dtype)
    check = "same output, waves and all_gather, all tokens to one rank"
    yield {"check": check, "placements": 1, "wrong": int(wrong)}


def random_placement(
    generator: np.random.Generator, num_experts: int, num_slots: int, num_ranks: int
) -> Placement:
    """Every expert has a slot, and other experts the rest, anywhere."""
    spare = generator.permutation(num_experts)[: num_slots - num_experts]
    row = generator.permutation(np.concatenate([np.arange(num_experts), spare]))
    return Placement.from_slots(row[None], num_experts=num_experts, num_ranks=num_ranks)


def _moves_check(mesh: Mesh, placements: list[Placement], dtype) -> dict[str, Any]:
    """Weights that hold their expert's number, moved from each placement to the next."""

    def expected(placement: Placement) -> np.ndarray:
        return np.asarray(placement.slot_to_expert)[0, :, None, None].astype(np.float32)

    now = placements[-1]
    ids = np.broadcast_to(expected(now), (now.num_slots, 64, 128)).astype(dtype)
    params, wrong = {"weights": spread(ids, mesh, 0), "bias": spread(ids[:, 0], mesh, 0)}, 0
    for placement in placements:
        params, now = rebalance(params, now, placement), placement
        weights = multihost_utils.process_allgather(params["weights"], tiled=True)
        bias = multihost_utils.process_allgather(params["bias"], tiled=True)
        here = expected(now)
        same = (weights == here.astype(dtype)).all() and (bias == here[:, 0].astype(dtype)).all()
        wrong += not same
    return {"check": "every slot holds its expert", "placements": len(placements), "wrong": wrong}


def _wrong_outputs(mesh: Mesh, config: MoEConfig, placements: list[Placement], dtype) -> int:
    """On how many placements the layer's output is not that on the first, byte for byte."""
    layer = MoE(config, mesh=mesh, rngs=nnx.Rngs(_SEED), placement=placements[0], dtype=dtype)
    tokens = _draw_tokens(mesh, _TOKENS, dtype)
    first, wrong = _bytes_of(layer(tokens)), 0
    for placement in placements[1:]:
        layer.use_placement(placement)
        wrong += not np.array_equal(_bytes_of(layer(tokens)), first)
    return wrong


def _skewed_differs(mesh: Mesh, num_experts: int, dtype) -> bool:
    """Whether a batch that is larger than any buffer for one wave comes out differently."""
    num_ranks = mesh.shape[AXIS]
    tokens = _draw_tokens(mesh, 1024 * num_ranks // _TOP_K, dtype)  # 1,024 rows for each pair
    outputs = []
    for exchange in ("waves", "all_gather"):
        config = MoEConfig(
            _EMBED, _HIDDEN, num_experts, _TOP_K, num_experts, num_ranks, exchange=exchange
        )
        layer = MoE(config, mesh=mesh, rngs=nnx.Rngs(_SEED), dtype=dtype)
        router = np.zeros((_EMBED, num_experts), np.float32)
        router[0, :_TOP_K] = 1  # all of the first rank; on what is 1 in every token
        layer.router[...] = lay_out(router, layer.router[...].sharding)
        outputs.append(_bytes_of(layer(tokens)))
    return not np.array_equal(*outputs)


def _draw_tokens(mesh: Mesh, of_rank: int, dtype) -> jax.Array:
    drawn = np.random.default_rng(_SEED).normal(size=(mesh.size * of_rank, _EMBED)).astype(dtype)
    drawn[:, 0] = 1
    return spread(drawn, mesh, 0)


def _bytes_of(x: jax.Array) -> np.ndarray:
    return np.asarray(multihost_utils.process_allgather(x, tiled=True)).view(np.uint8)


def checks_table(rows: list[dict]) -> Table:
    return Table("The same bytes for any placement", COLUMNS, rows)
