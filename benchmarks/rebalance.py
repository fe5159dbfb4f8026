"""A change of placement while a model runs: bytes, time and stall, against doing it anew.

    python -m benchmarks.rebalance [--ranks P] [--fractions F ...] [--json]

The same change in several ways, one after the other in every round: only the slots that change
move, copied from device to device (ours, which the others are set against), or by one collective
program; `take` under `jit` with `out_shardings`, which gathers whole banks;
all banks from the host again. Time is of the change alone; stall is what a run of steps takes
longer with the change in it. Ours is made layer by layer between steps, as a balancer does.
Where there are too few devices the CPU simulates them: bytes are then as on real ones, times not.

Axes: L layers, E experts, S slots, P ranks, D embedding width, F hidden width.
"""

import argparse
import functools
import json
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console

from benchmarks.machine import describe
from benchmarks.tables import Column, Table
from benchmarks.timing import in_turn
from jax_eplb.mesh import expert_mesh, simulate_devices
from jax_eplb.moe.experts import place_experts
from jax_eplb.moving import Moves, apply_moves, find_banks, find_moves, prepare_moves, stage_moves

_SEED = 20261126
COLUMNS = [
    Column("changed", "slots changed, percent", 1),
    Column("way", "way"),
    Column("megabytes", "MB moved", 1),
    Column("extra_megabytes", "extra MB of a device", 1),
    Column("ms", "ms", 2),
    Column("stall_ms", "stall, ms", 2),
    Column("bytes_ratio", "bytes, times ours", 1),
    Column("time_ratio", "time, times ours", 1),
    Column("stall_ratio", "stall, times ours", 1),
]
_SIZE_OF = {"f32": 4, "bf16": 2, "u32": 4, "s32": 4, "u16": 2, "pred": 1}


