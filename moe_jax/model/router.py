"""Routers choose each token's experts: one table, with everything about a router in its row."""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from moe_jax.model.router_row import KERNEL, Inputs, Leaf, Router
from moe_jax.model.routing import Routing, router_logits
from moe_jax.ops import bins

if TYPE_CHECKING:
    from moe_jax.model.config import ModelConfig


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
    With `gate_norm_std` a token's logits are first scaled to that standard deviation (Wei et al.,
    Skywork-MoE, arXiv 2406.06563, §3.1, called lambda there; the paper also subtracts the mean,
    which a softmax ignores).
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
    """[M, k]: the indices of the largest scores; ties go to the lower index."""
    return jax.lax.top_k(jax.lax.stop_gradient(score_ME), k)[1]


def normalise_logits(logits_ME: jax.Array, std: float) -> jax.Array:
    """Scales each token's logits to the unbiased standard deviation `std`.

    Equal logits stay unchanged: their deviation is 0, and no factor changes that.
    """
    variance_M1 = jnp.var(logits_ME, axis=-1, ddof=1, keepdims=True)
    flat_M1 = variance_M1 == 0
    return logits_ME * jnp.where(flat_M1, 1, std * jax.lax.rsqrt(variance_M1 + flat_M1))


def topk_softmax(logits_ME: jax.Array, *, num_experts_per_tok: int) -> Routing:
    """A softmax over the top k logits, which equals `softmax_topk` with `norm_topk_prob`."""
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
    num_expert_groups: int = 1,
    num_groups_per_tok: int = 1,
    routed_scaling_factor: float = 1.0,
) -> Routing:
    """DeepSeek-V3's router (arXiv 2412.19437, eq. 12-16): sigmoid scores and a selection bias.

    The bias affects which experts are chosen, not their weights. Experts form equal groups; only
    the groups whose two best biased scores have the largest sums are candidates. The probabilities,
    for a balance loss, are the scores divided by their sum.
    """
    M, E = logits_ME.shape
    logits_ME = logits_ME.astype(jnp.float32)
    score_ME = jax.nn.sigmoid(logits_ME)
    choice_ME = score_ME + bias_E
    if num_expert_groups > 1:
        choice_MGE = choice_ME.reshape(M, num_expert_groups, -1)
        best_MG = jnp.sum(jax.lax.top_k(choice_MGE, 2)[0], axis=-1)
        _, group_index = jax.lax.top_k(best_MG, num_groups_per_tok)
        open_MG = jnp.any(jax.nn.one_hot(group_index, num_expert_groups, dtype=bool), axis=1)
        choice_ME = jnp.where(open_MG[..., None], choice_MGE, -jnp.inf).reshape(M, E)
    expert_index_MA = top_k(choice_ME, num_experts_per_tok)
    weight_MA = bins.chosen(score_ME, expert_index_MA)
    if norm_topk_prob:
        weight_MA = weight_MA / (jnp.sum(weight_MA, axis=-1, keepdims=True) + 1e-20)
    probabilities_ME = score_ME / jnp.sum(score_ME, axis=-1, keepdims=True)
    return Routing(expert_index_MA, weight_MA * routed_scaling_factor, logits_ME, probabilities_ME)


def shortfall(logits_ME: jax.Array, bias_E: jax.Array, *, num_experts_per_tok: int) -> jax.Array:
    """[M, E]: the bias that each expert lacks to reach a token's threshold with its sigmoid score.

    The threshold is the (k+1)-th largest biased score. The chosen experts have negative shortfalls.
    """
    choice_ME = jax.nn.sigmoid(jax.lax.stop_gradient(logits_ME).astype(jnp.float32)) + bias_E
    return jax.lax.top_k(choice_ME, num_experts_per_tok + 1)[0][:, -1:] - choice_ME


