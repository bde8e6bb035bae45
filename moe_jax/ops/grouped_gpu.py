"""The grouped matmul on NVIDIA GPUs from Ampere on: Pallas kernels through Triton.

On an H100 with jax 0.11.2 they reach 0.65 to 0.86 of the rate of a large matrix product, at the
shapes of Drop-Upcycling 8x1.5B and OLMoE. For Ampere they were only compiled. float32 goes through
TF32, as everywhere in jax by default. jax 0.12 announces that Pallas will eventually replace Triton
by Mosaic GPU. The Mosaic kernels that come with jax were timed in the same runs: they are no faster
for the products of rows, and take 0.93 of the time for the gradient of the matrices, which they
round to bfloat16.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from moe_jax.ops import implementations, stacks
from moe_jax.ops.grouped_kernel import Kernel

# An accumulator of 128 x 256 fits in the registers of 8 warps. A stage is 128 bytes of each row of
# both operands, 48 KiB: three stages fit in the shared memory of an A100 or H100, two in that of
# any other Ampere GPU. On an H100 this beat tiles of 128 x 128 by 10 %, even when those computed
# gate and up in one program and so read the rows only once. Four warps were no faster, nor were
# four stages of half the bytes.
_ROWS, _COLUMNS = 128, 256
_CONTRACTED_BYTES = 128
_WARPS, _STAGES, _STAGES_OF_LITTLE_MEMORY = 8, 3, 2
_LITTLE_MEMORY = ((8, 6), (8, 9), (12, 0), (12, 1))  # compute capabilities with 100 KiB shared

# The number of row blocks that use a matrix concurrently, so that a matrix too large for the L2
# cache is read only once for all of them.
_ABREAST = 8


def _compiler_params():
    little = implementations.compute_capability() in _LITTLE_MEMORY
    stages = _STAGES_OF_LITTLE_MEMORY if little else _STAGES
    return plgpu.CompilerParams(num_warps=_WARPS, num_stages=stages)


def _width(size: int, most: int) -> int:
    return min(max(16, pl.next_power_of_2(size)), most)  # Triton's products need at least 16


def _block_rows(M: int, E: int) -> int:
    """Rows per block: at most half a balanced group, so at most about a quarter is padding."""
    return min(max(16, 2 ** ((M // (2 * E)).bit_length() - 1)), _ROWS)


def _blocks(M: int, B: int, group_sizes_E: jax.Array) -> tuple[jax.Array, ...]:
    """(expert, first row, number of rows) of each block, at most B rows of one expert.

    Rows beyond the sum of the groups belong to an extra expert E, so that every row is in a block.
    Blocks that these groups do not need have no rows.
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
    """`size` indices from `start`; `inside` is True for valid ones, or None if all are valid."""

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
    mask = None if rows.inside is None else rows.inside[:, None]
    if columns.inside is not None:
        mask = columns.inside if mask is None else mask & columns.inside
    return ref.at[index if expert is None else (expert, *index)], mask


def _load(*args):
    ref, mask = _at(*args)
    return plgpu.load(ref, mask=mask, other=None if mask is None else 0)


def _dot(x, y, contract: tuple[int, int]):
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)


def _multiply_kernel(blocks, rows, weights, result, *, tiles, transpose: bool):
    """Accumulates the products of each pair in `rows` and `weights`, one after the other."""
    tm, tk, tn = tiles
    _, K, N = weights[0].shape
    K, N = (N, K) if transpose else (K, N)
    block = pl.program_id(2) * _ABREAST + pl.program_id(0)
    expert, row, count, steps = (ref[block] for ref in blocks)
    block_span = _Span(row, tm, jnp.arange(tm) < count)
    column_span = _Span.tile(pl.program_id(1), tn, N)

    def add_tile(x, w, i, sum_MN):
        k_span = _Span.tile(i, tk, K)
        w_span = (column_span, k_span) if transpose else (k_span, column_span)
        x_tile, w_tile = _load(x, block_span, k_span), _load(w, *w_span, expert)
        return sum_MN + _dot(x_tile, w_tile, (1, int(transpose)))

    y = jnp.zeros((tm, tn), jnp.float32)
    for pair in zip(rows, weights, strict=True):
        y = jax.lax.fori_loop(0, steps, functools.partial(add_tile, *pair), y)
    ref, mask = _at(result, block_span, column_span)
    plgpu.store(ref, y.astype(ref.dtype), mask=mask)


