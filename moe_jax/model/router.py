"""Routing is data: which experts a token goes to and with what weight, and what to count of it."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from moe_jax.model.config import ModelConfig
from moe_jax.ops import bins


@struct.dataclass
class Routing:
    """The decision for M tokens. `weight` is what an expert's output is multiplied by.

    An `expert_index` of E is a slot that goes to no expert. `load_ME`, where a router has it, is
    how likely an expert is chosen, a count that gradients pass through.
    """

    expert_index_MA: jax.Array
    weight_MA: jax.Array
    logits_ME: jax.Array
    probabilities_ME: jax.Array
    load_ME: jax.Array | None = None


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
    weight_sum_E: jax.Array
    load_sum_E: jax.Array  # of `Routing.load_ME`, else the assignments
    z_sum: jax.Array  # of logsumexp(logits)^2
    entropy_sum: jax.Array  # of the probabilities, nats
    num_tokens: jax.Array
    num_dropped: jax.Array  # assignments beyond an expert's capacity; 0 when dropless
    routing: Routing | None = None


def softmax_topk(
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
    expert_index_MA = top_k(probabilities_ME, num_experts_per_tok)
    weight_MA = bins.chosen(probabilities_ME, expert_index_MA)
    if norm_topk_prob:
        weight_MA = weight_MA / jnp.sum(weight_MA, axis=-1, keepdims=True)
    return Routing(expert_index_MA, weight_MA, logits_ME, probabilities_ME)


def top_k(score_ME: jax.Array, k: int) -> jax.Array:
    """[M, k]: the indices of the largest, ties to the lower."""
    return jax.lax.top_k(jax.lax.stop_gradient(score_ME), k)[1]


def normalise_logits(logits_ME: jax.Array, std: float) -> jax.Array:
    """Each token's logits times what gives them the unbiased standard deviation `std`.

    Equal logits stay as they are: they have no direction to be stretched in.
    """
    variance_M1 = jnp.var(logits_ME, axis=-1, ddof=1, keepdims=True)
    flat_M1 = variance_M1 == 0
    return logits_ME * jnp.where(flat_M1, 1, std * jax.lax.rsqrt(variance_M1 + flat_M1))


def topk_softmax(logits_ME: jax.Array, *, num_experts_per_tok: int) -> Routing:
    """The top k logits, then a softmax over them: `softmax_topk` renormalised, by another way."""
    logits_ME = logits_ME.astype(jnp.float32)
    expert_index_MA = top_k(logits_ME, num_experts_per_tok)
    chosen_MA = bins.chosen(logits_ME, expert_index_MA)
    probabilities_ME = jax.nn.softmax(logits_ME, axis=-1)
    return Routing(expert_index_MA, jax.nn.softmax(chosen_MA), logits_ME, probabilities_ME)


def sigmoid_topk(
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
    only the groups with the largest sum of their two best biased scores may be chosen from. The
    probabilities, for a balance loss, are the scores divided by their sum.
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
    expert_index_MA = top_k(choice_ME, num_experts_per_tok)
    weight_MA = bins.chosen(score_ME, expert_index_MA)
    if norm_topk_prob:
        weight_MA = weight_MA / (jnp.sum(weight_MA, axis=-1, keepdims=True) + 1e-20)
    probabilities_ME = score_ME / jnp.sum(score_ME, axis=-1, keepdims=True)
    return Routing(expert_index_MA, weight_MA * scale, logits_ME, probabilities_ME)


def noisy_topk(
    logits_ME: jax.Array,
    noise_ME: jax.Array,
    key: jax.Array | None,
    *,
    num_experts_per_tok: int,
) -> Routing:
    """Noise on the logits, the top k, a softmax over them (Shazeer et al., arXiv 1701.06538, §2.1).

    The deviation of the noise is softplus(noise_ME) + 0.01, as in LLaMA-MoE (Zhu et al., arXiv
    2406.16554); without a key, in evaluation, there is none. `load_ME` is the probability, over an
    expert's own noise, that it is among the k (arXiv 1701.06538, eq. 8-9).
    """
    clean_ME = logits_ME.astype(jnp.float32)
    E, A = clean_ME.shape[-1], num_experts_per_tok
    if key is None:
        return topk_softmax(clean_ME, num_experts_per_tok=A)
    deviation_ME = jax.nn.softplus(noise_ME.astype(jnp.float32)) + 0.01
    noisy_ME = clean_ME + deviation_ME * jax.random.normal(key, clean_ME.shape)
    routing = topk_softmax(noisy_ME, num_experts_per_tok=A)
    if A == E:
        return routing
    best_MA = jax.lax.top_k(noisy_ME, A + 1)[0]
    # What another expert has to pass: the k-th best, for one that is chosen the best one left out.
    chosen_ME = noisy_ME > best_MA[:, A:]
    threshold_ME = jnp.where(chosen_ME, best_MA[:, A:], best_MA[:, A - 1 : A])
    load_ME = jax.scipy.stats.norm.cdf((clean_ME - threshold_ME) / deviation_ME)
    return routing.replace(load_ME=load_ME)


def expert_choice(
    logits_ME: jax.Array, valid_M: jax.Array, *, tokens_per_expert: int, norm_topk_prob: bool
) -> Routing:
    """Each expert takes its best tokens (Zhou et al., arXiv 2202.09368): balanced by construction.

    Not causal: whether a token is taken depends on the later ones of its batch, so a language model
    trained so sees a little of its future, and decodes otherwise than it was trained. The A = E
    slots of a token are the experts in order, E where it was not taken. With `norm_topk_prob` a
    token's weights are divided by their sum (Komatsuzaki et al., arXiv 2212.05055, §3.1).
    """
    M, E = logits_ME.shape
    logits_ME = logits_ME.astype(jnp.float32)
    probabilities_ME = jax.nn.softmax(logits_ME, axis=-1)
    score_EM = jnp.where(valid_M, probabilities_ME.T, -1)
    score_EC, token_EC = jax.lax.top_k(score_EM, min(tokens_per_expert, M))
    taken_EM = jnp.zeros((E, M), bool).at[jnp.arange(E)[:, None], token_EC].set(score_EC >= 0)
    weight_ME = jnp.where(taken_EM.T, probabilities_ME, 0)
    if norm_topk_prob:
        weight_ME = weight_ME / jnp.maximum(jnp.sum(weight_ME, axis=-1, keepdims=True), 1e-20)
    expert_index_ME = jnp.where(taken_EM.T, jnp.arange(E), E)
    return Routing(expert_index_ME, weight_ME, logits_ME, probabilities_ME)


def group_topk(
    logits_ME: jax.Array, *, num_experts_per_tok: int, norm_topk_prob: bool, num_groups: int
) -> Routing:
    """The best expert of each group, then the k best of these: DivMoE's.

    Expert e belongs to group e mod G: with G shards of a feed-forward laid out as virtual groups,
    the group of a shard are that shard's copies, and a token gets no shard twice.
    """
    M, E = logits_ME.shape
    logits_ME = logits_ME.astype(jnp.float32)
    probabilities_ME = jax.nn.softmax(logits_ME, axis=-1)
    by_group_MGC = probabilities_ME.reshape(M, -1, num_groups).swapaxes(1, 2)
    best_MG, copy_MG = jnp.max(by_group_MGC, axis=-1), jnp.argmax(by_group_MGC, axis=-1)
    group_MA = top_k(best_MG, num_experts_per_tok)
    weight_MA = bins.chosen(best_MG, group_MA)
    copy_MA = jnp.take_along_axis(copy_MG, group_MA, axis=-1)
    if norm_topk_prob:
        weight_MA = weight_MA / jnp.sum(weight_MA, axis=-1, keepdims=True)
    return Routing(copy_MA * num_groups + group_MA, weight_MA, logits_ME, probabilities_ME)


def forced_balance(logits_ME: jax.Array, *, num_experts_per_tok: int, **parameters) -> Routing:
    """Experts in turn whatever the logits say, for benchmarks: the best case of any routing."""
    M, E = logits_ME.shape
    A = num_experts_per_tok
    routing = softmax_topk(logits_ME, num_experts_per_tok=A, **parameters)
    expert_index_MA = (jnp.arange(M * A, dtype=jnp.int32) % E).reshape(M, A)
    return routing.replace(expert_index_MA=expert_index_MA)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a router may look at beside its logits."""

    valid_M: jax.Array
    bias_E: jax.Array | None = None  # on the choice alone
    noise_ME: jax.Array | None = None
    key: jax.Array | None = None  # None in evaluation


