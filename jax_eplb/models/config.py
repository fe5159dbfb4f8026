"""The decoder's sizes, read from a file of `configs/`."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import yaml

from jax_eplb.moe import MoEConfig


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Static sizes of a decoder whose first layers are dense and whose others are MoE layers."""

    vocab_size: int
    embed_dim: int
    num_layers: int  # dense and MoE
    num_dense_layers: int
    num_heads: int
    head_dim: int
    dense_hidden_dim: int
    num_experts: int
    experts_per_token: int
    expert_hidden_dim: int
    shared_hidden_dim: int
    max_length: int
    rope_base: float = 10_000.0
    norm_epsilon: float = 1e-6

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("num_dense_layers", "shared_hidden_dim") else 1
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
            if field.type is int and not whole:
                raise ValueError(f"{field.name} is {value!r}; use an integer of {least} or more")
            # YAML 1.1 reads 1e-6 as text: it wants 1.0e-6.
            if field.type is float and not (isinstance(value, int | float) and value > 0):
                raise ValueError(f"{field.name} is {value!r}; use a positive number, as 1.0e-6")
        if self.num_dense_layers >= self.num_layers:
            raise ValueError(
                f"num_dense_layers is {self.num_dense_layers} of {self.num_layers} layers; "
                "at least one must be an MoE layer"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary positions need an even one")
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token is {self.experts_per_token} of {self.num_experts} experts; "
                "a token cannot choose more than there are"
            )

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.num_dense_layers

    @property
    def moe_layer_ids(self) -> tuple[int, ...]:
        return tuple(range(self.num_dense_layers, self.num_layers))

    def moe(
        self,
        *,
        num_slots: int,
        num_ranks: int,
        moe_max_num_tokens: int | None = None,
        replica_choice: str = "even",
    ) -> MoEConfig:
        """The MoE layers' config on so many slots and ranks."""
        return MoEConfig(
            embed_dim=self.embed_dim,
            hidden_dim=self.expert_hidden_dim,
            num_experts=self.num_experts,
            experts_per_token=self.experts_per_token,
            num_slots=num_slots,
            num_ranks=num_ranks,
            shared_hidden_dim=self.shared_hidden_dim,
            replica_choice=replica_choice,
            moe_max_num_tokens=moe_max_num_tokens,
        )

    @classmethod
    def from_dict(cls, values: Any, source: str) -> "DecoderConfig":
        """Check the names of a mapping from a file; `source` is named in errors."""
        if not isinstance(values, dict):
            raise ValueError(f"{source}: 'model' must be a mapping of sizes, not {values!r}")
        fields = dataclasses.fields(cls)
        known = {field.name for field in fields}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(
                f"{source}: unknown model setting {unknown[0]!r}; known: {sorted(known)}"
            )
        required = {f.name for f in fields if f.default is dataclasses.MISSING}
        missing = sorted(required - set(values))
        if missing:
            raise ValueError(f"{source}: the model setting {missing[0]!r} is missing")
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None


def read_config(path: str | os.PathLike) -> dict[str, Any]:
    """Read a YAML file of `configs/`: a mapping with at least a `model` section."""
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML ({error})") from None
    if not isinstance(values, dict) or "model" not in values:
        raise ValueError(f"{path}: expected a mapping with a 'model' section")
    return values
