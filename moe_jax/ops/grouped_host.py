"""The grouped matmul on a CPU with numpy's BLAS: a group is one product, whatever its size.

XLA:CPU must know sizes at compile time, so groups have to be padded or split into blocks, and it
computes the small products of fine-grained experts on a single core. Here there is a thread per
core; each takes products of one expert at a time, and reads and writes the program's own arrays.
Matrices are read in the stack of all layers, and an expert without rows is not read at all.
`python scripts/benchmark.py grouped_matmul` shows the gain; its bound is XLA with equal groups.

From the first large call on, all of numpy's products in the process use one thread each.
"""

import collections
import concurrent.futures
import contextlib
import functools
import math
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import threadpoolctl

from moe_jax.ops import host_call, stacks
from moe_jax.ops.grouped_kernel import Kernel

_TASK_ROWS = 512  # the most rows of a task, so that all cores can share the rows of one expert
_ALONE = 1e7  # multiplications that take one core 0.2 ms, about as long as waking other threads
_READING = 14  # the rows whose multiplications take as long as reading the matrix from memory


def _product(inputs, outputs):
    x_MD, *stacks_LEDF, layer, sizes_E = inputs
    weights = [w_LEDF[int(layer)] for w_LEDF in stacks_LEDF]
    multiply(x_MD, lambda i, expert: weights[i][expert], sizes_E, outputs)


