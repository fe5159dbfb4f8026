"""Training a decoder, expert parallel on any mesh: loss, step, and draws of text.

Axes: B sequences of all ranks, T tokens of each, L MoE layers, E experts, P ranks.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, UInt8

from jax_eplb.models import parameters
from jax_eplb.models.config import DecoderConfig
from jax_eplb.models.decoder import Batch, DecoderParams, decode, logits_of
from jax_eplb.moe import MoEConfig
from jax_eplb.placement import Placement
from jax_eplb.routing import balance, masked_mean, normalized_scores
from jax_eplb.tables import PlacementTables


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The `training` section of a config file."""

    seed: int
    steps: int
    sequences_per_step: int
    sequence_length: int
    learning_rate: float
    warmup_steps: int
    final_learning_rate: float
    weight_decay: float
    clip_norm: float
    balance_loss: float  # weight of Switch Transformer's load-balancing loss
    kinds: dict[str, float] = dataclasses.field(hash=False)  # share of each kind of text

    def __post_init__(self):
        if self.steps <= self.warmup_steps:
            raise ValueError(
                f"steps is {self.steps}; use more than warmup_steps, {self.warmup_steps}"
            )

    @classmethod
    def from_dict(cls, values: Any, source: str) -> "TrainingConfig":
        """Check the names of a mapping from a file; `source` is named in errors."""
        if not isinstance(values, dict):
            raise ValueError(f"{source}: 'training' must be a mapping, not {values!r}")
        names = {field.name for field in dataclasses.fields(cls)}
        for name in sorted(names ^ set(values)):
            fault = "missing" if name in names else f"unknown; known: {sorted(names)}"
            raise ValueError(f"{source}: the training setting {name!r} is {fault}")
        return cls(**values)

    def optimizer(self) -> optax.GradientTransformation:
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, self.warmup_steps, self.steps, self.final_learning_rate
        )

        def is_matrix(params: DecoderParams):
            named = parameters.named(params)
            mask = [not name.endswith("norm") for name, _ in named]
            return jax.tree.unflatten(jax.tree.structure(params), mask)

        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            optax.adamw(schedule, b2=0.98, weight_decay=self.weight_decay, mask=is_matrix),
        )


class Corpus(NamedTuple):
    """All kinds of text in one array, kind after kind."""

    text: UInt8[Array, "bytes"]
    start: Int[Array, "kinds"]
    length: Int[Array, "kinds"]
    share: Float[Array, "kinds"]


def corpus(texts: dict[str, bytes], training: TrainingConfig, mesh: Mesh) -> Corpus:
    """Put the text of `training.kinds` on every device.

    Raises ValueError where a kind has no text, or less than one passage of it.
    """
    shares = training.kinds
    missing = sorted(set(shares) - set(texts))
    if missing:
        raise ValueError(f"no text of kind {missing[0]!r}; there is {sorted(texts)}")
    for kind in shares:
        if len(texts[kind]) <= training.sequence_length:
            raise ValueError(
                f"{len(texts[kind])} bytes of kind {kind!r}; a passage takes "
                f"{training.sequence_length + 1}"
            )
    lengths = [len(texts[kind]) for kind in shares]
    text = np.frombuffer(b"".join(texts[kind] for kind in shares), np.uint8)
    start = np.cumsum([0, *lengths[:-1]], dtype=np.int32)
    share = np.array(list(shares.values()), np.float32)
    arrays = (text, start, np.array(lengths, np.int32), share / share.sum())
    return Corpus(*jax.device_put(arrays, NamedSharding(mesh, P())))


