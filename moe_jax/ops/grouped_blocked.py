"""The grouped matmul over blocks of rows, in plain XLA for any backend.

On a CPU `jax.lax.ragged_dot` executes E times the necessary products. Here a group is padded to a
multiple of at most 32 rows, and a block is a slice: nothing is gathered or scattered.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp


def expected_trips(number: int | str) -> str:
    """The `jax.named_scope` for a loop with a data-dependent trip count, expected to be `number`.

    The dry run reads it in the compiled text to count the loop's products.
    """
    return f"expected_trips_{number}"


@jax.custom_vjp
def products(x_MD, weights, group_sizes_E):
    """One [M, F] for each [E, D, F] of `weights`, computed at least in float32.

    Rows beyond the sum of the groups give zeros, and their contents never affect gradients.
    """
    (M, _), E = x_MD.shape, len(group_sizes_E)
    ys = tuple(jnp.zeros((M, w.shape[2]), x_MD.dtype) for w in weights)

    def group(ys, group):
        expert, start, size = group

        def filled():
            matrices = _wide(tuple(w_EDF[expert] for w_EDF in weights))

            def visit(ys, block):
                x_RD = block.of(x_MD)
                return tuple(
                    block.written(y_MF, x_RD @ w_DF)
                    for y_MF, w_DF in zip(ys, matrices, strict=True)
                )

            return over_blocks(visit, ys, M, E, start, size)

        # Most experts have no rows while decoding; this avoids even slicing out their matrices.
        return jax.lax.cond(size > 0, filled, lambda: ys), None

    return jax.lax.scan(group, ys, (jnp.arange(E), *_places(group_sizes_E)))[0]


def _forward(x_MD, weights, group_sizes_E):
    return products(x_MD, weights, group_sizes_E), (x_MD, weights, group_sizes_E)


def _backward(residuals, gradients):
    x_MD, weights, group_sizes_E = residuals
    (M, _), E = x_MD.shape, len(group_sizes_E)

    def group(dx_MD, expert):
        *matrices, start, size = expert
        matrices = _wide(matrices)

        def visit(totals, block):
            dx_MD, dw = totals
            x_RD, g = block.of(x_MD), [block.of(g_MF) for g_MF in gradients]
            dx_RD = sum(g_RF @ w_DF.T for g_RF, w_DF in zip(g, matrices, strict=True))
            dw = [dw_DF + x_RD.T @ g_RF for dw_DF, g_RF in zip(dw, g, strict=True)]
            return block.written(dx_MD, dx_RD), dw

        totals = dx_MD, [jnp.zeros_like(w_DF) for w_DF in matrices]
        dx_MD, dw = over_blocks(visit, totals, M, E, start, size)
        return dx_MD, tuple(d.astype(w.dtype) for d, w in zip(dw, expert, strict=False))

    dx_MD, dw = jax.lax.scan(group, jnp.zeros_like(x_MD), (*weights, *_places(group_sizes_E)))
    return dx_MD, dw, None


products.defvjp(_forward, _backward)


def _places(group_sizes_E):
    """The first row of each group, and its size."""
    return jnp.cumsum(group_sizes_E) - group_sizes_E, group_sizes_E


@dataclasses.dataclass(frozen=True)
class _Block:
    """`size` rows from `row` on; only rows before `end` are valid, or all if it is None."""

    row: jax.Array
    end: jax.Array | None
    size: int

    def of(self, x):
        """The block's rows of x, with zeros for rows that are not valid."""
        return _wide(self._only(*self._cut(x), 0))

    def written(self, x, rows):
        """x with `rows` written to the block's valid rows."""
        first, old = self._cut(x)
        new = self._only(first, rows.astype(x.dtype), old)
        return jax.lax.dynamic_update_slice_in_dim(x, new, first, 0)

    def _cut(self, x):
        """The block's first row, shifted so that the block ends inside x, and the rows there."""
        first = self.row if self.end is None else jnp.minimum(self.row, x.shape[0] - self.size)
        return first, jax.lax.dynamic_slice_in_dim(x, first, self.size)

    def _only(self, first, rows, otherwise):
        if self.end is None:
            return rows
        index_R = first + jnp.arange(self.size)
        counts_R = (self.row <= index_R) & (index_R < self.end)
        return jnp.where(counts_R[:, None], rows, otherwise)


def block_sizes(M: int, E: int) -> list[int]:
    """Rows per block, largest first: from 512, where a CPU multiplies fastest, halved down to 32.

    With fewer rows a CPU spends more time on packing an expert's matrix than on multiplying by it.
    Groups of fewer than 8 rows, as in decoding, use only blocks of 8, because there another loop
    costs more than padded rows.
    """
    if M < 8 * E:
        return [min(M, 8)]
    return [size for size in (512, 256, 128, 64) if size <= M] + [min(M, 32)]


def over_blocks(visit: Callable, carry, M: int, E: int, start: jax.Array, size: jax.Array):
    """Folds carry = visit(carry, block) over a group's `size` rows from `start` on.

    A group takes as many blocks of each size as it fills; only its last block may be padded. Blocks
    are visited in loops because XLA:CPU copies arrays that several branches of a conditional write.
    Routing decides a loop's trip count; the loop's name gives the count for M / E rows.
    """
    end, balanced = start + size, M // E
    sizes = block_sizes(M, E)
    for B in sizes:
        padded = B == sizes[-1]
        number = -(-(end - start) // B) if padded else (end - start) // B
        expected = -(-balanced // B) if padded else balanced // B

        def one(i, carry, first=start, B=B, padded=padded):
            return visit(carry, _Block(first + i * B, end if padded else None, B))

        with jax.named_scope(expected_trips(expected)):
            carry = jax.lax.fori_loop(0, number, one, carry)
        start, balanced = start + number * B, balanced - expected * B
    return carry


def _wide(tree):
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)
