"""Routing is data: which experts a token goes to and with what weight, and what to count of it."""

import math

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Routing:
    """The decision for M tokens. `weight` is what an expert's output is multiplied by."""

    expert_index_MA: jax.Array
    weight_MA: jax.Array
    logits_ME: jax.Array
    probabilities_ME: jax.Array


@struct.dataclass
class RouterStats:
    """Sums over the tokens of a batch shard; padding is not counted.

    In `model.Output` every field has two leading axes: sparse layers (in the order of the model)
    and batch shards. They are not summed over shards, so that one step can compute a balance loss
    over a device as well as over the global batch. `routing`, when asked for, has the leading axes
    sparse layers, batch, time.
    """

    tokens_per_expert_E: jax.Array  # assignments, all A slots together
    probability_sum_E: jax.Array
    z_sum: jax.Array  # of logsumexp(logits)^2
    num_tokens: jax.Array
    num_dropped: jax.Array  # assignments beyond an expert's capacity; 0 when dropless
    routing: Routing | None = None


def route(
    logits_ME: jax.Array,
    *,
    num_experts_per_tok: int,
    norm_topk_prob: bool,
    gate_norm_std: float | None = None,
) -> Routing:
    """Softmax over all experts, then the top k; ties go to the lower index.

    With `norm_topk_prob` the k weights are divided by their sum (Mixtral, Drop-Upcycling), which
    equals a softmax over the k logits; without it they are the plain probabilities (OLMoE, Switch).
    With `gate_norm_std` a token's logits are first brought to that standard deviation (Wei et al.,
    Skywork-MoE, arXiv 2406.06563, §3.1: their lambda; less the mean, which a softmax ignores).
    """
    logits_ME = logits_ME.astype(jnp.float32)
    if gate_norm_std is not None:
        logits_ME = normalise_logits(logits_ME, gate_norm_std)
    probabilities_ME = jax.nn.softmax(logits_ME, axis=-1)
    weight_MA, expert_index_MA = jax.lax.top_k(probabilities_ME, num_experts_per_tok)
    if norm_topk_prob:
        weight_MA = weight_MA / jnp.sum(weight_MA, axis=-1, keepdims=True)
    return Routing(expert_index_MA, weight_MA, logits_ME, probabilities_ME)


def normalise_logits(logits_ME: jax.Array, std: float) -> jax.Array:
    """Each token's logits times what gives them the unbiased standard deviation `std`.

    Equal logits stay as they are: they have no direction to be stretched in.
    """
    variance_M1 = jnp.var(logits_ME, axis=-1, ddof=1, keepdims=True)
    flat_M1 = variance_M1 == 0
    return logits_ME * jnp.where(flat_M1, 1, std * jax.lax.rsqrt(variance_M1 + flat_M1))


def route_sigmoid(
    logits_ME: jax.Array,
    bias_E: jax.Array,
    *,
    num_experts_per_tok: int,
    norm_topk_prob: bool,
    num_groups: int = 1,
    num_groups_per_tok: int = 1,
    scale: float = 1.0,
) -> Routing:
    """DeepSeek-V3's (arXiv 2412.19437, eq. 12-16): sigmoid scores, chosen with a bias on them.

    The bias decides who is chosen, not with what weight. Experts lie in `num_groups` equal groups;
    only the groups with the largest sum of their two best biased scores may be chosen from.
    """
    M, E = logits_ME.shape
    logits_ME = logits_ME.astype(jnp.float32)
    score_ME = jax.nn.sigmoid(logits_ME)
    choice_ME = score_ME + bias_E
    if num_groups > 1:
        choice_MGE = choice_ME.reshape(M, num_groups, -1)
        best_MG = jnp.sum(jax.lax.top_k(choice_MGE, 2)[0], axis=-1)
        _, group_index = jax.lax.top_k(best_MG, num_groups_per_tok)
        open_MG = jnp.any(jax.nn.one_hot(group_index, num_groups, dtype=bool), axis=1)
        choice_ME = jnp.where(open_MG[..., None], choice_MGE, -jnp.inf).reshape(M, E)
    _, expert_index_MA = jax.lax.top_k(choice_ME, num_experts_per_tok)
    weight_MA = jnp.take_along_axis(score_ME, expert_index_MA, axis=-1)
    if norm_topk_prob:
        weight_MA = weight_MA / (jnp.sum(weight_MA, axis=-1, keepdims=True) + 1e-20)
    return Routing(expert_index_MA, weight_MA * scale, logits_ME, score_ME)


def forced_balance(logits_ME: jax.Array, *, num_experts_per_tok: int, **parameters) -> Routing:
    """Experts in turn whatever the logits say, for benchmarks: the best case of any routing."""
    M, E = logits_ME.shape
    A = num_experts_per_tok
    routing = route(logits_ME, num_experts_per_tok=A, **parameters)
    expert_index_MA = (jnp.arange(M * A, dtype=jnp.int32) % E).reshape(M, A)
    return routing.replace(expert_index_MA=expert_index_MA)


ROUTERS = {"softmax_topk": route, "forced_balance": forced_balance}


def capacity(num_assignments: int, num_experts: int, factor: float, minimum: int) -> int:
    """Slots of an expert: its even share times the factor, rounded up."""
    return max(minimum, math.ceil(factor * num_assignments / num_experts))


def virtual_drop_rate(tokens_per_expert_E: jax.Array, factor: float) -> jax.Array:
    """The share of assignments that a capacity would have dropped in a run that drops none.

    sum_e max(0, load_e - C) / sum_e load_e with C = ceil(factor · sum_e load_e / E), what drives
    Skywork-MoE's balance coefficients (Wei et al., arXiv 2406.06563). Leading axes are kept; numpy
    or jax.
    """
    total = tokens_per_expert_E.sum(axis=-1, keepdims=True)
    capacity_E = -(-factor * total // tokens_per_expert_E.shape[-1])
    beyond = (tokens_per_expert_E - capacity_E).clip(min=0).sum(axis=-1)
    return beyond / total[..., 0].clip(min=1)


def statistics(routing: Routing, valid_M: jax.Array, num_dropped: jax.Array) -> RouterStats:
    """Sums over the tokens where `valid_M` holds."""
    E = routing.logits_ME.shape[-1]
    counted_MA = jnp.where(valid_M[:, None], routing.expert_index_MA, E)
    z_M = jax.nn.logsumexp(routing.logits_ME, axis=-1) ** 2
    return RouterStats(
        tokens_per_expert_E=jnp.bincount(counted_MA.ravel(), length=E),
        probability_sum_E=jnp.sum(routing.probabilities_ME * valid_M[:, None], axis=0),
        z_sum=jnp.sum(z_M * valid_M),
        num_tokens=jnp.sum(valid_M),
        num_dropped=num_dropped,
    )