def _fields(config: ModelConfig, *names: str) -> dict:
    return {name: getattr(config, name) for name in ("num_experts_per_tok", *names)}


# ModelConfig.router -> (logits_ME, config, inputs) -> Routing.
ROUTERS: dict[str, Callable[[jax.Array, ModelConfig, Inputs], Routing]] = {
    "softmax_topk": lambda logits, config, _: softmax_topk(
        logits, **_fields(config, "norm_topk_prob", "gate_norm_std")
    ),
    "topk_softmax": lambda logits, config, _: topk_softmax(logits, **_fields(config)),
    "sigmoid_topk": lambda logits, config, inputs: sigmoid_topk(
        logits,
        inputs.bias_E,
        **_fields(config, "norm_topk_prob"),
        num_groups=config.num_expert_groups,
        num_groups_per_tok=config.num_groups_per_tok,
        scale=config.routed_scaling_factor,
    ),
    "noisy_topk": lambda logits, config, inputs: noisy_topk(
        logits, inputs.noise_ME, inputs.key, **_fields(config)
    ),
    "expert_choice": lambda logits, config, inputs: expert_choice(
        logits,
        inputs.valid_M,
        norm_topk_prob=config.norm_topk_prob,
        tokens_per_expert=slots_of_expert(len(logits), config),
    ),
    "group_topk": lambda logits, config, _: group_topk(
        logits, **_fields(config, "norm_topk_prob"), num_groups=config.num_expert_groups
    ),
    "forced_balance": lambda logits, config, _: forced_balance(
        logits, **_fields(config, "norm_topk_prob", "gate_norm_std")
    ),
}


