"""Applies to each row the feed-forward of its expert."""

import jax
import jax.numpy as jnp

from moe_jax.model import layers, remat
from moe_jax.model.config import ModelConfig
from moe_jax.ops import grouped_matmul, stacks


def experts_of_rows(
    x_RD: jax.Array,
    weight_R: jax.Array,
    experts: dict,
    group_sizes_E: jax.Array | None,
    config: ModelConfig,
) -> jax.Array:
    """weight · expert(x) for each row [R, D]; the rows are sorted by expert.

    Rows beyond the sum of the groups give zeros; without sizes the groups are equal.

    The weight multiplies the hidden neurons, before the down projection. The result is the same,
    but the weight's gradient does not need the expert's output, so nothing of width D is kept or
    recomputed for it.
    """
    weight_R1 = weight_R[:, None].astype(x_RD.dtype)

    def product(x, *names):
        weights = tuple(experts[name] for name in names)
        if group_sizes_E is not None:
            return grouped_matmul.grouped_matmuls(
                x, weights, group_sizes_E, implementation=config.grouped_matmul
            )
        weights = stacks.values(weights)
        x_ECD = x.reshape(len(weights[0]), -1, x.shape[-1])
        return tuple(
            jnp.einsum("ecd,edf->ecf", x_ECD, w.astype(x.dtype)).reshape(x.shape[0], -1)
            for w in weights
        )

    def of_pair(x, name):
        return product(x, name)[0]

    def projected(x, *names):
        ys = zip(names, product(x, *names), strict=True)
        return tuple(layers.add_low_rank(y, x, experts, name, of_pair) for name, y in ys)

    inner = [name for name in ("gate", "up") if name in experts]
    hidden = projected(x_RD, *inner)
    if "up_bias" in experts:
        biases = (_bias_of_rows(experts[f"{name}_bias"], group_sizes_E, x_RD) for name in inner)
        hidden = tuple(h + b for h, b in zip(hidden, biases, strict=True))

    @remat.made_again
    def down(hidden, weight_R1):
        return projected(layers.activate(hidden, config) * weight_R1, "down")[0]

    y_RD = down(remat.named("gate_up", hidden), weight_R1)
    if "down_bias" in experts:
        y_RD += _bias_of_rows(experts["down_bias"], group_sizes_E, x_RD) * weight_R1
    return y_RD


def _bias_of_rows(bias_EF, group_sizes_E, x_RD):
    """Each row's expert bias, as a matrix product: a gather's gradient would be a scatter-add."""
    R, E = x_RD.shape[0], bias_EF.shape[0]
    if group_sizes_E is not None:
        expert_R = jnp.searchsorted(jnp.cumsum(group_sizes_E), jnp.arange(R), side="right")
    else:
        expert_R = jnp.arange(R) // (R // E)
    mine_RE = jax.nn.one_hot(expert_R, E, dtype=x_RD.dtype)
    return jnp.matmul(mine_RE, bias_EF.astype(x_RD.dtype), precision="highest")
