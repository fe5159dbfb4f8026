"""Placement: which expert sits in each slot, and the tables derived from it.

Axes: L layers, E experts, S slots, P ranks, N = S / P slots of a rank, R replicas of an expert,
J slots of experts that have several.
Slots r·N .. r·N + N - 1 belong to rank r.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def max_replicas(num_experts: int, num_slots: int, num_ranks: int) -> int:
    """The bound R on the replicas of one expert, from the sizes alone.

    Every other expert keeps a slot, and a rank needs no second replica of an expert unless it has
    more slots than there are experts.

    >>> max_replicas(num_experts=256, num_slots=288, num_ranks=36)
    33
    """
    per_rank = -(-num_slots // (num_ranks * num_experts))  # of one expert, if dealt evenly
    return min(num_slots - num_experts + 1, num_ranks * per_rank)


class PlacementTables(NamedTuple):
    """What the layer reads to find an expert's replicas; derived, never stored.

    One layer's tables are the same without the axis L. J = `max_replicated_slots`.
    """

    slot_to_expert: Int[Array, "L S"]
    slots_by_expert: Int[Array, "L S"]  # the slots of expert 0 first, ascending, then of 1 ...
    expert_to_slots: Int[Array, "L E R"]  # ascending; S past an expert's last replica
    replica_count: Int[Array, "L E"]
    # The slots of experts that have several, as they stand in `slots_by_expert`; S past the last.
    replicated_slots: Int[Array, "L J"]
    leveling: Float[Array, "L J J"]  # of `leveling_operator`


def max_replicated_slots(num_experts: int, num_slots: int) -> int:
    """The bound J on the slots whose expert has several: S - E spare ones are of as many experts.

    Rounded up to a power of two, 16 or more, as GPU kernels need; 0 where there are no spare slots.

    >>> max_replicated_slots(num_experts=256, num_slots=288)
    64
    """
    bound = min(num_slots, 2 * (num_slots - num_experts))
    return max(16, 1 << (bound - 1).bit_length()) if bound else 0


@functools.partial(jax.jit, static_argnames=("num_experts", "num_ranks", "max_replicas"))
def derive_tables(
    slot_to_expert: Int[Array, "L S"], *, num_experts: int, num_ranks: int, max_replicas: int
) -> PlacementTables:
    """Invert `slot_to_expert`.

    >>> sizes = {"num_experts": 3, "num_ranks": 2, "max_replicas": 2}
    >>> tables = derive_tables(jnp.array([[0, 1, 2, 0]]), **sizes)
    >>> tables.slots_by_expert[0].tolist(), tables.replicated_slots[0, :3].tolist()
    ([0, 3, 1, 2], [0, 3, 4])
    >>> tables.expert_to_slots[0].tolist(), tables.replica_count[0].tolist()
    ([[0, 3], [1, 4], [2, 4]], [2, 1, 1])
    """
    num_slots = slot_to_expert.shape[1]

    def one_layer(experts):
        order = jnp.argsort(experts, stable=True).astype(jnp.int32)
        count = jnp.zeros(num_experts, jnp.int32).at[experts].add(1)
        first = jnp.cumsum(count) - count
        replica = jnp.arange(max_replicas, dtype=jnp.int32)[None]
        position = first[:, None] + replica  # [E, R]
        held = replica < count[:, None]
        slots = jnp.where(held, order[jnp.minimum(position, num_slots - 1)], num_slots)
        several = count[experts[order]] > 1
        num_places = max_replicated_slots(num_experts, num_slots)
        place = jnp.where(several, jnp.cumsum(several) - 1, num_places)
        replicated = jnp.full(num_places, num_slots, jnp.int32).at[place].set(order, mode="drop")
        leveling = leveling_operator(replicated, experts, num_slots // num_ranks)
        slots = slots.astype(jnp.int32)
        return PlacementTables(experts, order, slots, count, replicated, leveling)

    return jax.vmap(one_layer)(slot_to_expert.astype(jnp.int32))


def leveling_operator(
    replicated_slots: Int[Array, "J"], slot_to_expert: Int[Array, "S"], slots_per_rank: int
) -> Float[Array, "J J"]:
    """What turns the heights of ranks into tokens to shift, for the replica choice `balanced`.

    Tokens of slots, each scaled by `leveling_scale`, may be shifted by any d that sums to zero
    (unscaled) over each expert's slots. Of these, -M (h + v) lowers |heights|^2 + |v + d|^2 most,
    where h are the slots' rank heights, divided by the scale, and v is any wish. M is symmetric,
    and zero for what is no slot.
    """
    num_slots = slot_to_expert.size
    used = replicated_slots < num_slots
    alone = -1 - jnp.arange(replicated_slots.size, dtype=jnp.int32)  # no two of these are equal
    expert = jnp.where(used, slot_to_expert.at[replicated_slots].get(mode="clip"), alone)
    rank = jnp.where(used, replicated_slots // slots_per_rank, alone)
    same_rank = (rank[:, None] == rank[None]).astype(jnp.float32)
    same_expert = (expert[:, None] == expert[None]).astype(jnp.float32)
    scale = leveling_scale(same_rank.sum(axis=0))
    # With Q, which takes out what would change an expert's sum, P = I - Q and the Hessian H:
    # M = Q (Q H Q)^-1 Q on the range of Q = (Q H Q + P)^-1 - P.
    weight = 1 / scale
    outer = weight[:, None] * weight[None]
    squares = (same_expert * (weight * weight)[None]).sum(axis=1, keepdims=True)
    remove = same_expert * outer / squares
    identity = jnp.eye(replicated_slots.size, dtype=jnp.float32)
    keep = identity - remove
    hessian = identity + used.astype(jnp.float32)[None] * same_rank * outer
    product = functools.partial(jnp.matmul, precision="highest")
    return jnp.linalg.inv(product(product(keep, hessian), keep) + remove) - remove


def leveling_scale(crowd: Float[Array, "J"]) -> Float[Array, "J"]:
    """From how many replicated slots stand on the slot's rank: found by trials on recordings.

    >>> leveling_scale(jnp.array([4.0])).tolist()
    [1.0]
    """
    return jnp.sqrt(0.5 * jnp.sqrt(crowd))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Placement:
    """Which expert sits in each slot of each MoE layer.

    A pytree: the table is traced, the sizes are static. The constructor does not look at values,
    so that placements can be built under `jit`; use `Placement.from_slots` for tables from outside.

    >>> placement = Placement.default(num_experts=4, num_slots=6, num_ranks=2, num_layers=1)
    >>> placement.slot_to_expert.tolist()
    [[0, 1, 2, 2, 3, 0]]
    """

    slot_to_expert: Int[Array, "L S"]
    num_experts: int = dataclasses.field(metadata={"static": True})
    num_ranks: int = dataclasses.field(metadata={"static": True})
    # The model's own numbers of its MoE layers: DeepSeek-V3's are 3 to 60.
    layer_ids: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def num_layers(self) -> int:
        return len(self.layer_ids)

    @property
    def num_slots(self) -> int:
        return self.slot_to_expert.shape[-1]

    @property
    def slots_per_rank(self) -> int:
        return self.num_slots // self.num_ranks

    @property
    def max_replicas(self) -> int:
        return max_replicas(self.num_experts, self.num_slots, self.num_ranks)

    def tables(self) -> PlacementTables:
        """All that is derived from `slot_to_expert`, for all layers."""
        return derive_tables(
            self.slot_to_expert,
            num_experts=self.num_experts,
            num_ranks=self.num_ranks,
            max_replicas=self.max_replicas,
        )

    @classmethod
    def from_slots(
        cls,
        slot_to_expert,
        *,
        num_experts: int,
        num_ranks: int,
        layer_ids: Sequence[int] | None = None,
    ) -> "Placement":
        """Check a table from outside, [L, S] of expert ids, and wrap it.

        Raises ValueError where S is not divisible by P, S < E, a row has another length, an expert
        is unknown or has no slot or has too many, or the layer ids do not fit the rows.
        """
        rows = [np.asarray(row) for row in slot_to_expert]
        ids = tuple(int(i) for i in (range(len(rows)) if layer_ids is None else layer_ids))
        check_layer_ids(ids, len(rows))
        num_slots = rows[0].size
        check_sizes(num_experts, num_slots, num_ranks)
        bound = max_replicas(num_experts, num_slots, num_ranks)
        for layer, row in zip(ids, rows, strict=True):
            _check_row(layer, row, num_slots=num_slots, num_experts=num_experts, bound=bound)
        return cls(jnp.asarray(np.stack(rows), jnp.int32), num_experts, num_ranks, ids)

    @classmethod
    def default(
        cls,
        *,
        num_experts: int,
        num_ranks: int,
        num_slots: int | None = None,
        num_layers: int | None = None,
        layer_ids: Sequence[int] | None = None,
    ) -> "Placement":
        """The layout before any plan: rank r's slot i holds expert (r·E // P + i) mod E.

        This is TensorRT-LLM's initial layout. `num_slots` defaults to the fewest that P divides.
        """
        if num_slots is None:
            num_slots = fewest_slots(num_experts, num_ranks)
        check_sizes(num_experts, num_slots, num_ranks)
        if layer_ids is None:
            layer_ids = range(1 if num_layers is None else num_layers)
        ids = tuple(int(i) for i in layer_ids)
        check_layer_ids(ids, len(ids) if num_layers is None else num_layers)
        first = np.arange(num_ranks)[:, None] * num_experts // num_ranks
        row = (first + np.arange(num_slots // num_ranks)).reshape(-1) % num_experts
        table = jnp.asarray(np.tile(row, (len(ids), 1)), jnp.int32)
        return cls(table, num_experts, num_ranks, ids)


def fewest_slots(num_experts: int, num_ranks: int) -> int:
    """The smallest S with S ≥ E that P divides: `num_slots` without redundancy.

    >>> fewest_slots(60, 8)
    64
    """
    return -(-num_experts // num_ranks) * num_ranks


def check_sizes(num_experts: int, num_slots: int, num_ranks: int) -> None:
    """Raise ValueError unless P divides S and S ≥ E, all positive."""
    for name, value in (("experts", num_experts), ("slots", num_slots), ("ranks", num_ranks)):
        if value < 1:
            raise ValueError(f"the number of {name} is {value}; it must be at least 1")
    if num_slots % num_ranks:
        above = fewest_slots(max(num_slots, num_experts), num_ranks)
        raise ValueError(
            f"{num_slots} slots cannot be divided among {num_ranks} ranks; "
            f"use a multiple of {num_ranks}, such as {above}"
        )
    if num_slots < num_experts:
        raise ValueError(
            f"{num_slots} slots cannot hold {num_experts} experts; "
            f"use at least {fewest_slots(num_experts, num_ranks)} slots"
        )


def check_layer_ids(ids: tuple[int, ...], num_layers: int) -> None:
    if not ids:
        raise ValueError("a placement needs at least one layer; there is none")
    if len(ids) != num_layers:
        raise ValueError(f"{len(ids)} layer ids were given for {num_layers} layers; give one each")
    if len(set(ids)) < len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        raise ValueError(f"layer id {twice} stands twice; each layer needs an id of its own")


def _check_row(layer: int, row: np.ndarray, *, num_slots: int, num_experts: int, bound: int):
    if row.ndim != 1 or row.size != num_slots:
        raise ValueError(
            f"layer {layer}: the list of slots has shape {row.shape}, expected ({num_slots},) "
            "as in the first layer; every layer needs the same number of slots"
        )
    if not np.issubdtype(row.dtype, np.integer):
        raise ValueError(f"layer {layer}: expert ids must be integers, not {row.dtype}")
    unknown = (row < 0) | (row >= num_experts)
    if unknown.any():
        slot = int(unknown.argmax())
        raise ValueError(
            f"layer {layer}, slot {slot}: unknown expert {row[slot]}; "
            f"this model's experts are 0 to {num_experts - 1}"
        )
    count = np.bincount(row, minlength=num_experts)
    if not count.all():
        expert = int(count.argmin())
        raise ValueError(
            f"layer {layer}: expert {expert} has no slot ({(count > 0).sum()} of {num_experts} "
            "experts are placed); plan again for this model, or allow more slots"
        )
    if count.max() > bound:
        expert = int(count.argmax())
        raise ValueError(
            f"layer {layer}: expert {expert} has {count[expert]} replicas, more than the {bound} "
            "that this number of ranks can use; give its spare slots to other experts"
        )