def multiply(x_MD, matrix: Callable[[int, int], np.ndarray], sizes_E, outputs) -> None:
    """Fills each output [M, F] with the products by matrix(output's index, expert) [D, F]."""
    tasks = _tasks(sizes_E)
    # A few rows of one expert, as in decoding, are divided by columns.
    parts = -(-_num_cores() // len(tasks)) if tasks else 1

    def of_rows(expert, rows, part):
        for i, y_MF in enumerate(outputs):
            width = -(-y_MF.shape[1] // parts)
            columns = slice(part * width, (part + 1) * width)
            w_DF = _wide(matrix(i, expert)[:, columns])
            np.matmul(x_MD[rows], w_DF, out=y_MF[rows, columns])

    per_row = x_MD.shape[1] * sum(y_MF.shape[1] for y_MF in outputs)
    divided = [(*task, part) for task in tasks for part in range(parts)]
    _run(of_rows, divided, _work(tasks, per_row))
    _clear_rest(sizes_E, outputs)


def _input_gradient(inputs, outputs):
    *gradients_and_stacks, layer, sizes_E = inputs
    number = len(gradients_and_stacks) // 2
    gradients, stacks_LEDF = gradients_and_stacks[:number], gradients_and_stacks[number:]
    weights = [w_LEDF[int(layer)] for w_LEDF in stacks_LEDF]
    (dx_MD,) = outputs

    def of_rows(expert, rows):
        np.matmul(gradients[0][rows], _wide(weights[0][expert]).T, out=dx_MD[rows])
        for g_MF, w_EDF in zip(gradients[1:], weights[1:], strict=True):
            dx_MD[rows] += g_MF[rows] @ _wide(w_EDF[expert]).T

    tasks = _tasks(sizes_E)
    _run(of_rows, tasks, _work(tasks, _multiplications(weights)))
    _clear_rest(sizes_E, outputs)


def _weight_gradient(inputs, outputs):
    x_MD, *gradients, sizes_E = inputs
    ends_E = np.cumsum(sizes_E)

    def of_expert(expert, g_MF, dw_EDF):
        rows = slice(ends_E[expert] - sizes_E[expert], ends_E[expert])
        np.matmul(x_MD[rows].T, g_MF[rows], out=dw_EDF[expert])

    pairs = list(zip(gradients, outputs, strict=True))
    tasks = [(expert, *pair) for expert in np.argsort(-sizes_E) for pair in pairs]
    _run(of_expert, tasks, ends_E[-1] * _multiplications(outputs))


def _wide(w: np.ndarray) -> np.ndarray:
    """The matrix at least in float32."""
    if w.dtype == jnp.bfloat16:  # its bits are the upper half of a float32's
        return (w.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return w.astype(np.promote_types(w.dtype, np.float32), copy=False)


def _tasks(sizes_E) -> list[tuple[int, slice]]:
    """(expert, some of its rows) for all rows of all groups, the largest first."""
    tasks, end = [], 0
    for expert, size in enumerate(sizes_E.tolist()):
        start, end = end, end + size
        cuts = range(start, end, _TASK_ROWS)
        tasks += [(expert, slice(cut, min(cut + _TASK_ROWS, end))) for cut in cuts]
    return sorted(tasks, key=lambda task: task[1].start - task[1].stop)


def _work(tasks, multiplications_per_row: int) -> int:
    """The time of the tasks, in multiplications; reading a matrix has its time too."""
    rows = sum(max(rows.stop - rows.start, _READING) for _, rows in tasks)
    return rows * multiplications_per_row


def _clear_rest(sizes_E, outputs):
    end = int(sizes_E.sum())
    for y in outputs:
        y[end:] = 0


def _multiplications(weights) -> int:
    """The number of multiplications per row, with one matrix from each of `weights`."""
    return sum(math.prod(w.shape[-2:]) for w in weights)


def _run(function, tasks, multiplications):
    """Calls function(*task) for all tasks, in order, in this thread and one per additional core."""
    left = collections.deque(tasks)

    def until_none_is_left():
        while True:
            try:
                task = left.popleft()
            except IndexError:
                return
            function(*task)

    helpers = min(_num_cores(), len(tasks)) - 1 if multiplications >= _ALONE else 0
    helping = []
    with contextlib.suppress(RuntimeError):  # raised when the interpreter is shutting down
        helping += (_threads().submit(until_none_is_left) for _ in range(helpers))
    try:
        until_none_is_left()
    finally:
        for helper in helping:
            helper.cancel() or helper.result()


@functools.cache
def _threads() -> concurrent.futures.Executor:
    """Threads start during a call and inherit its floating-point mode: XLA flushes denormals."""
    threadpoolctl.threadpool_limits(1, user_api="blas")  # one thread per product
    return concurrent.futures.ThreadPoolExecutor(_num_cores(), "grouped_matmul")


def _num_cores() -> int:
    """The number of cores of this process; a scheduler may not have given it all."""
    has_affinity = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


for _function in (_product, _input_gradient, _weight_gradient):
    host_call.register(f"moe_jax_grouped{_function.__name__}", _function)


def product(x_MD, weights, group_sizes_E):
    shapes = [(len(x_MD), w.shape[2]) for w in weights]
    arrays = *_wide_rows(x_MD), *_located(weights), group_sizes_E
    return _call("product", x_MD.dtype, shapes, _multiplications(weights), arrays)


def input_gradient(gradients, weights, group_sizes_E):
    shape = len(gradients[0]), weights[0].shape[1]
    arrays = *_wide_rows(*gradients), *_located(weights), group_sizes_E
    dtype, per_row = gradients[0].dtype, _multiplications(weights)
    return _call("input_gradient", dtype, [shape], per_row, arrays)[0]


def weight_gradient(x_MD, gradients, group_sizes_E):
    E, D = len(group_sizes_E), x_MD.shape[1]
    shapes = [(E, D, g.shape[1]) for g in gradients]
    arrays = *_wide_rows(x_MD, *gradients), group_sizes_E
    per_row = sum(D * g.shape[1] for g in gradients)
    return _call("weight_gradient", arrays[0].dtype, shapes, per_row, arrays)


def _wide_rows(*rows):
    """The rows at least in float32, because numpy has no products of narrower numbers."""
    return [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in rows]


def _located(weights):
    """The stacks of layers [L, E, D, F], and the layer in them."""
    if stacks.is_row(weights[0]):
        return *(w.stack for w in weights), weights[0].index.astype(jnp.int32)
    return *(w[None] for w in _wide_rows(*weights)), jnp.int32(0)


def _call(name, dtype, shapes, multiplications_per_row, arrays):
    """Calls the numpy function, and returns arrays of `dtype`."""
    ys = host_call.call(
        f"moe_jax_grouped_{name}",
        [jax.ShapeDtypeStruct(shape, arrays[0].dtype) for shape in shapes],
        *arrays,
        flops=2 * len(arrays[0]) * multiplications_per_row,
    )
    return tuple(y.astype(dtype) for y in ys)


HOST = Kernel(product, input_gradient, weight_gradient)
