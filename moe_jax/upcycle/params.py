"""Walks the parameter tree: dense `mlp` leaves to `moe` leaves, everything else kept as it is."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax.model.config import DENSE, MOE, ModelConfig
from moe_jax.model.segments import segments
from moe_jax.parallel import naming, sharding
from moe_jax.upcycle import experts, recipes, router_init

EXPERT_AXIS = "expert"


def upcycle(
    params: dict,
    config: ModelConfig,
    moe_config: ModelConfig,
    *,
    recipe: str = "drop",
    key: jax.Array,
    router: str = "normal",
    **parameters,
) -> dict:
    """MoE parameters made of a dense model's.

    Attention, norms, embeddings and head are the parent's; each layer that is sparse in
    `moe_config` gets `num_experts` experts made of its FFN by `recipe`, and a fresh router.

    Args:
      params: the tree of a dense model, whose config is `config`.
      moe_config: the config of the result, usually `config.to_moe(...)`.
      recipe: a name in `recipes.RECIPES`; `parameters` are its own.
      key: folded in by layer and expert, so that an expert depends neither on the mesh nor on how
        many others there are.
      router: a name in `router_init.ROUTER_INITIALISERS`.

    With a mesh set (`jax.set_mesh`) and `params` sharded by the rules of `parallel/sharding.py`
    the result is sharded by them too; only one dense layer at a time is whole on a device. The
    values are bitwise the same with and without a mesh, under `jax.jit` and without.

    Raises: ValueError, in one line, for a recipe, parameter or pair of configs that do not fit.
    """
    make_expert, make_router = check(config, moe_config, recipe, router, parameters)

    blocks = {}
    for segment in segments(moe_config.block_kinds):
        for place, layers in segment.layers.items():
            own = blocks_of(params, config, layers)
            blocks[place] = own
            if segment.kinds[place].feed_forward == MOE:
                blocks[place] = {
                    "attention": own["attention"],
                    "moe": _to_moe(own["mlp"], layers, moe_config, key, make_expert, make_router),
                }
    return {**params, "blocks": blocks}


def check(
    config: ModelConfig, moe_config: ModelConfig, recipe: str, router: str, parameters: dict
) -> tuple[Callable, Callable]:
    """The functions that make an expert and a router's kernel.

    Raises: ValueError as `upcycle`.
    """
    recipes.check(recipe, parameters)
    if router not in router_init.ROUTER_INITIALISERS:
        known = ", ".join(router_init.ROUTER_INITIALISERS)
        raise ValueError(f"router={router!r} is unknown; use one of {known}")
    check_configs(config, moe_config)
    make_expert = functools.partial(recipes.RECIPES[recipe], **parameters)
    return make_expert, router_init.ROUTER_INITIALISERS[router]


def blocks_of(params: dict, config: ModelConfig, layers: tuple[int, ...]) -> dict:
    """The blocks of some layers, which are of one kind, stacked in this order."""
    rows = {
        layer: (place, row)
        for segment in segments(config.block_kinds)
        for place, members in segment.layers.items()
        for row, layer in enumerate(members)
    }
    places, index = zip(*(rows[layer] for layer in layers), strict=True)
    blocks = params["blocks"]
    if len(set(places)) > 1:
        of_layers = [
            jax.tree.map(lambda w, row=row: w[row], blocks[place])
            for place, row in zip(places, index, strict=True)
        ]
        return jax.tree.map(lambda *ws: jnp.stack(ws), *of_layers)
    stacked = blocks[places[0]]
    number = jax.tree.leaves(stacked)[0].shape[0]
    if index == tuple(range(number)):
        return stacked
    return jax.tree.map(lambda w: w[jnp.array(index)], stacked)


# What an upcycled model and its parent may differ in.
OWN = set(
    """initializer_range model_type num_experts num_experts_per_tok
    moe_intermediate_size norm_topk_prob gate_norm_std router dispatch capacity_factor min_capacity
    token_priority layers dtype remat grouped_matmul attention""".split()
)


def check_configs(config: ModelConfig, moe_config: ModelConfig) -> None:
    """Raises: ValueError when `moe_config` is not `config` with some layers made sparse."""
    if set(config.layer_kinds) != {DENSE}:
        raise ValueError(
            f"upcycling needs a dense parent; this one has num_experts={config.num_experts}"
        )
    if MOE not in moe_config.layer_kinds:
        raise ValueError("the upcycled model has no sparse layer; set num_experts to 2 or more")
    theirs, ours = (
        dataclasses.replace(c, num_key_value_heads=c.num_kv_heads, head_dim=c.head_size)
        for c in (config, moe_config)
    )
    for field in dataclasses.fields(ModelConfig):
        name = field.name
        if name not in OWN and getattr(ours, name) != getattr(theirs, name):
            raise ValueError(
                f"{name}={getattr(ours, name)} differs from the dense parent's "
                f"{getattr(theirs, name)}; use {getattr(theirs, name)}"
            )
    if moe_config.expert_size != config.intermediate_size:
        raise ValueError(
            f"moe_intermediate_size={moe_config.expert_size} differs from the dense parent's "
            f"intermediate_size={config.intermediate_size}; leave it out"
        )


def _to_moe(mlp, layers, config, key, make_expert, make_router) -> dict:
    ffn = {name: w for name, w in mlp.items() if name != "norm"}
    layers_L = jnp.array(layers)

    make = functools.partial(make_experts, make_expert=make_expert, key=key)
    kernels = make_routers(layers_L, config, ffn["up"].dtype, make_router=make_router, key=key)
    return {
        "norm": mlp["norm"],
        "router": {"kernel": kernels},
        "experts": _on_mesh(make, ffn, layers_L, config.num_experts),
    }


def make_routers(
    layers_L: jax.Array, config: ModelConfig, dtype, *, make_router: Callable, key: jax.Array
) -> jax.Array:
    """The routers' kernels [L, D, E] of these layers."""

    def router_of(layer):
        key_layer = jax.random.fold_in(naming.fold_in(key, "router"), layer)
        return make_router(key_layer, config.hidden_size, config.num_experts).astype(dtype)

    return jax.lax.map(router_of, layers_L)


