"""The grouped matmul at the heart of an MoE: each group of rows times its own expert's matrix.

An implementation is three functions (`Kernel`) under one custom VJP: the value, the gradient of the
rows and the gradient of the matrices, which is never left to the transpose of the value. Plain XLA
(`grouped_blocked`) has its own custom VJP, which computes both gradients in one loop.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from moe_jax.ops import (
    grouped_blocked,
    grouped_gpu,
    grouped_host,
    grouped_tpu,
    host_memory,
    offloaded,
    stacks,
)
from moe_jax.ops.grouped_kernel import Kernel
from moe_jax.ops.implementations import Implementation, choose, platform


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grouped(Implementation):
    # It reads rows of stacks where they lie, for these dtypes of (rows of x, matrices).
    in_place: tuple[tuple[str, str], ...] = ()


def grouped_matmul(
    x_MD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array, *, implementation: str = "auto"
) -> jax.Array:
    """Multiplies row i of x by the matrix of the expert whose group contains i.

    Args:
      x_MD: rows sorted by expert.
      w_EDF: one matrix per expert.
      group_sizes_E: int32; they sum to at most M, and rows beyond the sum give zeros.
      implementation: a key of IMPLEMENTATIONS, or "auto", the first of them that can run.

    Returns: [M, F] in x's dtype.
    Raises: ValueError if `implementation` cannot run on this backend.
    """
    return grouped_matmuls(x_MD, (w_EDF,), group_sizes_E, implementation=implementation)[0]


def grouped_matmuls(
    x_MD: jax.Array,
    weights: tuple[jax.Array | stacks.OfStack | offloaded.Offloaded | host_memory.HostExperts, ...],
    group_sizes_E: jax.Array,
    *,
    implementation: str = "auto",
) -> tuple[jax.Array, ...]:
    """`grouped_matmul` of the same rows with each of `weights`, [E, D, F], such as gate and up.

    Weights that are rows of stacks are read where they lie, if the implementation can; those that
    are not in memory are fetched.
    """
    if elsewhere := tuple(w for w in weights if isinstance(w, offloaded.Offloaded)):
        return offloaded.products(x_MD, elsewhere, group_sizes_E)
    if in_host := tuple(w for w in weights if isinstance(w, host_memory.HostExperts)):
        weights, group_sizes_E = host_memory.sent(in_host, group_sizes_E, len(x_MD))
    chosen = choose("grouped_matmul", implementation, IMPLEMENTATIONS)
    if not _in_place(chosen, x_MD, weights):
        weights = tuple(w.astype(x_MD.dtype) for w in stacks.values(weights))
    return chosen.function(x_MD, weights, group_sizes_E)


def reads_in_place(x: jax.Array, weights: tuple[jax.Array | stacks.OfStack, ...]) -> bool:
    """True if this process has one device, a CPU, and `host` reads these weights in their stacks.

    On other devices XLA's own products of dense matrices do not copy them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    alone = mesh.empty or mesh.size == 1
    return alone and platform() == "cpu" and _in_place(IMPLEMENTATIONS["host"], x, weights)


def _in_place(chosen: "Grouped", x: jax.Array, weights) -> bool:
    return all(
        stacks.is_row(w) and (x.dtype.name, w.dtype.name) in chosen.in_place for w in weights
    )


def reference(x_MD, weights, group_sizes_E):
    """Multiplies every row by every expert and masks: E times the work, but obviously correct."""
    ends_E = jnp.cumsum(group_sizes_E)
    row_M = jnp.arange(x_MD.shape[0])

    def add_expert(ys, expert):
        *matrices, start, end = expert
        mine_M = (start <= row_M) & (row_M < end)
        rows_MD = jnp.where(mine_M[:, None], x_MD, 0)
        return tuple(y_MF + rows_MD @ w_DF for y_MF, w_DF in zip(ys, matrices, strict=True)), None

    ys = tuple(jnp.zeros((x_MD.shape[0], w.shape[2]), x_MD.dtype) for w in weights)
    return jax.lax.scan(add_expert, ys, (*weights, ends_E - group_sizes_E, ends_E))[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(kernel: Kernel, x_MD, weights, group_sizes_E):
    return kernel.product(x_MD, weights, group_sizes_E)


def _forward(kernel, x_MD, weights, group_sizes_E):
    y = kernel.product(x_MD, weights, group_sizes_E)
    kept = tuple(dataclasses.replace(w, value=None) if stacks.is_row(w) else w for w in weights)
    return y, (x_MD, kept, group_sizes_E)


def _backward(kernel, residuals, gradients):
    x_MD, weights, group_sizes_E = residuals
    dx_MD = kernel.input_gradient(gradients, weights, group_sizes_E)
    dw = kernel.weight_gradient(x_MD, gradients, group_sizes_E)
    dw = [d.astype(w.dtype) for d, w in zip(dw, weights, strict=True)]
    of_values = (stacks.OfStack(d, None, None) for d in dw)
    return dx_MD, tuple(of_values if stacks.is_row(weights[0]) else dw), None


_product.defvjp(_forward, _backward)

# "auto" tries them in this order. Megablox comes before ragged_dot, which copies every matrix to
# transpose it for the gradient of the rows; `host` comes before `blocked`, which takes 1.3 to 1.7
# times as long (`python scripts/benchmark.py grouped_matmul`).
IMPLEMENTATIONS = {
    "megablox": Grouped(
        *(functools.partial(_product, grouped_tpu.MEGABLOX), ("tpu",)),
        in_place=(("bfloat16", "bfloat16"), ("float32", "float32")),
    ),
    "triton": Grouped(
        *(functools.partial(_product, grouped_gpu.TRITON), ("gpu",)),
        in_place=(("bfloat16", "bfloat16"), ("float32", "float32")),
    ),
    "host": Grouped(
        *(functools.partial(_product, grouped_host.HOST), ("cpu",)),
        in_place=(
            ("float64", "float64"),
            *(("float32", stored) for stored in ("float32", "bfloat16", "float16")),
        ),
    ),
    "blocked": Grouped(grouped_blocked.products),
    "ragged_dot": Grouped(
        *(functools.partial(_product, grouped_tpu.RAGGED_DOT), ("tpu",)),
        grouped_tpu.ragged_dot_unavailable,
    ),
    "reference": Grouped(reference),
}
