"""The sparse feed-forward layer: norm, route, dispatch, experts, combine.

Always inside `jax.shard_map` when a mesh is set, with tokens dispatched among the experts of their
own device: left to automatic partitioning the sort becomes a global one, with all-reduces of
[assignments, D]. Without a mesh the same per-device function is called directly.
"""

import functools

import jax
import jax.numpy as jnp

from moe_jax.model import layers, router
from moe_jax.model.config import ModelConfig
from moe_jax.ops import grouped_matmul, permute
from moe_jax.parallel import sharding


def shapes(config: ModelConfig) -> dict:
    D, F, E = config.hidden_size, config.expert_size, config.num_experts
    return {
        "norm": layers.norm_shapes(config),
        "router": {"kernel": (D, E)},
        "experts": {"gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)},
    }


def moe(
    x_BTD: jax.Array,
    params: dict,
    valid_BT: jax.Array,
    config: ModelConfig,
    *,
    return_routing: bool = False,
) -> tuple[jax.Array, router.RouterStats]:
    """The layer's output (to be added to x) and its statistics, one row per batch shard."""
    local = functools.partial(_moe_of_device, config=config, return_routing=return_routing)
    if jax.sharding.get_abstract_mesh().empty:
        return local(x_BTD, params, valid_BT)
    specs = sharding.layer_specs(params, "moe")

    def gathered(x_BTD, params, valid_BT):
        gather = functools.partial(sharding.all_gather, keep=("tensor",))
        params = jax.tree.map(gather, params, specs)
        y_BTD, stats = local(x_BTD, params, valid_BT)
        return jax.lax.psum(y_BTD, "tensor"), stats

    # check_vma=False: the loops of the grouped product start from unvaried zeros.
    return jax.shard_map(
        gathered,
        in_specs=(sharding.BATCH, specs, sharding.BATCH),
        out_specs=(sharding.BATCH, sharding.BATCH),
        check_vma=False,
    )(x_BTD, params, valid_BT)


def _moe_of_device(x_BTD, params, valid_BT, *, config, return_routing):
    B, T, D = x_BTD.shape
    x_BTD = layers.rms_norm(x_BTD, params["norm"]["scale"], config.rms_norm_eps)
    x_MD, valid_M = x_BTD.reshape(B * T, D), valid_BT.ravel()
    with jax.named_scope("router"):
        # In float32: with bfloat16 logits close calls between experts would depend on rounding.
        logits_ME = x_MD.astype(jnp.float32) @ params["router"]["kernel"].astype(jnp.float32)
        routing = router.route(
            logits_ME,
            num_experts_per_tok=config.num_experts_per_tok,
            norm_topk_prob=config.norm_topk_prob,
        )
        stats = jax.tree.map(lambda x: x[None], router.statistics(routing, valid_M))
    y_MD = mix_experts(x_MD, routing, params["experts"], config.grouped_matmul)
    if return_routing:
        by_token = jax.tree.map(lambda x: x.reshape(B, T, *x.shape[1:]), routing)
        stats = stats.replace(routing=by_token)
    return y_MD.reshape(B, T, D), stats


def mix_experts(
    x_MD: jax.Array, routing: router.Routing, experts: dict, implementation: str
) -> jax.Array:
    """Dropless mixture of SwiGLU experts: sum over a token's assignments of weight · expert(x).

    The weight multiplies the hidden neurons, before the down projection: the same sum, but its
    gradient needs no expert output, so nothing of width D is kept or computed again for it.
    """
    E = routing.logits_ME.shape[-1]
    with jax.named_scope("dispatch"):
        permutation = permute.sort_by_expert(routing.expert_index_MA, E)
        x_RD = permute.dispatch(x_MD, permutation)
        weight_R = permute.dispatch_weight(routing.weight_MA, permutation)
    with jax.named_scope("experts"):
        sizes_E = permutation.group_sizes_E
        gate_RF, up_RF = grouped_matmul.grouped_matmuls(
            x_RD, (experts["gate"], experts["up"]), sizes_E, implementation=implementation
        )
        hidden_RF = jax.nn.silu(gate_RF) * up_RF * weight_R[:, None].astype(x_MD.dtype)
        y_RD = grouped_matmul.grouped_matmul(
            hidden_RF, experts["down"], sizes_E, implementation=implementation
        )
    with jax.named_scope("combine"):
        return permute.combine(y_RD, permutation)