def noisy_topk(
    logits_ME: jax.Array, noise_ME: jax.Array, key: jax.Array | None, *, num_experts_per_tok: int
) -> Routing:
    """A softmax over the top k of the noisy logits (Shazeer et al., arXiv 1701.06538, §2.1).

    The noise has a standard deviation of softplus(noise_ME) + 0.01, as in LLaMA-MoE (Zhu et al.,
    arXiv 2406.16554); without a key, in evaluation, there is no noise. `load_ME` is the
    probability, over an expert's own noise, that it is among the k (arXiv 1701.06538, eq. 8-9).
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
    # An expert not chosen has to exceed the k-th best, a chosen one the best of those not chosen.
    chosen_ME = noisy_ME > best_MA[:, A:]
    threshold_ME = jnp.where(chosen_ME, best_MA[:, A:], best_MA[:, A - 1 : A])
    load_ME = jax.scipy.stats.norm.cdf((clean_ME - threshold_ME) / deviation_ME)
    return dataclasses.replace(routing, load_ME=load_ME)


def expert_choice(
    logits_ME: jax.Array,
    valid_M: jax.Array,
    limit: int | jax.Array,
    *,
    tokens_per_expert: int,
    norm_topk_prob: bool,
) -> Routing:
    """Each expert takes its best tokens (Zhou et al., arXiv 2202.09368): balanced by construction.

    Not causal: whether a token is taken depends on later tokens of its batch, so a language model
    trained this way sees a little of its future, and decoding differs from training. The A = E
    slots of a token are the experts in order, with E for each expert that did not take it. With
    `norm_topk_prob` a token's weights are divided by their sum (Komatsuzaki et al., arXiv
    2212.05055, §3.1).

    Args:
      limit: how many of these tokens each expert takes, at most `tokens_per_expert`.
    """
    M, E = logits_ME.shape
    logits_ME = logits_ME.astype(jnp.float32)
    probabilities_ME = jax.nn.softmax(logits_ME, axis=-1)
    # A token that repeats the first token of its document has the same score up to rounding, which
    # depends on the batch size. With 16 bits of precision they tie, and the earlier token wins.
    score_ME = jax.lax.reduce_precision(probabilities_ME, exponent_bits=8, mantissa_bits=15)
    score_EM = jnp.where(valid_M, score_ME.T, -1)
    score_EC, token_EC = jax.lax.top_k(score_EM, min(tokens_per_expert, M))
    taken_EC = (score_EC >= 0) & (jnp.arange(score_EC.shape[1]) < limit)
    taken_EM = jnp.zeros((E, M), bool).at[jnp.arange(E)[:, None], token_EC].set(taken_EC)
    weight_ME = jnp.where(taken_EM.T, probabilities_ME, 0)
    if norm_topk_prob:
        weight_ME = weight_ME / jnp.maximum(jnp.sum(weight_ME, axis=-1, keepdims=True), 1e-20)
    expert_index_ME = jnp.where(taken_EM.T, jnp.arange(E), E)
    return Routing(expert_index_ME, weight_ME, logits_ME, probabilities_ME)


def group_topk(
    logits_ME: jax.Array, *, num_experts_per_tok: int, norm_topk_prob: bool, num_expert_groups: int
) -> Routing:
    """DivMoE's router: the best expert of each group, then the top k of these.

    Expert e belongs to group e mod G. When G shards of a feed-forward are laid out as virtual
    groups, each group holds the copies of one shard, so a token never gets the same shard twice.
    """
    M, E = logits_ME.shape
    logits_ME = logits_ME.astype(jnp.float32)
    probabilities_ME = jax.nn.softmax(logits_ME, axis=-1)
    by_group_MGC = probabilities_ME.reshape(M, -1, num_expert_groups).swapaxes(1, 2)
    best_MG, copy_MG = jnp.max(by_group_MGC, axis=-1), jnp.argmax(by_group_MGC, axis=-1)
    group_MA = top_k(best_MG, num_experts_per_tok)
    weight_MA = bins.chosen(best_MG, group_MA)
    copy_MA = jnp.take_along_axis(copy_MG, group_MA, axis=-1)
    if norm_topk_prob:
        weight_MA = weight_MA / jnp.sum(weight_MA, axis=-1, keepdims=True)
    return Routing(copy_MA * num_expert_groups + group_MA, weight_MA, logits_ME, probabilities_ME)


def forced_balance(
    logits_ME: jax.Array, num_groups: int, *, num_experts_per_tok: int, **parameters
) -> Routing:
    """Assigns experts in turn whatever the logits are: for benchmarks, the best case of any router.

    The turn starts again at expert 0 in each group of tokens.
    """
    M, E = logits_ME.shape
    A = num_experts_per_tok
    routing = softmax_topk(logits_ME, num_experts_per_tok=A, **parameters)
    turn_R = jnp.arange(M * A, dtype=jnp.int32) % (M // num_groups * A)
    expert_index_MA = (turn_R % E).reshape(M, A)
    return dataclasses.replace(routing, expert_index_MA=expert_index_MA)


def _renormalised(config: "ModelConfig") -> bool:
    return config.norm_topk_prob


def _sigmoid_weight(config: "ModelConfig") -> float:
    """A sigmoid of 0 is 1/2."""
    total = 1.0 if config.norm_topk_prob else config.num_experts_per_tok / 2
    return total * config.routed_scaling_factor


def _sigmoid_problems(config: "ModelConfig") -> Iterator[str]:
    E, G = config.num_experts, config.num_expert_groups
    if G == 1 or E % G:
        return
    if config.num_groups_per_tok > G:
        yield f"num_groups_per_tok={config.num_groups_per_tok} is more than the {G} groups"
    room = config.num_groups_per_tok * E // G
    if E // G < 2 or room < config.num_experts_per_tok:
        yield (
            f"num_expert_groups={G}: a token chooses {config.num_experts_per_tok} experts "
            f"among the {room} of {config.num_groups_per_tok} groups, which need 2 or more "
            "each; use fewer groups"
        )


def _group_problems(config: "ModelConfig") -> Iterator[str]:
    A, G = config.num_experts_per_tok, config.num_expert_groups
    if A > G:
        yield (
            f"num_experts_per_tok={A} is more than num_expert_groups={G}, each of which gives one; "
            f"use at most {G}"
        )


def _expert_choice_problems(config: "ModelConfig") -> Iterator[str]:
    if config.dispatch != "capacity":
        yield "router='expert_choice' gives each expert as many tokens; set dispatch='capacity'"


def _route_noisy(logits_ME, inputs: Inputs, **values) -> Routing:
    noise_ME = router_logits(inputs.x_MD, inputs.leaves["noise"])
    return noisy_topk(logits_ME, noise_ME, inputs.key, **values)


def _route_noisy_mlp(hidden_ME, inputs: Inputs, **values) -> Routing:
    """The router of LLaMA-MoE's release ("mlp" in its code): linear, tanh, linear, no biases."""
    logits_ME = router_logits(jnp.tanh(hidden_ME), inputs.leaves["output"])
    return _route_noisy(logits_ME, inputs, **values)


