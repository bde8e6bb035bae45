"""The published upcycling recipes, as compositions of transforms.

Each row states how the new model relates to its parent at step 0. A recipe for dense parents is a
function (ffn, context, **parameters) -> ffn that makes one expert from the FFN of one layer; a
recipe for MoE parents returns the averaging weights [E, P] of the old experts in the new ones. Its
keyword arguments are the parameters that `config.init.upcycle`, `upcycle.upcycle` and
`--recipe.NAME=VALUE` accept for it. To add a recipe, add a row to `RECIPES`.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable

import jax
import numpy as np

from moe_jax import spelling
from moe_jax.model.config import ModelConfig
from moe_jax.upcycle import experts, mixing, parameters, step_zero

DENSE, MIXTURE = "dense", "mixture"
ONE = "one pass over the weights"


@dataclasses.dataclass(frozen=True)
class ExpertContext:
    """Everything besides the weights that a recipe may use to make an expert."""

    expert: jax.Array  # the expert's index
    key: jax.Array  # the expert's own key
    layer_key: jax.Array  # the same for all experts of the layer
    config: ModelConfig  # the result's
    granularity: int  # the number of experts that together have the width of the parent's FFN
    neurons_F: jax.Array | None = None  # the expert's row of the statistic "neurons"


def naive(ffn: experts.FFN, context: ExpertContext) -> experts.FFN:
    """Exact copies."""
    del context
    return ffn


def noise(
    ffn: experts.FFN,
    context: ExpertContext,
    *,
    ratio: parameters.Ratio = 0.5,
    std: parameters.Deviation = 0.02,
    index_sharing: parameters.IndexSharing = "per_matrix",
    permute_neurons: bool = True,
) -> experts.FFN:
    """Copies with noise N(0, std²) on a fraction `ratio` of the neurons."""
    ffn = experts.permute_neurons(ffn, context.key) if permute_neurons else ffn
    return experts.add_noise(ffn, context.key, std=std, ratio=ratio, index_sharing=index_sharing)


def drop(
    ffn: experts.FFN,
    context: ExpertContext,
    *,
    ratio: parameters.Ratio = 0.5,
    index_sharing: parameters.IndexSharing = "neuron",
    permute_neurons: bool = False,
) -> experts.FFN:
    """Copies with a fraction `ratio` of the neurons redrawn.

    The released code differs from the paper: it uses index_sharing="per_matrix" and
    permute_neurons=True.
    """
    ffn = experts.permute_neurons(ffn, context.key) if permute_neurons else ffn
    return experts.redraw_neurons(ffn, context.key, ratio=ratio, index_sharing=index_sharing)


def virtual_group(
    ffn: experts.FFN, context: ExpertContext, *, scaling: parameters.Scaling = "paper"
) -> experts.FFN:
    """Expert i is shard i mod G of the parent, scaled up to offset the router's weights."""
    G = context.granularity
    return _scaled(experts.shard(ffn, context.expert % G, G), context, scaling)


def virtual_group_drop(
    ffn: experts.FFN,
    context: ExpertContext,
    *,
    ratio: parameters.Ratio = 0.5,
    index_sharing: parameters.IndexSharing = "neuron",
    scaling: parameters.Scaling = "paper",
) -> experts.FFN:
    """Virtual groups; a part of each shard's neurons is redrawn, independently for each copy."""
    G = context.granularity
    ffn = experts.shard(ffn, context.expert % G, G)
    ffn = experts.redraw_neurons(ffn, context.key, ratio=ratio, index_sharing=index_sharing)
    return _scaled(ffn, context, scaling)


def llama_moe(
    ffn: experts.FFN, context: ExpertContext, *, partition: parameters.Partition = "random"
) -> experts.FFN:
    """Distributes the parent's neurons among N experts, and scales their outputs by N/k."""
    if partition == "statistics":
        assert context.neurons_F is not None  # the plan refuses this partition without it
        ffn = experts.take_neurons(ffn, context.neurons_F)
    else:
        if partition == "random":
            ffn = experts.permute_neurons(ffn, context.layer_key)
        ffn = experts.shard(ffn, context.expert, context.granularity)
    factor = context.config.num_experts / context.config.num_experts_per_tok
    return experts.scale(ffn, factor, scaling="down", hidden_act=context.config.hidden_act)


def svd_residual(
    ffn: experts.FFN, context: ExpertContext, *, rank_ratio: parameters.RankRatio = 0.5
) -> experts.FFN:
    """Copies that share the leading singular directions of each matrix."""
    return experts.reflect_residual(ffn, context.key, rank_ratio=rank_ratio)


