"""Sort-based dispatch: tokens to rows grouped by expert, and back.

Both directions are gathers, and so are their gradients: the transpose of a gather is a scatter-add,
which runs row by row on a CPU and needs atomics on a GPU, while a permutation's transpose is the
gather by its inverse.
"""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Permutation:
    """M tokens x A assignments sorted by expert: R = M·A rows, an expert's tokens in order."""

    assignment_R: jax.Array  # sorted row -> assignment (token * A + slot)
    row_MA: jax.Array  # assignment -> sorted row
    group_sizes_E: jax.Array


def sort_by_expert(expert_index_MA: jax.Array, num_experts: int) -> Permutation:
    expert_index_R = expert_index_MA.ravel()
    assignment_R = jnp.argsort(expert_index_R, stable=True)
    row_R = (
        jnp.zeros_like(assignment_R)
        .at[assignment_R]
        .set(jnp.arange(assignment_R.size, dtype=assignment_R.dtype), unique_indices=True)
    )
    return Permutation(
        assignment_R=assignment_R,
        row_MA=row_R.reshape(expert_index_MA.shape),
        group_sizes_E=jnp.bincount(expert_index_R, length=num_experts),
    )


@jax.custom_vjp
def dispatch(x_MD: jax.Array, permutation: Permutation) -> jax.Array:
    """Copies each token to its A rows: [M, D] to [R, D], rows grouped by expert."""
    A = permutation.row_MA.shape[1]
    return x_MD[permutation.assignment_R // A]


@jax.custom_vjp
def combine(rows_RD: jax.Array, permutation: Permutation) -> jax.Array:
    """Sums the A rows of each token: [R, D] to [M, D]. The adjoint of `dispatch`."""
    return jnp.sum(rows_RD[permutation.row_MA], axis=1)


def _dispatch_forward(x_MD, permutation):
    return dispatch(x_MD, permutation), permutation


def _combine_forward(rows_RD, permutation):
    return combine(rows_RD, permutation), permutation


dispatch.defvjp(
    _dispatch_forward, lambda permutation, grad_RD: (combine(grad_RD, permutation), None)
)
combine.defvjp(
    _combine_forward, lambda permutation, grad_MD: (dispatch(grad_MD, permutation), None)
)


@jax.custom_vjp
def dispatch_weight(weight_MA: jax.Array, permutation: Permutation) -> jax.Array:
    """The weight of each sorted row: [M, A] to [R]."""
    return weight_MA.ravel()[permutation.assignment_R]


dispatch_weight.defvjp(
    lambda weight_MA, permutation: (dispatch_weight(weight_MA, permutation), permutation),
    lambda permutation, grad_R: (grad_R[permutation.row_MA], None),
)
