"""Dispatch and combine: permutes tokens into rows grouped by expert, and back.

Both directions are gathers, and so are their gradients. The transpose of a general gather is a
scatter-add, which runs row by row on a CPU and needs atomics on a GPU, but the transpose of a
permutation is a gather by its inverse.
"""

import jax
import jax.numpy as jnp
from flax import struct

from moe_jax.ops.bins import count_by_bin


@struct.dataclass
class Permutation:
    """M tokens x A assignments (index: token * A + slot) in R rows grouped by expert.

    If `complete`, it is a bijection with R = M·A. Otherwise an empty row holds assignment M·A, and
    a dropped assignment has row R.
    """

    assignment_R: jax.Array  # row -> assignment
    row_MA: jax.Array  # assignment -> row
    group_sizes_E: jax.Array  # number of assignments kept
    complete: bool = struct.field(pytree_node=False)


def sort_by_expert(expert_index_MA: jax.Array, num_experts: int) -> Permutation:
    """Dropless dispatch: sorts assignments by expert, in the order of the tokens.

    Raises: ValueError if the combined index of an expert and an assignment exceeds int32.
    """
    expert_index_R = expert_index_MA.ravel()
    R = expert_index_R.size
    if num_experts * R >= 2**31:
        raise ValueError(f"{R} assignments to {num_experts} experts at once; use more microbatches")
    # Sorting a combined key takes a quarter of the time of an argsort on a CPU.
    assignment_R = jnp.sort(expert_index_R * R + jnp.arange(R)) % R
    return Permutation(
        assignment_R=assignment_R,
        row_MA=_inverse(assignment_R).reshape(expert_index_MA.shape),
        group_sizes_E=count_by_bin(expert_index_R, num_experts),
        complete=True,
    )


def fill_slots(
    expert_index_MA: jax.Array,
    valid_M: jax.Array,
    num_experts: int,
    capacity: int,
    limit_G: jax.Array,
    key: jax.Array | None = None,
) -> Permutation:
    """Capacity dispatch: each expert has slots for each of G groups of tokens, and drops the rest.

    The groups are consecutive and of equal size. Group g has `limit_G[g]` slots of expert e, at
    most C, which begin at row (e·G + g)·C. First choices have priority over second ones (GShard,
    Lepikhin et al., arXiv 2006.16668). Among equal choices the earlier token has priority or, with
    a key, a random one (DeepSpeed-MoE's random token selection, Rajbhandari et al., arXiv
    2201.05596), with the same random order of positions in all groups. Padding takes no slot.
    """
    (M, A), G = expert_index_MA.shape, len(limit_G)
    size = M // G
    order_X = jnp.arange(size) if key is None else jax.random.permutation(key, size)
    order_M = (jnp.arange(G)[:, None] * size + order_X).ravel()
    assignment_AM = order_M * A + jnp.arange(A)[:, None]
    # A bin is an expert's slots for one group.
    num_bins = num_experts * G
    bin_MA = expert_index_MA * G + jnp.arange(M)[:, None] // size
    bin_R = jnp.where(valid_M[:, None], bin_MA, num_bins)[order_M].T.ravel()
    by_bin_R = jnp.argsort(bin_R, stable=True)
    sorted_R, bin_R = assignment_AM.ravel()[by_bin_R], bin_R[by_bin_R]
    load_N = count_by_bin(bin_R, num_bins)
    place_R = jnp.arange(M * A) - (jnp.cumsum(load_N) - load_N).at[bin_R].get(mode="clip")
    slots = num_bins * capacity
    kept_R = (place_R < limit_G[bin_R % G]) & (bin_R < num_bins)
    row_R = jnp.where(kept_R, bin_R * capacity + place_R, slots)
    return Permutation(
        assignment_R=jnp.full(slots, M * A).at[row_R].set(sorted_R, mode="drop"),
        row_MA=row_R[_inverse(sorted_R)].reshape(M, A),
        group_sizes_E=jnp.minimum(load_N.reshape(-1, G), limit_G).sum(axis=1),
        complete=False,
    )


def _inverse(permutation_R):
    index_R = jnp.arange(permutation_R.size, dtype=permutation_R.dtype)
    return jnp.zeros_like(permutation_R).at[permutation_R].set(index_R, unique_indices=True)


@jax.custom_vjp
def dispatch(x_MD: jax.Array, permutation: Permutation) -> jax.Array:
    """Copies each token to its rows: [M, D] to [R, D] grouped by expert; empty rows are zero."""
    A = permutation.row_MA.shape[1]
    return _take(x_MD, permutation.assignment_R // A, permutation)


@jax.custom_vjp
def combine(rows_RD: jax.Array, permutation: Permutation) -> jax.Array:
    """Sums the rows of each token: [R, D] to [M, D]. The adjoint of `dispatch`."""
    return jnp.sum(_take(rows_RD, permutation.row_MA, permutation), axis=1)


@jax.custom_vjp
def dispatch_weight(weight_MA: jax.Array, permutation: Permutation) -> jax.Array:
    """The weight of each row: [M, A] to [R]."""
    return _take(weight_MA.ravel(), permutation.assignment_R, permutation)


def _take(x, index, permutation):
    if permutation.complete:
        return x.at[index].get(mode="promise_in_bounds")
    return x.at[index].get(mode="fill", fill_value=0)


def _with_permutation(function):
    return lambda x, permutation: (function(x, permutation), permutation)


dispatch.defvjp(
    _with_permutation(dispatch),
    lambda permutation, grad_RD: (combine(grad_RD, permutation), None),
)
combine.defvjp(
    _with_permutation(combine),
    lambda permutation, grad_MD: (dispatch(grad_MD, permutation), None),
)
dispatch_weight.defvjp(
    _with_permutation(dispatch_weight),
    lambda permutation, grad_R: (_take(grad_R, permutation.row_MA, permutation), None),
)
