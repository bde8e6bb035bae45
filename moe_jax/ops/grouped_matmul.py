"""Rows grouped by expert, each group times its own matrix: the product at the heart of an MoE."""

import jax
import jax.numpy as jnp
from flax import struct


def grouped_matmul(
    x_MD: jax.Array,
    w_EDF: jax.Array,
    group_sizes_E: jax.Array,
    *,
    implementation: str = "auto",
) -> jax.Array:
    """Row i of x times the matrix of the expert whose group holds i.

    Args:
      x_MD: rows sorted by expert.
      w_EDF: one matrix per expert.
      group_sizes_E: int32; they sum to at most M, and rows beyond the sum give zeros.
      implementation: "reference" (every expert over every row, masked), "blocked" (blocks
        of rows one after the other; runs anywhere), or "auto", which is "blocked".

    Returns: [M, F] in x's dtype.
    Raises: ValueError for an unknown `implementation`.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"grouped_matmul implementation={implementation!r} is unknown; "
            f"use one of {', '.join(map(repr, IMPLEMENTATIONS))}"
        )
    return IMPLEMENTATIONS[implementation](x_MD, w_EDF.astype(x_MD.dtype), group_sizes_E)


def reference(x_MD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """E times the work of `blocked`, and nothing to get wrong."""
    ends_E = jnp.cumsum(group_sizes_E)
    row_M = jnp.arange(x_MD.shape[0])

    def add_expert(y_MF, expert):
        w_DF, start, end = expert
        mine_M = (start <= row_M) & (row_M < end)
        return y_MF + jnp.where(mine_M[:, None], x_MD, 0) @ w_DF, None

    y_MF = jnp.zeros((x_MD.shape[0], w_EDF.shape[2]), x_MD.dtype)
    return jax.lax.scan(add_expert, y_MF, (w_EDF, ends_E - group_sizes_E, ends_E))[0]


@struct.dataclass
class _Blocks:
    """P blocks of rows, each the rows of one expert; dead ones start at row M and count none."""

    expert_P: jax.Array
    start_P: jax.Array
    count_P: jax.Array
    is_first_P: jax.Array  # of its expert


def _block_size(M: int, E: int) -> int:
    """A power of two near a quarter of a balanced group, so that at most 1/4 is padding.

    But no fewer than 64 rows where there are as many: below that a CPU spends more on packing an
    expert's matrix than on multiplying by it.
    """
    quarter = 2 ** max(0, (M // (4 * E)).bit_length() - 1)
    return min(max(quarter, 64), 128, max(8, M))


def _blocks(M: int, B: int, group_sizes_E: jax.Array) -> _Blocks:
    E = group_sizes_E.shape[0]
    P = (M + E * (B - 1)) // B  # enough for any groups
    end_E = jnp.cumsum(group_sizes_E)
    last_block_E = jnp.cumsum(-(-group_sizes_E // B))
    block_P = jnp.arange(P)
    expert_P = jnp.clip(jnp.searchsorted(last_block_E, block_P, side="right"), max=E - 1)
    left_P = last_block_E[expert_P] - block_P  # blocks of this expert from this one on
    blocks_P = -(-group_sizes_E[expert_P] // B)
    start_P = (end_E - group_sizes_E)[expert_P] + (blocks_P - left_P) * B
    start_P = jnp.where(left_P > 0, start_P, M)
    count_P = jnp.clip(end_E[expert_P] - start_P, 0, B)
    return _Blocks(expert_P, start_P, count_P, left_P == blocks_P)


def _rows(x_MD: jax.Array, start: jax.Array, B: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x_MD, start, B)


def _pad(x_MD: jax.Array, B: int) -> jax.Array:
    """B more rows: the last block of a group reads and writes beyond it, maybe beyond M."""
    return jnp.pad(x_MD, ((0, B), (0, 0)))


@jax.custom_vjp
def blocked(x_MD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """A loop over blocks of B rows, each times its expert's matrix.

    Blocks are written in order, so what the last block of a group writes beyond it is overwritten
    by the next group: no row is gathered or masked. The padding is bounded by E blocks, and the
    blocks that the groups at hand do not need are skipped. `jax.lax.ragged_dot` executes E times
    the due products on CPU.
    """
    return _blocked_product(x_MD, w_EDF, group_sizes_E, contract=0)


def _blocked_product(x_MD, w_EDF, group_sizes_E, contract):
    """x times w, or with `contract` 1 times w transposed."""
    M, E = x_MD.shape[0], w_EDF.shape[0]
    B = _block_size(M, E)
    blocks, padded = _blocks(M, B, group_sizes_E), _pad(x_MD, B)
    width = w_EDF.shape[2 - contract]

    def one_block(carry, block):
        y, w_DF = carry
        # Carried along, an expert's matrix is copied out of the stack once, not for every block.
        w_DF = jax.lax.cond(block.is_first_P, lambda: w_EDF[block.expert_P], lambda: w_DF)
        y_BF = jax.lax.cond(
            block.count_P > 0,
            lambda: jax.lax.dot_general(
                _rows(padded, block.start_P, B), w_DF, (((1,), (contract,)), ((), ()))
            ),
            lambda: jnp.zeros((B, width), x_MD.dtype),
        )
        return (jax.lax.dynamic_update_slice_in_dim(y, y_BF, block.start_P, 0), w_DF), None

    start = (jnp.zeros((M + B, width), x_MD.dtype), w_EDF[0])
    y = jax.lax.scan(one_block, start, blocks)[0][0]
    beyond = jnp.zeros((B, width), x_MD.dtype)
    return jax.lax.dynamic_update_slice_in_dim(y, beyond, jnp.sum(group_sizes_E), 0)[:M]


def _blocked_forward(x_MD, w_EDF, group_sizes_E):
    return blocked(x_MD, w_EDF, group_sizes_E), (x_MD, w_EDF, group_sizes_E)


def _blocked_backward(residuals, grad_MF):
    x_MD, w_EDF, group_sizes_E = residuals
    M, E = x_MD.shape[0], w_EDF.shape[0]
    B = _block_size(M, E)
    x_padded, grad_padded = _pad(x_MD, B), _pad(grad_MF, B)

    def one_block(dw_EDF, block):
        def add():
            inside_B = jnp.arange(B) < block.count_P
            x_BD = jnp.where(inside_B[:, None], _rows(x_padded, block.start_P, B), 0)
            dw_DF = jnp.matmul(
                x_BD.T, _rows(grad_padded, block.start_P, B), preferred_element_type=jnp.float32
            )
            return dw_EDF.at[block.expert_P].add(dw_DF)

        return jax.lax.cond(block.count_P > 0, add, lambda: dw_EDF), None

    dw_EDF, _ = jax.lax.scan(
        one_block, jnp.zeros(w_EDF.shape, jnp.float32), _blocks(M, B, group_sizes_E)
    )
    dx_MD = _blocked_product(grad_MF, w_EDF, group_sizes_E, contract=1)
    return dx_MD, dw_EDF.astype(w_EDF.dtype), None


blocked.defvjp(_blocked_forward, _blocked_backward)

IMPLEMENTATIONS = {"auto": blocked, "reference": reference, "blocked": blocked}
