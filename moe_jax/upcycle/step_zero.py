"""The relation of a new model to its parent before any training, which each recipe states."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from moe_jax.model.config import ModelConfig
from moe_jax.model.router import ROUTERS
from moe_jax.upcycle import experts, router_init

if TYPE_CHECKING:
    from moe_jax.upcycle.plan import Plan


@dataclasses.dataclass(frozen=True)
class Start:
    """The promise of a recipe.

    `factor` gives, for the plan of a dropless model, the output of each layer's feed-forward in
    units of its parent's; None where it is no multiple of it.
    """

    text: str
    factor: Callable[["Plan"], float | None] = lambda plan: None


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


def _weight(plan: "Plan") -> float | None:
    """The sum of every token's weights at the start; None where it depends on the token."""
    config, row = plan.config, ROUTERS[plan.config.router]
    known = config.dispatch == "merge" or row.sum_is_fixed(config) or plan.router == "zero"
    return even_weight(config) if known and row.causal else None


def _of_copies(plan: "Plan") -> float | None:
    # dispatch="merge" averages weights, so the neurons must be in the same order.
    merged = plan.config.dispatch == "merge" and plan.parameters.get("permute_neurons")
    return None if plan.parameters.get("ratio", 0) or merged else _weight(plan)


def _of_shards(plan: "Plan") -> float | None:
    config, T, G = plan.config, plan.config.num_experts_per_tok, plan.granularity
    scaling, weight, factor = plan.parameters["scaling"], _weight(plan), needed_scale(config, G)
    whole = T == G if ROUTERS[config.router].one_per_group else T % G == 0
    whole &= plan.router in ("grouped", "zero") and config.dispatch != "merge"
    if not whole or weight is None or plan.parameters.get("ratio", 0):
        return None
    shape = experts.shape_of_scaling(gated=config.gated_mlp, hidden_act=config.hidden_act)
    if scaling == "paper" and shape != "squared" and factor != 1:
        return None
    return weight / G * (1 if scaling == "none" else factor)


def _of_parts(plan: "Plan") -> float | None:
    config = plan.config
    all_alike = plan.router == "zero" and config.num_experts_per_tok == config.num_experts
    if not all_alike or plan.parameters["partition"] == "statistics" or config.dispatch == "merge":
        return None
    return even_weight(config) / config.num_experts


def _of_duplicates(plan: "Plan") -> float | None:
    """Copies share a softmax's probability among them; sigmoids know nothing of each other."""
    source, config, row = plan.source, plan.config, ROUTERS[plan.config.router]
    times = config.num_experts_per_tok / source.num_experts_per_tok
    one_by_one = config.num_expert_groups == 1 and config.gate_norm_std is None
    copied = plan.router == router_init.COPIED and _rule(config) == _rule(source)
    if plan.noise_on_copies or row.copies_share is None or not (copied and one_by_one):
        return None
    if any((plan.shares(i).sum(axis=0) != times).any() for i in range(config.num_hidden_layers)):
        return None
    return 1.0 if row.copies_share(config) else times


def _rule(config: ModelConfig) -> tuple:
    """All that makes weights of a router's logits, but the number of experts."""
    values = {**ROUTERS[config.router].values(config), "num_experts_per_tok": None}
    return config.router, values, config.dispatch, config.merge_segment_length


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
EQUAL = Start("equal", lambda plan: 1.0)
EQUAL_IF_EXPERTS_ARE = Start("another model, equal if the experts are and their weights sum to one")
NEAR_FULL_RANK = Start("another model, close with rank_ratio near 1")
OTHER = Start("another model")
