"""The layer against the published models, as the library `transformers` writes them.

Each block gets random weights, ours the same ones; both see the same tokens, in float32.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_eplb import MoEConfig, Placement, expert_mesh
from jax_eplb.moe import MoEParams, moe_forward
from jax_eplb.moe.feed_forward import ExpertWeights, SharedWeights
from jax_eplb.routing.losses import load_balancing_loss
from jax_eplb.routing.router import RouterConfig, route

if not all(map(importlib.util.find_spec, ("torch", "transformers"))):
    pytest.skip("it takes pip install 'jax-eplb[transformers]'", allow_module_level=True)

import torch
from transformers.models.deepseek_v2 import modeling_deepseek_v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.mixtral import modeling_mixtral
from transformers.models.olmoe import modeling_olmoe
from transformers.models.qwen2_moe import modeling_qwen2_moe
from transformers.models.qwen3_moe import modeling_qwen3_moe

D, F, E, K, T = 16, 12, 8, 3, 40
RANKS, SLOTS = 4, 12
GROUPS = {"num_groups": 4, "groups_per_token": 2}
THEIR_GROUPS = {"n_group": 4, "topk_group": 2}


@dataclasses.dataclass(frozen=True)
class Model:
    """How to build a block of `transformers`, and what the same is called here."""

    block: Callable[..., Any]
    config: Callable[..., Any]
    theirs: dict[str, Any]
    router: RouterConfig
    ours: dict[str, Any] = dataclasses.field(default_factory=dict)


_MIXTRAL = {"intermediate_size": F, "num_local_experts": E}
_QWEN = {"moe_intermediate_size": F, "num_experts": E}
_DEEPSEEK = {"moe_intermediate_size": F, "n_routed_experts": E, "n_shared_experts": 2}
MODELS = {
    "mixtral": Model(
        modeling_mixtral.MixtralSparseMoeBlock,
        modeling_mixtral.MixtralConfig,
        _MIXTRAL,
        RouterConfig(),
    ),
    "qwen2_moe": Model(
        modeling_qwen2_moe.Qwen2MoeSparseMoeBlock,
        modeling_qwen2_moe.Qwen2MoeConfig,
        _QWEN | {"shared_expert_intermediate_size": 20},
        RouterConfig(renormalize=False),
        {"shared_hidden_dim": 20, "shared_gate": True},
    ),
    "qwen3_moe": Model(
        modeling_qwen3_moe.Qwen3MoeSparseMoeBlock,
        modeling_qwen3_moe.Qwen3MoeConfig,
        _QWEN | {"norm_topk_prob": True},
        RouterConfig(),
    ),
    "olmoe": Model(
        modeling_olmoe.OlmoeSparseMoeBlock,
        modeling_olmoe.OlmoeConfig,
        {"intermediate_size": F, "num_experts": E},
        RouterConfig(renormalize=False),
    ),
    "deepseek_v2": Model(
        modeling_deepseek_v2.DeepseekV2Moe,
        modeling_deepseek_v2.DeepseekV2Config,
        _DEEPSEEK
        | THEIR_GROUPS
        | {"topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0},
        RouterConfig(renormalize=False, scaling_factor=16.0, **GROUPS),
        {"shared_hidden_dim": 2 * F},
    ),
    "deepseek_v3": Model(
        modeling_deepseek_v3.DeepseekV3MoE,
        modeling_deepseek_v3.DeepseekV3Config,
        _DEEPSEEK | THEIR_GROUPS | {"norm_topk_prob": True, "routed_scaling_factor": 2.5},
        RouterConfig(
            "sigmoid",
            selection_bias=True,
            group_score="top_2_sum",
            scaling_factor=2.5,
            **GROUPS,
        ),
        {"shared_hidden_dim": 2 * F},
    ),
    "gpt_oss": Model(
        modeling_gpt_oss.GptOssMLP,
        modeling_gpt_oss.GptOssConfig,
        _MIXTRAL,
        RouterConfig("softmax_of_top_k", logits_bias=True),
        {"activation": "clamped_swiglu", "expert_biases": True},
    ),
}
each_model = pytest.mark.parametrize("name", MODELS)


@functools.cache
def built(name):
    """The block of `transformers`, with random weights that route tokens to all experts."""
    model = MODELS[name]
    config = model.config(
        hidden_size=D, num_experts_per_tok=K, num_attention_heads=2, **model.theirs
    )
    config._experts_implementation = "eager"
    block = model.block(config).float().eval()
    generator = torch.Generator().manual_seed(sorted(MODELS).index(name))
    with torch.no_grad():
        for weight in block.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.4)
        for bias in block.buffers():  # DeepSeek-V3's selection bias
            bias.copy_(torch.randn(bias.shape, generator=generator) * 0.1)
    return block


def tokens_of(name, size=T):
    scale = 3 if name == "gpt_oss" else 1  # large enough for its clamps
    return scale * np.random.default_rng(len(name)).normal(size=(size, D)).astype(np.float32)


def array(tensor):
    return jnp.asarray(tensor.detach().numpy())


def router_of(block):
    return block.router if hasattr(block, "router") else block.gate


def params_of(block):
    """Our parameters, experts in expert order: [in, out] where `torch` has [out, in]."""
    router, experts = router_of(block), block.experts
    gate_up, down = array(experts.gate_up_proj), array(experts.down_proj)
    biases = None, None
    if hasattr(experts, "gate_up_proj_bias"):
        # gpt-oss has [in, out] too, with gate and up in turn.
        halves = functools.partial(jnp.concatenate, axis=-1)
        gate_up = halves([gate_up[..., ::2], gate_up[..., 1::2]])
        bias = array(experts.gate_up_proj_bias)
        biases = halves([bias[..., ::2], bias[..., 1::2]]), array(experts.down_proj_bias)
    else:
        gate_up, down = gate_up.swapaxes(1, 2), down.swapaxes(1, 2)
    shared = getattr(block, "shared_experts", getattr(block, "shared_expert", None))
    if shared is not None:
        columns = [array(shared.gate_proj.weight).T, array(shared.up_proj.weight).T]
        gate = getattr(block, "shared_expert_gate", None)
        shared = SharedWeights(
            jnp.concatenate(columns, axis=1),
            array(shared.down_proj.weight).T,
            None if gate is None else array(gate.weight).T,
        )
    bias = getattr(router, "bias", None)
    selection_bias = getattr(router, "e_score_correction_bias", None)
    return MoEParams(
        array(router.weight).T,
        ExpertWeights(gate_up, down, *biases),
        shared,
        None if bias is None else array(bias),
        None if selection_bias is None else array(selection_bias),
    )


def by_expert(experts, weights):
    """float[T, E]: the weight of each expert, 0 where it was not chosen."""
    dense = np.zeros((len(experts), E), np.float32)
    np.put_along_axis(dense, np.asarray(experts), np.asarray(weights), axis=1)
    return dense


@each_model
def test_tokens_are_routed_to_the_same_experts_with_the_same_weights(name):
    block = built(name)
    with torch.no_grad():
        logits, weights, experts = router_of(block)(torch.from_numpy(tokens_of(name, 300)))
    bias = params_of(block).selection_bias
    routes = route(jnp.asarray(logits.numpy()), K, MODELS[name].router, bias)
    assert len(np.unique(experts)) == E
    found = by_expert(routes.experts, routes.weights)
    np.testing.assert_allclose(found, by_expert(experts, weights), rtol=2e-5)


@each_model
def test_the_router_learns_the_same(name):
    block, router = built(name), MODELS[name].router
    counts = np.random.default_rng(1).normal(size=(T, E)).astype(np.float32)
    logits, weights, experts = router_of(block)(torch.from_numpy(tokens_of(name)))
    logits.retain_grad()
    (weights * torch.from_numpy(counts).gather(1, experts)).sum().backward()
    bias = params_of(block).selection_bias

    @jax.grad
    def gradient(logits):
        routes = route(logits, K, router, bias)
        return (routes.weights * jnp.take_along_axis(counts, routes.experts, axis=1)).sum()

    expected = logits.grad.numpy()
    found = gradient(array(logits))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6 * router.scaling_factor)


def test_groups_are_masked_as_deepseek_masks_them():
    # With merits below zero, a mask of 0 would choose from the groups that lost.
    model, router = MODELS["deepseek_v3"], router_of(built("deepseek_v3"))
    bias = router.e_score_correction_bias - 3
    tokens = torch.from_numpy(tokens_of("deepseek_v3"))
    with torch.no_grad():
        logits = tokens @ router.weight.T
        before = router.e_score_correction_bias.clone()
        router.e_score_correction_bias.copy_(bias)
        _, weights, experts = router(tokens)
        router.e_score_correction_bias.copy_(before)
    routes = route(jnp.asarray(logits.numpy()), K, model.router, array(bias))
    found = by_expert(routes.experts, routes.weights)
    np.testing.assert_allclose(found, by_expert(experts, weights), rtol=2e-5)


@functools.cache
def layer(name, **keywords):
    """tokens [T, D] and parameters by expert, through our layer on four devices, with replicas."""
    model = MODELS[name]
    config = MoEConfig(D, F, E, K, SLOTS, RANKS, router=model.router, **model.ours, **keywords)
    placement = Placement.default(num_experts=E, num_slots=SLOTS, num_ranks=RANKS)
    tables = placement.tables(with_leveling=True).of_layer(0)
    axis = P("expert")

    def local(params, tables, tokens, mask):
        output = moe_forward(params, tables, tokens, mask, config=config, axis_name="expert")
        return output.tokens, output.router_logits, output.expert_tokens[None]

    run = jax.shard_map(
        local,
        mesh=expert_mesh(RANKS),
        in_specs=(MoEParams(P(), axis, P(), P(), P()), P(), axis, axis),
        out_specs=axis,
    )

    def from_expert_order(params, tokens):
        in_slots = jax.tree.map(lambda bank: bank[placement.slot_to_expert[0]], params.experts)
        mask = jnp.ones(len(tokens), bool)
        return run(params._replace(experts=in_slots), tables, tokens, mask)

    return jax.jit(from_expert_order)


def check_block(name, **keywords):
    block, tokens = built(name), tokens_of(name)
    with torch.no_grad():
        expected = block(torch.from_numpy(tokens)[None])
        logits, _, experts = router_of(block)(torch.from_numpy(tokens))
    if isinstance(expected, tuple):  # gpt-oss gives its weights too
        expected = expected[0]
    found, router_logits, expert_tokens = layer(name, **keywords)(params_of(block), tokens)
    np.testing.assert_allclose(router_logits, logits.numpy(), rtol=1e-5, atol=1e-5)
    counts = np.bincount(experts.numpy().ravel(), minlength=E)
    np.testing.assert_array_equal(expert_tokens.sum(axis=0), counts)
    scale = float(expected.abs().max())
    np.testing.assert_allclose(found, expected[0].numpy(), rtol=1e-5, atol=2e-6 * scale)


@each_model
def test_the_block_gives_the_same_output(name):
    check_block(name, replica_choice="even", exchange="waves")


@pytest.mark.slow
@pytest.mark.parametrize("replica_choice", ["local", "balanced", "fewest"])
@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss"])
def test_the_block_gives_the_same_output_by_other_policies(name, replica_choice):
    check_block(name, replica_choice=replica_choice, exchange="all_gather")


@pytest.mark.parametrize("padded", [False, True])
def test_the_load_balancing_loss_is_mixtrals(padded):
    logits = np.random.default_rng(0).normal(size=(3, T, E)).astype(np.float32)
    mask = np.ones((4, T // 4), bool)
    if padded:
        mask[1, 3:] = mask[2] = False
    expected = modeling_mixtral.load_balancing_loss_func(
        tuple(torch.from_numpy(logits)), E, K, torch.from_numpy(mask).long() if padded else None
    )
    found = load_balancing_loss(logits, K, mask.reshape(-1) if padded else None)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
