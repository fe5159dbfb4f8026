"""Placement: which expert sits in each slot.

Axes: L layers, E experts, S slots, P ranks, N = S / P slots of a rank, R replicas of an expert.
Slots r·N .. r·N + N - 1 belong to rank r.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jax_eplb.tables import PlacementTables, derive_tables, max_replicas


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

    def tables(self, *, with_leveling: bool = False) -> PlacementTables:
        """All that is derived from `slot_to_expert`, for all layers.

        `with_leveling` for the replica choice `balanced`: a matrix of J × J float32 a layer.
        """
        return derive_tables(
            self.slot_to_expert,
            num_experts=self.num_experts,
            num_ranks=self.num_ranks,
            with_leveling=with_leveling,
        )

    @classmethod
    def from_slots(
        cls,
        slot_to_expert,
        *,
        num_experts: int,
        num_ranks: int,
        layer_ids: Sequence[int] | None = None,
        may_be_empty: bool = False,
    ) -> "Placement":
        """Check a table from outside, [L, S] of expert ids, and wrap it.

        If slots may be empty, as plans without some of the ranks have them, E is one that is.
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
            _check_row(layer, row, num_slots, num_experts, bound, may_be_empty)
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


def _check_row(
    layer: int, row: np.ndarray, num_slots: int, num_experts: int, bound: int, may_be_empty: bool
) -> None:
    if row.ndim != 1 or row.size != num_slots:
        raise ValueError(
            f"layer {layer}: the list of slots has shape {row.shape}, expected ({num_slots},) "
            "as in the first layer; every layer needs the same number of slots"
        )
    if not np.issubdtype(row.dtype, np.integer):
        raise ValueError(f"layer {layer}: expert ids must be integers, not {row.dtype}")
    unknown = (row < 0) | (row >= num_experts + may_be_empty)
    if unknown.any():
        slot = int(unknown.argmax())
        raise ValueError(
            f"layer {layer}, slot {slot}: unknown expert {row[slot]}; "
            f"this model's experts are 0 to {num_experts - 1}"
        )
    count = np.bincount(row, minlength=num_experts)[:num_experts]
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
