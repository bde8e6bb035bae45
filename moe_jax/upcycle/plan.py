"""What an upcycling will do, decided and checked before any weight is touched."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from moe_jax.model.config import (
    ATTENTION_EXPERTS,
    COMPUTATION,
    DENSE,
    EXPERTS,
    ORIGIN,
    ROUTER,
    ModelConfig,
    fields_of,
)
from moe_jax.upcycle import recipes, router_init, step_zero

# Statistics of a parent: of (its config, the result's) their shape after an axis of all its layers.
STATISTICS = {
    # Which neurons each expert takes; clusters of the feed-forward's inputs.
    "neurons": lambda source, config: (config.num_experts, config.expert_size),
    "centroids": lambda source, config: (config.num_experts, config.hidden_size),
    # What the loss owes to an expert; its assignments; how alike the outputs of two are.
    "utility": lambda source, config: (source.num_experts,),
    "load": lambda source, config: (source.num_experts,),
    "similarity": lambda source, config: (source.num_experts,) * 2,
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Of one upcycling. `statistics` are arrays [num_hidden_layers, …] by name."""

    recipe: recipes.Recipe
    parameters: dict
    source: ModelConfig
    config: ModelConfig  # of the result
    router: str
    num_parents: int
    statistics: dict[str, np.ndarray]

    @property
    def granularity(self) -> int:
        return step_zero.granularity(self.source, self.config)

    @property
    def start_factor(self) -> float | None:
        """How many times the parent's a layer's feed-forward output is before any training."""
        if self.num_parents > 1:
            return None
        return self.recipe.start.factor(self.source, self.config, self.router, self.parameters)

    @property
    def at_start(self) -> str:
        """What the made model is before any training, in words."""
        if self.start_factor is None:
            return f"not equal to the parent (this recipe: {self.recipe.start.text})"
        if self.start_factor == 1:
            return "equal to the parent"
        return f"each feed-forward gives {self.start_factor:.3g} times the parent's"

    def parent_of(self, expert: int, num_experts: int) -> int:
        """Several parents' feed-forwards are dealt out in their order, each to as many experts."""
        return expert * self.num_parents // num_experts

    def make_expert(self, ffn: dict, place: recipes.Place) -> dict:
        return self.recipe.make(ffn, place, **self.parameters)

    def shares(self, layer: int) -> np.ndarray:
        """[E, P]: of a mixture's experts in those of the result, in this layer."""
        own = {name: x[layer] for name, x in self.statistics.items()}
        P, E = self.source.num_experts, self.config.num_experts
        return self.recipe.make(P, E, own, **self.parameters)


def make(
    source: ModelConfig,
    config: ModelConfig,
    *,
    recipe: str,
    router: str = "",
    num_parents: int = 1,
    statistics: dict[str, np.ndarray] | None = None,
    parameters: dict,
) -> Plan:
    """The plan to make models of `config` from parents of `source`.

    Raises: ValueError, in one line, for a recipe, parameter, statistic, router initialiser or pair
    of configs that do not fit.
    """
    recipes.check(recipe, parameters)
    method = recipes.RECIPES[recipe]
    known = (*router_init.ROUTER_INITIALISERS, router_init.COPIED)
    if router and router not in known:
        raise ValueError(f"router={router!r} is unknown; use one of {', '.join(known)}")
    given = {name: value for name, value in parameters.items() if value is not None}
    plan = Plan(
        recipe=method,
        parameters={**recipes.parameters_of(recipe), **given},
        source=source,
        config=config,
        router=router or method.router,
        num_parents=num_parents,
        statistics={name: np.asarray(x) for name, x in (statistics or {}).items()},
    )
    for problem in _problems(plan, recipe):
        raise ValueError(problem)
    return plan


def _problems(plan: Plan, recipe: str):
    yield from _problems_of_kinds(plan, recipe)
    yield from _problems_of_sizes(plan, recipe)
    yield from _problems_of_routers(plan)
    yield from _problems_of_statistics(plan, recipe)


