"""Load balancing of experts: one table of rules, each of which is an auxiliary loss, an update
outside the gradient, or both.

The losses are functions of `RouterStats`, which are sums over tokens. One function therefore
computes them over a sequence, a device, a batch, or all microbatches of a batch. A penalty is a
loss of the routers' matrices alone.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax import config as configs
from moe_jax import model, tree
from moe_jax.model.config import MOE
from moe_jax.model.layout import layer_groups
from moe_jax.model.routing import Counted, RouterStats, bin_width, virtual_drop_rate
from moe_jax.training.state import Measures, RouterState

BIAS = re.compile(r"blocks/(\w+)/moe/router/bias")
KERNEL = re.compile(r"blocks/\w+/moe/router/kernel")


def initial(config: model.ModelConfig, balance: configs.Balance) -> RouterState:
    """The state at the first step of a run with this model and `balance` section."""
    num_sparse = config.layer_kinds.count(MOE)
    if balance.load_balancing_schedule != "adaptive" or not num_sparse:
        return RouterState()
    return RouterState(jnp.full(num_sparse, balance.load_balancing_coefficient, jnp.float32))


def counted(balance: configs.Balance) -> Counted:
    """The statistics that the rules of this section need."""
    return Counted(
        by_row=balance.load_balancing_over == "sequence",
        shortfalls=balance.bias_update == "quantile",
    )


def router_losses(
    stats: RouterStats,
    balance: configs.Balance,
    *,
    num_experts_per_tok: int,
    num_tokens: jax.Array,
    accumulation_steps: int = 1,
    coefficients_L: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The auxiliary losses of a batch, summed, and each term before its coefficient.

    A term is the mean over layers. The loss uses that mean or the sum over layers, depending on
    `balance.over_layers`: megablocks (OLMoE) averages; Megatron, DeepSpeed, Skywork-MoE and
    LLaMA-MoE sum. Terms that are not a mean over tokens are computed over the tokens that
    `balance.load_balancing_over` names: "device" computes them for each batch shard, "sequence" for
    each row, and both average over the groups that have tokens; "global" and "window" compute them
    over all of `stats`.
    Unless it is "window", `stats` may come from one of the `accumulation_steps` microbatches. The
    results of all microbatches then add up to their average over microbatches or, for a term that
    is a mean over tokens, to the mean over the batch.

    Args:
      stats: [L, batch shards or rows, ...], like `model.Output.router`.
      num_tokens: the number of tokens in the whole batch, at least 1.
      coefficients_L: each layer's coefficient of the load-balancing loss, instead of the config's.
    """
    groups = stats if balance.load_balancing_over in ("device", "sequence") else pooled(stats)
    filled_LG = groups.num_tokens > 0
    share = 1 if balance.load_balancing_over == "window" else 1 / accumulation_steps
    mean_over_groups_LG = share * filled_LG / jnp.maximum(filled_LG.sum(axis=1, keepdims=True), 1)
    total, terms = jnp.zeros(()), {}
    for name, rule in RULES.items():
        coefficient = getattr(balance, rule.coefficient)
        if rule.loss is None or not (coefficient or rule.always):
            continue
        weight_LG = groups.num_tokens / num_tokens if rule.per_token else mean_over_groups_LG
        loss_L = jnp.sum(weight_LG * rule.loss(groups, balance, num_experts_per_tok), axis=1)
        if name == "load_balancing_loss" and coefficients_L is not None:
            coefficient = coefficients_L
        total += rule.sign * OVER_LAYERS[balance.over_layers](coefficient * loss_L)
        terms[name] = loss_L.mean()
    return total, terms


OVER_LAYERS = {"mean": jnp.mean, "sum": jnp.sum}


