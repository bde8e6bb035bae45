"""The sparse feed-forward layer: norm, route, dispatch, experts, combine.

Always inside `jax.shard_map` when a mesh is set, with tokens dispatched among the experts of their
own device: left to automatic partitioning the sort becomes a global one, with all-reduces of
[assignments, D]. Without a mesh the same per-device function is called directly.
"""

import functools

import jax
import jax.numpy as jnp

from moe_jax.model import layers, merging, remat, router
from moe_jax.model.config import ModelConfig
from moe_jax.ops import grouped_matmul, permute
from moe_jax.parallel import naming, sharding


def shapes(config: ModelConfig) -> dict:
    one = layers.ffn_shapes(config, config.expert_size)
    kernel = (config.hidden_size, config.num_experts)
    shapes = {
        "norm": layers.norm_shapes(config),
        "router": {"kernel": kernel},
        "experts": {name: (config.num_experts, *shape) for name, shape in one.items()},
    }
    if config.router == "sigmoid_topk":
        shapes["router"]["bias"] = (config.num_experts,)
    if config.router == "noisy_topk":
        shapes["router"]["noise"] = kernel
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
    return_routing: bool = False,
) -> tuple[jax.Array, router.RouterStats]:
    """The layer's output (to be added to x) and its statistics, one row per batch shard.

    `key` is of what is random in training: a router's noise, and with `token_priority` "random"
    which tokens a full expert drops; without it there is no noise, and the earlier ones stay.
    """
    of_device = merging.merged_of_device if config.dispatch == "merge" else _moe_of_device
    local = functools.partial(of_device, config=config, return_routing=return_routing)
    if jax.sharding.get_abstract_mesh().empty:
        return local(x_BTD, params, valid_BT, key)
    specs = sharding.layer_specs(params, "moe")

    def gathered(x_BTD, params, valid_BT, key):
        gather = functools.partial(sharding.all_gather, keep=("tensor",))
        params = _bias_once(jax.tree.map(gather, params, specs))
        if key is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(sharding.BATCH_AXES))
        y_BTD, stats = local(x_BTD, params, valid_BT, key)
        return jax.lax.psum(y_BTD, "tensor"), stats

    # check_vma=False: the loops of the grouped product start from unvaried zeros.
    return jax.shard_map(
        gathered,
        in_specs=(sharding.BATCH, specs, sharding.BATCH, jax.P()),
        out_specs=(sharding.BATCH, sharding.BATCH),
        check_vma=False,
    )(x_BTD, params, valid_BT, key)


def _bias_once(params: dict) -> dict:
    """What is added to the output only on the first of the tensor axis, over which it is summed."""
    first = jax.lax.axis_index("tensor") == 0
    return {
        name: _bias_once(x) if isinstance(x, dict) else x * first if name == "down_bias" else x
        for name, x in params.items()
    }


def _moe_of_device(x_BTD, params, valid_BT, key, *, config, return_routing):
    B, T, D = x_BTD.shape
    x_BTD = layers.norm(x_BTD, params["norm"], config)
    x_MD, valid_M = x_BTD.reshape(B * T, D), valid_BT.ravel()
    with jax.named_scope("router"):
        routing = _route(x_MD, params["router"], valid_M, key, config)
    with jax.named_scope("dispatch"):
        plan = remat.named("plan", _plan(routing.expert_index_MA, valid_M, key, config))
        x_RD = permute.dispatch(x_MD, plan)
        weight_R = permute.dispatch_weight(routing.weight_MA, plan)
    with jax.named_scope("experts"):
        y_RD = experts_of_rows(x_RD, weight_R, params["experts"], plan, config)
    with jax.named_scope("combine"):
        y_MD = permute.combine(y_RD, plan)
    if "shared" in params:
        with jax.named_scope("shared_expert"):
            y_MD += layers.feed_forward(x_MD, params["shared"], config)

    chosen_MA = (routing.expert_index_MA < config.num_experts) & valid_M[:, None]
    num_dropped = jnp.sum(chosen_MA) - jnp.sum(plan.group_sizes_E)
    num_dropped = jnp.zeros_like(num_dropped) if plan.complete else num_dropped
    stats = router.statistics(routing, valid_M, num_dropped)
    stats = jax.tree.map(lambda x: x[None], stats)
    if return_routing:
        by_token = jax.tree.map(lambda x: x.reshape(B, T, *x.shape[1:]), routing)
        stats = stats.replace(routing=by_token)
    return y_MD.reshape(B, T, D), stats