def _problems_of_kinds(plan, recipe):
    source, config, method = plan.source, plan.config, plan.recipe
    if method.takes == recipes.DENSE and source.num_experts:
        yield (
            f"recipe {recipe!r} needs a dense parent; this one has num_experts={source.num_experts}"
        )
    if method.takes == recipes.MIXTURE and not source.num_experts:
        yield f"recipe {recipe!r} needs a mixture to be made of; this parent is dense"
    if method.gives == recipes.MIXTURE and not config.num_experts:
        yield "the upcycled model has no sparse layer; set num_experts to 2 or more"
    if method.gives == recipes.DENSE and config.num_experts:
        yield f"recipe {recipe!r} makes a dense model; set num_experts=0"
    if method.takes == recipes.MIXTURE and method.gives == recipes.MIXTURE:
        if config.layer_kinds != source.layer_kinds:
            yield f"layers={config.layer_kinds} differs from the parent's {source.layer_kinds}"
    if method.gives == recipes.DENSE and source.shared_expert_intermediate_size:
        yield f"recipe {recipe!r} cannot merge a shared expert; this parent has one"
    if plan.num_parents > 1 and not method.several:
        yield f"recipe {recipe!r} takes one parent, not {plan.num_parents}"
    own = OWN | (OF_ATTENTION if method.attention else frozenset())
    if method.takes == recipes.MIXTURE:
        own = own - {"shared_expert_intermediate_size"}
        if method.gives == recipes.DENSE or DENSE not in source.layer_kinds:
            own = own | {"intermediate_size"}
    for name, ours, theirs in differences(source, config, own):
        yield f"{name}={ours} differs from the parent's {theirs}; use {theirs}"


def differences(source: ModelConfig, config: ModelConfig, own: frozenset[str]) -> Iterator[tuple]:
    """Each field but `own` that two models differ in: its name, the config's and the source's."""
    theirs, ours = (
        dataclasses.replace(c, num_key_value_heads=c.num_kv_heads, head_dim=c.head_size)
        for c in (source, config)
    )
    # Rotary positions have no weights (Skywork-MoE takes longer texts than its parent).
    rotary = {"max_position_embeddings"} if config.position_embedding == "rotary" else set()
    for name in (field.name for field in dataclasses.fields(ModelConfig)):
        if name not in own | rotary and getattr(ours, name) != getattr(theirs, name):
            yield name, getattr(ours, name), getattr(theirs, name)


# What an upcycled model and its parent may differ in.
OWN = fields_of(ORIGIN, EXPERTS, ROUTER, COMPUTATION)
OF_ATTENTION = fields_of(ATTENTION_EXPERTS)


