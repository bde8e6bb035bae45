"""Walks the parameter tree: `mlp` leaves to `moe` leaves, everything else kept as it is."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import tree
from moe_jax.model.config import MOE, ModelConfig
from moe_jax.model.layout import layer_groups, slots
from moe_jax.model.router import ROUTERS
from moe_jax.parallel import sharding
from moe_jax.upcycle import experts, mixing, plan, recipes, router_init


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
    """MoE parameters made of a dense model's (or of several; or of a mixture's).

    Attention, norms, embeddings and head are the parent's; each layer that is sparse in
    `moe_config` gets `num_experts` experts made of its FFN by `recipe`, and a fresh router.

    Args:
      params: the tree of a model whose config is `config`, or a sequence of such trees for recipes
        that take several parents.
      moe_config: the config of the result, usually `config.to_moe(...)`.
      recipe: a name in `recipes.RECIPES`; `parameters` are its own.
      key: folded in by layer and expert, so that an expert depends neither on the mesh nor on how
        many others there are.
      router: a name in `router_init.ROUTER_INITIALISERS`, or "copied" from a mixture; "" is the
        recipe's own.
      statistics: of the parent, for recipes that need some; `plan.STATISTICS` names them.

    With a mesh set (`jax.set_mesh`) and `params` sharded by the rules of `parallel/sharding.py`
    the result is sharded by them too; only one dense layer at a time is whole on a device. The
    values are bitwise the same with and without a mesh, under `jax.jit` and without.

    Raises: ValueError, in one line, for a recipe, parameter or pair of configs that do not fit.
    """
    parents = tuple(params) if isinstance(params, list | tuple) else (params,)
    made = plan.make(
        config,
        moe_config,
        recipe=recipe,
        router=router,
        num_parents=len(parents),
        statistics=statistics,
        parameters=parameters,
    )
    shell = rest_of([{k: w for k, w in p.items() if k != "blocks"} for p in parents], made)
    return {**shell, "blocks": _blocks(parents, made, key)}


def _blocks(parents, made, key) -> dict:
    # Of a mixture first by its own places: a dense result has its dense and sparse layers in one.
    own = made.source if made.recipe.takes == recipes.MIXTURE else made.config
    blocks = {}
    for group in layer_groups(own.block_kinds):
        for place, layers in group.layers.items():
            owns = [blocks_of(p, made.source, layers) for p in parents]
            feed_forward = "moe" if "moe" in owns[0] else "mlp"
            ffns = [own.pop(feed_forward) for own in owns]
            block = rest_of(owns, made)
            if made.config.num_attention_experts and made.recipe.attention:
                block["attention"] = attention_experts(
                    [own["attention"] for own in owns], layers, made, key
                )
            sparse = group.kinds[place].feed_forward == MOE
            if feed_forward == "moe":
                block |= _of_mixture(ffns[0], layers, made, key)
            elif sparse:
                block["moe"] = _of_dense(ffns, layers, made, key)
            else:
                block["mlp"] = rest_of(ffns, made)
            blocks[place] = block
    return {
        place: blocks_of({"blocks": blocks}, own, layers)
        for group in layer_groups(made.config.block_kinds)
        for place, layers in group.layers.items()
    }


def blocks_of(params: dict, config: ModelConfig, layers: tuple[int, ...]) -> dict:
    """The blocks of some layers, which are of one kind, stacked in this order."""
    slots_of = [slots(config.block_kinds)[layer] for layer in layers]
    blocks = params["blocks"]
    if len({place for place, _ in slots_of}) > 1:
        of_layers = [
            jax.tree.map(lambda w, row=row: w[row], blocks[place]) for place, row in slots_of
        ]
        return jax.tree.map(lambda *ws: jnp.stack(ws), *of_layers)
    index = tuple(row for _, row in slots_of)
    stacked = blocks[slots_of[0][0]]
    number = jax.tree.leaves(stacked)[0].shape[0]
    if index == tuple(range(number)):
        return dict(stacked)
    return jax.tree.map(lambda w: w[jnp.array(index)], stacked)


def rest_of(trees: list[dict], made: plan.Plan) -> dict:
    """What is not made into experts: the mean of the parents', or the last one's."""
    if made.recipe.rest == "last" or len(trees) == 1:
        return trees[-1]
    return jax.tree.map(lambda *ws: mean(ws), *trees)


@jax.jit
def mean(arrays: Sequence[jax.Array]) -> jax.Array:
    total = sum(w.astype(jnp.float32) for w in arrays)
    return (total / len(arrays)).astype(arrays[0].dtype)


def attention_experts(attentions: list[dict], layers, made: plan.Plan, key: jax.Array) -> dict:
    """The parents' attentions beside each other, dealt out in their order, and a fresh router."""
    E = made.config.num_attention_experts
    of_expert = [attentions[made.parent_of(e, E)] for e in range(E)]
    stacked = jax.tree.map(lambda *ws: jnp.stack(ws, axis=1), *of_expert)
    del stacked["norm"]
    dtype = attentions[0]["wq"].dtype
    kernels = make_routers(jnp.array(layers), made, dtype, key=key, name="attention_router", E=E)
    return {
        "norm": rest_of([a["norm"] for a in attentions], made),
        "router": {"kernel": kernels},
        "experts": stacked,
    }


