"""The grouped product as a loop over blocks of rows: plain XLA, on any backend.

`jax.lax.ragged_dot` executes E times the due products on CPU. Here the padding is bounded by E
blocks, and blocks that the groups at hand do not need are skipped. Nothing is gathered or
scattered: a block is a slice, and its expert's matrix is read where it lies.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax.ops.grouped_kernel import Kernel

# Four blocks of one expert are one product where they can: XLA:CPU multiplies 256 rows at the speed
# of a large product, 64 at 0.87 of it, and adds a gradient to the stack once instead of four times.
RUN = 4


def _block_size(M: int, E: int) -> int:
    """A power of two near a quarter of a balanced group, so that at most 1/4 is padding.

    But no fewer than 64 rows: below that a CPU spends more on packing an expert's matrix than on
    multiplying by it. Only groups of less than 16 rows, as in decoding, take fewer.
    """

    def power_of_two(rows):
        return 2 ** max(0, rows.bit_length() - 1)

    least = min(max(power_of_two(4 * M // E), 8), 64)
    return min(max(power_of_two(M // (4 * E)), least), 128, max(1, M))


def _fold(visit: Callable, start, M: int, group_sizes_E: jax.Array):
    """Folds carry = visit(carry, expert, first row, number of rows, size) over all groups.

    `size`, which is static, is B or RUN·B, the number of rows at most. Runs come first, then what
    is left of the groups, RUN blocks to a step: so a step costs the same either way, and the
    number of steps is enough for any groups.
    """
    E = group_sizes_E.shape[0]
    B = _block_size(M, E)
    run = RUN if M >= RUN * B else 1
    S = -(-((M + E * (B - 1)) // B) // run)  # steps
    end_E = jnp.cumsum(group_sizes_E)
    blocks_E = -(-group_sizes_E // B)
    last_E = jnp.cumsum(blocks_E)
    block_P = jnp.arange(S * run)
    expert_P = jnp.clip(jnp.searchsorted(last_E, block_P, side="right"), max=E - 1)
    number_P = block_P - (last_E - blocks_E)[expert_P]  # of this block in its expert
    row_P = (end_E - group_sizes_E)[expert_P] + number_P * B
    count_P = jnp.clip(end_E[expert_P] - row_P, 0, B)
    in_run_P = number_P < blocks_E[expert_P] // run * run
    order_P = jnp.argsort(~in_run_P, stable=True)
    schedule = [x[order_P].reshape(S, run) for x in (expert_P, row_P, count_P, in_run_P)]

    def one_block(carry, block):
        expert, row, count = block
        return jax.lax.cond(
            count > 0, lambda: visit(carry, expert, row, count, B), lambda: carry
        ), None

    def step(carry, blocks):
        *blocks, in_run = blocks
        expert, row, count = blocks
        return jax.lax.cond(
            in_run[0],
            lambda: visit(carry, expert[0], row[0], jnp.sum(count), run * B),
            lambda: jax.lax.scan(one_block, carry, blocks)[0],
        ), None

    return jax.lax.scan(step, start, schedule)[0]


def _slice(M: int, row, count, size: int):
    """Where to cut `size` rows out of M so that the `count` rows from `row` are in; their mask."""
    first = jnp.minimum(row, M - size)
    index_R = first + jnp.arange(size)
    return first, ((row <= index_R) & (index_R < row + count))[:, None]


def _products(rows: tuple, weights: tuple, group_sizes_E, *, contract: int, together: bool):
    """rows[i] times weights[i] (transposed if `contract` is 1), or `together` their sum."""
    M = rows[0].shape[0]
    rows = rows * len(weights) if len(rows) < len(weights) else rows

    def visit(ys, expert, row, count, size):
        first, mine_R1 = _slice(M, row, count, size)
        products = [
            jax.lax.dot_general(
                jax.lax.dynamic_slice_in_dim(x, first, size),
                w[expert],
                (((1,), (contract,)), ((), ())),
            )
            for x, w in zip(rows, weights, strict=True)
        ]
        products = [sum(products[1:], products[0])] if together else products
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(
                y,
                jnp.where(mine_R1, product, jax.lax.dynamic_slice_in_dim(y, first, size)),
                first,
                0,
            )
            for y, product in zip(ys, products, strict=True)
        )

    widths = [w.shape[2 - contract] for w in (weights[:1] if together else weights)]
    start = tuple(jnp.zeros((M, width), rows[0].dtype) for width in widths)
    return _fold(visit, start, M, group_sizes_E)


def product(x_MD, weights, group_sizes_E):
    return _products((x_MD,), weights, group_sizes_E, contract=0, together=False)


def input_gradient(gradients, weights, group_sizes_E):
    return _products(gradients, weights, group_sizes_E, contract=1, together=True)[0]


def weight_gradient(x_MD, gradients, group_sizes_E):
    M, D = x_MD.shape

    def visit(stacks, expert, row, count, size):
        first, mine_R1 = _slice(M, row, count, size)
        x_RD = jnp.where(mine_R1, jax.lax.dynamic_slice_in_dim(x_MD, first, size), 0)
        return tuple(
            dw_EDF.at[expert].add(
                jnp.matmul(
                    x_RD.T,
                    jnp.where(mine_R1, jax.lax.dynamic_slice_in_dim(grad_MF, first, size), 0),
                    preferred_element_type=jnp.float32,
                )
            )
            for dw_EDF, grad_MF in zip(stacks, gradients, strict=True)
        )

    E = group_sizes_E.shape[0]
    start = tuple(jnp.zeros((E, D, g.shape[1]), jnp.float32) for g in gradients)
    return _fold(visit, start, M, group_sizes_E)


KERNEL = Kernel(product, input_gradient, weight_gradient)
