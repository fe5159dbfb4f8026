"""A decoder small enough for the tests, on the tests' devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jax_eplb import Placement, expert_mesh
from jax_eplb.models import Cache, DecoderConfig, DecoderParams, decode, parameters
from jax_eplb.models.decoder import Batch, logits_of

SMALL = DecoderConfig(
    vocab_size=32,
    embed_dim=16,
    num_layers=3,
    num_dense_layers=1,
    num_heads=2,
    head_dim=8,
    dense_hidden_dim=24,
    num_experts=8,
    experts_per_token=2,
    expert_hidden_dim=8,
    shared_hidden_dim=8,
    max_length=16,
)


@functools.cache
def fresh(config: DecoderConfig = SMALL, ranks: int = 4, seed: int = 0) -> DecoderParams:
    """Fresh parameters on a mesh of so many ranks."""
    return parameters.initialize(jax.random.key(seed), config, expert_mesh(ranks), "expert")


@functools.cache
def drawn_on_host(config: DecoderConfig = SMALL) -> DecoderParams:
    """Parameters as numpy arrays in expert order, made without compiling anything."""
    generator = np.random.default_rng(0)

    def make(name, shape):
        if name.endswith("norm"):
            return np.ones(shape, np.float32)
        scale = 1.0 if name == "embed" else shape[-2] ** -0.5
        return (generator.normal(size=shape) * scale).astype(np.float32)

    tree = parameters.shapes(config)
    structure = jax.tree.structure(tree, is_leaf=parameters.is_shape)
    return jax.tree.unflatten(structure, [make(*leaf) for leaf in parameters.named(tree)])


def default_placement(config: DecoderConfig, num_slots: int, ranks: int) -> Placement:
    return Placement.default(
        num_experts=config.num_experts,
        num_slots=num_slots,
        num_ranks=ranks,
        layer_ids=config.moe_layer_ids,
    )


class Runner:
    """`decode`, jitted, on one mesh, with the parameters of `drawn_on_host` under a placement."""

    def __init__(self, placement: Placement, config: DecoderConfig = SMALL):
        self.config, ranks = config, placement.num_ranks
        self.mesh = expert_mesh(ranks)
        self.moe = config.moe(num_slots=placement.num_slots, num_ranks=ranks)
        self.use(placement)
        axis = P("expert")
        specs = parameters.specs(config, "expert")
        with_cache = P(None, "expert")
        outputs = (axis, with_cache, axis, axis)

        def local(params, tables, batch, cache):
            out = decode(
                params, tables, batch, cache, config=config, moe=self.moe, axis_name="expert"
            )
            logits = logits_of(out.hidden, params)
            return logits, out.cache, out.expert_tokens[None], out.rank_tokens[None]

        self.run = jax.jit(
            jax.shard_map(
                local,
                mesh=self.mesh,
                in_specs=(specs, P(), axis, with_cache),
                out_specs=outputs,
            )
        )

    def use(self, placement: Placement) -> None:
        self.tables = placement.tables()
        self.params = parameters.on_mesh(
            drawn_on_host(self.config),
            np.asarray(placement.slot_to_expert),
            self.config,
            self.mesh,
            "expert",
            jnp.float32,
        )

    def empty_cache(self, sequences: int, capacity: int = 12) -> Cache:
        shape = (self.config.num_layers, sequences, capacity, self.config.num_heads)
        zeros = np.zeros((*shape, self.config.head_dim), np.float32)
        return Cache(zeros, zeros)

    def __call__(self, tokens, start=None, valid=None, cache=None, seats=None):
        """(logits [B, T, V], cache, counts [P, L, E], rank tokens [P, L]); B over all ranks."""
        size, length = tokens.shape
        start = np.zeros(size, np.int32) if start is None else np.asarray(start, np.int32)
        positions = start[:, None] + np.arange(length, dtype=np.int32)
        valid = np.ones(tokens.shape, bool) if valid is None else valid
        if seats is None:
            seats = np.arange(size, dtype=np.int32) % (size // self.mesh.size)
        batch = Batch(tokens.astype(np.int32), positions, valid, np.asarray(seats, np.int32))
        return self.run(self.params, self.tables, batch, cache)
