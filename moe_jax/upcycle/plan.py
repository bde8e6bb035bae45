"""The plan of an upcycling, made and checked before any weight is touched.

It states the origin of every leaf of the result. `transform.py` (in memory and on a mesh) and
`streaming.py` (from folder to folder) execute it.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator

import numpy as np

from moe_jax import spelling
from moe_jax.model.config import DENSE, MOE, ModelConfig, fields_of
from moe_jax.model.fields import ATTENTION_EXPERTS, COMPUTATION, EXPERTS, ORIGIN, ROUTER
from moe_jax.model.layout import slots
from moe_jax.model.router import ROUTERS
from moe_jax.upcycle import origins, recipes, router_init

# A parent's statistics: (its config, the result's) -> the shape that follows the axis of layers.
STATISTICS = {
    # The neurons of each expert; centres of the clusters of the feed-forward's inputs.
    "neurons": lambda source, config: (config.num_experts, config.expert_size),
    "centroids": lambda source, config: (config.num_experts, config.hidden_size),
    # Each expert's summed squared gradients; its assignments; the similarity of experts' outputs.
    "utility": lambda source, config: (source.num_experts,),
    "load": lambda source, config: (source.num_experts,),
    "similarity": lambda source, config: (source.num_experts,) * 2,
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """One upcycling. `statistics` are arrays [num_hidden_layers, …] by name."""

    name: str  # the recipe's name
    recipe: recipes.Recipe
    parameters: dict
    source: ModelConfig
    config: ModelConfig  # the result's
    router: str
    num_parents: int
    statistics: dict[str, np.ndarray]
    of_moments: bool = False  # the plan transforms the weights' Adam moments, not the weights

    @property
    def granularity(self) -> int:
        """G, the number of experts that hold one feed-forward of the parent."""
        return self.source.intermediate_size // self.config.expert_size

    def noise_on(self, leaf: str) -> float:
        """The relative deviation of the noise on the copies in this leaf of a copied router."""
        limits = self.recipe.limits.items()
        return next((self.parameters[name] for name, p in limits if p.of_copied == leaf), 0.0)

    @property
    def noisy_on_copies(self) -> list[str]:
        """The names of the parameters that add noise to copies in this model's router."""
        leaves = ROUTERS[self.config.router].leaves
        limits = self.recipe.limits.items()
        return [name for name, p in limits if p.of_copied in leaves and self.parameters[name]]

    @property
    def of_parameters(self) -> dict[str, str]:
        """Each statistic that a parameter's value needs -> that parameter as "NAME=VALUE"."""
        return {
            limits.statistics[self.parameters[name]]: f"{name}={self.parameters[name]!r}"
            for name, limits in self.recipe.limits.items()
            if self.parameters[name] in limits.statistics
        }

    def for_moments(self) -> "Plan":
        """The plan by which an optimizer's moments follow their weights to experts and neurons.

        Moments are not redrawn, scaled or disturbed; a router's moments are zero.
        """
        limits = self.recipe.limits.items()
        own = {name: p.for_moments for name, p in limits if p.for_moments is not None}
        own = {**self.parameters, **own}
        return dataclasses.replace(self, router="zero", parameters=own, of_moments=True)

    # Origins of leaves ------------------------------------------------------------

    def shell(self, paths: Iterable[str]) -> dict[str, origins.Kept]:
        """The leaves that belong to no layer; `paths` are all leaves of a parent."""
        return {path: self._kept(path) for path in paths if not path.startswith("blocks/")}

    def layers(self, paths: Iterable[str]) -> list[dict[str, origins.Origin]]:
        """The origins of the leaves of each layer of the result; `paths` are a parent's leaves."""
        leaves: dict[str, list[str]] = {}
        for path in paths:
            if path.startswith("blocks/"):
                _, slot, leaf = path.split("/", 2)
                leaves.setdefault(slot, []).append(leaf)
        slots_of_source = enumerate(slots(self.source.block_kinds))
        return [self._layer(layer, leaves[slot]) for layer, (slot, _) in slots_of_source]

    def shares(self, layer: int) -> np.ndarray:
        """[E, P]: the weight of each of the parent's P experts in each new expert of this layer."""
        own = {name: x[layer] for name, x in self.statistics.items()}
        P, E = self.source.num_experts, self.config.num_experts
        return self.recipe.make(P, E, own, **self.parameters)

    def parents_of(self, num_experts: int) -> tuple[int, ...]:
        """The parent of each expert: equally many consecutive experts for each parent."""
        return tuple(e * self.num_parents // num_experts for e in range(num_experts))

    def _layer(self, layer: int, leaves: list[str]) -> dict[str, origins.Origin]:
        was_sparse, is_sparse = (
            config.layer_kinds[layer] == MOE for config in (self.source, self.config)
        )
        found: dict[str, origins.Origin] = {}
        for leaf in leaves:
            part, name = leaf.split("/", 1)
            if part == "attention" and self.recipe.attention:
                found |= self._attention(leaf, name)
            elif part == "moe":
                found |= self._of_mixture(leaf, name)
            elif part == "mlp" and is_sparse:
                found |= self._of_dense(leaf, name)
            else:
                found[leaf] = self._kept(leaf)
        if is_sparse and self.router != router_init.COPIED:
            found |= self._fresh_router("moe/experts/up" if was_sparse else "mlp/up")
        return found

    def _kept(self, path: str) -> origins.Kept:
        last = self.num_parents - 1
        return origins.Kept(path, (last,) if self.recipe.rest == "last" else tuple(range(last + 1)))

    def _attention(self, leaf: str, name: str) -> dict[str, origins.Origin]:
        if name.startswith("norm/"):
            return {leaf: self._kept(leaf)}
        D, E = self.config.hidden_size, self.config.num_attention_experts
        found: dict[str, origins.Origin] = {
            f"attention/experts/{name}": origins.Stacked(leaf, self.parents_of(E))
        }
        if name == "wq":
            kernel = origins.FreshRouter(leaf, "attention_router", (D, E), self.router)
            found["attention/router/kernel"] = kernel
        return found

    def _of_dense(self, leaf: str, name: str) -> dict[str, origins.Origin]:
        if name.startswith("norm/"):
            return {f"moe/{name}": self._kept(leaf)}
        expert = origins.Expert(leaf, self.parents_of(self.config.num_experts))
        shared = {f"moe/shared/{name}": self._kept(leaf)} if self.recipe.shared else {}
        return {f"moe/experts/{name}": expert, **shared}

    def _of_mixture(self, leaf: str, name: str) -> dict[str, origins.Origin]:
        dense = self.recipe.gives == recipes.DENSE
        part, _, inner = name.partition("/")
        if part == "experts":
            return {f"mlp/{inner}" if dense else leaf: origins.Mixture(leaf)}
        if part == "router":
            copied = not dense and self.router == router_init.COPIED
            return {leaf: origins.CopiedRouter(leaf)} if copied else {}
        return {f"mlp/{name}" if dense else leaf: self._kept(leaf)}

    def _fresh_router(self, path: str) -> dict[str, origins.Origin]:
        """The plan's initialiser makes the kernel; the router's other leaves have their own."""
        found: dict[str, origins.Origin] = {}
        for name, leaf in ROUTERS[self.config.router].leaves.items():
            shape = leaf.shape(self.config.hidden_size, self.config.num_experts)
            own = (f"router_{name}", shape, "" if self.of_moments else leaf.upcycled)
            own = ("router", shape, self.router) if name == "kernel" else own
            found[f"moe/router/{name}"] = origins.FreshRouter(path, *own)
        return found


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
        raise ValueError(spelling.unknown("router", router, known))
    given = {name: value for name, value in parameters.items() if value is not None}
    plan = Plan(
        name=recipe,
        recipe=method,
        parameters={**method.defaults, **given},
        source=source,
        config=config,
        router=router or method.router,
        num_parents=num_parents,
        statistics={name: np.asarray(x) for name, x in (statistics or {}).items()},
    )
    problems = _problems_of_kinds, _problems_of_sizes, _problems_of_routers, _problems_of_statistics
    for problem in itertools.chain(*(of(plan) for of in problems)):
        raise ValueError(problem)
    return plan


def _problems_of_kinds(plan: Plan) -> Iterator[str]:
    source, config, method, recipe = plan.source, plan.config, plan.recipe, plan.name
    of_mixture, to_dense = method.takes == recipes.MIXTURE, method.gives == recipes.DENSE
    if not of_mixture and source.num_experts:
        yield (
            f"recipe {recipe!r} needs a dense parent; this one has num_experts={source.num_experts}"
        )
    if of_mixture and not source.num_experts:
        yield f"recipe {recipe!r} needs a mixture to be made of; this parent is dense"
    if not to_dense and not config.num_experts:
        yield "the upcycled model has no sparse layer; set num_experts to 2 or more"
    if to_dense and config.num_experts:
        yield f"recipe {recipe!r} makes a dense model; set num_experts=0"
    if of_mixture and not to_dense and config.layer_kinds != source.layer_kinds:
        yield f"layers={config.layer_kinds} differs from the parent's {source.layer_kinds}"
    if to_dense and source.shared_expert_intermediate_size:
        yield f"recipe {recipe!r} cannot merge a shared expert; this parent has one"
    if plan.num_parents > 1 and not method.several:
        yield f"recipe {recipe!r} takes one parent, not {plan.num_parents}"
    own = OWN | OF_ATTENTION if method.attention else OWN
    if of_mixture:
        own = own - {"shared_expert_intermediate_size"}
        if to_dense or DENSE not in source.layer_kinds:
            own = own | {"intermediate_size"}
    for name, ours, theirs in differences(source, config, own):
        yield f"{name}={ours} differs from the parent's {theirs}; use {theirs}"


def differences(source: ModelConfig, config: ModelConfig, own: frozenset[str]) -> Iterator[tuple]:
    """(name, config's value, source's value) of each field, except `own`, in which they differ."""
    theirs, ours = (
        dataclasses.replace(c, num_key_value_heads=c.num_kv_heads, head_dim=c.head_size)
        for c in (source, config)
    )
    # Rotary positions have no weights (Skywork-MoE takes longer texts than its parent).
    rotary = {"max_position_embeddings"} if config.position_embedding == "rotary" else set()
    for name in (field.name for field in dataclasses.fields(ModelConfig)):
        if name not in own | rotary and getattr(ours, name) != getattr(theirs, name):
            yield name, getattr(ours, name), getattr(theirs, name)


# The fields in which an upcycled model may differ from its parent.
OWN = fields_of(ORIGIN, EXPERTS, ROUTER, COMPUTATION)
OF_ATTENTION = fields_of(ATTENTION_EXPERTS)


def _problems_of_sizes(plan: Plan) -> Iterator[str]:
    of_dense = plan.recipe.takes == recipes.DENSE
    yield from (_problems_of_dense_sizes if of_dense else _problems_of_mixture_sizes)(plan)


def _problems_of_mixture_sizes(plan: Plan) -> Iterator[str]:
    source, config, method, recipe = plan.source, plan.config, plan.recipe, plan.name
    (P, expert_F), (E, F) = ((c.num_experts, c.expert_size) for c in (source, config))
    dense_F = source.intermediate_size if DENSE in source.layer_kinds else expert_F
    if method.gives == recipes.MIXTURE:
        if F != expert_F:
            yield f"moe_intermediate_size={F} differs from the parent's {expert_F}; leave it out"
        if E < P if method.grows else E > P:
            bound = "at least" if method.grows else "at most"
            yield f"num_experts={E} must be {bound} the parent's {P} for recipe {recipe!r}"
    elif dense_F != expert_F:
        yield (
            f"recipe {recipe!r} makes all layers of one width, but the parent's dense layers "
            f"have {dense_F} neurons and its experts {expert_F}; use another parent"
        )
    elif (width := config.intermediate_size) != expert_F:
        yield f"intermediate_size={width} differs from the experts' {expert_F}; use {expert_F}"


def _problems_of_dense_sizes(plan: Plan) -> Iterator[str]:
    source, config, method, recipe = plan.source, plan.config, plan.recipe, plan.name
    E, F = config.num_experts, config.expert_size
    of_parent = f"parent's intermediate_size={source.intermediate_size}"
    if not method.cut and F != source.intermediate_size:
        yield f"moe_intermediate_size={F} differs from the {of_parent}; leave it out"
    G = plan.granularity
    parts = method.cut and not ("neurons" in plan.statistics and "neurons" in plan.of_parameters)
    if parts and (G == 0 or source.intermediate_size % F):
        yield f"moe_intermediate_size={F} does not divide the {of_parent}; {_cut(source, G)}"
    elif parts and method.partitions and E != G:
        yield (
            f"num_experts={E} of moe_intermediate_size={F} do not share out the parent's "
            f"{source.intermediate_size} neurons; {_cut(source, E)}"
            + (f", or num_experts={G}" if G > 1 else "")
        )
    elif parts and E % (G * plan.num_parents):
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
    if (number := config.num_attention_experts) % plan.num_parents:
        yield f"num_attention_experts={number} is not divisible by the {plan.num_parents} parents"
    if method.attention and not config.num_attention_experts:
        yield (
            f"recipe {recipe!r} makes experts of attention too; set num_attention_experts={E} and "
            "--to=orbax (no Hugging Face folder can hold them)"
        )


def _cut(source: ModelConfig, wanted: int) -> str:
    """The advice to split a feed-forward into the nearest possible number of equal parts."""
    sizes = range(2, source.intermediate_size + 1)
    parts = [n for n in sizes if source.intermediate_size % n == 0]
    near = min(parts, key=lambda n: abs(n - wanted))
    width = source.intermediate_size // near
    more = "" if near == wanted else f" with {near} experts"
    return f"use --granularity={near} (moe_intermediate_size={width}){more}"


def _problems_of_routers(plan: Plan) -> Iterator[str]:
    source, config, router = plan.source, plan.config, plan.router
    of_mixture = plan.recipe.takes == recipes.MIXTURE
    if plan.recipe.gives == recipes.DENSE:
        if router:
            yield f"router={router!r} has no effect: recipe {plan.name!r} makes no router"
        return
    if router == router_init.COPIED and not of_mixture:
        yield "router='copied' needs a mixture to copy from; this parent is dense"
    if router == router_init.COPIED and config.router != source.router:
        yield f"router='copied' keeps the parent's router={source.router!r}; use it"
    for name, limits in plan.recipe.limits.items():
        value, leaf = plan.parameters[name], limits.of_copied
        copied = router == router_init.COPIED and leaf in ROUTERS[config.router].leaves
        if leaf and not copied and value not in (0, plan.recipe.defaults[name]):
            yield f"{name}={value} has no effect: no router's {leaf} is copied; leave it out"
    if router == router_init.COPIED and not ROUTERS[config.router].copied:
        others = ", ".join(router_init.ROUTER_INITIALISERS)
        yield f"router='copied' cannot copy a router={config.router!r}; use one of {others}"
    if router == "grouped" and of_mixture:
        yield "router='grouped' is for the shards of dense feed-forwards"


def _problems_of_statistics(plan: Plan) -> Iterator[str]:
    recipe = plan.name
    for name in sorted(set(plan.statistics) - set(STATISTICS)):
        yield f"the statistic {name!r} is unknown; known are {', '.join(STATISTICS)}"
    needed = dict.fromkeys(plan.recipe.statistics, f"recipe {recipe!r}") | plan.of_parameters
    if plan.router == "centroids":
        needed["centroids"] = "router='centroids'"
    for name in sorted(set(needed) - set(plan.statistics)):
        yield (
            f"{needed[name]} needs the statistic {name!r}; "
            "make it with scripts/collect_statistics.py and pass it"
        )
    used = {*needed, *plan.recipe.optional} & set(plan.statistics)
    if plan.statistics and not used:
        useful = [f"the statistic {name!r}" for name in plan.recipe.optional]
        for name, limits in plan.recipe.limits.items():
            useful += [f"{name}={value!r}" for value in limits.statistics]
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