def moe_ct(ffn: experts.FFN, context: ExpertContext) -> experts.FFN:
    """Experts whose output is zero at first, and the parent's feed-forward as a shared expert."""
    del context
    return experts.silence(ffn)


def _scaled(ffn, context, scaling):
    factor = step_zero.needed_scale(context.config, context.granularity)
    return experts.scale(ffn, factor, scaling=scaling, hidden_act=context.config.hidden_act)


def expert_upcycling(
    P: int,
    E: int,
    statistics: dict,
    *,
    router_noise: parameters.RouterNoise = 0.0,
    bias_noise: parameters.BiasNoise = 0.01,
) -> np.ndarray:
    """The old experts and copies of the most useful ones (or of all in turn, without "utility").

    Noise lets a copy diverge from its original. The noise on its selection bias, if the router has
    one, is `bias_noise` times the deviation of the layer's biases, as the authors recommend; the
    noise on its router column is `router_noise` times the column's deviation.
    """
    del router_noise, bias_noise  # `transform.copied_router` uses them
    return mixing.duplicated(P, E, statistics.get("utility"))


def prune(P: int, E: int, statistics: dict) -> np.ndarray:
    """Keeps only the experts with the highest load."""
    return mixing.pruned(P, E, statistics["load"])


def diversify_merge(P: int, E: int, statistics: dict) -> np.ndarray:
    """Groups of similar experts, each merged into an average weighted by load.

    Without the load all members of a group have equal weights.
    """
    del P
    return mixing.grouped(E, statistics["similarity"], statistics.get("load"))


