"""The sparse feed-forward layer: norm, router, dispatch, experts, combine, shared expert.

With a mesh the layer always runs inside `jax.shard_map`: under automatic partitioning the dispatch
would sort globally, with all-reduces of [assignments, D]. `model/exchange.py` brings tokens to
experts on other devices. Without a mesh the same per-device function is called directly.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from moe_jax import tree
from moe_jax.model import exchange, exchange_cost, layers, merging, remat, router
from moe_jax.model.config import ModelConfig
from moe_jax.model.routing import (
    BY_SHARD,
    Counted,
    Groups,
    RouterStats,
    Routing,
    grouped_statistics,
    router_logits,
    shortfall_histogram,
)
from moe_jax.ops import stacks
from moe_jax.parallel import sharding

EXPERT_MATRIX = re.compile("/experts/(gate|up|down)$")


def shapes(config: ModelConfig) -> dict:
    """The shapes of the layer's parameters, by name."""
    one = layers.ffn_shapes(config, config.expert_size)
    leaves = router.ROUTERS[config.router].leaves
    sizes = config.hidden_size, config.num_experts
    shapes = {
        "norm": layers.norm_shapes(config),
        "router": {name: leaf.shape(*sizes) for name, leaf in leaves.items()},
        "experts": {name: (config.num_experts, *shape) for name, shape in one.items()},
    }
    if config.shared_expert_intermediate_size:
        shapes["shared"] = layers.ffn_shapes(config, config.shared_expert_intermediate_size)
    return shapes


