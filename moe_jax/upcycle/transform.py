"""Executes the plan of an upcycling in memory, on one device or on a mesh."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import tree
from moe_jax.model.config import ModelConfig
from moe_jax.model.layout import layer_groups, slots
from moe_jax.parallel import sharding
from moe_jax.upcycle import experts, mixing, origins, recipes, router_init
from moe_jax.upcycle import plan as plans


def upcycle(
    params: dict | Sequence[dict],
    config: ModelConfig,
    moe_config: ModelConfig,
    *,
    recipe: str = "drop",
    key: jax.Array,
    router: str = "",
    statistics: dict[str, np.ndarray] | None = None,
    **parameters,
) -> dict:
    """Makes MoE parameters from one or several dense models, or from another MoE.

    Attention, norms, embeddings and head are the parent's; each layer that is sparse in
    `moe_config` gets `num_experts` experts, made from its FFN by `recipe`, and a fresh router.

    Args:
      params: the tree of a model whose config is `config`, or a sequence of such trees for recipes
        that take several parents.
      moe_config: the config of the result, usually `config.to_moe(...)`.
      recipe: a name in `recipes.RECIPES`; `parameters` are the recipe's.
      key: layer and expert are folded into it, so an expert depends neither on the mesh nor on the
        number of experts.
      router: a name in `router_init.ROUTER_INITIALISERS`, or "copied" for an MoE parent; "" is the
        recipe's own.
      statistics: the parent's, for recipes that need some; `plan.STATISTICS` names them.

    With a mesh set (`jax.set_mesh`) and `params` sharded by the rules of `parallel/sharding.py`
    the result is sharded by them too; only one dense layer at a time is whole on a device. The
    values are bitwise the same with and without a mesh, under `jax.jit` and without.

    Raises: ValueError, in one line, for a recipe, parameter or pair of configs that do not fit.
    """
    parents = tuple(params) if isinstance(params, list | tuple) else (params,)
    plan = plans.make(
        config,
        moe_config,
        recipe=recipe,
        router=router,
        num_parents=len(parents),
        statistics=statistics,
        parameters=parameters,
    )
    return execute(plan, parents, key)


def execute(plan: plans.Plan, parents: Sequence[dict], key: jax.Array) -> dict:
    """Makes the plan's parameters from those of its parents."""
    leaves = [tree.flatten(parent) for parent in parents]
    made = {path: _kept(leaves, origin) for path, origin in plan.shell(leaves[0]).items()}
    origins_L = plan.layers(leaves[0])
    for group in layer_groups(plan.config.block_kinds):
        for slot, layers in group.layers.items():
            # Layers of one slot may differ in origin: a dense one may come from a sparse layer.
            alike: dict[tuple, list[int]] = {}
            for layer in layers:
                alike.setdefault(tuple(origins_L[layer].items()), []).append(layer)
            blocks = {
                tuple(own): _block(
                    [_of_layers(w, plan.source, own) for w in leaves], dict(same), own, plan, key
                )
                for same, own in alike.items()
            }
            block = _restacked(blocks, layers)
            made |= {f"blocks/{slot}/{leaf}": w for leaf, w in block.items()}
    return tree.unflatten(made)


def _of_layers(leaves: dict, config: ModelConfig, layers: Sequence[int]) -> dict[str, jax.Array]:
    """The block leaves of these layers, which have the same kind, stacked in this order."""
    slot_rows = [slots(config.block_kinds)[layer] for layer in layers]
    first = f"blocks/{slot_rows[0][0]}/"
    stack = {path.removeprefix(first): w for path, w in leaves.items() if path.startswith(first)}
    if len({slot for slot, _ in slot_rows}) > 1:
        return {
            leaf: jnp.stack([leaves[f"blocks/{slot}/{leaf}"][row] for slot, row in slot_rows])
            for leaf in stack
        }
    rows = [row for _, row in slot_rows]
    if rows == list(range(len(next(iter(stack.values()))))):
        return stack
    return {leaf: w[jnp.array(rows)] for leaf, w in stack.items()}


