"""The grouped matmul on a CPU with numpy's BLAS: a group is one product, whatever its size.

XLA:CPU must know sizes at compile time, so groups have to be padded or split into blocks, and it
computes the small products of fine-grained experts on a single core. Here there is a thread per
core; each takes products of one expert at a time, and reads and writes the program's own arrays.
`python scripts/benchmark.py grouped_matmul` shows the gain; its bound is XLA with equal groups.

From the first large call on, all of numpy's products in the process use one thread each.
"""

import collections
import concurrent.futures
import contextlib
import functools
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import threadpoolctl

from moe_jax.ops import host_call
from moe_jax.ops.grouped_kernel import Kernel

_TASK_ROWS = 512  # the most rows of a task, so that all cores can share the rows of one expert
_ALONE = 1e7  # multiplications that take one core 0.2 ms, about as long as waking other threads


def _product(inputs, outputs):
    x_MD, *weights, sizes_E = inputs

    def of_rows(expert, rows):
        for w_EDF, y_MF in zip(weights, outputs, strict=True):
            np.matmul(x_MD[rows], w_EDF[expert], out=y_MF[rows])

    _for_all_rows(of_rows, sizes_E, weights, outputs)


def _input_gradient(inputs, outputs):
    *gradients_and_weights, sizes_E = inputs
    number = len(gradients_and_weights) // 2
    gradients, weights = gradients_and_weights[:number], gradients_and_weights[number:]
    (dx_MD,) = outputs

    def of_rows(expert, rows):
        np.matmul(gradients[0][rows], weights[0][expert].T, out=dx_MD[rows])
        for g_MF, w_EDF in zip(gradients[1:], weights[1:], strict=True):
            dx_MD[rows] += g_MF[rows] @ w_EDF[expert].T

    _for_all_rows(of_rows, sizes_E, weights, outputs)


def _weight_gradient(inputs, outputs):
    x_MD, *gradients, sizes_E = inputs
    ends_E = np.cumsum(sizes_E)

    def of_expert(expert, g_MF, dw_EDF):
        rows = slice(ends_E[expert] - sizes_E[expert], ends_E[expert])
        np.matmul(x_MD[rows].T, g_MF[rows], out=dw_EDF[expert])

    pairs = list(zip(gradients, outputs, strict=True))
    tasks = [(expert, *pair) for expert in np.argsort(-sizes_E) for pair in pairs]
    _run(of_expert, tasks, ends_E[-1] * _multiplications(outputs))


def _for_all_rows(of_rows, sizes_E, weights, outputs):
    """Calls of_rows(expert, slice of its rows) for all groups; rows beyond the groups get zeros."""
    tasks, end = [], 0
    for expert, size in enumerate(sizes_E.tolist()):
        start, end = end, end + size
        cuts = range(start, end, _TASK_ROWS)
        tasks += [(expert, slice(cut, min(cut + _TASK_ROWS, end))) for cut in cuts]
    tasks.sort(key=lambda task: task[1].start - task[1].stop)
    _run(of_rows, tasks, end * _multiplications(weights))
    for y in outputs:
        y[end:] = 0


def _multiplications(weights) -> int:
    """The number of multiplications per row, with one matrix from each of `weights`."""
    return sum(math.prod(w.shape[1:]) for w in weights)


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
    ys = _call("product", shapes, weights, x_MD, *weights, group_sizes_E)
    return tuple(y.astype(x_MD.dtype) for y in ys)


def input_gradient(gradients, weights, group_sizes_E):
    shape = len(gradients[0]), weights[0].shape[1]
    arrays = *gradients, *weights, group_sizes_E
    (dx_MD,) = _call("input_gradient", [shape], weights, *arrays)
    return dx_MD.astype(gradients[0].dtype)


def weight_gradient(x_MD, gradients, group_sizes_E):
    E, D = len(group_sizes_E), x_MD.shape[1]
    dw = [jax.ShapeDtypeStruct((E, D, g.shape[1]), x_MD.dtype) for g in gradients]
    shapes = [d.shape for d in dw]
    return tuple(_call("weight_gradient", shapes, dw, x_MD, *gradients, group_sizes_E))


def _call(name, shapes, matrices, *arrays):
    """Calls the numpy function at least in float32; a row is multiplied by one matrix from each of
    `matrices`."""
    *floats, group_sizes_E = arrays
    dtype = jnp.promote_types(floats[0].dtype, jnp.float32)
    return host_call.call(
        f"moe_jax_grouped_{name}",
        [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes],
        *(x.astype(dtype) for x in floats),
        group_sizes_E,
        flops=2 * len(floats[0]) * _multiplications(matrices),
    )


HOST = Kernel(product, input_gradient, weight_gradient)
