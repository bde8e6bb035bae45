"""What is minimised beside the cross-entropy of `ops/cross_entropy.py`, of routers and teachers.

Router losses are functions of `RouterStats`, sums over tokens, so that one function gives them over
a device, over a batch, or over all microbatches of a batch.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from moe_jax.config.sections import Balance
from moe_jax.model.router import RouterStats
from moe_jax.ops import cross_entropy, implementations
from moe_jax.parallel import sharding


@struct.dataclass
class RouterLosses:
    """Means over layers, before their coefficients; None where the config leaves one out."""

    load_balancing_loss: jax.Array
    router_z_loss: jax.Array
    importance_loss: jax.Array | None = None
    mutual_information: jax.Array | None = None


def router_losses(
    stats: RouterStats,
    balance: Balance,
    *,
    accumulation_steps: int,
    num_experts_per_tok: int,
    num_tokens: jax.Array,
    coefficients_L: jax.Array | None = None,
) -> tuple[jax.Array, RouterLosses]:
    """What the routers add to the loss of a batch, and its parts.

    `balance.load_balancing_over` says over which tokens every part is taken that is not a mean
    over tokens: "device" takes it batch shard by batch shard and averages over those that have
    tokens, "global" and "window" over all of `stats`. Unless it is "window", `stats` may be of one
    of the `accumulation_steps` microbatches: the results of all of them then add up to the average
    over microbatches, but for what is a mean over tokens, which is that of the batch.

    Args:
      stats: as `model.Output.router`, [L, batch shards, ...].
      num_tokens: of the whole batch, at least 1.
      coefficients_L: of the load-balancing loss of each layer, in the place of the config's one.
    """
    over = balance.load_balancing_over
    groups = stats if over == "device" else pooled(stats)
    filled_LG = groups.num_tokens > 0
    share = 1 if over == "window" else 1 / accumulation_steps
    mean_over_groups_LG = share * filled_LG / jnp.maximum(filled_LG.sum(axis=1, keepdims=True), 1)
    total, means = jnp.zeros(()), {}
    for name, term in TERMS.items():
        coefficient = getattr(balance, term.coefficient)
        if not coefficient and not term.always:
            continue
        weight_LG = groups.num_tokens / num_tokens if term.per_token else mean_over_groups_LG
        loss_L = jnp.sum(weight_LG * term.loss(groups, balance, num_experts_per_tok), axis=1)
        if name == "load_balancing_loss" and coefficients_L is not None:
            coefficient = coefficients_L
        total += term.sign * jnp.mean(coefficient * loss_L)
        means[name] = loss_L.mean()
    return total, RouterLosses(**means)


def slope(function: Callable, stats: RouterStats) -> tuple[object, dict[str, jax.Array]]:
    """What `function` returns at `stats`, (loss, others), and the loss's gradient by each sum.

    The sums are linear in the microbatches, so that a loss's gradient by the parameters is that of
    the sum over microbatches of `along(slope, their statistics)`, exactly, whatever function of the
    sums the loss is.
    """
    fields = {field.name: getattr(stats, field.name) for field in dataclasses.fields(stats)}
    floats = {
        n: x for n, x in fields.items() if x is not None and jnp.issubdtype(x.dtype, jnp.floating)
    }
    return jax.value_and_grad(lambda x: function(stats.replace(**x)), has_aux=True)(floats)


def along(slope: dict[str, jax.Array], stats: RouterStats) -> jax.Array:
    """The inner product of a slope, held constant, and statistics."""
    products = (jnp.vdot(jax.lax.stop_gradient(x), getattr(stats, n)) for n, x in slope.items())
    return sum(products)


def load_balancing(
    stats: RouterStats, *, num_experts_per_tok: int, scope: str, divide_by_k: bool, form: str
) -> jax.Array:
    """How unevenly experts are used, [L, groups], or [1, groups] of all layers together.

    With f_e the assignments of expert e per token (so sum f = k) and P_e its mean probability:

    "switch": E · sum_e f_e P_e (Fedus et al., Switch, arXiv 2101.03961, eq. 4-6); gradients pass
      through P only. At uniform routing it is k, or 1 with `divide_by_k`.
    "squared": sum_e (1/E - P_e)^2 (Wei et al., Skywork-MoE, arXiv 2406.06563), 0 at uniform P.

    Args:
      stats: of each layer and group of tokens.
      scope: "layer" takes the loss layer by layer, to be averaged (OLMoE; Megatron and DeepSpeed
        add the layers up: their coefficient times the number of layers is ours); "all_layers"
        averages f and P over the layers first (Hugging Face's Mixtral, Drop-Upcycling), which a
        model with every layer collapsed onto other experts also satisfies.
      divide_by_k: of "switch"; True as in megablocks (OLMoE), False as in Hugging Face.
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


def router_z(stats: RouterStats) -> jax.Array:
    """Mean over tokens of logsumexp(router logits)^2 (Zoph et al., arXiv 2202.08906)."""
    return stats.z_sum / jnp.maximum(stats.num_tokens, 1)


def importance(stats: RouterStats) -> jax.Array:
    """CV^2(importance) + CV^2(load) over experts (Shazeer et al., arXiv 1701.06538, §4 and A).

    Importance is the sum of an expert's weights, load how often it is chosen, smoothly where the
    router has noise. CV^2 = unbiased variance / (mean^2 + 1e-10), as in LLaMA-MoE (Zhu et al.,
    arXiv 2406.16554); it is 0 for a single expert.
    """
    if stats.weight_sum_E.shape[-1] == 1:
        return jnp.zeros(stats.num_tokens.shape)
    return _cv_squared(stats.weight_sum_E) + _cv_squared(stats.load_sum_E)


def _cv_squared(x_LGE):
    return jnp.var(x_LGE, axis=-1, ddof=1) / (jnp.mean(x_LGE, axis=-1) ** 2 + 1e-10)


def mutual_information(stats: RouterStats) -> jax.Array:
    """H(mean over tokens of p) - mean over tokens of H(p), in nats (Pan et al., arXiv 2404.05567).

    Of token and expert: 0 where all tokens have the same probabilities, log E where each has one
    expert and all experts have as many. To be made large.
    """
    tokens_LG = jnp.maximum(stats.num_tokens, 1)
    P_LGE = stats.probability_sum_E / tokens_LG[..., None]
    log_LGE = jnp.log(jnp.maximum(P_LGE, jnp.finfo(P_LGE.dtype).tiny))
    return -jnp.sum(P_LGE * log_LGE, axis=-1) - stats.entropy_sum / tokens_LG


def pooled(stats: RouterStats) -> RouterStats:
    """All batch shards as one group of tokens."""
    return jax.tree.map(lambda x: x.sum(axis=1, keepdims=True), stats)


@dataclasses.dataclass(frozen=True)
class Term:
    """`loss` is of (statistics [L, G, ...], config.balance, num_experts_per_tok), [L, G]."""

    coefficient: str  # its key in config.balance
    loss: Callable[[RouterStats, Balance, int], jax.Array]
    sign: int = 1
    per_token: bool = False  # a mean over tokens: groups count by their tokens, else alike
    always: bool = False  # reported with a coefficient of 0 too


# By the fields of RouterLosses.
TERMS = {
    "load_balancing_loss": Term(
        "load_balancing_coefficient",
        lambda stats, balance, k: load_balancing(
            stats,
            num_experts_per_tok=k,
            scope=balance.load_balancing_scope,
            divide_by_k=balance.load_balancing_divide_by_k,
            form=balance.load_balancing_form,
        ),
        always=True,
    ),
    "router_z_loss": Term(
        "router_z_coefficient", lambda stats, *_: router_z(stats), per_token=True, always=True
    ),
    "importance_loss": Term("importance_coefficient", lambda stats, *_: importance(stats)),
    "mutual_information": Term(
        "mutual_information_coefficient", lambda stats, *_: mutual_information(stats), sign=-1
    ),
}


def distillation_loss(
    x_BTD: jax.Array,
    unembed_DV: jax.Array,
    teacher_x_BTC: jax.Array,
    teacher_unembed_CV: jax.Array,
    weight_BT: jax.Array,
    *,
    temperature: float,
) -> jax.Array:
    """T^2 · KL(teacher || student), logits divided by T, summed over tokens times their weight.

    Hinton et al., arXiv 1503.02531. From the final norms' outputs, with the logits of some tokens
    at a time, made again for the gradient; as in `cross_entropy` each device has its own rows.
    """
    local = functools.partial(_divergence, temperature=temperature)
    arrays = (x_BTD, unembed_DV, teacher_x_BTC, teacher_unembed_CV, weight_BT)
    if jax.sharding.get_abstract_mesh().empty:
        return local(*arrays)
    spec = sharding.spec_of("unembed")

    def on_device(x_BTD, unembed_DV, teacher_x_BTC, teacher_unembed_CV, weight_BT):
        unembeds = (sharding.all_gather(w, spec) for w in (unembed_DV, teacher_unembed_CV))
        student_DV, teacher_CV = unembeds
        return local(x_BTD, student_DV, teacher_x_BTC, teacher_CV, weight_BT)[None]

    return jax.shard_map(
        on_device,
        in_specs=(sharding.BATCH, spec, sharding.BATCH, spec, sharding.BATCH),
        out_specs=sharding.BATCH,
        check_vma=False,  # the tensor axis computes the same on all its devices
    )(*arrays).sum()


def _divergence(x_BTD, unembed_DV, teacher_x_BTC, teacher_unembed_CV, weight_BT, temperature):
    @jax.checkpoint
    def of_token(x_D, teacher_x_C):
        log_p_V, log_q_V = (
            jax.nn.log_softmax(
                jnp.matmul(x, w.astype(x.dtype), preferred_element_type=jnp.float32) / temperature
            )
            for x, w in ((x_D, unembed_DV), (teacher_x_C, teacher_unembed_CV))
        )
        return temperature**2 * jnp.sum(jnp.exp(log_q_V) * (log_q_V - log_p_V))

    tokens = tuple(x.reshape(-1, x.shape[-1]) for x in (x_BTD, teacher_x_BTC))
    logits = cross_entropy.CHUNK_LOGITS[implementations.platform()]
    chunk = max(1, logits // unembed_DV.shape[1] // 2)
    kl_M = jax.lax.map(lambda token: of_token(*token), tokens, batch_size=chunk)
    return jnp.sum(kl_M * weight_BT.ravel())