def _problems_of_sizes(plan, recipe):
    source, config, method = plan.source, plan.config, plan.recipe
    E, F = config.num_experts, config.expert_size
    if method.takes == recipes.MIXTURE:
        dense_F = source.intermediate_size if DENSE in source.layer_kinds else source.expert_size
        if method.gives == recipes.DENSE and dense_F != source.expert_size:
            yield (
                f"recipe {recipe!r} makes all layers of one width, but the parent's dense layers "
                f"have {dense_F} neurons and its experts {source.expert_size}; use another parent"
            )
        if method.gives == recipes.DENSE and config.intermediate_size != source.expert_size:
            yield (
                f"intermediate_size={config.intermediate_size} differs from the experts' "
                f"{source.expert_size}; use {source.expert_size}"
            )
        if method.gives == recipes.MIXTURE and F != source.expert_size:
            yield (
                f"moe_intermediate_size={F} differs from the parent's {source.expert_size}; "
                "leave it out"
            )
        grows, P = method.make is recipes.expert_upcycling, source.num_experts
        if method.gives == recipes.MIXTURE and (E < P if grows else E > P):
            bound = "at least" if grows else "at most"
            yield f"num_experts={E} must be {bound} the parent's {P} for recipe {recipe!r}"
        return
    if not method.cut and F != source.intermediate_size:
        yield (
            f"moe_intermediate_size={F} differs from the parent's "
            f"intermediate_size={source.intermediate_size}; leave it out"
        )
    given = "neurons" in plan.statistics and plan.parameters.get("partition") == "statistics"
    G = plan.granularity
    if method.cut and not given and (G == 0 or source.intermediate_size % F):
        yield (
            f"moe_intermediate_size={F} does not divide the parent's "
            f"intermediate_size={source.intermediate_size}; use a divisor of it"
        )
    elif method.make is recipes.llama_moe and not given and E != G:
        yield (
            f"num_experts={E} of moe_intermediate_size={F} do not share out the parent's "
            f"{source.intermediate_size} neurons; use {G} experts"
        )
    elif method.cut and not given and E % (G * plan.num_parents):
        yield (
            f"num_experts={E} is not divisible by the {G} shards of each of {plan.num_parents} "
            f"feed-forwards; use a multiple of {G * plan.num_parents}"
        )
    elif E % plan.num_parents:
        yield f"num_experts={E} is not divisible by the {plan.num_parents} parents"
    shared = config.shared_expert_intermediate_size
    if method.shared and shared != source.intermediate_size:
        yield (
            f"recipe {recipe!r} keeps the parent's feed-forward as a shared expert; "
            f"set shared_expert_intermediate_size={source.intermediate_size}"
        )
    if not method.shared and shared:
        yield f"recipe {recipe!r} makes no shared expert; leave shared_expert_intermediate_size out"
    if config.num_attention_experts % plan.num_parents:
        yield (
            f"num_attention_experts={config.num_attention_experts} is not divisible by the "
            f"{plan.num_parents} parents"
        )
    if method.attention and not config.num_attention_experts:
        yield f"recipe {recipe!r} makes experts of attention too; set num_attention_experts"


def _problems_of_routers(plan):
    source, config, router = plan.source, plan.config, plan.router
    if plan.recipe.gives == recipes.DENSE:
        return
    if router == router_init.COPIED and plan.recipe.takes == recipes.DENSE:
        yield "router='copied' needs a mixture to copy from; this parent is dense"
    if router == router_init.COPIED and config.router != source.router:
        yield f"router='copied' keeps the parent's router={source.router!r}; use it"
    if router == "grouped" and plan.recipe.takes == recipes.MIXTURE:
        yield "router='grouped' is for the shards of dense feed-forwards"


def _problems_of_statistics(plan, recipe):
    for name in sorted(set(plan.statistics) - set(STATISTICS)):
        yield f"the statistic {name!r} is unknown; known are {', '.join(STATISTICS)}"
    needed = dict.fromkeys(plan.recipe.statistics, f"recipe {recipe!r}")
    if plan.parameters.get("partition") == "statistics":
        needed["neurons"] = "partition='statistics'"
    if plan.router == "centroids":
        needed["centroids"] = "router='centroids'"
    for name in sorted(set(needed) - set(plan.statistics)):
        yield (
            f"{needed[name]} needs the statistic {name!r}; "
            "make it with scripts/collect_statistics.py and pass it"
        )
    used = {*needed, *plan.recipe.optional} & set(plan.statistics)
    # A run's moments go the way of its weights, statistics and all, but to zero routers.
    of_moments = plan.router == "zero" != plan.recipe.router
    if plan.statistics and not used and not of_moments:
        useful = [f"the statistic {name!r}" for name in plan.recipe.optional]
        if "partition" in plan.parameters:
            useful.append("partition='statistics'")
        if plan.recipe.gives == recipes.MIXTURE:
            useful.append("router='centroids'")
        yield (
            f"recipe {recipe!r} uses none of the statistics {', '.join(sorted(plan.statistics))}; "
            f"leave them out, or give {' or '.join(useful)}"
        )
    for name in sorted(used):
        want = (plan.source.num_hidden_layers, *STATISTICS[name](plan.source, plan.config))
        if plan.statistics[name].shape != want:
            yield (
                f"the statistic {name!r} is {list(plan.statistics[name].shape)}, not {list(want)}; "
                "collect it from this parent, for this number of experts"
            )
