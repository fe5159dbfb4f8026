"""The MoE layer written twice more, without ranks, slots or waves, to compare with.

Axes: T tokens, D embedding width, E experts, K choices per token, F hidden width.
"""

import jax
import jax.numpy as jnp
import numpy as np


def moe_by_numpy(tokens, router, gate_up, down, choices, *, shared=None, mask=None):
    """float64[T, D], one token and one expert at a time; weights in expert order [E, …]."""
    tokens, router, gate_up, down = (
        np.asarray(x, np.float64) for x in (tokens, router, gate_up, down)
    )
    out = np.zeros_like(tokens)
    for t, token in enumerate(tokens):
        if mask is None or mask[t]:
            logits = token @ router
            chosen = np.argsort(-logits, kind="stable")[:choices]
            weights = np.exp(logits[chosen] - logits.max())
            for expert, weight in zip(chosen, weights / weights.sum(), strict=True):
                out[t] += weight * _expert_by_numpy(token, gate_up[expert], down[expert])
        if shared is not None:
            out[t] += _expert_by_numpy(token, *(np.asarray(x, np.float64) for x in shared))
    return out


def _expert_by_numpy(token, gate_up, down):
    gate, up = np.split(token @ gate_up, 2)
    return (gate / (1 + np.exp(-gate)) * up) @ down


def moe_dense(tokens, router, gate_up, down, choices, *, shared=None, mask=None):
    """Every expert on every token, weighted by zero where it was not chosen; differentiable."""
    logits = tokens @ router
    _, chosen = jax.lax.top_k(logits, choices)
    is_chosen = jax.nn.one_hot(chosen, router.shape[1], dtype=bool).any(axis=1)  # [T, E]
    weights = jax.nn.softmax(jnp.where(is_chosen, logits, -jnp.inf), axis=1)
    every = _gated(jnp.einsum("td,edf->tef", tokens, gate_up))
    out = jnp.einsum("te,tef,efd->td", weights, every, down)
    if mask is not None:
        out = jnp.where(mask[:, None], out, 0)
    if shared is not None:
        out = out + _gated(tokens @ shared[0]) @ shared[1]
    return out


def _gated(gate_up):
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up
