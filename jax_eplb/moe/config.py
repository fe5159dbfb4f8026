"""What an MoE layer is made of: the static sizes, checked once."""

import dataclasses

from jax_eplb.kernels import check_implementation
from jax_eplb.placement import check_sizes


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Static sizes and choices of an MoE layer; hashable, so `jit` takes it whole.

    `max_tokens_per_wave` bounds the rows that a rank receives in one round of the exchange
    (TensorRT-LLM's `moe_max_num_tokens`); a fuller batch takes more rounds. None: twice the even
    share of the batch.
    """

    embed_dim: int  # D
    hidden_dim: int  # F, of one expert
    num_experts: int  # E
    experts_per_token: int  # K
    num_slots: int  # S
    num_ranks: int  # P
    shared_hidden_dim: int = 0  # of the shared expert that serves every token; 0: none
    renormalize: bool = True
    max_tokens_per_wave: int | None = None
    kernel: str | None = None  # an implementation of grouped_matmul; None: by backend

    def __post_init__(self):
        check_sizes(self.num_experts, self.num_slots, self.num_ranks)
        for name, least in (("embed_dim", 1), ("hidden_dim", 1), ("shared_hidden_dim", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"experts_per_token is {self.experts_per_token}; "
                f"it must lie between 1 and the number of experts, {self.num_experts}"
            )
        if self.max_tokens_per_wave is not None and self.max_tokens_per_wave < self.num_ranks:
            raise ValueError(
                f"max_tokens_per_wave is {self.max_tokens_per_wave}; a wave carries at least one "
                f"token from each of the {self.num_ranks} ranks"
            )
        if self.kernel is not None:
            check_implementation(self.kernel)

    @property
    def slots_per_rank(self) -> int:
        return self.num_slots // self.num_ranks

    def wave_capacity(self, num_tokens: int) -> int:
        """Rows that one rank sends another in a wave, for a batch of T tokens a rank."""
        choices = max(1, num_tokens * self.experts_per_token)
        if self.max_tokens_per_wave is not None:
            return min(choices, self.max_tokens_per_wave // self.num_ranks)
        # Twice the even share: a second wave is then rare, and small batches never need one.
        return min(choices, max(64, -(-2 * choices // self.num_ranks)))
