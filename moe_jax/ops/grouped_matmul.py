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


def _block_size(M: int, E: int) -> int:
    """A power of two near a quarter of a balanced group: few blocks, and at most 1/4 of padding."""
    return 2 ** min(7, max(3, (M // (4 * E)).bit_length() - 1))


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
    return _Blocks(expert_P, start_P, jnp.clip(end_E[expert_P] - start_P, 0, B))


def _rows(x_MD: jax.Array, start: jax.Array, B: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x_MD, start, B)


def _pad(x_MD: jax.Array, B: int) -> jax.Array:
    """B more rows: the last block of a group reads and writes beyond it, maybe beyond M."""
    return jnp.pad(x_MD, ((0, B), (0, 0)))


@jax.custom_vjp
def blocked(x_MD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """A loop over blocks of B rows, each times its expert's matrix.

    Blocks are written in order, so what the last block of a group writes beyond it is overwritten
    by the next group: no row is gathered or masked. The padding is bounded by E blocks, at most 1/4
    of the due products for balanced groups of 32 rows or more. `jax.lax.ragged_dot` executes E
    times the due ones on CPU.
    """
    return _blocked_product(x_MD, w_EDF, group_sizes_E, contract=0)


def _blocked_product(x_MD, w_EDF, group_sizes_E, contract):
    """x times w, or with `contract` 1 times w transposed."""
    M, E = x_MD.shape[0], w_EDF.shape[0]
    B = _block_size(M, E)
    blocks, padded = _blocks(M, B, group_sizes_E), _pad(x_MD, B)

    def one_block(y, block):
        product = jax.lax.dot_general(
            _rows(padded, block.start_P, B), w_EDF[block.expert_P], (((1,), (contract,)), ((), ()))
        )
        return jax.lax.dynamic_update_slice_in_dim(y, product, block.start_P, 0), None

    width = w_EDF.shape[2 - contract]
    y = jax.lax.scan(one_block, jnp.zeros((M + B, width), x_MD.dtype), blocks)[0][:M]
    inside_M = jnp.arange(M) < jnp.sum(group_sizes_E)
    return jnp.where(inside_M[:, None], y, 0)


def _blocked_forward(x_MD, w_EDF, group_sizes_E):
    return blocked(x_MD, w_EDF, group_sizes_E), (x_MD, w_EDF, group_sizes_E)


def _blocked_backward(residuals, grad_MF):
    x_MD, w_EDF, group_sizes_E = residuals
    M, E = x_MD.shape[0], w_EDF.shape[0]
    B = _block_size(M, E)
    x_padded, grad_padded = _pad(x_MD, B), _pad(grad_MF, B)

    def one_block(dw_EDF, block):
        inside_B = jnp.arange(B) < block.count_P
        x_BD = jnp.where(inside_B[:, None], _rows(x_padded, block.start_P, B), 0)
        dw_DF = jnp.matmul(
            x_BD.T, _rows(grad_padded, block.start_P, B), preferred_element_type=jnp.float32
        )
        return dw_EDF.at[block.expert_P].add(dw_DF), None

    dw_EDF, _ = jax.lax.scan(
        one_block, jnp.zeros(w_EDF.shape, jnp.float32), _blocks(M, B, group_sizes_E)
    )
    dx_MD = _blocked_product(grad_MF, w_EDF, group_sizes_E, contract=1)
    return dx_MD, dw_EDF.astype(w_EDF.dtype), None


blocked.defvjp(_blocked_forward, _blocked_backward)

IMPLEMENTATIONS = {"auto": blocked, "reference": reference, "blocked": blocked}