def penalties(
    params: dict, balance: configs.Balance, *, accumulation_steps: int = 1
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The penalties of the routers' matrices, summed, and each one before its coefficient.

    Both are those of one of `accumulation_steps` microbatches, which add up.
    """
    total, terms = jnp.zeros(()), {}
    for name, rule in RULES.items():
        coefficient = getattr(balance, rule.coefficient)
        if rule.penalty is None or not coefficient:
            continue
        leaves = tree.flatten(params).items()
        penalty_L = jnp.concatenate([rule.penalty(x) for n, x in leaves if KERNEL.fullmatch(n)])
        penalty_L /= accumulation_steps
        total += coefficient * OVER_LAYERS[balance.over_layers](penalty_L)
        terms[name] = penalty_L.mean()
    return total, terms


def updated(
    params: dict, state: RouterState, run: configs.Run, measures: Measures
) -> tuple[dict, RouterState]:
    """Parameters and state after the updates of all rules, given the measures of this step."""
    for rule in RULES.values():
        if rule.update is not None:
            params, state = rule.update(params, state, run, measures)
    return params, state


def slope(function: Callable, stats: RouterStats) -> tuple[Any, dict[str, jax.Array]]:
    """The value (loss, others) of `function` at `stats`, and the loss's gradient for each sum.

    The sums are linear in the microbatches. By the chain rule any function of the sums therefore
    has exactly the parameter gradient of the sum over microbatches of `along(slope, their sums)`.
    """
    fields = {name: x for name, x in vars(stats).items() if x is not None}
    sums = {name: x for name, x in fields.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    of_sums = jax.value_and_grad(lambda x: function(dataclasses.replace(stats, **x)), has_aux=True)
    return of_sums(sums)


def along(slope: dict[str, jax.Array], stats: RouterStats) -> jax.Array:
    """The inner product of a slope, treated as constant, with statistics."""
    products = (jnp.vdot(jax.lax.stop_gradient(x), getattr(stats, n)) for n, x in slope.items())
    return sum(products, jnp.zeros(()))


def load_balancing(
    stats: RouterStats, *, num_experts_per_tok: int, scope: str, divide_by_k: bool, form: str
) -> jax.Array:
    """A measure of load imbalance: [L, groups], or [1, groups] for all layers together.

    With f_e the assignments of expert e per token (so sum f = k) and P_e its mean probability:

    "switch": E · sum_e f_e P_e (Fedus et al., Switch, arXiv 2101.03961, eq. 4-6); gradients pass
      through P only. At uniform routing it is k, or 1 with `divide_by_k`.
    "squared": sum_e (1/E - P_e)^2 (Wei et al., Skywork-MoE, arXiv 2406.06563), 0 at uniform P.

    Args:
      stats: sums for each layer and group of tokens.
      scope: "layer" computes the loss for each layer; "all_layers" first averages f and P over the
        layers (Hugging Face's Mixtral, Drop-Upcycling), a loss that also has its balanced value if
        every layer has collapsed, each onto other experts, as long as all layers together use all
        experts evenly.
      divide_by_k: True as in megablocks (OLMoE), False as in Hugging Face; only used by "switch".
    """
    tokens_LG1 = jnp.maximum(stats.num_tokens, 1)[..., None]
    f_LGE, P_LGE = (x / tokens_LG1 for x in (stats.tokens_per_expert_E, stats.probability_sum_E))
    if scope == "all_layers":
        f_LGE, P_LGE = (x_LGE.mean(axis=0, keepdims=True) for x_LGE in (f_LGE, P_LGE))
    E = P_LGE.shape[-1]
    if form == "squared":
        return jnp.sum((1 / E - P_LGE) ** 2, axis=-1)
    loss_LG = E * jnp.sum(f_LGE * P_LGE, axis=-1)
    return loss_LG / num_experts_per_tok if divide_by_k else loss_LG


def router_z(stats: RouterStats, *_) -> jax.Array:
    """Mean over tokens of logsumexp(router logits)^2 (Zoph et al., arXiv 2202.08906)."""
    return stats.z_sum / jnp.maximum(stats.num_tokens, 1)


def importance(stats: RouterStats, *_) -> jax.Array:
    """CV^2(importance) + CV^2(load) over experts (Shazeer et al., arXiv 1701.06538, §4 and A).

    Importance is the sum of an expert's weights. Load is its number of assignments or, for a noisy
    router, their differentiable estimate. CV^2 = unbiased variance / (mean^2 + 1e-10), as in
    LLaMA-MoE (Zhu et al., arXiv 2406.16554); it is 0 for a single expert.
    """
    if stats.weight_sum_E.shape[-1] == 1:
        return jnp.zeros(stats.num_tokens.shape)
    return _cv_squared(stats.weight_sum_E) + _cv_squared(stats.load_sum_E)


def _cv_squared(x_LGE):
    return jnp.var(x_LGE, axis=-1, ddof=1) / (jnp.mean(x_LGE, axis=-1) ** 2 + 1e-10)


def mutual_information(stats: RouterStats, *_) -> jax.Array:
    """H(mean over tokens of p) - mean over tokens of H(p), in nats (Pan et al., arXiv 2404.05567).

    The mutual information between token and expert is 0 if all tokens have the same probabilities,
    and log E if each token is certain of one expert and all experts have equally many. Training
    maximises it.
    """
    tokens_LG = jnp.maximum(stats.num_tokens, 1)
    P_LGE = stats.probability_sum_E / tokens_LG[..., None]
    log_LGE = jnp.log(jnp.maximum(P_LGE, jnp.finfo(P_LGE.dtype).tiny))
    return -jnp.sum(P_LGE * log_LGE, axis=-1) - stats.entropy_sum / tokens_LG


def orthogonality(kernel_LDE: jax.Array) -> jax.Array:
    """The sum of |R^T R - I| over pairs of experts for each layer's router matrix R: SimBal, which
    reads no token (arXiv 2506.14038)."""
    gram_LEE = jnp.einsum("lde,ldf->lef", kernel_LDE, kernel_LDE, precision="highest")
    return jnp.abs(gram_LEE - jnp.eye(kernel_LDE.shape[-1])).sum(axis=(1, 2))


def pooled(stats: RouterStats) -> RouterStats:
    """The statistics of all batch shards or rows, summed into one group of tokens."""
    return jax.tree.map(lambda x: x.sum(axis=1, keepdims=True), stats)


def adapted(
    params: dict, state: RouterState, run: configs.Run, measures: Measures
) -> tuple[dict, RouterState]:
    """alpha <- beta alpha + (1 - beta) min(rate · d, maximum) for each layer's drop rate d.

    Wei et al., Skywork-MoE, arXiv 2406.06563, use a rate (their xi) of 1/5, a maximum of 0.01 and a
    beta of 0.99. With dropless dispatch, d is the rate that a capacity would have given.
    """
    if state.coefficients_L is None or measures.router is None:
        return params, state
    tokens_per_expert_LE = measures.router["tokens_per_expert_E"]
    if run.model.dispatch == "capacity":
        rate_L = measures.router["num_dropped"] / jnp.maximum(tokens_per_expert_LE.sum(axis=1), 1)
    else:
        rate_L = virtual_drop_rate(tokens_per_expert_LE, run.model.capacity_factor)
    adaptive, beta = run.balance.adaptive, run.balance.adaptive.beta
    target_L = jnp.minimum(adaptive.rate * rate_L, adaptive.maximum)
    return params, RouterState(beta * state.coefficients_L + (1 - beta) * target_L)


def with_updated_biases(
    params: dict, state: RouterState, run: configs.Run, measures: Measures
) -> tuple[dict, RouterState]:
    """Parameters with bias += rate · sign(mean load - load) in every router that has one.

    Wang et al., arXiv 2408.15664, algorithm 1; DeepSeek-V3, arXiv 2412.19437, §2.1.2. The mean of a
    layer's biases is then subtracted, which changes no choice and keeps them from drifting. A bias
    whose path matches `optimizer.frozen` keeps its value.
    """
    rate = run.balance.bias_update_rate
    if not rate or measures.router is None:
        return params, state
    tokens_per_expert_LE = measures.router["tokens_per_expert_E"]

    def stepped(bias_LE, rows):
        load_LE = tokens_per_expert_LE[rows]
        bias_LE += rate * jnp.sign(load_LE.mean(axis=1, keepdims=True) - load_LE)
        return bias_LE - bias_LE.mean(axis=1, keepdims=True)

    return _with_biases(params, run, stepped), state


def with_quantile_biases(
    params: dict, state: RouterState, run: configs.Run, measures: Measures
) -> tuple[dict, RouterState]:
    """Parameters with the biases that would give every expert its even share of this batch, if the
    tokens' thresholds stayed as they are: quantile balancing.

    A token chooses the experts whose score plus bias is above its threshold, the (k+1)-th largest;
    the others have a shortfall. Each expert's bias changes by the k/E quantile of its shortfalls
    over the tokens of the whole batch, less the mean over experts (J. Su, kexue.fm/archives/11619;
    Kimi K3's technical report, §2.3.3 and appendix D). The quantile is read from a histogram, by
    linear interpolation within a bin. The authors' bins are those of the new biases; ours, of their
    changes, let the loads get more even: 0 is the edge of a bin. Equal histograms give bitwise
    equal biases in any program, because nothing is rounded but the sum of an old bias and its
    change. A frozen bias keeps its value.
    """
    if measures.shortfall_LEH is None:
        return params, state
    E, k = run.model.num_experts, run.model.num_experts_per_tok

    def solved(bias_LE, rows):
        tick_L1 = bin_width(bias_LE) / TICKS
        new_LE = bias_LE + tick_L1 * quantile(measures.shortfall_LEH[rows], k, E)
        total_L1 = jnp.round(new_LE / tick_L1).astype(jnp.int32).sum(axis=1, keepdims=True)
        return new_LE - tick_L1 * (total_L1 // E)

    return _with_biases(params, run, solved), state


TICKS = 64  # per bin: a power of two


def quantile(counts_LEH: jax.Array, numerator: int, denominator: int) -> jax.Array:
    """[L, E]: the quantile of each histogram, in whole ticks; 0 for an empty one.

    Bins are `TICKS` wide, and half of them are below 0. The arithmetic is that of int32, for
    batches of at most 2^31 / max(TICKS, numerator) tokens: 33 million with up to 64 experts each.
    """
    below_LEH = jnp.cumsum(counts_LEH, axis=-1)
    wanted_LE = below_LEH[..., -1] * numerator // denominator
    bin_LE1 = jnp.argmax(below_LEH >= wanted_LE[..., None], axis=-1, keepdims=True)
    here_LE, upto_LE = (
        jnp.take_along_axis(x_LEH, bin_LE1, axis=-1)[..., 0] for x_LEH in (counts_LEH, below_LEH)
    )
    part_LE = TICKS * (wanted_LE - upto_LE + here_LE) // jnp.maximum(here_LE, 1)
    ticks_LE = TICKS * (bin_LE1[..., 0] - counts_LEH.shape[-1] // 2) + part_LE
    return jnp.where(wanted_LE > 0, ticks_LE, 0)


def _with_biases(params: dict, run: configs.Run, new: Callable) -> dict:
    """Parameters with `new(bias_LE, rows)` for the routers' biases.

    `rows` are the positions of a leaf's layers among the sparse layers.
    """
    frozen = run.optimizer.frozen
    sparse = [layer for layer, kind in enumerate(run.model.layer_kinds) if kind == MOE]
    layers = {s: ls for g in layer_groups(run.model.block_kinds) for s, ls in g.layers.items()}

    def updated_leaf(name, leaf):
        match = BIAS.fullmatch(name)
        if not match or (frozen and re.search(frozen, name)):
            return leaf
        return new(leaf, jnp.array([sparse.index(layer) for layer in layers[match[1]]]))

    return tree.map_with_name(updated_leaf, params)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One way to balance experts.

    coefficient: the key of `config.balance` that turns the rule on: its coefficient, or its name.
    loss: (statistics [L, G, ...], config.balance, num_experts_per_tok) -> [L, G].
    penalty: router matrices [L, D, E] -> [L], a loss of these alone.
    update: changes parameters and RouterState after a step, like `updated`.
    """

    coefficient: str
    loss: Callable[[RouterStats, configs.Balance, int], jax.Array] | None = None
    penalty: Callable[[jax.Array], jax.Array] | None = None
    update: Callable[..., tuple[dict, RouterState]] | None = None
    sign: int = 1
    per_token: bool = False  # a mean over tokens: groups count by their tokens, otherwise equally
    always: bool = False  # reported even with a coefficient of 0


# Rules by the names of their terms in metrics.jsonl.
RULES = {
    "load_balancing_loss": Rule(
        "load_balancing_coefficient",
        lambda stats, balance, k: load_balancing(
            stats,
            num_experts_per_tok=k,
            scope=balance.load_balancing_scope,
            divide_by_k=balance.load_balancing_divide_by_k,
            form=balance.load_balancing_form,
        ),
        update=adapted,
        always=True,
    ),
    "router_z_loss": Rule("router_z_coefficient", router_z, per_token=True, always=True),
    "importance_loss": Rule("importance_coefficient", importance),
    "mutual_information": Rule("mutual_information_coefficient", mutual_information, sign=-1),
    "router_orthogonality": Rule("orthogonality_coefficient", penalty=orthogonality),
    "selection_bias": Rule("bias_update_rate", update=with_updated_biases),
    "quantile_bias": Rule("bias_update", update=with_quantile_biases),
}
