"""Router logits to experts and their weights, as the published models do it.

Axes: T tokens, K choices per token, E experts, G groups of experts.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jax_eplb.kernels import TopKSorted, by_row_blocks, top_k_sort

SCORES = ("softmax", "softmax_of_top_k", "sigmoid")
GROUP_SCORES = ("max", "top_2_sum")


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """How a router chooses K experts for a token, and how much each of them counts.

        RouterConfig()                                          # Mixtral, Qwen3-MoE
        RouterConfig(renormalize=False)                         # OLMoE, Qwen2-MoE
        RouterConfig("softmax_of_top_k", logits_bias=True)      # gpt-oss
        RouterConfig(renormalize=False, num_groups=8, groups_per_token=3,
                     scaling_factor=16.0)                       # DeepSeek-V2
        RouterConfig("sigmoid", selection_bias=True, num_groups=8, groups_per_token=4,
                     group_score="top_2_sum", scaling_factor=2.5)  # DeepSeek-V3, -R1

    `scores` are "softmax" over all experts, "sigmoid" of each, or "softmax_of_top_k": the logits
    choose, and the softmax is over the chosen. With `renormalize` the K weights sum to 1, before
    they are multiplied by `scaling_factor`. With `selection_bias` a bias by expert is added to
    the scores that choose, and not to those that weigh.

    With several groups, of E / `num_groups` neighbours each, a token chooses among the experts of
    its best `groups_per_token` groups. A group is as good as its best expert ("max"), or its two
    best together ("top_2_sum").

    `logits_bias` says that the router's linear map has a bias; its result is what `route` takes.
    """

    scores: str = "softmax"
    renormalize: bool = True
    selection_bias: bool = False
    num_groups: int = 1
    groups_per_token: int = 1
    group_score: str = "max"
    scaling_factor: float = 1.0
    logits_bias: bool = False

    def __post_init__(self):
        for name, known in (("scores", SCORES), ("group_score", GROUP_SCORES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {known}")
        if self.scores == "softmax_of_top_k" and not self.renormalize:
            raise ValueError(
                "renormalize is False, but the weights of 'softmax_of_top_k' always sum to 1; "
                "use renormalize=True, or scores='softmax'"
            )
        if self.num_groups < 1:
            raise ValueError(f"num_groups is {self.num_groups}; use 1 for no groups")
        if not 1 <= self.groups_per_token <= self.num_groups:
            raise ValueError(
                f"groups_per_token is {self.groups_per_token}; "
                f"it must lie between 1 and num_groups, {self.num_groups}"
            )
        if not (self.scaling_factor > 0 and math.isfinite(self.scaling_factor)):
            raise ValueError(
                f"scaling_factor is {self.scaling_factor}; use a positive number, 1.0 for none"
            )

    @property
    def logits_choose(self) -> bool:
        """Whether the experts of the highest logits are chosen, and nothing else counts."""
        return self.num_groups == 1 and not self.selection_bias

    def check_sizes(self, num_experts: int, experts_per_token: int) -> None:
        """Raise a ValueError where K of E experts cannot be chosen this way."""
        if not 1 <= experts_per_token <= num_experts:
            raise ValueError(
                f"experts_per_token is {experts_per_token}; "
                f"it must lie between 1 and the number of experts, {num_experts}"
            )
        if num_experts % self.num_groups:
            raise ValueError(
                f"{num_experts} experts do not divide into num_groups={self.num_groups} groups; "
                "use a divisor"
            )
        group_size = num_experts // self.num_groups
        if self.num_groups > 1 and self.group_score == "top_2_sum" and group_size < 2:
            raise ValueError(
                f"a group is {group_size} of {num_experts} experts, and 'top_2_sum' takes 2; "
                f"use num_groups of at most {num_experts // 2}, or group_score='max'"
            )
        if experts_per_token > self.groups_per_token * group_size:
            raise ValueError(
                f"a token chooses experts_per_token={experts_per_token} among "
                f"groups_per_token={self.groups_per_token} groups of {group_size} experts; "
                f"use groups_per_token of at least {-(-experts_per_token // group_size)}"
            )


class Routes(NamedTuple):
    """The experts that each token chose, the best first, and how much each one counts."""

    experts: Int[Array, "T K"]
    weights: Float[Array, "T K"]  # float32


def route(
    logits: Float[Array, "T E"],
    experts_per_token: int,
    config: RouterConfig,
    selection_bias: Float[Array, "E"] | None = None,
) -> Routes:
    """Choose each token's K experts and weigh them, in float32. Ties go to the lowest expert.

    The weights are differentiable in `logits`; the choice, and so the bias, has no gradient.

    >>> logits = jnp.array([[0.0, 2.0, 2.0, -9.0]])
    >>> route(logits, 2, RouterConfig()).weights.tolist()
    [[0.5, 0.5]]
    >>> bias = jnp.array([1.0, 0.0, 0.0, 0.0])
    >>> route(logits, 2, RouterConfig("sigmoid", selection_bias=True), bias).experts.tolist()
    [[0, 1]]
    """
    config.check_sizes(logits.shape[-1], experts_per_token)
    check_selection_bias(selection_bias, logits.shape[-1], config)
    logits = logits.astype(jnp.float32)
    experts = choose(logits, experts_per_token, config, selection_bias)
    return Routes(experts, weigh(logits, experts, config))


def route_and_sort(
    logits: Float[Array, "T E"],
    mask: Bool[Array, "T"],
    experts_per_token: int,
    config: RouterConfig,
    selection_bias: Float[Array, "E"] | None = None,
    rank_of_expert: Int[Array, "E"] | None = None,
) -> tuple[Routes, TopKSorted]:
    """`route` of a batch, and the order of its choices by expert, as `top_k_sort` tells it.

    Together they are one or two launches on an NVIDIA GPU. Not row by row: what is, is under
    `by_row_blocks` here.

    >>> logits, mask = jnp.array([[0.0, 2.0, 2.0, -9.0]] * 2), jnp.array([True, False])
    >>> routes, found = route_and_sort(logits, mask, 2, RouterConfig())
    >>> routes.weights.tolist(), found.choice.tolist(), found.expert_tokens.tolist()
    ([[0.5, 0.5], [0.5, 0.5]], [0, 1, 4, 4], [0, 1, 1, 0])
    """
    config.check_sizes(logits.shape[-1], experts_per_token)
    check_selection_bias(selection_bias, logits.shape[-1], config)
    logits = merits = logits.astype(jnp.float32)
    if not config.logits_choose:
        merits = by_row_blocks(lambda rows: merits_of(rows, config, selection_bias), logits)
    found = top_k_sort(merits, mask, experts_per_token, rank_of_expert)

    def weigh_rows(logits, experts, values):
        return weigh(logits, experts, config, values if config.logits_choose else None)

    weights = by_row_blocks(weigh_rows, logits, found.experts, found.values)
    return Routes(found.experts, weights), found


def check_selection_bias(
    selection_bias: Float[Array, "E"] | None, num_experts: int, config: RouterConfig
) -> None:
    """Raise a ValueError where the bias is not the one that `config` asks for."""
    if config.selection_bias != (selection_bias is not None):
        given = "missing" if selection_bias is None else f"given, of {selection_bias.shape}"
        raise ValueError(
            f"the selection bias is {given}, but RouterConfig.selection_bias is "
            f"{config.selection_bias}; a router either has one or has none"
        )
    if selection_bias is not None and selection_bias.shape != (num_experts,):
        raise ValueError(
            f"the selection bias is of shape {selection_bias.shape}; "
            f"it takes one value for each of the {num_experts} experts"
        )


def choose(
    logits: Float[Array, "T E"],
    experts_per_token: int,
    config: RouterConfig,
    selection_bias: Float[Array, "E"] | None = None,
) -> Int[Array, "T K"]:
    """The K best experts of each token, the best first.

    >>> choose(jnp.array([[1.0, 3.0, 3.0, 2.0]]), 3, RouterConfig()).tolist()
    [[1, 2, 3]]
    """
    return jax.lax.top_k(merits_of(logits, config, selection_bias), experts_per_token)[1]


def merits_of(
    logits: Float[Array, "T E"], config: RouterConfig, selection_bias: Float[Array, "E"] | None
) -> Float[Array, "T E"]:
    """What chooses: the experts of the greatest merit. It has no gradient.

    >>> merits_of(jnp.zeros((1, 2)), RouterConfig("sigmoid", selection_bias=True), jnp.ones(2))
    Array([[1.5, 1.5]], dtype=float32)
    """
    merit = jax.lax.stop_gradient(logits)
    grouped = config.num_groups > 1
    # Scores rise with logits, and round to ties that logits do not have. So the logits choose,
    # unless scores are added to something.
    if selection_bias is not None or (grouped and config.group_score == "top_2_sum"):
        merit = scores_of(merit, config)
    if selection_bias is not None:
        merit = merit + jax.lax.stop_gradient(selection_bias)[None].astype(jnp.float32)
    return within_best_groups(merit, config) if grouped else merit


def scores_of(logits: Float[Array, "T E"], config: RouterConfig) -> Float[Array, "T E"]:
    """What the selection bias is added to, and what groups are judged by.

    >>> scores_of(jnp.zeros((1, 4)), RouterConfig("softmax")).tolist()
    [[0.25, 0.25, 0.25, 0.25]]
    """
    if config.scores == "softmax":
        return jax.nn.softmax(logits, axis=-1)
    if config.scores == "sigmoid":
        return jax.nn.sigmoid(logits)
    return logits


def within_best_groups(merit: Float[Array, "T E"], config: RouterConfig) -> Float[Array, "T E"]:
    """-inf for the experts of all but each token's best groups; ties go to the lowest group.

    Not 0, which would beat the experts of a good group whose merit a bias has made negative.

    >>> merit = jnp.array([[-3.0, -1.0, -2.0, -2.0]])
    >>> within_best_groups(merit, RouterConfig(num_groups=2)).tolist()
    [[-3.0, -1.0, -inf, -inf]]
    """
    num_tokens, num_experts = merit.shape
    groups = merit.reshape(num_tokens, config.num_groups, num_experts // config.num_groups)
    if config.group_score == "max":
        group_merit = groups.max(axis=-1)
    else:
        group_merit = jax.lax.top_k(groups, 2)[0].sum(axis=-1)
    _, best = jax.lax.top_k(group_merit, config.groups_per_token)
    among_best = jax.nn.one_hot(best, config.num_groups, dtype=bool).any(axis=1)  # [T, G]
    return jnp.where(among_best[..., None], groups, -jnp.inf).reshape(merit.shape)


def weigh(
    logits: Float[Array, "T E"],
    experts: Int[Array, "T K"],
    config: RouterConfig,
    chosen: Float[Array, "T K"] | None = None,
) -> Float[Array, "T K"]:
    """How much each chosen expert counts; `chosen` are its logits, if they are known.

    >>> weigh(jnp.zeros((1, 4)), jnp.array([[3, 1]]), RouterConfig(renormalize=False)).tolist()
    [[0.25, 0.25]]
    """
    if chosen is None:
        chosen = jnp.take_along_axis(logits, experts, axis=-1)
    if config.renormalize:
        # The softmax of logarithms is their scores divided by their sum. Unlike the quotient it
        # is right, and has a gradient, where all scores are too small for float32.
        logarithms = jax.nn.log_sigmoid(chosen) if config.scores == "sigmoid" else chosen
        weights = jax.nn.softmax(logarithms, axis=-1)
    elif config.scores == "sigmoid":
        weights = jax.nn.sigmoid(chosen)
    else:
        weights = jnp.exp(chosen - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
    return weights * config.scaling_factor