def change(table: np.ndarray, fraction: float, generator: np.random.Generator) -> np.ndarray:
    """A table in which about this part of all slots has another expert; none loses its last one.

    Some slots of a layer hand their experts on in a ring.

    >>> old = np.arange(8)[None]
    >>> int((change(old, 0.5, np.random.default_rng(0)) != old).sum())
    4
    """
    layers, slots = table.shape
    wanted = max(2, round(fraction * table.size))
    each = max(2, -(-wanted // layers))
    new = table.copy()
    for layer in generator.permutation(layers)[: max(1, round(wanted / each))]:
        ring = generator.permutation(slots)[:each]
        new[layer, ring] = table[layer, np.roll(ring, 1)]
    return new


class Model:
    """Banks in slots, and a step that reads all of them."""

    def __init__(self, arguments: argparse.Namespace, mesh: Mesh):
        self.mesh, self.arguments = mesh, arguments
        layers, experts, slots = arguments.layers, arguments.experts, arguments.slots
        generator = np.random.default_rng(_SEED)
        self.table = np.tile(np.arange(slots) % experts, (layers, 1))
        dtype = jnp.dtype(arguments.dtype)
        width, hidden = arguments.embed_dim, arguments.hidden_dim
        self.by_expert = {}
        for name, shape in (("gate_up", (width, 2 * hidden)), ("down", (hidden, width))):
            # Of one random matrix, scaled otherwise for each expert: drawing takes minutes.
            whole = self.by_expert[name] = np.empty((layers, experts, *shape), dtype)
            matrix = generator.normal(size=shape, scale=0.01).astype(np.float32)
            for place in np.ndindex(layers, experts):
                whole[place] = matrix * (1 + np.float32(place[0] * experts + place[1]))
        self.sharding = NamedSharding(mesh, P(None, "expert"))
        self.start = self.load(self.table)
        first = {name: np.asarray(_prints(bank)) for name, bank in self.start.items()}
        self.prints = {name: prints[:, :experts] for name, prints in first.items()}
        tokens = generator.normal(size=(arguments.ranks * arguments.tokens, width))
        self.tokens = jax.device_put(jnp.asarray(tokens, dtype), NamedSharding(mesh, P("expert")))
        self.step = jax.jit(
            jax.shard_map(
                _step, mesh=mesh, in_specs=(P(None, "expert"), P("expert")), out_specs=P("expert")
            )
        )

    def load(self, table: np.ndarray) -> dict[str, jax.Array]:
        """All banks from the host, each device its rows."""
        return {
            name: place_experts(whole, table, self.sharding)
            for name, whole in self.by_expert.items()
        }

    def fresh(self) -> dict[str, jax.Array]:
        """The banks at the start, in memory of their own: on CPU, what was loaded may share it."""
        return jax.block_until_ready(jax.tree.map(jnp.copy, self.start))

    def check(self, params, table: np.ndarray) -> None:
        """Raise RuntimeError unless every slot holds its expert."""
        layer = np.arange(len(table))[:, None]
        for name, prints in self.prints.items():
            if not np.array_equal(_prints(params[name]), prints[layer, table]):
                raise RuntimeError(f"{name}: a slot does not hold its expert after the change")

    @property
    def row_bytes(self) -> int:
        return sum(x[0, 0].nbytes for x in self.by_expert.values())


def _step(params, tokens):
    """Every rank's tokens through all experts it holds, layer by layer."""

    def layer(tokens, banks):
        gate_up, down = banks
        hidden = jnp.einsum("td,ndf->ntf", tokens, gate_up)
        gate, up = jnp.split(hidden, 2, axis=-1)
        return tokens + jnp.einsum("ntf,nfd->td", jax.nn.silu(gate) * up, down), None

    return jax.lax.scan(layer, tokens, (params["gate_up"], params["down"]))[0]


class Live:
    """Ours: layer by layer, staged while a step runs, written before the next one."""

    def __init__(self, model: Model, *, collective: bool):
        self.name = "changed slots, " + ("collective" if collective else "copied")
        self.model, arguments, self.collective = model, model.arguments, collective
        params = model.load(model.table)
        self.banks, self.ranks = find_banks(params), arguments.ranks
        self.at_once = arguments.slots // arguments.ranks
        prepare_moves(params, self.at_once, banks=self.banks, collective=collective)

    def moves(self, old: np.ndarray, new: np.ndarray) -> list[Moves]:
        moves = find_moves(old, new, num_ranks=self.ranks)
        return [moves.take(moves.layer == layer) for layer in np.unique(moves.layer)]

    def run(self, params, old: np.ndarray, new: np.ndarray, between: Callable[[Any], Any]):
        for moves in self.moves(old, new):
            staged = stage_moves(params, moves, banks=self.banks, collective=self.collective)
            between(params)
            params = apply_moves(params, staged)
        return params

    def sizes(self, old: np.ndarray, new: np.ndarray) -> tuple[int, int]:
        """Bytes that go from device to device, and what a device needs beside its banks."""
        sent, most = 0, 0
        for moves in self.moves(old, new):
            ranks = moves.source // self.at_once, moves.destination // self.at_once
            fullest = max(int(np.bincount(x).max()) for x in ranks)
            padded = 1 << (fullest - 1).bit_length()
            most = max(most, padded)
            if self.collective:
                sent += 2 * padded * (self.ranks - 1)
            else:
                sent += int((ranks[0] != ranks[1]).sum())
        rows = (5 if self.collective else 2) * most
        return sent * self.model.row_bytes, rows * self.model.row_bytes


class TakeAll:
    """`take` of all slots under `jit`, the result spread like the banks."""

    name = "take under jit"

    def __init__(self, model: Model):
        self.model = model
        spread = {name: model.sharding for name in model.by_expert}
        everywhere = NamedSharding(model.mesh, P())

        def take(params, source):
            return {
                n: jnp.take_along_axis(x, source[..., None, None], 1) for n, x in params.items()
            }

        self.program = jax.jit(take, out_shardings=spread)
        self.put = functools.partial(jax.device_put, device=everywhere)

    def source(self, old: np.ndarray, new: np.ndarray) -> np.ndarray:
        """int32[L, S]: the first slot that holds each expert."""
        return np.array(
            [[np.flatnonzero(row == e)[0] for e in to] for row, to in zip(old, new, strict=True)],
            np.int32,
        )

    def run(self, params, old: np.ndarray, new: np.ndarray, between: Callable[[Any], Any]):
        return self.program(params, self.put(self.source(old, new)))

    def sizes(self, old: np.ndarray, new: np.ndarray) -> tuple[int, int]:
        params = self.model.load(old)
        compiled = self.program.lower(params, self.put(self.source(old, new))).compile()
        memory: Any = compiled.memory_analysis()
        own = sum(x.nbytes for x in jax.tree.leaves(params)) // self.model.arguments.ranks
        moved = _collective_bytes(compiled.as_text() or "") * self.model.arguments.ranks
        return moved, memory.temp_size_in_bytes + own


class Reload:
    """All banks from the host again."""

    name = "reload from the host"

    def __init__(self, model: Model):
        self.model = model

    def run(self, params, old: np.ndarray, new: np.ndarray, between: Callable[[Any], Any]):
        return self.model.load(new)

    def sizes(self, old: np.ndarray, new: np.ndarray) -> tuple[int, int]:
        whole = old.size * self.model.row_bytes
        return whole, whole // self.model.arguments.ranks


def _collective_bytes(program: str) -> int:
    """What a device gets from others in the collectives of a compiled program, about.

    >>> _collective_bytes("%a = f32[2,8]{1,0} all-gather(f32[2,2]{1,0} %b), dimensions={1}")
    64
    """
    total = 0
    for line in program.splitlines():
        found = re.search(r"= (.*?) (?:all-\w+|collective-permute)(?:-start)?\(", line)
        for kind, shape in re.findall(r"(\w+)\[([\d,]*)\]", found[1]) if found else ():
            sizes = [int(n) for n in shape.split(",") if n]
            total += _SIZE_OF.get(kind, 0) * int(np.prod(sizes, dtype=np.int64))
    return total


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of all fractions and ways."""
    model = Model(arguments, expert_mesh(arguments.ranks))
    ways: list[Any] = [Live(model, collective=False), Live(model, collective=True)]
    ways += [TakeAll(model), Reload(model)]
    generator = np.random.default_rng(_SEED)
    rows = []
    for fraction in arguments.fractions:
        old, new = model.table, change(model.table, fraction, generator)
        changed = 100 * float((old != new).mean())
        # As many steps as ours needs to be done between them, and some after it.
        number = int((old != new).any(axis=1).sum()) + 2
        clocks: dict[Any, Callable[[], float]] = {
            (way.name, what): functools.partial(clock, model, way, old, new, number)
            for way in ways
            for what, clock in (("alone", _alone), ("run", _run))
        }
        clocks["steps"] = functools.partial(_only_steps, model, number)
        for clock in clocks.values():
            clock()  # compiles
        times = {
            key: found.median_ms or 0.0 for key, found in in_turn(clocks, arguments.repeats).items()
        }
        ours = None
        for way in ways:
            moved, extra = way.sizes(old, new)
            row = {
                "changed": changed,
                "way": way.name,
                "megabytes": moved / 1e6,
                "extra_megabytes": extra / 1e6,
                "ms": times[way.name, "alone"],
                "stall_ms": max(0.0, times[way.name, "run"] - times["steps"]),
                "step_ms": times["steps"] / number,
            }
            ours = ours or row
            for ratio, key in (
                ("bytes_ratio", "megabytes"),
                ("time_ratio", "ms"),
                ("stall_ratio", "stall_ms"),
            ):
                row[ratio] = row[key] / ours[key] if ours[key] else None
            rows.append(row)
    return rows


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = jax.block_until_ready(call())
    return 1e3 * (time.perf_counter() - start), result


def _alone(model: Model, way, old, new, number) -> float:
    """ms of the change, and nothing else."""
    start = model.fresh()
    ms, params = _timed(lambda: way.run(start, old, new, lambda params: None))
    model.check(params, new)
    return ms


def _run(model: Model, way, old, new, number) -> float:
    """ms of so many steps with the change after the first."""
    start = model.fresh()

    def call():
        outputs = [model.step(start, model.tokens)]
        params = way.run(
            start, old, new, lambda params: outputs.append(model.step(params, model.tokens))
        )
        while len(outputs) < number:
            outputs.append(model.step(params, model.tokens))
        return outputs, params

    ms, (_, params) = _timed(call)
    model.check(params, new)
    return ms


def _only_steps(model: Model, number: int) -> float:
    return _timed(lambda: [model.step(model.start, model.tokens) for _ in range(number)])[0]


@jax.jit
def _prints(bank: jax.Array) -> jax.Array:
    """A number of each slot's bits, uint32[L, S]."""
    bits = jax.lax.bitcast_convert_type(bank, jnp.dtype(f"uint{8 * bank.dtype.itemsize}"))
    return bits.astype(jnp.uint32).sum(axis=(2, 3))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What a change of placement costs.")
    parser.add_argument("--ranks", type=int, help="default: all devices; 8 on the CPU")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--slots", type=int, default=80)
    parser.add_argument("--embed-dim", type=int, default=256)
    parser.add_argument("--hidden-dim", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32, help="of each rank")
    parser.add_argument("--fractions", type=float, nargs="*", default=[0.01, 0.1, 1.0])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    arguments = parser.parse_args(argv)
    simulate_devices(arguments.ranks or 8)
    arguments.ranks = arguments.ranks or len(jax.devices())
    if arguments.slots % arguments.ranks or arguments.slots < arguments.experts:
        parser.error(
            f"{arguments.slots} slots must hold {arguments.experts} experts and be divisible "
            f"among {arguments.ranks} ranks"
        )
    rows = measure(arguments)
    if arguments.json:
        print(json.dumps({"machine": describe(), "rows": rows}))
        return
    title = (
        f"{arguments.layers} layers of {arguments.experts} experts in {arguments.slots} slots on "
        f"{arguments.ranks} ranks, {arguments.embed_dim} × {arguments.hidden_dim}, "
        f"{arguments.dtype}, {describe()['device']}"
    )
    Console(width=140).print(Table(title, COLUMNS, rows).as_rich())


if __name__ == "__main__":
    main()