def _gradient_kernel(groups, x, gradient, result, *, tiles):
    """A tile of an expert's gradient: its rows of x, transposed, times its rows of `gradient`."""
    tm, tk, tn = tiles
    expert = pl.program_id(2)
    start, size, steps = (ref[expert] for ref in groups)
    k_span = _Span.tile(pl.program_id(1), tk, x.shape[1])
    column_span = _Span.tile(pl.program_id(0), tn, gradient.shape[1])

    def add_rows(i, sum_KN):
        row_span = _Span(start + i * tm, tm, i * tm + jnp.arange(tm) < size)
        x_tile, gradient_tile = _load(x, row_span, k_span), _load(gradient, row_span, column_span)
        return sum_KN + _dot(x_tile, gradient_tile, (0, 0))

    dw = jax.lax.fori_loop(0, steps, add_rows, jnp.zeros((tk, tn), jnp.float32))
    ref, mask = _at(result, k_span, column_span, expert)
    plgpu.store(ref, dw, mask=mask)


def triton(interpret: bool = False) -> Kernel:
    """One kernel for the value and the gradient of the rows, another for the matrices' gradient."""

    def multiply(rows, weights, group_sizes_E, *, transpose):
        (M, K), (E, *DF) = rows[0].shape, weights[0].shape
        N = DF[0 if transpose else 1]
        dtype = rows[0].dtype
        tiles = _block_rows(M, E), _CONTRACTED_BYTES // dtype.itemsize, _width(N, _COLUMNS)
        expert_P, row_P, count_P = _blocks(M, tiles[0], group_sizes_E)
        # Rows beyond the sum stay zero. This is not in the kernel because Pallas lowers a select
        # between two literal numbers to one between booleans (jax 0.10.2, 0.12.0.1).
        live_P = (expert_P < E) & (count_P > 0)
        located = [stacks.all_experts(w) for w in weights]
        matrices, (first, *_) = zip(*located, strict=True)
        steps_P = jnp.where(live_P, jnp.int32(pl.cdiv(K, tiles[1])), 0)
        return pl.pallas_call(
            functools.partial(_multiply_kernel, tiles=tiles, transpose=transpose),
            out_shape=jax.ShapeDtypeStruct((M, N), dtype),
            grid=(_ABREAST, pl.cdiv(N, tiles[2]), expert_P.size // _ABREAST),
            compiler_params=_compiler_params(),
            interpret=interpret,
            name="grouped_input_gradient" if transpose else "grouped_product",
        )((first + expert_P, row_P, count_P, steps_P), rows, matrices)

    def product(x_MD, weights, group_sizes_E):
        return tuple(multiply((x_MD,), (w,), group_sizes_E, transpose=False) for w in weights)

    def input_gradient(gradients, weights, group_sizes_E):
        return multiply(gradients, weights, group_sizes_E, transpose=True)

    def weight_gradient(x_MD, gradients, group_sizes_E):
        D, F, E = x_MD.shape[1], gradients[0].shape[1], group_sizes_E.shape[0]
        contracted = _CONTRACTED_BYTES // x_MD.dtype.itemsize
        tiles = contracted, _width(D, _ROWS), _width(F, _COLUMNS)
        sizes_E = group_sizes_E.astype(jnp.int32)
        groups = jnp.cumsum(sizes_E) - sizes_E, sizes_E, -(-sizes_E // contracted)
        gradient = pl.pallas_call(
            functools.partial(_gradient_kernel, tiles=tiles),
            out_shape=jax.ShapeDtypeStruct((E, D, F), jnp.float32),
            grid=(pl.cdiv(F, tiles[2]), pl.cdiv(D, tiles[1]), E),
            compiler_params=_compiler_params(),
            interpret=interpret,
            name="grouped_weight_gradient",
        )
        return tuple(gradient(groups, x_MD, g_MF) for g_MF in gradients)

    return Kernel(product, input_gradient, weight_gradient)


TRITON = triton()