def _route_expert_choice(
    logits_ME, inputs, *, num_experts_per_tok, capacity_factor, min_capacity, **values
) -> Routing:
    M, E = logits_ME.shape
    G, valid_M = inputs.groups.number, inputs.groups.valid_M
    C, limit_G = inputs.groups.slots(num_experts_per_tok, E, capacity_factor, min_capacity)

    def choose(logits_XE, valid_X, limit):
        return expert_choice(logits_XE, valid_X, limit, tokens_per_expert=C, **values)

    of_groups = jax.vmap(choose)(logits_ME.reshape(G, -1, E), valid_M.reshape(G, -1), limit_G)
    return jax.tree.map(lambda x: x.reshape(M, E), of_groups)


SOFTMAX = ("num_experts_per_tok", "norm_topk_prob", "gate_norm_std")
BIAS = Leaf(lambda D, E: (E,))
NOISE = Leaf(KERNEL.shape)  # zero at first: arXiv 2406.16554
OUTPUT = Leaf(lambda D, E: (E, E), zero=False, upcycled="torch_linear")

# The keys are the values of `ModelConfig.router`.
ROUTERS: dict[str, Router] = {
    "softmax_topk": Router(
        lambda logits, inputs, **values: softmax_topk(logits, **values),
        reads=SOFTMAX,
        sum_is_fixed=_renormalised,
        copies_share=lambda config: True,
    ),
    "topk_softmax": Router(
        lambda logits, inputs, **values: topk_softmax(logits, **values),
        copies_share=lambda config: True,
        same_as={"router": "softmax_topk", "norm_topk_prob": True},
    ),
    "sigmoid_topk": Router(
        lambda logits, inputs, **values: sigmoid_topk(logits, inputs.leaves["bias"], **values),
        reads=(
            *("num_experts_per_tok", "norm_topk_prob", "num_expert_groups"),
            *("num_groups_per_tok", "routed_scaling_factor"),
        ),
        leaves={"kernel": KERNEL, "bias": BIAS},
        problems=_sigmoid_problems,
        sum_is_fixed=_renormalised,
        even_weight=_sigmoid_weight,
        copies_share=_renormalised,
    ),
    "noisy_topk": Router(
        _route_noisy,
        leaves={"kernel": KERNEL, "noise": NOISE},
        copies_share=lambda config: True,
        products=2,
    ),
    "noisy_topk_mlp": Router(
        _route_noisy_mlp,
        leaves={"kernel": KERNEL, "noise": NOISE, "output": OUTPUT},
        products=2,
        inner_products=1,
        copied=False,
    ),
    "expert_choice": Router(
        _route_expert_choice,
        reads=("num_experts_per_tok", "norm_topk_prob", "capacity_factor", "min_capacity"),
        problems=_expert_choice_problems,
        sum_is_fixed=_renormalised,
        causal=False,
        decodes_as="softmax_topk",
    ),
    "group_topk": Router(
        lambda logits, inputs, **values: group_topk(logits, **values),
        reads=("num_experts_per_tok", "norm_topk_prob", "num_expert_groups"),
        problems=_group_problems,
        sum_is_fixed=_renormalised,
        one_per_group=True,
    ),
    "forced_balance": Router(
        lambda logits, inputs, **values: forced_balance(logits, inputs.groups.number, **values),
        reads=SOFTMAX,
        sum_is_fixed=_renormalised,
        learned=False,
    ),
}