def draw(corpus: Corpus, seed: int, step: Int[Array, ""], size: int, length: int):
    """int32[B, T + 1] passages of step `step`: a function of seed and step, so resuming repeats."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    kind_key, place_key = jax.random.split(key)
    kind = jax.random.choice(kind_key, len(corpus.share), (size,), p=corpus.share)
    room = (corpus.length[kind] - length).astype(jnp.float32)
    offset = (jax.random.uniform(place_key, (size,)) * room).astype(jnp.int32)
    at = (corpus.start[kind] + offset)[:, None] + jnp.arange(length + 1, dtype=jnp.int32)[None]
    return corpus.text[at].astype(jnp.int32)


class Losses(NamedTuple):
    nats: Float[Array, ""]  # mean over tokens
    balance: Float[Array, ""]  # 1 where all experts share alike
    expert_tokens: Int[Array, "L E"]


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The static parts of training: what `jit` closes over."""

    config: DecoderConfig
    training: TrainingConfig
    mesh: Mesh
    axis_name: str = "expert"
    dtype: Any = jnp.float32  # of activations and products

    @property
    def moe(self) -> MoEConfig:
        return self.config.moe(
            num_slots=self.config.num_experts, num_ranks=self.mesh.shape[self.axis_name]
        )

    def placement(self) -> Placement:
        """Training holds each expert once, in order."""
        return Placement.default(
            num_experts=self.config.num_experts,
            num_ranks=self.moe.num_ranks,
            layer_ids=self.config.moe_layer_ids,
            num_slots=self.moe.num_slots,
        )

    def tables(self) -> PlacementTables:
        """What the layers read from the placement, on every device."""
        return jax.device_put(self.placement().tables(), NamedSharding(self.mesh, P()))

    def optimizer_state(self, params: DecoderParams):
        """A fresh optimizer state: what belongs to a parameter is spread as the parameter is."""
        init = self.training.optimizer().init
        everywhere = NamedSharding(self.mesh, P())
        shardings = optax.tree_utils.tree_map_params(
            init,
            lambda _, parameter: parameter.sharding,
            jax.eval_shape(init, params),
            params,
            transform_non_params=lambda _: everywhere,
        )
        return jax.jit(init, out_shardings=shardings)(params)

    def losses(self, params: DecoderParams, tables: PlacementTables, passages) -> Losses:
        """Next-token loss of int32[B, T + 1] passages, B divisible by the ranks."""
        axis = P(self.axis_name)
        local = functools.partial(
            _local_losses, config=self.config, moe=self.moe, axis_name=self.axis_name
        )
        run = jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(parameters.specs(self.config, self.axis_name), P(), axis),
            out_specs=axis,
        )
        nats, counts, probabilities = run(self._cast(params), tables, passages)
        expert_tokens = counts.sum(axis=0)  # [L, E]
        by_layer = balance(expert_tokens, probabilities.mean(axis=0))
        return Losses(nats.mean(), by_layer.mean(), expert_tokens)

    def step(self, state, tables: PlacementTables, corpus: Corpus, step: Int[Array, ""]):
        """One optimizer step; state is (params, optimizer state)."""
        params, optimizer_state = state
        passages = draw(
            corpus,
            self.training.seed,
            step,
            self.training.sequences_per_step,
            self.training.sequence_length,
        )

        def objective(params):
            losses = self.losses(params, tables, passages)
            return losses.nats + jnp.float32(self.training.balance_loss) * losses.balance, losses

        grads, losses = jax.grad(objective, has_aux=True)(params)
        updates, optimizer_state = self.training.optimizer().update(grads, optimizer_state, params)
        return (optax.apply_updates(params, updates), optimizer_state), losses

    def _cast(self, params: DecoderParams) -> DecoderParams:
        """Activations and products in `dtype`; the router and the embedding in float32.

        Gradients of an embedding are scattered additions, which are fast and exact in float32.
        """
        cast = jax.tree.map(lambda x: x.astype(self.dtype), params)
        moe = cast.sparse.moe._replace(router=params.sparse.moe.router)
        return cast._replace(sparse=cast.sparse._replace(moe=moe), embed=params.embed)


def _local_losses(params, tables, passages, *, config: DecoderConfig, moe, axis_name: str):
    """This rank's mean loss [1], counts [1, L, E] and mean router probabilities [1, L, E]."""
    tokens, targets = passages[:, :-1], passages[:, 1:]
    size, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (size, length))
    batch = Batch(tokens, positions, jnp.ones((size, length), bool), jnp.arange(size))
    output = decode(params, tables, batch, None, config=config, moe=moe, axis_name=axis_name)
    logits = logits_of(output.hidden, params)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()
    probabilities = masked_mean(normalized_scores(output.router_logits))
    return nats[None], output.expert_tokens[None], probabilities[None]
