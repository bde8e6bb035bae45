"""Balance by rules outside of the gradient: adaptive coefficients, and biases on the choice."""

import re

import jax
import jax.numpy as jnp
from flax import struct

from moe_jax import model, tree
from moe_jax.config.sections import AdaptiveBalance, Balance
from moe_jax.model import router
from moe_jax.model.config import MOE
from moe_jax.model.layout import layer_groups

BIAS = re.compile(r"blocks/(\w+)/moe/router/bias")


@struct.dataclass
class RouterState:
    """What the rules remember from step to step; without leaves where they remember nothing."""

    coefficients_L: jax.Array | None = None  # of each sparse layer's load-balancing loss


def initial(config: model.ModelConfig, balance: Balance) -> RouterState:
    """The state at the first step of a run of this model and `balance` section."""
    num_sparse = config.layer_kinds.count(MOE)
    if balance.load_balancing_schedule != "adaptive" or not num_sparse:
        return RouterState()
    return RouterState(jnp.full(num_sparse, balance.load_balancing_coefficient, jnp.float32))


def adapted(
    state: RouterState,
    config: model.ModelConfig,
    adaptive: AdaptiveBalance,
    tokens_per_expert_LE: jax.Array,
    dropped_L: jax.Array,
) -> RouterState:
    """alpha <- beta alpha + (1 - beta) min(rate · d, maximum) for each layer's drop rate d.

    Wei et al., Skywork-MoE, arXiv 2406.06563, whose rate (their xi) is 1/5, maximum 0.01 and beta
    0.99. Where dispatch drops nothing d is the rate at which it would have.
    """
    if state.coefficients_L is None:
        return state
    if config.dispatch == "capacity":
        rate_L = dropped_L / jnp.maximum(tokens_per_expert_LE.sum(axis=1), 1)
    else:
        rate_L = router.virtual_drop_rate(tokens_per_expert_LE, config.capacity_factor)
    target_L = jnp.minimum(adaptive.rate * rate_L, adaptive.maximum)
    beta = adaptive.beta
    return RouterState(beta * state.coefficients_L + (1 - beta) * target_L)


def with_updated_biases(
    params: dict,
    config: model.ModelConfig,
    rate: float,
    tokens_per_expert_LE: jax.Array,
    frozen: str = "",
) -> dict:
    """Parameters with bias += rate · sign(mean load - load) in every router that has one.

    But for those whose path `frozen` finds.

    Wang et al., arXiv 2408.15664, algorithm 1; DeepSeek-V3, arXiv 2412.19437, §2.1.2. The biases
    of a layer are then brought to a mean of zero, which changes no choice and keeps them from
    drifting off.
    """
    sparse = [layer for layer, kind in enumerate(config.layer_kinds) if kind == MOE]
    layers = {p: ls for group in layer_groups(config.block_kinds) for p, ls in group.layers.items()}

    def updated(name, leaf):
        match = BIAS.fullmatch(name)
        if not match or (frozen and re.search(frozen, name)):
            return leaf
        rows = jnp.array([sparse.index(layer) for layer in layers[match[1]]])
        load_LE = tokens_per_expert_LE[rows]
        bias_LE = leaf + rate * jnp.sign(load_LE.mean(axis=1, keepdims=True) - load_LE)
        return bias_LE - bias_LE.mean(axis=1, keepdims=True)

    return tree.map_with_name(updated, params)
