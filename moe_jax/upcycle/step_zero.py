"""Each recipe's statement of how the new model relates to its parent before any training."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from moe_jax.model.config import ModelConfig
from moe_jax.model.router import ROUTERS
from moe_jax.upcycle import experts, router_init

if TYPE_CHECKING:
    from moe_jax.upcycle.plan import Plan


@dataclasses.dataclass(frozen=True)
class Start:
    """A recipe's statement about step 0.

    `factor` gives, for the plan of a dropless model, the ratio of each layer's feed-forward output
    to its parent's; it is None for a recipe whose output is in general no multiple of the
    parent's.
    `unless` yields a line for each condition of `factor` that fails, with the setting NAME=VALUE
    that repairs it, if there is one.
    """

    text: str
    factor: Callable[["Plan"], float] | None = None
    unless: Callable[["Plan"], Iterator[str]] = lambda plan: iter(())


def factor(plan: "Plan") -> float | None:
    """The ratio of a layer's feed-forward output to the parent's, before any training.

    None if the output is not a multiple of the parent's, or there are several parents.
    """
    start = plan.recipe.start
    one_multiple = plan.num_parents == 1 and not differences(plan)
    return start.factor(plan) if start.factor is not None and one_multiple else None


def differences(plan: "Plan") -> list[str]:
    """The conditions of `factor` that fail, each with the setting that repairs it, if any."""
    return list(plan.recipe.start.unless(plan))


def in_words(plan: "Plan") -> str:
    """How the new model relates to its parent before any training."""
    multiple = factor(plan)
    if multiple is None:
        own = differences(plan) if plan.num_parents == 1 else []
        why = "; and ".join(own) or f"this recipe: {plan.recipe.start.text}"
        relation = f"not equal to the parent ({why})"
    elif multiple == 1:
        relation = "equal to the parent"
    else:
        relation = f"each feed-forward gives {multiple:.3g} times the parent's"
    if multiple is not None and plan.config.dispatch == "capacity":
        relation += ", except for tokens beyond the capacity of their experts"
    return relation + _copies_stay(plan) * (
        "; a copy gets the logits of its original: set router_noise, for example 0.01, to let them "
        "become different experts"
    )


def _copies_stay(plan: "Plan") -> bool:
    """True if no noise, from the recipe or the router itself, makes copies diverge."""
    row, more = ROUTERS[plan.config.router], plan.config.num_experts > plan.source.num_experts
    copied = more and plan.router == router_init.COPIED
    return copied and row.learned and not ("noise" in row.leaves or plan.noisy_on_copies)


def needed_scale(config: ModelConfig, granularity: int) -> float:
    """The factor on each shard's output with which the chosen shards add up to the whole FFN.

    The weights are those at the start of training. He et al., arXiv 2410.07524: N G / T for
    softmax then top-k, whose weights are about 1 / N each (E G² / T in their notation); G if the T
    weights sum to one.
    """
    return granularity / even_weight(config)


def even_weight(config: ModelConfig) -> float:
    """The sum of a token's weights when the logits of all experts are equal."""
    if config.dispatch == "merge":
        return 1.0
    return ROUTERS[config.router].weight_at_even_logits(config)


def _initialiser(name: str) -> str:
    return f"initialise the router by {name} (--router={name} or init.upcycle.router={name!r})"


def _weight(plan: "Plan") -> float:
    return even_weight(plan.config)


def _weight_varies(plan: "Plan") -> Iterator[str]:
    """A line if the sum of a token's weights depends on the token."""
    config, row = plan.config, ROUTERS[plan.config.router]
    if not row.causal:
        yield f"with router={config.router!r} experts choose tokens, and some tokens get no expert"
    elif config.dispatch != "merge" and not row.sum_is_fixed(config) and plan.router != "zero":
        yield "the weights of a token's experts have no fixed sum; set norm_topk_prob=True"


def _neurons_change(plan: "Plan") -> Iterator[str]:
    if ratio := plan.parameters.get("ratio", 0):
        yield f"a share of {ratio} of the neurons is new; ratio=0.0 keeps all"


def _copies_differ(plan: "Plan") -> Iterator[str]:
    yield from _neurons_change(plan)
    if plan.config.dispatch == "merge" and plan.parameters.get("permute_neurons"):
        yield (
            "dispatch='merge' averages neurons, but their order differs between experts; "
            "set permute_neurons=False"
        )
    yield from _weight_varies(plan)


def _of_shards(plan: "Plan") -> float:
    factor = needed_scale(plan.config, plan.granularity)
    return (
        _weight(plan) / plan.granularity * (1 if plan.parameters["scaling"] == "none" else factor)
    )


