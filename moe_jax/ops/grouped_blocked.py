"""Functions of rows and of their expert's parameters, over blocks of rows: plain XLA, any backend.

`jax.lax.ragged_dot` executes E times the due products on CPU. Here a group is padded to a multiple
of 32 rows at most, and nothing is gathered or scattered: a block is a slice. It can go through
several products one after the other while it is in the cache: a whole expert (`model/experts.py`)
takes 0.8 of the time of its products over all rows and the activation between them.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.parallel import hlo_text

SAVED_NAME = "between_stages"  # of what `through_stages` keeps beside its rows, to remat policies


def products(x_MD, weights, group_sizes_E):
    """One [M, F] for each [E, D, F] of `weights`."""
    return through_stages((_products,), x_MD, (weights,), group_sizes_E)


def _products(x_RD, matrices):
    return tuple(x_RD @ w_DF for w_DF in matrices)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def through_stages(stages: tuple[Callable, ...], rows, params: tuple, group_sizes_E: jax.Array):
    """Rows through the functions `stages`, one after the other, each with its expert's parameters.

    What goes into each stage is kept for the gradient, which computes from it what the stage's own
    gradient needs. All is computed in float32 at least.

    Args:
      stages: functions (rows, parameters of one expert) -> rows, which treat each row by itself.
      rows: a tree of [M, …], sorted by expert.
      params: for each stage a tree of [E, …].
      group_sizes_E: int32; rows beyond their sum give zeros, and add nothing whatever they hold.

    Returns: a tree of [M, …].
    """
    return _forward(stages, rows, params, group_sizes_E)[0]


def _forward(stages, rows, params, group_sizes_E):
    M, E = _shape(rows, group_sizes_E)
    outputs, shapes = (), rows
    for stage, of_experts in zip(stages, params, strict=True):
        shapes = jax.eval_shape(stage, shapes, jax.tree.map(lambda p: p[0], of_experts))
        outputs += (_zeros(shapes),)

    def group(outputs, group):
        expert, start, size = group

        def filled():
            of_expert = _wide(jax.tree.map(lambda p: p[expert], params))

            def visit(outputs, block):
                values = (block.of(rows),)
                for stage, of_stage in zip(stages, of_expert, strict=True):
                    values += (stage(values[-1], of_stage),)
                return block.written(outputs, values[1:])

            return over_blocks(visit, outputs, M, E, start, size)

        # In decoding most experts have no rows, and their matrices are not even cut out.
        return jax.lax.cond(size > 0, filled, lambda: outputs), None

    groups = jnp.arange(E), jnp.cumsum(group_sizes_E) - group_sizes_E, group_sizes_E
    *between, result = jax.lax.scan(group, outputs, groups)[0]
    between = jax.tree.map(lambda x: checkpoint_name(x, SAVED_NAME), between)
    return result, ((rows, *between), params, group_sizes_E)


def _backward(stages, residuals, gradients):
    kept, params, group_sizes_E = residuals
    M, E = _shape(kept, group_sizes_E)

    def group(of_rows, expert):
        params, *start_and_size = expert
        params = _wide(params)

        def visit(totals, block):
            of_rows, of_params = totals
            gradient, found = block.of(gradients), ()
            for stage, values, of_expert in reversed([*zip(stages, kept, params, strict=True)]):
                _, pull = jax.vjp(stage, block.of(values), of_expert)
                gradient, of_expert = pull(gradient)
                found = (of_expert, *found)
            return block.written(of_rows, gradient), jax.tree.map(jnp.add, of_params, found)

        totals = of_rows, _zeros(params)
        of_rows, of_params = over_blocks(visit, totals, M, E, *start_and_size)
        return of_rows, jax.tree.map(lambda d, p: d.astype(p.dtype), of_params, expert[0])

    groups = params, jnp.cumsum(group_sizes_E) - group_sizes_E, group_sizes_E
    of_rows, of_params = jax.lax.scan(group, _zeros(kept[0]), groups)
    return of_rows, of_params, None


through_stages.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class _Block:
    """`size` rows from `row` on, of which those before `end` are meant, or all if it is None."""

    row: jax.Array
    end: jax.Array | None
    size: int

    def of(self, tree):
        """Its rows of each array, zeros where not meant."""
        return _wide(jax.tree.map(lambda x: self._only(*self._cut(x), 0), tree))

    def written(self, tree, rows):
        """The tree with `rows` in their place."""

        def put(x, new):
            first, old = self._cut(x)
            new = self._only(first, new.astype(x.dtype), old)
            return jax.lax.dynamic_update_slice_in_dim(x, new, first, 0)

        return jax.tree.map(put, tree, rows)

    def _cut(self, x):
        """Where the block begins, moved so that it ends inside of x, and its rows."""
        first = self.row if self.end is None else jnp.minimum(self.row, x.shape[0] - self.size)
        return first, jax.lax.dynamic_slice_in_dim(x, first, self.size)

    def _only(self, first, rows, otherwise):
        if self.end is None:
            return rows
        index_R = first + jnp.arange(self.size)
        meant_R = (self.row <= index_R) & (index_R < self.end)
        return jnp.where(meant_R.reshape(-1, *[1] * (rows.ndim - 1)), rows, otherwise)


def block_sizes(M: int, E: int) -> list[int]:
    """Rows of a block, largest first: from 512, where a CPU multiplies fastest, halved down to 32.

    With fewer it spends more on packing an expert's matrix than on multiplying by it. Groups of
    less than 8 rows, as in decoding, take blocks of 8 alone: there each loop costs more than rows.
    """
    if M < 8 * E:
        return [min(M, 8)]
    return [size for size in (512, 256, 128, 64) if size <= M] + [min(M, 32)]


def over_blocks(visit: Callable, carry, M: int, E: int, start: jax.Array, size: jax.Array):
    """Folds carry = visit(carry, block) over a group's `size` rows from `start` on.

    As many blocks of each size as it fills; only one of the last size may be padded. In loops, for
    XLA:CPU copies the arrays that more than one branch of a condition writes. How often they run
    depends on routing; their names say how often with M / E rows, to who reads the program.
    """
    end, balanced = start + size, M // E
    sizes = block_sizes(M, E)
    for B in sizes:
        padded = B == sizes[-1]
        number, expected = (
            -(-rows // B) if padded else rows // B for rows in (end - start, balanced)
        )

        def one(i, carry, first=start, B=B, padded=padded):
            return visit(carry, _Block(first + i * B, end if padded else None, B))

        with jax.named_scope(hlo_text.expected_trips(expected)):
            carry = jax.lax.fori_loop(0, number, one, carry)
        start, balanced = start + number * B, balanced - expected * B
    return carry


def _wide(tree):
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def _zeros(tree):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)


def _shape(rows, group_sizes_E) -> tuple[int, int]:
    return jax.tree.leaves(rows)[0].shape[0], group_sizes_E.shape[0]