def _restacked(blocks: dict[tuple[int, ...], dict], layers: tuple[int, ...]) -> dict:
    """Joins several stacks, each with some of these layers, into one stack in layer order."""
    if len(blocks) == 1:
        return blocks[layers]
    at = {layer: (own, row) for own in blocks for row, layer in enumerate(own)}
    return {
        leaf: jnp.stack([blocks[at[layer][0]][leaf][at[layer][1]] for layer in layers])
        for leaf in next(iter(blocks.values()))
    }


def _block(stacks: list[dict], origin_of: dict, layers: Sequence[int], plan, key) -> dict:
    """The leaves of some layers of the result, from the parents' stacks of the same layers."""
    layers_L, ffn_P, made = jnp.array(layers), {}, {}
    if any(isinstance(origin, origins.Mixture) for origin in origin_of.values()):
        share_LEP = jnp.array(np.stack([plan.shares(layer) for layer in layers]), jnp.float32)
    for leaf, origin in origin_of.items():
        own, name = [stack[origin.path] for stack in stacks], leaf.rpartition("/")[2]
        match origin:
            case origins.Kept():
                made[leaf] = _kept(stacks, origin)
            case origins.Stacked():
                made[leaf] = jnp.stack([own[p] for p in origin.parents], axis=1)
            case origins.Expert():
                ffn_P[name] = jnp.stack(own, axis=1)
            case origins.Mixture():
                made[leaf] = _mixed(name, own[0], share_LEP, plan)
            case origins.CopiedRouter():
                made[leaf] = copied_router(name, own[0], share_LEP, layers_L, plan=plan, key=key)
            case origins.FreshRouter():
                dtype = jnp.result_type(*own)
                made[leaf] = fresh_router(layers_L, origin, dtype, plan=plan, key=key)
    if ffn_P:
        make = functools.partial(make_experts, plan=plan, key=key)
        experts_E = _on_mesh(make, ffn_P, layers_L, plan)
        made |= {f"moe/experts/{name}": w for name, w in experts_E.items()}
    return made


def _kept(trees: Sequence[dict], origin: origins.Kept) -> jax.Array:
    own = [trees[parent][origin.path] for parent in origin.parents]
    return own[0] if len(own) == 1 else mean(own)


@jax.jit
def mean(arrays: Sequence[jax.Array]) -> jax.Array:
    total = jnp.asarray(sum(w.astype(jnp.float32) for w in arrays))
    return (total / len(arrays)).astype(arrays[0].dtype)


# Experts ---------------------------------------------------------------------------------------


def make_experts(
    ffn_P: experts.FFN,
    layers_L: jax.Array,
    experts_E: jax.Array,
    *,
    plan: plans.Plan,
    key: jax.Array,
    whole: Callable = lambda ffn: ffn,
    part: Callable = lambda ffn: ffn,
) -> experts.FFN:
    """Makes these experts of these layers, [L, E, …], one at a time, from FFNs [L, P, …].

    `whole` all-gathers a layer's FFN, `part` takes this device's shard of the result.
    """
    key = tree.fold_in(key, "experts")
    E, P = plan.config.num_experts, ffn_P["up"].shape[1]
    parent_E = jnp.array(plan.parents_of(E)) if P > 1 else jnp.zeros(E, int)
    neurons = plan.statistics.get("neurons")

    def layer(scanned):
        ffn_P, layer = scanned
        layer_key = jax.random.fold_in(key, layer)
        only = whole({name: w[0] for name, w in ffn_P.items()}) if P == 1 else None

        def expert(e):
            ffn = only or whole({name: w[parent_E[e]] for name, w in ffn_P.items()})
            context = recipes.ExpertContext(
                expert=e,
                key=jax.random.fold_in(layer_key, e),
                layer_key=layer_key,
                config=plan.config,
                granularity=plan.granularity,
                neurons_F=None if neurons is None else jnp.asarray(neurons)[layer, e],
            )
            return part(plan.recipe.make(ffn, context, **plan.parameters))

        return jax.lax.map(expert, experts_E)

    return jax.lax.map(layer, (ffn_P, layers_L))