def merge_back(P: int, E: int, statistics: dict) -> np.ndarray:
    """A dense model with the average of all experts, weighted by their load if it is given."""
    del E
    return mixing.averaged(P, statistics.get("load"))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A row: the function that makes experts, its needs, and its text in the table of recipes."""

    make: Callable
    source: str
    kept: str  # what it keeps of the parent
    start: step_zero.Start
    changed: str = "nothing"
    cost: str = ONE
    takes: str = DENSE
    gives: str = MIXTURE
    several: bool = False  # takes several dense parents, assigned to the experts in order
    rest: str = "mean"  # the other parameters of several parents: their "mean", or the "last" one's
    cut: bool = False  # experts may be narrower than the parent's feed-forward
    shared: bool = False  # the parent's feed-forward is kept as a shared expert
    attention: bool = False  # makes attention experts too
    partitions: bool = False  # each of the parent's neurons goes to exactly one expert
    grows: bool = False  # makes at least as many experts as the MoE parent has, not at most as many
    moments: bool = True  # Adam's moments can follow their weights
    router: str = "normal"  # the router's initialiser, unless the user names another
    statistics: tuple[str, ...] = ()  # required statistics
    optional: tuple[str, ...] = ()  # statistics that it uses if they are given

    @property
    def defaults(self) -> dict:
        """The parameters that it takes, and their defaults."""
        return {a.name: a.default for a in self._arguments}

    @property
    def limits(self) -> dict[str, parameters.Parameter]:
        """The parameters that it takes, and the values that each may have."""
        return {a.name: parameters.limits(a.annotation) for a in self._arguments}

    @property
    def _arguments(self) -> list[inspect.Parameter]:
        arguments = inspect.signature(self.make, eval_str=True).parameters.values()
        return [argument for argument in arguments if argument.kind is argument.KEYWORD_ONLY]


NORMALS = f"{ONE}, one normal number for each new weight"
OF_SEVERAL = functools.partial(
    Recipe, several=True, cost="training each parent, one pass over the weights of all"
)
OF_MIXTURE = functools.partial(Recipe, takes=MIXTURE, router="copied")
RECIPES = {
    "naive": Recipe(
        naive, source="Komatsuzaki et al., arXiv 2212.05055", kept="all", start=step_zero.COPIES
    ),
    "noise": Recipe(
        noise,
        source="Nakamura et al., arXiv 2502.19261 (baseline RNU)",
        kept="all",
        changed="noise N(0, std²) added to `ratio` of each matrix's neurons",
        start=step_zero.COPIES_BUT,
    ),
    "drop": Recipe(
        drop,
        source="Nakamura et al., arXiv 2502.19261",
        kept="1 − `ratio` of the neurons",
        changed="`ratio` of the neurons, redrawn with their mean and deviation",
        cost=NORMALS,
        start=step_zero.COPIES_BUT,
    ),
    "virtual_group": Recipe(
        virtual_group,
        source="He et al., arXiv 2410.07524",
        kept="all, in G shards",
        changed="scale",
        start=step_zero.SHARDS,
        cut=True,
        router="grouped",
    ),
    "virtual_group+drop": Recipe(
        virtual_group_drop,
        source="He et al. and Nakamura et al., as above",
        kept="1 − `ratio` of each shard",
        changed="`ratio` of each shard, and scale",
        cost=NORMALS,
        start=step_zero.SHARDS_BUT,
        cut=True,
        router="grouped",
    ),
    "branch_train_mix": OF_SEVERAL(
        naive,
        source="Sukhbaatar et al., arXiv 2403.07816",
        kept="each parent's FFNs; the mean of the rest",
        start=step_zero.COPIES_OF_EACH,
    ),
    "bam": OF_SEVERAL(
        naive,
        source="Zhang et al., arXiv 2408.08274",
        kept="each parent's FFNs and attention; the mean of the rest",
        cost="as for branch_train_mix",
        start=step_zero.COPIES_OF_EACH,
        attention=True,
    ),
    "skywork": OF_SEVERAL(
        naive,
        source="Wei et al., arXiv 2406.06563",
        kept="the FFNs of each checkpoint or specialist; the rest from the last",
        start=step_zero.COPIES_OF_EACH,
        rest="last",
    ),
    "divmoe": OF_SEVERAL(
        virtual_group,
        source="DivMoE (n specialists, virtual groups, best expert of each group)",
        kept="each parent's FFNs, in G shards; the mean of the rest",
        changed="scale",
        start=step_zero.SHARDS_OF_EACH,
        cut=True,
        router="grouped",
    ),
    "llama_moe": Recipe(
        llama_moe,
        source="Zhu et al., arXiv 2406.16554",
        kept="all, each neuron in one expert",
        changed="scale N/k",
        start=step_zero.PARTS,
        cut=True,
        partitions=True,
        moments=False,
        router="zero",
    ),
    "moe_ct": Recipe(
        moe_ct,
        source="MoE-CT, arXiv 2407.00875",
        kept="all, as a shared expert to be frozen (`optimizer.frozen`)",
        changed="experts are added, whose output is zero at first",
        start=step_zero.EQUAL,
        shared=True,
    ),
    "svd_residual": Recipe(
        svd_residual,
        source="our reading of SPRI, arXiv 2606.16456",
        kept="`rank_ratio` of the singular directions",
        changed="the signs of half of the other directions",
        cost="a singular value decomposition for each expert",
        start=step_zero.NEAR_FULL_RANK,
        moments=False,
    ),
    "expert_upcycling": OF_MIXTURE(
        expert_upcycling,
        source="Dwivedi et al., arXiv 2604.19835",
        kept="all experts, and copies of the most useful",
        changed="the copies' selection biases or router columns, by noise",
        cost=f"gradients to measure utility, {ONE}",
        start=step_zero.DUPLICATES,
        grows=True,
        optional=("utility",),
    ),
    "prune": OF_MIXTURE(
        prune,
        source="Lu et al., arXiv 2402.14800, by load",
        kept="the most used experts",
        cost=f"a forward pass to measure load, {ONE}",
        start=step_zero.OTHER,
        statistics=("load",),
    ),
    "diversify_merge": OF_MIXTURE(
        diversify_merge,
        source="Zhang et al., arXiv 2407.09590",
        kept="averages of similar experts",
        cost=f"a forward pass of every expert to measure similarity, {ONE}",
        start=step_zero.OTHER,
        statistics=("similarity",),
        optional=("load",),
    ),
    "merge_back": OF_MIXTURE(
        merge_back,
        source="an MoE made dense by averaging",
        kept="the average of all experts",
        start=step_zero.EQUAL_IF_EXPERTS_ARE,
        gives=DENSE,
        router="",
        optional=("load",),
    ),
}


def check(recipe: str, given: dict) -> None:
    """Raises: ValueError for an unknown recipe, or a parameter or value that it does not accept."""
    if recipe not in RECIPES:
        raise ValueError(spelling.unknown("recipe", recipe, RECIPES))
    limits = RECIPES[recipe].limits
    for name, value in given.items():
        if name not in limits:
            takes = (", ".join(limits) or "none") + spelling.did_you_mean(name, limits)
            raise ValueError(f"recipe {recipe!r} has no parameter {name!r}; it takes {takes}")
        if value is not None:
            limits[name].check(name, value)
