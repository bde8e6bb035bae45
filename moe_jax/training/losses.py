"""What is minimised beside the cross-entropy of `ops/cross_entropy.py`: load balance, router z."""

import jax
import jax.numpy as jnp

from moe_jax.model import router


def load_balancing_loss(
    stats: router.RouterStats, *, num_experts_per_tok: int, scope: str, divide_by_k: bool
) -> jax.Array:
    """E · sum_e f_e P_e over the global batch (Fedus et al., Switch, arXiv 2101.03961, eq. 4-6).

    f_e is the number of assignments of expert e per token (so sum f = k), P_e its mean probability;
    gradients pass through P only. At uniform routing it is k, or 1 with `divide_by_k`.

    Args:
      stats: as `model.Output.router`, summed here over the batch shards.
      scope: "layer" takes the product layer by layer and averages (OLMoE; Megatron and DeepSpeed
        add the layers up: their coefficient times the number of layers is ours); "all_layers"
        averages f and P over the layers first (Hugging Face's Mixtral, Drop-Upcycling), which a
        model with every layer collapsed onto other experts also satisfies.
      divide_by_k: True as in megablocks (OLMoE), False as in Hugging Face.
    """
    tokens_L = jnp.maximum(stats.num_tokens.sum(axis=1), 1)
    f_LE = stats.tokens_per_expert_E.sum(axis=1) / tokens_L[:, None]
    P_LE = stats.probability_sum_E.sum(axis=1) / tokens_L[:, None]
    if scope == "all_layers":
        f_LE, P_LE = (x_LE.mean(axis=0, keepdims=True) for x_LE in (f_LE, P_LE))
    loss = f_LE.shape[-1] * jnp.sum(f_LE * P_LE, axis=-1).mean()
    return loss / num_experts_per_tok if divide_by_k else loss


def router_z_loss(stats: router.RouterStats) -> jax.Array:
    """Mean over layers and tokens of logsumexp(router logits)^2 (Zoph et al., arXiv 2202.08906)."""
    return jnp.mean(stats.z_sum.sum(axis=1) / jnp.maximum(stats.num_tokens.sum(axis=1), 1))
