"""The relation of a new model to its parent before any training, as each recipe promises it."""

import dataclasses
from collections.abc import Callable

from moe_jax.model.config import ModelConfig
from moe_jax.model.router import ROUTERS
from moe_jax.upcycle import experts


@dataclasses.dataclass(frozen=True)
class Start:
    """The relation of a new model to its parent before any training.

    `factor` says for (parent's config, config, router initialiser, parameters), dropless, how many
    times its parent's each layer's feed-forward output is; None when it is no multiple of it.
    """

    text: str
    factor: Callable[[ModelConfig, ModelConfig, str, dict], float | None]


def granularity(source: ModelConfig, config: ModelConfig) -> int:
    """G, how many experts hold one feed-forward of the parent."""
    return source.intermediate_size // config.expert_size


def needed_scale(config: ModelConfig, granularity: int) -> float:
    """The factor that makes the chosen shards, weighted at the start, the whole feed-forward.

    He et al., arXiv 2410.07524: N G / T for softmax then top-k, whose weights are about 1 / N
    each (E G² / T in their letters); G where the T weights sum to one.
    """
    return granularity / even_weight(config)


def even_weight(config: ModelConfig) -> float:
    """The sum of a token's weights where the logits of all experts are equal."""
    if config.dispatch == "merge":
        return 1.0
    return ROUTERS[config.router].weight_at_even_logits(config)


def _sum_is_fixed(config: ModelConfig) -> bool:
    """True if the sum of a token's weights does not depend on the logits."""
    return config.dispatch == "merge" or ROUTERS[config.router].sum_is_fixed(config)


def _weight(config: ModelConfig, router: str) -> float | None:
    """The sum of every token's weights at the start; None where it depends on the token."""
    known = _sum_is_fixed(config) or router == "zero"
    return even_weight(config) if known and ROUTERS[config.router].causal else None


def _of_copies(source, config, router, parameters):
    del source
    # dispatch="merge" averages weights, so the neurons must be in the same order.
    merged = config.dispatch == "merge" and parameters.get("permute_neurons")
    return None if parameters.get("ratio", 0) or merged else _weight(config, router)


def _of_shards(source, config, router, parameters):
    T, G = config.num_experts_per_tok, granularity(source, config)
    factor, scaling, weight = (
        needed_scale(config, G),
        parameters["scaling"],
        _weight(config, router),
    )
    whole = T == G if ROUTERS[config.router].one_per_group else T % G == 0
    whole &= router in ("grouped", "zero") and config.dispatch != "merge"
    if not whole or weight is None or parameters.get("ratio", 0):
        return None
    shape = experts.shape_of_scaling(gated=config.gated_mlp, hidden_act=config.hidden_act)
    if scaling == "paper" and shape != "squared" and factor != 1:
        return None
    return weight / G * (1 if scaling == "none" else factor)


def _of_parts(source, config, router, parameters):
    del source
    all_alike = router == "zero" and config.num_experts_per_tok == config.num_experts
    if not all_alike or parameters["partition"] == "statistics" or config.dispatch == "merge":
        return None
    return even_weight(config) / config.num_experts


def _of_duplicates(source, config, router, parameters):
    """Copies share a softmax's probability among them; sigmoids know nothing of each other."""
    del router
    times, left = divmod(config.num_experts, source.num_experts)
    alike = left == 0 and config.num_experts_per_tok == times * source.num_experts_per_tok
    one_by_one = config.num_expert_groups == 1 and config.gate_norm_std is None
    copies_share = ROUTERS[config.router].copies_share
    if parameters["router_noise"] or copies_share is None or not (alike and one_by_one):
        return None
    return 1.0 if copies_share(config) else float(times)


def _always(source, config, router, parameters):
    del source, config, router, parameters
    return 1.0


def _never(source, config, router, parameters):
    del source, config, router, parameters
    return None


COPIES = Start("equal, where the weights of the chosen experts sum to one", _of_copies)
COPIES_BUT = Start("close, equal with ratio=0 and weights that sum to one", _of_copies)
COPIES_OF_EACH = Start("another model, equal if the parents are and weights sum to one", _of_copies)
SHARDS = Start(
    "equal, for T a multiple of G, a router grouped or zero, weights that sum to one and scaling "
    "exact or down (with scaling none: 1/G of it); otherwise another model",
    _of_shards,
)
SHARDS_BUT = Start("another model, with ratio=0 as virtual_group", _of_shards)
SHARDS_OF_EACH = Start("another model, as virtual_group if the parents are equal", _of_shards)
PARTS = Start("another model (with k of N parts); all parts together: 1/N of it", _of_parts)
DUPLICATES = Start(
    "close; equal with all copied m times, k times m, no noise, and weights by softmax over all "
    "experts or that sum to one",
    _of_duplicates,
)
EQUAL = Start("equal", _always)
EQUAL_IF_EXPERTS_ARE = Start(
    "another model, equal if the experts are and their weights sum to one", _never
)
NEAR_FULL_RANK = Start("another model, close with rank_ratio near 1", _never)
OTHER = Start("another model", _never)
