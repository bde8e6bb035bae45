"""Sums by bin: the number of rows of each expert, or the gradient of its score.

This is a scatter-add, except on a GPU. There, atomic additions to few bins wait for each other (0.8
ms for the 131,072 assignments of an OLMoE layer on an H100, as long as a product of its experts)
and round in a random order. Instead, every value is compared with every bin in one fused loop.

Adding many values to one float32 in sequence loses whatever is below half of its last bit: 2e-5 of
a sum of half a million values, 0.4 % of a sum of four million. Blocks are therefore summed first.
"""

import jax
import jax.numpy as jnp

from moe_jax.ops import implementations

BLOCK = 4096  # values per block


def sum_by_bin(values: jax.Array, bin_index: jax.Array, num_bins: int) -> jax.Array:
    """[num_bins]: the sum of the values in each bin; values beyond the last bin are ignored."""
    if implementations.platform() != "gpu":
        if jnp.issubdtype(values.dtype, jnp.integer):
            return jnp.zeros(num_bins, values.dtype).at[bin_index].add(values, mode="drop")
        sums_BE = jnp.zeros((-(-values.size // BLOCK), num_bins), values.dtype)
        block_R = jnp.arange(values.size) // BLOCK
        sums_BE = sums_BE.at[block_R, bin_index.ravel()].add(values.ravel(), mode="drop")
        return jnp.sum(sums_BE, axis=0)
    mine_RE = bin_index.reshape(-1, 1) == jnp.arange(num_bins)
    return jnp.sum(jnp.where(mine_RE, values.reshape(-1, 1), 0), axis=0)


def count_by_bin(bin_index: jax.Array, num_bins: int) -> jax.Array:
    """The number of indices in each bin, int32 [num_bins]."""
    return sum_by_bin(jnp.ones(bin_index.shape, jnp.int32), bin_index, num_bins)


@jax.custom_vjp
def chosen(values_ME: jax.Array, index_MA: jax.Array) -> jax.Array:
    """[M, A]: the values of each row at its indices, which must all be different."""
    return jnp.take_along_axis(values_ME, index_MA, axis=-1)


def _chosen_backward(residuals, grad_MA):
    index_MA, E = residuals
    if implementations.platform() != "gpu":
        row_M1 = jnp.arange(len(index_MA))[:, None]
        return jnp.zeros((len(index_MA), E), grad_MA.dtype).at[row_M1, index_MA].set(grad_MA), None
    grad_ME = sum(
        jnp.where(index_MA[:, a, None] == jnp.arange(E), grad_MA[:, a, None], 0)
        for a in range(index_MA.shape[1])
    )
    return grad_ME, None


chosen.defvjp(
    lambda values_ME, index_MA: (chosen(values_ME, index_MA), (index_MA, values_ME.shape[1])),
    _chosen_backward,
)
