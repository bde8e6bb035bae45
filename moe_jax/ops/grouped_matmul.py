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
      implementation: "reference" (every expert over every row, masked), "blocked" (each group
        padded to whole blocks of rows; runs anywhere), or "auto", which is "blocked".

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
    """P blocks of B rows, each block the rows of one expert; M stands for "no row"."""

    expert_P: jax.Array
    row_PB: jax.Array  # block place -> row of x
    place_M: jax.Array  # row of x -> flat block place


def _blocks(M: int, group_sizes_E: jax.Array) -> _Blocks:
    E = group_sizes_E.shape[0]
    # A power of two near an eighth of a balanced group: at most 1/8 of padding, yet few blocks.
    B = 2 ** min(7, max(3, (M // (8 * E)).bit_length() - 1))
    P = (M + E * (B - 1)) // B
    end_E = jnp.cumsum(group_sizes_E)
    start_E = end_E - group_sizes_E
    blocks_E = -(-group_sizes_E // B)
    last_block_E = jnp.cumsum(blocks_E)
    first_block_E = last_block_E - blocks_E

    block_P = jnp.arange(P)
    expert_P = jnp.clip(jnp.searchsorted(last_block_E, block_P, side="right"), max=E - 1)
    first_row_P = start_E[expert_P] + (block_P - first_block_E[expert_P]) * B
    row_PB = first_row_P[:, None] + jnp.arange(B)
    row_PB = jnp.where(row_PB < end_E[expert_P][:, None], row_PB, M)

    row_M = jnp.arange(M)
    expert_M = jnp.searchsorted(end_E, row_M, side="right")
    place_M = row_M + (first_block_E * B - start_E)[jnp.clip(expert_M, max=E - 1)]
    place_M = jnp.where(expert_M < E, place_M, P * B)
    return _Blocks(expert_P, row_PB, place_M)


def _to_blocks(x_MD: jax.Array, blocks: _Blocks) -> jax.Array:
    return x_MD.at[blocks.row_PB].get(mode="fill", fill_value=0)


def _from_blocks(y_PBF: jax.Array, blocks: _Blocks) -> jax.Array:
    flat = y_PBF.reshape(-1, y_PBF.shape[-1])
    return flat.at[blocks.place_M].get(mode="fill", fill_value=0)


@jax.custom_vjp
def blocked(x_MD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """Pads each group to whole blocks; a loop multiplies one block by one expert's matrix.

    The padding is bounded by E blocks, so the products executed are at most 1 + 1/8 of the due
    ones for balanced groups of 64 rows or more. `jax.lax.ragged_dot` executes E times the due ones on CPU.
    """
    blocks = _blocks(x_MD.shape[0], group_sizes_E)
    x_PBD = _to_blocks(x_MD, blocks)
    y_PBF = jax.lax.map(lambda block: block[0] @ w_EDF[block[1]], (x_PBD, blocks.expert_P))
    return _from_blocks(y_PBF, blocks)


def _blocked_forward(x_MD, w_EDF, group_sizes_E):
    return blocked(x_MD, w_EDF, group_sizes_E), (x_MD, w_EDF, group_sizes_E)


def _blocked_backward(residuals, grad_MF):
    x_MD, w_EDF, group_sizes_E = residuals
    blocks = _blocks(x_MD.shape[0], group_sizes_E)
    x_PBD, grad_PBF = _to_blocks(x_MD, blocks), _to_blocks(grad_MF, blocks)

    def one_block(dw_EDF, block):
        x_BD, grad_BF, expert = block
        dw_DF = jnp.matmul(x_BD.T, grad_BF, preferred_element_type=jnp.float32)
        return dw_EDF.at[expert].add(dw_DF), grad_BF @ w_EDF[expert].T

    dw_EDF, dx_PBD = jax.lax.scan(
        one_block, jnp.zeros(w_EDF.shape, jnp.float32), (x_PBD, grad_PBF, blocks.expert_P)
    )
    return _from_blocks(dx_PBD, blocks), dw_EDF.astype(w_EDF.dtype), None


blocked.defvjp(_blocked_forward, _blocked_backward)

IMPLEMENTATIONS = {"auto": blocked, "reference": reference, "blocked": blocked}