# Experts of dense feed-forwards ---------------------------------------------------------------


def _of_dense(mlps, layers, made, key) -> dict:
    ffns = [{name: w for name, w in mlp.items() if name != "norm"} for mlp in mlps]
    ffn_P = jax.tree.map(lambda *ws: jnp.stack(ws, axis=1), *ffns)
    layers_L = jnp.array(layers)
    make = functools.partial(make_experts, made=made, key=key)
    moe = {
        "norm": rest_of([mlp["norm"] for mlp in mlps], made),
        "router": routers(layers_L, made, ffn_P["up"].dtype, key=key),
        "experts": _on_mesh(make, ffn_P, layers_L, made),
    }
    return {**moe, "shared": ffns[0]} if made.recipe.shared else moe


def make_experts(
    ffn_P: experts.FFN,
    layers_L: jax.Array,
    experts_E: jax.Array,
    *,
    made: plan.Plan,
    key: jax.Array,
    whole: Callable = lambda ffn: ffn,
    part: Callable = lambda ffn: ffn,
) -> experts.FFN:
    """These experts of these layers, [L, E, …], one at a time, of parents' FFNs [L, P, …].

    `whole` gathers a layer's FFN, `part` cuts this device's share.
    """
    key = tree.fold_in(key, "experts")
    E, P = made.config.num_experts, ffn_P["up"].shape[1]
    parent_E = jnp.array([made.parent_of(e, E) for e in range(E)]) if P > 1 else jnp.zeros(E, int)
    neurons = made.statistics.get("neurons")

    def layer(scanned):
        ffn_P, layer = scanned
        layer_key = jax.random.fold_in(key, layer)
        only = whole({name: w[0] for name, w in ffn_P.items()}) if P == 1 else None

        def expert(e):
            ffn = only or whole({name: w[parent_E[e]] for name, w in ffn_P.items()})
            place = recipes.Place(
                expert=e,
                key=jax.random.fold_in(layer_key, e),
                layer_key=layer_key,
                config=made.config,
                granularity=made.granularity,
                neurons_F=None if neurons is None else jnp.asarray(neurons)[layer, e],
            )
            return part(made.make_expert(ffn, place))

        return jax.lax.map(expert, experts_E)

    return jax.lax.map(layer, (ffn_P, layers_L))


def _on_mesh(make: Callable, ffn_P: experts.FFN, layers_L: jax.Array, made) -> experts.FFN:
    mesh, E = jax.sharding.get_abstract_mesh(), made.config.num_experts
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


# Experts of a mixture's ------------------------------------------------------------------------