def _on_mesh(make: Callable, ffn_P: experts.FFN, layers_L: jax.Array, plan) -> experts.FFN:
    mesh, E = jax.sharding.get_abstract_mesh(), plan.config.num_experts
    if mesh.empty:
        return make(ffn_P, layers_L, jnp.arange(E))
    sharding.check_divisible(f"num_experts={E}", E, mesh, sharding.EXPERT)
    dense = {n: spec[1:] for n, spec in sharding.specs({"mlp": ffn_P})["mlp"].items()}
    sparse = sharding.specs({"experts": ffn_P})["experts"]

    def on_device(ffn_P, layers_L):
        mine = E // jax.lax.axis_size(sharding.EXPERT)
        experts_E = jax.lax.axis_index(sharding.EXPERT) * mine + jnp.arange(mine)
        return make(
            ffn_P,
            layers_L,
            experts_E,
            whole=lambda ffn: {n: sharding.all_gather(w, dense[n]) for n, w in ffn.items()},
            part=lambda ffn: {n: sharding.own_part(w, sparse[n][2:]) for n, w in ffn.items()},
        )

    in_specs = {name: sharding.P(None, None, *spec) for name, spec in dense.items()}
    return jax.shard_map(
        on_device, in_specs=(in_specs, sharding.P()), out_specs=sparse, check_vma=False
    )(ffn_P, layers_L)


def _mixed(name: str, w_LPX: jax.Array, share_LEP: jax.Array, plan: plans.Plan) -> jax.Array:
    mesh, to_dense = jax.sharding.get_abstract_mesh(), plan.recipe.gives == recipes.DENSE
    spec, E = sharding.spec_of(f"experts/{name}"), plan.config.num_experts
    if mesh.empty:
        mixed = mixing.mix(w_LPX, share_LEP)
    else:
        if not to_dense:
            sharding.check_divisible(f"num_experts={E}", E, mesh, sharding.EXPERT)
        out_spec = sharding.P(None, None, *spec[2:]) if to_dense else spec
        mixed = mixing.mix_on_mesh(w_LPX, share_LEP, spec, out_spec, axis=sharding.EXPERT)
    return mixed[:, 0] if to_dense else mixed


# Routers ---------------------------------------------------------------------------------------


def fresh_router(
    layers_L: jax.Array, origin: origins.FreshRouter, dtype, *, plan: plans.Plan, key: jax.Array
) -> jax.Array:
    """Draws one leaf of the routers of these layers, [L, …]."""
    if not origin.initialiser:
        return jnp.zeros((len(layers_L), *origin.shape), dtype)
    D, E = origin.shape
    centroids = plan.statistics.get("centroids")

    def router_of(layer):
        context = router_init.RouterContext(
            key=jax.random.fold_in(tree.fold_in(key, origin.name), layer),
            D=D,
            E=E,
            granularity=plan.granularity if plan.recipe.cut else 1,
            centroids_ED=None if centroids is None else jnp.asarray(centroids)[layer],
        )
        return router_init.ROUTER_INITIALISERS[origin.initialiser](context).astype(dtype)

    return jax.lax.map(router_of, layers_L)


def copied_router(
    name: str,
    w_LX: jax.Array,
    share_LEP: jax.Array,
    layers_L: jax.Array,
    *,
    plan: plans.Plan,
    key: jax.Array,
) -> jax.Array:
    """The old experts' columns or biases, averaged like the experts, with noise on copies.

    The noise is in units of the standard deviation of the parent's column, or of its biases.
    """
    std = plan.noise_on(name)
    by_column = (lambda w: jnp.swapaxes(w, 1, 2)) if w_LX.ndim == 3 else lambda w: w
    mixed = mixing.mix(by_column(w_LX), share_LEP)
    if not std:
        return by_column(mixed)
    is_copy_LE = (jnp.cumsum(share_LEP, axis=1) > 1).any(axis=2, where=share_LEP > 0)

    def of_layer(scanned):
        layer, x_E, w_X, is_copy_E = scanned
        own = jax.random.fold_in(tree.fold_in(key, f"router_{name}"), layer)
        noise = std * jax.random.normal(own, x_E.shape)
        if x_E.ndim == 2:
            noise *= jnp.std(x_E.astype(jnp.float32), axis=1, keepdims=True)
        else:
            noise *= jnp.std(w_X.astype(jnp.float32), ddof=min(1, w_X.size - 1))
        noise = jnp.where(is_copy_E.reshape(-1, *(1,) * (x_E.ndim - 1)), noise, 0)
        return (x_E + noise).astype(x_E.dtype)

    return by_column(jax.lax.map(of_layer, (layers_L, mixed, w_LX, is_copy_LE)))