def slots_of_expert(num_tokens: int, config: ModelConfig) -> int:
    """What an expert of a limited capacity has room for among these tokens."""
    return capacity(
        num_tokens * config.num_experts_per_tok,
        config.num_experts,
        config.capacity_factor,
        config.min_capacity,
    )


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
    tokens_per_expert_E = bins.count_by_bin(counted_MA, E)
    load_sum_E = tokens_per_expert_E.astype(jnp.float32)
    if routing.load_ME is not None:
        load_sum_E = jnp.sum(routing.load_ME * valid_M[:, None], axis=0)
    z_M = jax.nn.logsumexp(routing.logits_ME, axis=-1) ** 2
    p_ME = routing.probabilities_ME
    entropy_M = -jnp.sum(p_ME * jnp.log(jnp.maximum(p_ME, jnp.finfo(p_ME.dtype).tiny)), axis=-1)
    return RouterStats(
        tokens_per_expert_E=tokens_per_expert_E,
        probability_sum_E=jnp.sum(p_ME * valid_M[:, None], axis=0),
        weight_sum_E=bins.sum_by_bin(routing.weight_MA, counted_MA, E),
        load_sum_E=load_sum_E,
        z_sum=jnp.sum(z_M * valid_M),
        entropy_sum=jnp.sum(entropy_M * valid_M),
        num_tokens=jnp.sum(valid_M),
        num_dropped=num_dropped,
    )
