"""What an MoE layer is made of: the static sizes and choices, checked once."""

import dataclasses

from jax_eplb.kernels import activation_named, check_implementation
from jax_eplb.moe.exchange_sizes import (
    IMPLEMENTATIONS,
    ExchangeSizes,
    exchange_sizes,
    least_in_wave,
)
from jax_eplb.placement import check_sizes
from jax_eplb.routing import (
    POLICIES,
    REPLICA_CHOICES,
    Ranks,
    ReplicaChoice,
    RouterConfig,
    split_of,
)
from jax_eplb.routing.fewest import WORTH_READING


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Static sizes and choices of an MoE layer; hashable, so `jit` takes it whole.

    `moe_max_num_tokens` (TensorRT-LLM's name) bounds the rows that a rank receives and computes in
    one wave of the exchange; a fuller batch takes more waves, of which the next arrives while one
    is computed. None: a few times the even share, or of a small batch all that there can be.
    """

    embed_dim: int  # D
    hidden_dim: int  # F, of one expert
    num_experts: int  # E
    experts_per_token: int  # K
    num_slots: int  # S
    num_ranks: int  # P
    router: RouterConfig = dataclasses.field(default_factory=RouterConfig)
    activation: str = "swiglu"  # a name of kernels.ACTIVATIONS
    expert_biases: bool = False
    shared_hidden_dim: int = 0  # of the shared expert that serves every token; 0: none
    shared_gate: bool = False  # the shared expert counts as much as a sigmoid gate says
    # A name of routing.POLICIES, or "auto": "balanced" for large batches, "fewest" for small ones.
    replica_choice: str = "even"
    ranks_per_node: int | None = None  # None: all on one node
    exchange: str = "waves"  # or "all_gather", for few ranks; "ragged", on GPUs
    moe_max_num_tokens: int | None = None
    kernel: str | None = None  # an implementation of grouped_matmul; None: by backend

    def __post_init__(self):
        check_sizes(self.num_experts, self.num_slots, self.num_ranks)
        for name, least in (("embed_dim", 1), ("hidden_dim", 1), ("shared_hidden_dim", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        self.router.check_sizes(self.num_experts, self.experts_per_token)
        activation_named(self.activation)
        for name, known in (("replica_choice", REPLICA_CHOICES), ("exchange", IMPLEMENTATIONS)):
            if getattr(self, name) not in known:
                choices = ", ".join(known)
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; use one of {choices}")
        if self.shared_gate and not self.shared_hidden_dim:
            raise ValueError("shared_gate needs a shared expert; set shared_hidden_dim")
        if self.ranks_per_node is not None and (
            self.ranks_per_node < 1 or self.num_ranks % self.ranks_per_node
        ):
            raise ValueError(
                f"ranks_per_node is {self.ranks_per_node}; it must divide the number of ranks, "
                f"{self.num_ranks}"
            )
        if self.moe_max_num_tokens is not None and self.moe_max_num_tokens < self._least_in_wave:
            raise ValueError(
                f"moe_max_num_tokens is {self.moe_max_num_tokens}; the least that a rank takes in "
                f"a round, with exchange {self.exchange!r}, is {self._least_in_wave} rows"
            )
        if self.kernel is not None:
            check_implementation(self.kernel)

    @property
    def slots_per_rank(self) -> int:
        return self.num_slots // self.num_ranks

    @property
    def needs_leveling(self) -> bool:
        """Whether `Placement.tables` must derive what divides a batch by its counts."""
        return split_of(self.replica_choice) == "balanced"

    def policy(self, num_tokens: int) -> ReplicaChoice:
        """What divides a batch of T tokens a rank among replicas."""
        if self.replica_choice != "auto":
            return POLICIES[self.replica_choice]
        choices = num_tokens * self.num_ranks * self.experts_per_token
        # Half of that for the mean expert, as others have more.
        few = choices <= WORTH_READING // 2 * self.num_experts
        return POLICIES["fewest" if few else "balanced"]

    @property
    def gate_up_dim(self) -> int:
        """U: the columns of one expert's first product."""
        return self.hidden_dim * (2 if activation_named(self.activation).gated else 1)

    def ranks(self, axis_name: str) -> Ranks:
        return Ranks(axis_name, self.num_ranks, self.slots_per_rank, self.ranks_per_node)

    def exchange_sizes(self, num_tokens: int) -> ExchangeSizes:
        """How much travels at once, for a batch of T tokens a rank."""
        return exchange_sizes(
            self.exchange,
            num_tokens,
            self.experts_per_token,
            self.num_ranks,
            self.slots_per_rank,
            self.embed_dim,
            self.moe_max_num_tokens,
        )

    @property
    def _least_in_wave(self) -> int:
        return least_in_wave(
            self.exchange, self.experts_per_token, self.num_ranks, self.slots_per_rank
        )
