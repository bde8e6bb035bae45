"""What a made model is to its parent before any training: promised by each recipe, and tested."""

import dataclasses
from collections.abc import Callable

from moe_jax.model.config import ModelConfig
from moe_jax.upcycle import experts


@dataclasses.dataclass(frozen=True)
class Start:
    """What a model made by a recipe is to the one it was made of, before any training.

    `factor` says for (parent's config, config, router initialiser, parameters), dropless, how many
    times its parent's each layer's feed-forward output is; None when it is no multiple of it.
    """

    text: str
    factor: Callable[[ModelConfig, ModelConfig, str, dict], float | None]


def granularity(source: ModelConfig, config: ModelConfig) -> int:
    """G, how many experts hold one feed-forward of the parent."""
    return source.intermediate_size // config.expert_size


def needed_scale(config: ModelConfig, granularity: int) -> float:
    """What makes the chosen shards of a feed-forward, weighted at the start, the whole of it.

    He et al., arXiv 2410.07524: N G / T for softmax then top-k, whose weights are about 1 / N
    each (E G² / T in their letters); G where the T weights sum to one.
    """
    if weights_sum_to_one(config):
        return granularity
    return config.num_experts * granularity / config.num_experts_per_tok


def weights_sum_to_one(config: ModelConfig) -> bool:
    return config.norm_topk_prob or config.router in ("topk_softmax", "noisy_topk")


def _of_copies(source, config, router, parameters):
    del source, router
    kept = parameters.get("ratio", 0) == 0
    return 1.0 if kept and weights_sum_to_one(config) else None


def _of_shards(source, config, router, parameters):
    T, G = config.num_experts_per_tok, granularity(source, config)
    factor, scaling = needed_scale(config, G), parameters["scaling"]
    whole = T == G if config.router == "group_topk" else T % G == 0
    known = weights_sum_to_one(config) or router == "zero"
    if not (whole and known and router in ("grouped", "zero")) or parameters.get("ratio", 0):
        return None
    shape = experts.shape_of_scaling(gated=config.gated_mlp, hidden_act=config.hidden_act)
    if scaling == "paper" and shape != "squared" and factor != 1:
        return None
    weights = 1 if weights_sum_to_one(config) else T / config.num_experts
    return weights / G * (1 if scaling == "none" else factor)


def _of_parts(source, config, router, parameters):
    del source
    all_alike = router == "zero" and config.num_experts_per_tok == config.num_experts
    exact = all_alike and parameters["partition"] != "statistics" and weights_sum_to_one(config)
    return 1 / config.num_experts if exact else None


def _of_duplicates(source, config, router, parameters):
    del router
    times, left = divmod(config.num_experts, source.num_experts)
    alike = left == 0 and config.num_experts_per_tok == times * source.num_experts_per_tok
    return 1.0 if alike and parameters["router_noise"] == 0 else None


def _always(source, config, router, parameters):
    del source, config, router, parameters
    return 1.0


def _never(source, config, router, parameters):
    del source, config, router, parameters
    return None


COPIES = Start("equal, where the weights of the chosen experts sum to one", _of_copies)
COPIES_BUT = Start("close, equal with ratio=0 and weights that sum to one", _of_copies)
COPIES_OF_EACH = Start("another model, equal if the parents are", _of_copies)
SHARDS = Start(
    "equal, for T a multiple of G, weights that sum to one and scaling exact or down "
    "(with scaling none: 1/G of it); otherwise close",
    _of_shards,
)
SHARDS_BUT = Start("close, as virtual_group with ratio=0", _of_shards)
SHARDS_OF_EACH = Start("another model, as virtual_group if the parents are equal", _of_shards)
PARTS = Start("another model (with k of N parts); all parts together: 1/N of it", _of_parts)
DUPLICATES = Start("close; equal with all copied m times, k times m, no noise", _of_duplicates)
EQUAL = Start("equal", _always)
EQUAL_IF_EXPERTS_ARE = Start("another model, equal if the experts are", _never)
NEAR_FULL_RANK = Start("another model, close with rank_ratio near 1", _never)
OTHER = Start("another model", _never)