def moe(
    x_BTD: jax.Array,
    params: dict,
    valid_BT: jax.Array,
    config: ModelConfig,
    *,
    key: jax.Array | None = None,
    training: bool = False,
    counted: Counted = BY_SHARD,
    return_routing: bool = False,
) -> tuple[jax.Array, RouterStats]:
    """The layer's output (to be added to x) and its statistics, by batch shard or by row.

    Args:
      key: for the router's noise (in training only) and, with `token_priority` "random", for
        choosing which tokens a full expert drops; without a key it keeps the earlier ones.
      training: if True, all tokens of a device compete for the experts' slots; otherwise only the
        tokens of one row compete with each other.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        alone = dataclasses.replace(config, expert_parallel="fsdp")
        return _of_device(x_BTD, params, valid_BT, key, alone, training, counted, return_routing)
    if config.dispatch == "merge" and mesh.shape["edp"] > 1:
        raise ValueError("dispatch='merge' averages all experts; set config.mesh.edp=1")
    num_tokens = valid_BT.size // sharding.batch_shards(mesh.shape)
    mode = exchange_cost.choose(config, num_tokens)
    config = dataclasses.replace(config, expert_parallel=mode)
    specs = sharding.layer_specs(stacks.values(params), "moe")
    kept = exchange.KEPT[mode]
    params = jax.tree.map(
        functools.partial(_row_or_value, config.dtype, mesh.shape, kept),
        *(params, specs),
        is_leaf=stacks.is_row,
    )

    def gathered(x_BTD, params, valid_BT, key):
        def gather(leaf, spec):
            return leaf if stacks.is_row(leaf) else sharding.all_gather(leaf, spec, keep=kept)

        params = jax.tree.map(gather, _rounded(params, config), specs, is_leaf=stacks.is_row)
        params = _bias_once(params)
        if key is not None and training:
            key = jax.random.fold_in(key, jax.lax.axis_index(sharding.BATCH_AXES))
        y_BTD, stats = _of_device(
            x_BTD, params, valid_BT, key, config, training, counted, return_routing
        )
        return jax.lax.psum(y_BTD, sharding.TENSOR), stats

    # check_vma=False: the loops of the grouped matmul start from zeros that no axis varies.
    return jax.shard_map(
        gathered,
        in_specs=(
            sharding.BATCH,
            jax.tree.map(_spec_of, params, specs, is_leaf=stacks.is_row),
            sharding.BATCH,
            jax.P(),
        ),
        out_specs=(sharding.BATCH, sharding.BATCH),
        check_vma=False,
    )(x_BTD, params, valid_BT, key)


def with_rounded_experts(params: dict, config: ModelConfig) -> dict:
    """A model's parameters, with the stacks of its experts' matrices in the computation's dtype.

    A training step rounds them once, so that both passes read a layer's matrices in these stacks.
    A layer that rounds its own writes a copy of them in each pass and, without remat, keeps another
    in a stack for the backward pass. The bits are the same. So is the memory: 2 bytes more for a
    value, and 2 bytes less for its gradient.
    """
    if config.dtype != "bfloat16":
        return params

    def rounded(name, w):
        return _in_bfloat16(w) if EXPERT_MATRIX.search(name) else w

    return tree.map_with_name(rounded, params)


def _in_bfloat16(w: jax.Array) -> jax.Array:
    # XLA would move a plain cast behind the all-gather.
    return jax.lax.reduce_precision(w, exponent_bits=8, mantissa_bits=7).astype(jnp.bfloat16)


def _rounded(params: dict, config: ModelConfig) -> dict:
    """Casts the feed-forwards' weights to the computation's dtype before they are all-gathered.

    The products would round them anyway, and this halves the bytes sent: of weights, and of a
    microbatch's gradients, which are summed over fsdp in that dtype.
    """
    if config.dtype != "bfloat16":
        return params

    def rounded(w):
        return w if stacks.is_row(w) else _in_bfloat16(w)

    return {
        part: jax.tree.map(rounded, leaves, is_leaf=stacks.is_row)
        if part in ("experts", "shared")
        else leaves
        for part, leaves in params.items()
    }


def _row_or_value(dtype: str, sizes: Mapping[str, int], keep: tuple[str, ...], leaf, spec: jax.P):
    """A row of a stack stays one if it is neither gathered nor rounded; else it is its value."""
    names = {name for entry in spec for name in sharding.names_of(entry)} - {*keep}
    untouched = leaf.dtype == dtype and all(sizes[name] == 1 for name in names)
    return leaf if untouched else stacks.values(leaf)


def _spec_of(leaf, spec: jax.P):
    """The spec of a leaf, or those of a row of a stack."""
    if not stacks.is_row(leaf):
        return spec
    return stacks.OfStack(spec, jax.P(None, *spec), jax.P())


def _bias_once(params: dict) -> dict:
    """Zeroes the down projection's bias on all but the first of the devices whose outputs are
    summed."""
    cut_along = {"experts": "tensor", "shared": sharding.TENSOR}
    for part in cut_along.keys() & params.keys():
        if "down_bias" in params[part]:
            first = jax.lax.axis_index(cut_along[part]) == 0
            bias = params[part]["down_bias"] * first
            params = {**params, part: {**params[part], "down_bias": bias}}
    return params


def _of_device(x_BTD, params, valid_BT, key, config, training, counted, return_routing):
    x_BTD = layers.norm(x_BTD, params["norm"], config)
    mix = merging.merged if config.dispatch == "merge" else routed
    order_key = key if config.token_priority == "random" else None
    groups = Groups(valid_BT.ravel(), 1 if training else len(valid_BT), order_key)
    noise_key = tree.fold_in(key, "noise") if key is not None and training else None
    y_BTD, routing, num_dropped = mix(x_BTD, params, groups, noise_key, config)
    stats = grouped_statistics(routing, valid_BT, counted.by_row)
    stats = dataclasses.replace(stats, num_dropped=jnp.reshape(num_dropped, 1))
    if counted.shortfalls:
        bias_E = params["router"]["bias"]
        shortfall_ME = router.shortfall(
            routing.logits_ME, bias_E, num_experts_per_tok=config.num_experts_per_tok
        )
        histogram_EH = shortfall_histogram(shortfall_ME, bias_E, groups.valid_M)
        stats = dataclasses.replace(stats, shortfall_EH=histogram_EH[None])
    if return_routing:
        stats = dataclasses.replace(stats, routing=routing.reshaped(*valid_BT.shape))
    return y_BTD, stats


def routed(x_BTD, params, groups, noise_key, config):
    """Returns the chosen experts' output, the Routing, and the number of dropped assignments."""
    x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
    with jax.named_scope("router"):
        routing = _route(x_MD, params["router"], groups, noise_key, config)
    y_MD, num_dropped = exchange.MODES[config.expert_parallel](
        x_MD, routing, groups, params["experts"], config
    )
    if "shared" in params:
        with jax.named_scope("shared_expert"):
            shared_MD = layers.feed_forward(x_MD, params["shared"], config)
            # Otherwise XLA fuses this sum into the shared expert's last product, which then waits
            # for the exchange instead of overlapping with it.
            y_MD, shared_MD = jax.lax.optimization_barrier((y_MD, shared_MD))
            y_MD += shared_MD
    return y_MD.reshape(x_BTD.shape), routing, num_dropped


def _route(x_MD, params, groups, noise_key, config) -> Routing:
    logits_ME = remat.named("router_logits", router_logits(x_MD, params["kernel"]))
    row = router.ROUTERS[config.router]
    inputs = router.Inputs(x_MD, groups, params, noise_key)
    return row.route(logits_ME, inputs, **row.values(config))