def _of_mixture(moe, layers, made, key) -> dict:
    share_LEP = jnp.array(np.stack([made.shares(layer) for layer in layers]), jnp.float32)
    mixed = _mixed(moe["experts"], share_LEP, made)
    if made.recipe.gives == recipes.DENSE:
        return {"mlp": {"norm": moe["norm"], **{name: w[:, 0] for name, w in mixed.items()}}}
    if made.router == router_init.COPIED:
        router = copied_routers(moe["router"], share_LEP, jnp.array(layers), made, key=key)
    else:
        router = routers(jnp.array(layers), made, moe["experts"]["up"].dtype, key=key)
    return {"moe": {**moe, "router": router, "experts": mixed}}


def _mixed(experts_P, share_LEP, made):
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return mixing.mix(experts_P, share_LEP)
    sparse = sharding.specs({"experts": experts_P})["experts"]
    out_specs = sparse
    if made.recipe.gives == recipes.DENSE:
        out_specs = {name: sharding.P(None, None, *spec[2:]) for name, spec in sparse.items()}
    else:
        E = made.config.num_experts
        sharding.check_divisible(f"num_experts={E}", E, mesh, sharding.EXPERT)
    return mixing.mix_on_mesh(
        experts_P, share_LEP, sparse, out_specs, cut=out_specs is sparse, axis=sharding.EXPERT
    )


# Routers ---------------------------------------------------------------------------------------


def routers(layers_L: jax.Array, made: plan.Plan, dtype, *, key: jax.Array) -> dict:
    """Fresh ones: kernels by the plan's initialiser, the router's other leaves of zeros."""
    E = made.config.num_experts
    kernel_LDE = make_routers(layers_L, made, dtype, key=key, name="router", E=E)
    others = {
        name: jnp.zeros((len(layers_L), *leaf.shape(made.config.hidden_size, E)), dtype)
        for name, leaf in ROUTERS[made.config.router].leaves.items()
        if name != "kernel"
    }
    return {"kernel": kernel_LDE, **others}


def make_routers(
    layers_L: jax.Array, made: plan.Plan, dtype, *, key: jax.Array, name: str, E: int
) -> jax.Array:
    """Kernels [L, D, E] for these layers."""
    centroids = made.statistics.get("centroids")
    initialise = router_init.ROUTER_INITIALISERS[made.router]

    def router_of(layer):
        place = router_init.RouterPlace(
            key=jax.random.fold_in(tree.fold_in(key, name), layer),
            D=made.config.hidden_size,
            E=E,
            granularity=made.granularity if made.recipe.cut else 1,
            centroids_ED=None if centroids is None else jnp.asarray(centroids)[layer],
        )
        return initialise(place).astype(dtype)

    return jax.lax.map(router_of, layers_L)


def copied_routers(
    router: dict, share_LEP: jax.Array, layers_L: jax.Array, made: plan.Plan, *, key: jax.Array
) -> dict:
    """The old experts' columns and biases, shared out as the experts are, and noise on copies.

    The noise is `router_noise` times the deviation of the parent's column; on a bias it is that
    number itself.
    """
    std = made.parameters.get("router_noise", 0.0)
    by_expert = {n: jnp.swapaxes(w, 1, 2) if w.ndim == 3 else w for n, w in router.items()}
    mixed = mixing.mix(by_expert, share_LEP)
    if std:
        is_copy_LE = (jnp.cumsum(share_LEP, axis=1) > 1).any(axis=2, where=share_LEP > 0)

        def noisy(name, x_LE):
            def of_layer(scanned):
                layer, x_E, is_copy_E = scanned
                own = jax.random.fold_in(tree.fold_in(key, f"router_{name}"), layer)
                noise = std * jax.random.normal(own, x_E.shape)
                if x_E.ndim == 2:
                    noise *= jnp.std(x_E.astype(jnp.float32), axis=1, keepdims=True)
                noise = jnp.where(is_copy_E.reshape(-1, *(1,) * (x_E.ndim - 1)), noise, 0)
                return (x_E + noise).astype(x_E.dtype)

            return jax.lax.map(of_layer, (layers_L, x_LE, is_copy_LE))

        mixed = {n: x if n == "noise" else noisy(n, x) for n, x in mixed.items()}
    return {n: jnp.swapaxes(w, 1, 2) if w.ndim == 3 else w for n, w in mixed.items()}
