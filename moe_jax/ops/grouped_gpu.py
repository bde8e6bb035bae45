"""The grouped product on NVIDIA GPUs from Ampere on: Pallas kernels through Triton.

Checked against the reference in interpret mode, and compiled for sm_80 and sm_90 (tensor cores, at
most 96 KiB of shared memory, no register spilled where widths are multiples of 128); not run, let
alone measured, on a GPU. float32 goes through TF32, as everywhere in jax by default. jax 0.12
announces that Pallas will give up Triton for Mosaic GPU some day; tokamax has such kernels.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from moe_jax.ops.grouped_kernel import Kernel

# Two accumulators of 128 x 128 fit the registers of 8 warps. Three stages of the widest loop, two
# pairs of operands and 64 bytes of each row of them, are 96 KiB: what every Ampere has to share.
_WIDTH = 128
_CONTRACTED_BYTES = 64
_PARAMS = plgpu.CompilerParams(num_warps=8, num_stages=3)

# So many blocks of rows pass a matrix side by side: one too large for the L2 cache is read once for
# all of them.
_ABREAST = 8


def _width(size: int) -> int:
    return min(max(16, pl.next_power_of_2(size)), _WIDTH)  # a product of Triton takes 16 or more


def _block_rows(M: int, E: int) -> int:
    """At most half a balanced group, so that about a quarter of the rows is padding at most."""
    return min(max(16, 2 ** ((M // (2 * E)).bit_length() - 1)), _WIDTH)


def _blocks(M: int, B: int, group_sizes_E: jax.Array) -> tuple[jax.Array, ...]:
    """(expert, first row, number of rows) of each block, at most B rows of one expert.

    Rows beyond the sum are those of an expert E, so that each row is in a block. Blocks that the
    groups at hand do not need have no rows.
    """
    beyond = M - jnp.sum(group_sizes_E, keepdims=True)
    sizes_X = jnp.concatenate([group_sizes_E, beyond]).astype(jnp.int32)
    X = sizes_X.shape[0]
    end_X, blocks_X = jnp.cumsum(sizes_X), -(-sizes_X // B)
    last_X = jnp.cumsum(blocks_X)
    P = pl.cdiv((M + X * (B - 1)) // B, _ABREAST) * _ABREAST
    block_P = jnp.arange(P)
    expert_P = jnp.searchsorted(last_X, block_P, side="right", method="compare_all")
    expert_P = jnp.clip(expert_P, max=X - 1)
    row_P = (end_X - sizes_X)[expert_P] + (block_P - (last_X - blocks_X)[expert_P]) * B
    count_P = jnp.clip(end_X[expert_P] - row_P, 0, B)
    return tuple(x.astype(jnp.int32) for x in (expert_P, row_P, count_P))


@dataclasses.dataclass(frozen=True)
class _Span:
    """`size` indices from `start`, and which of them count; None where all do."""

    start: jax.Array
    size: int
    inside: jax.Array | None

    @classmethod
    def tile(cls, number, size: int, limit: int):
        start = number * size
        inside = None if limit % size == 0 else start + jnp.arange(size) < limit
        return cls(start, size, inside)


def _at(ref, rows: _Span, columns: _Span, expert=None):
    index = (pl.ds(rows.start, rows.size), pl.ds(columns.start, columns.size))
    inside = [None if rows.inside is None else rows.inside[:, None], columns.inside]
    inside = [mask for mask in inside if mask is not None]
    mask = functools.reduce(jnp.logical_and, inside) if inside else None
    return ref.at[index if expert is None else (expert, *index)], mask


def _load(*args):
    ref, mask = _at(*args)
    return plgpu.load(ref, mask=mask, other=None if mask is None else 0)


def _dot(x, y, contract: tuple[int, int]):
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)


def _multiply_kernel(blocks, rows, weights, *results, tiles, transpose: bool):
    """One result for each of the weights, from the same rows; or one, the sum over the pairs."""
    tm, tk, tn = tiles
    _, K, N = weights[0].shape
    K, N = (N, K) if transpose else (K, N)
    block = pl.program_id(2) * _ABREAST + pl.program_id(0)
    expert, row, count, steps = (ref[block] for ref in blocks)
    block_span = _Span(row, tm, jnp.arange(tm) < count)
    column_span = _Span.tile(pl.program_id(1), tn, N)

    def step(i, sums):
        k_span = _Span.tile(i, tk, K)
        left = [_load(ref, block_span, k_span) for ref in rows]
        left = left * len(weights) if len(left) == 1 else left
        if transpose:
            right = [_load(ref, column_span, k_span, expert) for ref in weights]
        else:
            right = [_load(ref, k_span, column_span, expert) for ref in weights]
        products = [_dot(x, w, (1, int(transpose))) for x, w in zip(left, right, strict=True)]
        if len(results) == 1:  # each product added to the sum, so that Triton makes it one
            return (functools.reduce(jnp.add, products, sums[0]),)
        return tuple(map(jnp.add, sums, products))

    zeros = tuple(jnp.zeros((tm, tn), jnp.float32) for _ in results)
    for ref, y in zip(results, jax.lax.fori_loop(0, steps, step, zeros), strict=True):
        ref, mask = _at(ref, block_span, column_span)
        plgpu.store(ref, y.astype(ref.dtype), mask=mask)


def _gradient_kernel(groups, x, gradients, *results, tiles):
    """An expert's tile of each gradient: its rows of x, transposed, times those of the gradient."""
    tm, tk, tn = tiles
    expert = pl.program_id(2)
    start, size, steps = (ref[expert] for ref in groups)
    k_span = _Span.tile(pl.program_id(1), tk, x.shape[1])
    column_span = _Span.tile(pl.program_id(0), tn, gradients[0].shape[1])

    def step(i, sums):
        row_span = _Span(start + i * tm, tm, i * tm + jnp.arange(tm) < size)
        x_tile = _load(x, row_span, k_span)
        products = [_dot(x_tile, _load(ref, row_span, column_span), (0, 0)) for ref in gradients]
        return tuple(map(jnp.add, sums, products))

    zeros = tuple(jnp.zeros((tk, tn), jnp.float32) for _ in results)
    sums = jax.lax.fori_loop(0, steps, step, zeros)
    for ref, dw in zip(results, sums, strict=True):
        ref, mask = _at(ref, k_span, column_span, expert)
        plgpu.store(ref, dw, mask=mask)