def _shards_differ(plan: "Plan") -> Iterator[str]:
    config, T, G = plan.config, plan.config.num_experts_per_tok, plan.granularity
    yield from _neurons_change(plan)
    if config.dispatch == "merge":
        yield "dispatch='merge' averages the weights of different shards; set dispatch='dropless'"
    elif ROUTERS[config.router].one_per_group and T != G or T % G:
        yield (
            f"the {T} experts of a token do not make whole feed-forwards of {G} shards; "
            f"set num_experts_per_tok={G}"
        )
    elif plan.router not in ("grouped", "zero"):
        yield f"the shards of a feed-forward have different logits; {_initialiser('grouped')}"
    yield from _weight_varies(plan)
    shape = experts.shape_of_scaling(gated=config.gated_mlp, hidden_act=config.hidden_act)
    if (
        plan.parameters["scaling"] == "paper"
        and shape != "squared"
        and needed_scale(config, G) != 1
    ):
        yield "the paper's scaling is for another activation; set scaling='exact'"


def _of_parts(plan: "Plan") -> float:
    return _weight(plan) / plan.config.num_experts


def _parts_differ(plan: "Plan") -> Iterator[str]:
    config = plan.config
    if config.dispatch == "merge":
        yield "dispatch='merge' averages the weights of different parts; set dispatch='dropless'"
    if config.num_experts_per_tok != (E := config.num_experts):
        yield f"a token uses {config.num_experts_per_tok} of {E} parts; set num_experts_per_tok={E}"
    if plan.router != "zero":
        yield f"the parts have different weights; {_initialiser('zero')}"
    if plan.parameters["partition"] == "statistics":
        yield "the statistic may give a neuron to several parts or to none; set partition='random'"


def _of_duplicates(plan: "Plan") -> float:
    """Copies share a softmax's probability; sigmoids ignore each other, so that copies add up."""
    config, source = plan.config, plan.source
    times = config.num_experts_per_tok / source.num_experts_per_tok
    share = ROUTERS[config.router].copies_share
    return 1.0 if share is not None and share(config) else times


def _duplicates_differ(plan: "Plan") -> Iterator[str]:
    """A line for each reason why duplicated experts do not compute the parent's function."""
    source, config, row = plan.source, plan.config, ROUTERS[plan.config.router]
    times = config.num_experts_per_tok / source.num_experts_per_tok
    if plan.router != router_init.COPIED:
        yield f"the router is not the parent's; {_initialiser(router_init.COPIED)}"
    if _rule(config) != _rule(source):
        yield "the weights of experts follow a different rule from the parent's"
    if row.copies_share is None or config.num_expert_groups > 1 or config.gate_norm_std is not None:
        yield "this router's weights depend on the number of experts or on their groups"
    for parameter in plan.noisy_on_copies:
        yield f"noise makes copies differ from their originals; set {parameter}=0.0"
    copies = [plan.shares(i).sum(axis=0) for i in range(config.num_hidden_layers)]
    if any((of_layer != times).any() for of_layer in copies):
        yield (
            f"not every expert is there {times:g} times, its original included, as "
            "num_experts_per_tok needs; set num_experts_per_tok to "
            f"{source.num_experts_per_tok} times the number of each"
        )


def _rule(config: ModelConfig) -> tuple:
    """Everything but the number of experts that determines a token's weights from its logits."""
    values = {**ROUTERS[config.router].values(config), "num_experts_per_tok": None}
    return config.router, values, config.dispatch, config.merge_segment_length


COPIES = Start("equal if the weights of the chosen experts sum to one", _weight, _copies_differ)
COPIES_BUT = Start("close; equal if ratio=0 and the weights sum to one", _weight, _copies_differ)
COPIES_OF_EACH = Start(
    "another function; equal if the parents are and the weights sum to one", _weight, _copies_differ
)
SHARDS = Start(
    "equal if T is a multiple of G, the router is grouped or zero, the weights have a fixed sum "
    "(any sum with router zero), and scaling is exact, down, or paper with an ungated squared ReLU "
    "(with scaling none: the sum / G of it); otherwise another function",
    _of_shards,
    _shards_differ,
)
SHARDS_BUT = Start(
    "another function; with ratio=0, as for virtual_group", _of_shards, _shards_differ
)
SHARDS_OF_EACH = Start(
    "another function; as for virtual_group if the parents are equal", _of_shards, _shards_differ
)
PARTS = Start(
    "another function with k of N parts; 1/N of it with all parts, router zero and weights that "
    "sum to one",
    _of_parts,
    _parts_differ,
)
DUPLICATES = Start(
    "close; equal if every expert is there m times, k grows m-fold, there is no noise, and the "
    "weights sum to one or are a softmax over all experts",
    _of_duplicates,
    _duplicates_differ,
)
EQUAL = Start("equal", lambda plan: 1.0)
EQUAL_IF_EXPERTS_ARE = Start(
    "another function; equal if the experts are and their weights sum to one"
)
NEAR_FULL_RANK = Start("another function; close with rank_ratio near 1")
OTHER = Start("another function")