def make_experts(
    ffn: experts.FFN,
    layers_L: jax.Array,
    experts_E: jax.Array,
    *,
    make_expert: Callable,
    key: jax.Array,
    whole: Callable = lambda ffn: ffn,
    part: Callable = lambda ffn: ffn,
) -> experts.FFN:
    """These experts of these layers, [L, E, …], one at a time.

    `whole` gathers a layer's FFN, `part` cuts this device's share.
    """
    key = naming.fold_in(key, "experts")

    def layer(scanned):
        ffn_of_layer, layer = scanned
        ffn_of_layer = whole(ffn_of_layer)
        key_layer = jax.random.fold_in(key, layer)
        return jax.lax.map(
            lambda e: part(make_expert(ffn_of_layer, jax.random.fold_in(key_layer, e))), experts_E
        )

    return jax.lax.map(layer, (ffn, layers_L))


def _on_mesh(make: Callable, ffn: experts.FFN, layers_L: jax.Array, E: int) -> experts.FFN:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return make(ffn, layers_L, jnp.arange(E))
    dense, sparse = sharding.specs({"mlp": ffn})["mlp"], sharding.specs({"experts": ffn})["experts"]
    if E % mesh.shape[EXPERT_AXIS]:
        raise ValueError(
            f"num_experts={E} is not divisible by the mesh's expert axis "
            f"({mesh.shape[EXPERT_AXIS]}); set config.mesh.expert to a divisor of {E}"
        )

    def on_device(ffn, layers_L):
        mine = E // mesh.shape[EXPERT_AXIS]
        experts_E = jax.lax.axis_index(EXPERT_AXIS) * mine + jnp.arange(mine)
        return make(
            ffn,
            layers_L,
            experts_E,
            whole=lambda ffn: {n: sharding.all_gather(w, dense[n][1:]) for n, w in ffn.items()},
            part=lambda ffn: {n: sharding.own_part(w, sparse[n][2:]) for n, w in ffn.items()},
        )

    return jax.shard_map(
        on_device, in_specs=(dense, sharding.P()), out_specs=sparse, check_vma=False
    )(ffn, layers_L)
