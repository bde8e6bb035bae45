"""The grouped matmul on TPUs: jax's megablox kernels, and XLA's ragged_dot.

Both were compiled ahead of time for v5e, v5p, v6e and v7x and run in interpret mode, but neither
was timed on a TPU.
"""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

from moe_jax.ops import stacks
from moe_jax.ops.grouped_kernel import Kernel

# The VMEM of a kernel that does not request more, found by compiling: 16 MiB on v4, v5e and v5p. A
# sixth is left for what megablox holds besides its tiles: masks and float32 copies, which take up
# to 0.16 of the tiles' size.
_VMEM = 16 * 2**20
_LARGER_VMEM = {"TPU v6 lite": 32 * 2**20, "TPU7x": 32 * 2**20}

# The assumed overhead of a grid step, in bytes of HBM traffic: a few tenths of a microsecond.
# Without it, a tiling with many more, smaller steps would win for a little less traffic.
_STEP_BYTES = 2**19


def visited_rows(M: int, E: int, tm: int) -> int:
    """An upper bound on the rows that megablox multiplies.

    It processes whole tiles of tm rows; a tile with rows of several experts is processed once for
    each of them.
    """
    return (-(-M // tm) + E - 1) * tm


def tiling(
    M: int, K: int, N: int, E: int, itemsize: int, vmem: int = _VMEM
) -> tuple[int, int, int]:
    """(tm, tk, tn) for rows [M, K] times [E, K, N]: the one with the least HBM traffic that fits.

    If K is one tile, a matrix is read once for all row tiles of its expert. Otherwise it is read
    once per row tile, and only a large tm prevents the product from waiting for it.
    """

    def held(tm, tk, tn):  # bytes: double-buffered operand and result tiles, and an accumulator
        return 2 * itemsize * (tm * tk + tk * tn + tm * tn) + 4 * tm * tn

    def moved(tm, tk, tn):
        visits, steps_k, steps_n = visited_rows(M, E, tm) // tm, -(-K // tk), -(-N // tn)
        rows = visits * tm * tk
        matrices = (E if steps_k == 1 else visits) * tk * tn
        steps = visits * steps_k * steps_n
        return itemsize * steps_k * steps_n * (rows + matrices) + steps * _STEP_BYTES

    return _least(moved, held, M, K, N, E, vmem)


def gradient_tiling(
    M: int, K: int, N: int, E: int, itemsize: int, vmem: int = _VMEM
) -> tuple[int, int, int]:
    """(tm, tk, tn) for the E products [K, rows] times [rows, N] in float32, like `tiling`."""

    def held(tm, tk, tn):
        return 2 * itemsize * tm * (tk + tn) + 12 * tk * tn

    def moved(tm, tk, tn):
        visits, steps_k, steps_n = visited_rows(M, E, tm) // tm, -(-K // tk), -(-N // tn)
        steps = visits * steps_k * steps_n
        return steps * (itemsize * tm * (tk + tn) + _STEP_BYTES)

    return _least(moved, held, M, K, N, E, vmem)


def _least(moved: Callable, held: Callable, M, K, N, E, vmem) -> tuple[int, int, int]:
    tilings = itertools.product(_row_tiles(M, E), _widths(K), _widths(N))
    return min((t for t in tilings if held(*t) <= vmem * 5 // 6), key=lambda t: moved(*t))


def _row_tiles(M: int, E: int) -> list[int]:
    """512 and 256 rows, if the tiles visited twice add at most 1/16 to the products; else 128.

    A smaller tile is no faster: a 128 x 128 matrix unit takes as long to load 128 rows of a matrix
    as to multiply 128 rows by them. Small groups therefore cost more: 1.25 times the necessary
    products for 64 experts with 512 rows each. (The units of v6e and v7x are 256 x 256; the best
    sizes there have not been measured.)
    """
    tiles = [tm for tm in (512, 256) if tm <= M and 16 * (E - 1) * tm <= M]
    return tiles or [min(128, _round_up(M, 16))]  # a native bfloat16 tile has 16 rows


def _widths(size: int) -> list[int]:
    """Candidate tile widths: the whole size, or multiples of 128 that pad it by at most 1/16."""
    parts = range(2, size // 128 + 1)
    widths = (_round_up(-(-size // n), 128) for n in parts)
    fitting = {width for width in widths if 16 * -(-size // width) * width <= 17 * size}
    return [size, *sorted(fitting - {size}, reverse=True)]


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _vmem() -> int:
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    kind = jax.devices()[0].device_kind if device is None else device.device_kind
    return _LARGER_VMEM.get(kind, _VMEM)


def _only_grouped(rows: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """Sets rows beyond the sum of the groups to zero, whatever they hold."""
    return jnp.where((jnp.arange(rows.shape[0]) < jnp.sum(group_sizes_E))[:, None], rows, 0)


def _kernel(multiply: Callable, weight_gradient: Callable) -> Kernel:
    """Builds a `Kernel` from the product with one stack of matrices or with its transpose."""

    def product(x_MD, weights, group_sizes_E):
        return tuple(multiply(x_MD, w, group_sizes_E, transpose=False) for w in weights)

    def input_gradient(gradients, weights, group_sizes_E):
        pairs = zip(gradients, weights, strict=True)
        return functools.reduce(
            jnp.add, (multiply(grad_MF, w, group_sizes_E, transpose=True) for grad_MF, w in pairs)
        )

    return Kernel(product, input_gradient, weight_gradient)


def megablox(interpret: bool = False) -> Kernel:
    """`gmm` and `tgmm`, which multiply only the tiles that contain rows (`visited_rows`)."""

    def padded(rows, tm):
        return jnp.pad(rows, ((0, -rows.shape[0] % tm), (0, 0)))

    def multiply(rows, w, group_sizes_E, *, transpose):
        M, K = rows.shape
        E, N = w.shape[0], w.shape[1 if transpose else 2]
        tiles = tiling(M, K, N, E, rows.dtype.itemsize, _vmem())
        matrices, first = stacks.all_experts(w)
        sizes = jnp.zeros(len(matrices), jnp.int32)  # the experts of other layers have no rows
        sizes = jax.lax.dynamic_update_slice(sizes, group_sizes_E.astype(jnp.int32), (first,))
        y = gmm(
            padded(rows, tiles[0]),
            matrices,
            sizes,
            preferred_element_type=rows.dtype,
            tiling=tiles,
            transpose_rhs=transpose,
            interpret=interpret,
        )[:M]
        return _only_grouped(y, group_sizes_E)  # other rows of y are uninitialised memory

    def weight_gradient(x_MD, gradients, group_sizes_E):
        def one(grad_MF):
            (M, D), F, E = x_MD.shape, grad_MF.shape[1], group_sizes_E.shape[0]
            tiles = gradient_tiling(M, D, F, E, x_MD.dtype.itemsize, _vmem())
            return tgmm(
                padded(x_MD, tiles[0]).T,
                padded(grad_MF, tiles[0]),
                group_sizes_E.astype(jnp.int32),
                preferred_element_type=jnp.float32,
                tiling=tiles,
                interpret=interpret,
            )

        return tuple(map(one, gradients))

    return _kernel(multiply, weight_gradient)


MEGABLOX = megablox()


def ragged_dot_unavailable(platform: str) -> str:
    # On v5p, with jax 0.10.2 and the libtpu that it pins, it executed 8.01 times the necessary
    # products with 8 experts and 64.05 times with 64 experts; with jax 0.12.0.1, 1.00 times.
    reason = "multiplies by every expert for the gradient of the matrices on jax "
    return reason + jax.__version__ if jax.__version_info__ < (0, 12) else ""


def _ragged_dot(left, right, group_sizes_E, contract: tuple[int, int], dtype):
    """`right` is one matrix per group, or rows that are contracted with the rows of `left`."""
    dimensions = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((contract[0],), (contract[1],)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0] if right.ndim == 3 else [],
    )
    return jax.lax.ragged_dot_general(
        left, right, group_sizes_E, dimensions, preferred_element_type=dtype
    )


def _ragged_multiply(rows, w, group_sizes_E, *, transpose: bool):
    y = _ragged_dot(rows, w, group_sizes_E, (1, 2 if transpose else 1), rows.dtype)
    return _only_grouped(y, group_sizes_E)


def _ragged_weight_gradient(x_MD, gradients, group_sizes_E):
    # XLA's documentation does not state that rows beyond the sum are ignored.
    x_MD = _only_grouped(x_MD, group_sizes_E)
    gradients = (_only_grouped(grad_MF, group_sizes_E) for grad_MF in gradients)
    return tuple(
        _ragged_dot(x_MD, grad_MF, group_sizes_E, (0, 0), jnp.float32) for grad_MF in gradients
    )


RAGGED_DOT = _kernel(_ragged_multiply, _ragged_weight_gradient)