def _route(x_MD, params, valid_M, key, config) -> router.Routing:
    # In float32: with bfloat16 logits close calls between experts would depend on rounding.
    x_MD = x_MD.astype(jnp.float32)
    logits_ME = remat.named("router_logits", x_MD @ params["kernel"].astype(jnp.float32))
    inputs = router.Inputs(
        valid_M,
        bias_E=params.get("bias"),
        noise_ME=x_MD @ params["noise"].astype(jnp.float32) if "noise" in params else None,
        key=None if key is None else naming.fold_in(key, "noise"),
    )
    return router.ROUTERS[config.router](logits_ME, config, inputs)


def _plan(expert_index_MA, valid_M, key, config) -> permute.Permutation:
    E = config.num_experts
    if config.dispatch == "dropless":
        return permute.sort_by_expert(expert_index_MA, E)
    if config.token_priority != "random":
        key = None
    C = router.slots_of_expert(len(valid_M), config)
    return permute.fill_slots(expert_index_MA, valid_M, E, C, key)


def experts_of_rows(
    x_RD: jax.Array,
    weight_R: jax.Array,
    experts: dict,
    plan: permute.Permutation,
    config: ModelConfig,
) -> jax.Array:
    """weight · expert(x) of each row.

    The weight multiplies the hidden neurons, before the down projection: the same sum, but its
    gradient needs no expert output, so nothing of width D is kept or computed again for it.
    """
    weight_R1 = weight_R[:, None].astype(x_RD.dtype)

    def product(x, *names):
        weights = tuple(experts[name] for name in names)
        if plan.complete:
            return grouped_matmul.grouped_matmuls(
                x, weights, plan.group_sizes_E, implementation=config.grouped_matmul
            )
        x_ECD = x.reshape(config.num_experts, -1, x.shape[-1])
        return tuple(
            jnp.einsum("ecd,edf->ecf", x_ECD, w.astype(x.dtype)).reshape(x.shape[0], -1)
            for w in weights
        )

    inner = [name for name in ("gate", "up") if name in experts]
    hidden = product(x_RD, *inner)
    if "up_bias" in experts:
        biases = (_bias_of_rows(experts[f"{name}_bias"], plan, x_RD) for name in inner)
        hidden = tuple(h + b for h, b in zip(hidden, biases, strict=True))
    hidden_RF = layers.activate(remat.named("gate_up", hidden), config)
    y_RD = product(hidden_RF * weight_R1, "down")[0]
    if "down_bias" in experts:
        y_RD += _bias_of_rows(experts["down_bias"], plan, x_RD) * weight_R1
    return y_RD


def _bias_of_rows(bias_EF, plan, x_RD):
    """Each row's expert's bias, as a product: the gradient of a gather would be a scatter-add."""
    R, E = x_RD.shape[0], bias_EF.shape[0]
    if plan.complete:
        expert_R = jnp.searchsorted(jnp.cumsum(plan.group_sizes_E), jnp.arange(R), side="right")
    else:
        expert_R = jnp.arange(R) // (R // E)
    mine_RE = jax.nn.one_hot(expert_R, E, dtype=x_RD.dtype)
    return jnp.matmul(mine_RE, bias_EF.astype(x_RD.dtype), precision="highest")