def triton(interpret: bool = False) -> Kernel:
    """One kernel for the value and the gradient of the rows, one for that of the matrices."""

    def multiply(rows, weights, group_sizes_E, *, transpose, results):
        (M, K), (E, *DF) = rows[0].shape, weights[0].shape
        N = DF[0 if transpose else 1]
        dtype = rows[0].dtype
        tiles = _block_rows(M, E), _CONTRACTED_BYTES // dtype.itemsize, _width(N)
        expert_P, row_P, count_P = _blocks(M, tiles[0], group_sizes_E)
        # Rows beyond the sum stay zero. Not in the kernel: Pallas lowers a choice between two
        # literal numbers to one between booleans (jax 0.10.2, 0.12.0.1).
        live_P = (expert_P < E) & (count_P > 0)
        steps_P = jnp.where(live_P, jnp.int32(pl.cdiv(K, tiles[1])), 0)
        return pl.pallas_call(
            functools.partial(_multiply_kernel, tiles=tiles, transpose=transpose),
            out_shape=(jax.ShapeDtypeStruct((M, N), dtype),) * results,
            grid=(_ABREAST, pl.cdiv(N, tiles[2]), expert_P.size // _ABREAST),
            compiler_params=_PARAMS,
            interpret=interpret,
            name="grouped_input_gradient" if transpose else "grouped_product",
        )((expert_P, row_P, count_P, steps_P), rows, weights)

    def product(x_MD, weights, group_sizes_E):
        return multiply((x_MD,), weights, group_sizes_E, transpose=False, results=len(weights))

    def input_gradient(gradients, weights, group_sizes_E):
        return multiply(gradients, weights, group_sizes_E, transpose=True, results=1)[0]

    def weight_gradient(x_MD, gradients, group_sizes_E):
        D, F, E = x_MD.shape[1], gradients[0].shape[1], group_sizes_E.shape[0]
        tiles = _CONTRACTED_BYTES // x_MD.dtype.itemsize, _width(D), _width(F)
        sizes_E = group_sizes_E.astype(jnp.int32)
        groups = jnp.cumsum(sizes_E) - sizes_E, sizes_E, -(-sizes_E // tiles[0])
        return pl.pallas_call(
            functools.partial(_gradient_kernel, tiles=tiles),
            out_shape=(jax.ShapeDtypeStruct((E, D, F), jnp.float32),) * len(gradients),
            grid=(pl.cdiv(F, tiles[2]), pl.cdiv(D, tiles[1]), E),
            compiler_params=_PARAMS,
            interpret=interpret,
            name="grouped_weight_gradient",
        )(groups, x_MD, gradients)

    return Kernel(product, input_gradient, weight_gradient)


TRITON = triton()
