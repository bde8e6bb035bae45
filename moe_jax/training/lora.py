"""Low-rank pairs beside a model's matrices (LoRA: Hu et al., arXiv 2106.09685).

The pair of a matrix `gate` are its neighbours `gate_lora_a` and `gate_lora_b`; an expert has its
own. The model adds (x A) B to x W (`model.layers.add_low_rank`). This file adds pairs to
parameters, scales them for the model by alpha / rank, and merges them into their matrices.
"""

import functools
import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax import tree
from moe_jax.config import sections
from moe_jax.model.layers import LOW_RANK, low_rank_pair
from moe_jax.parallel import sharding
from moe_jax.training import optimizer

# A matrix's name -> the numbers of its input and of its output axes, which are its last axes.
AXES = {
    **dict.fromkeys(("wq", "wk", "wv"), (1, 2)),
    "wo": (2, 1),
    **dict.fromkeys(("gate", "up", "down"), (1, 1)),
}


def added(params: dict, lora: sections.Lora, key: jax.Array) -> dict:
    """The parameters and a pair for each matrix whose path matches the targets.

    A is Gaussian, with a variance of 1 / (number of inputs), and B is zero, so the model computes
    what it did before.

    Raises: ValueError if the targets match no matrix.
    """
    if not lora.rank:
        return params
    leaves = tree.flatten(params)
    matrices = [name for name in leaves if name.rpartition("/")[2] in AXES]
    optimizer.check_pattern("lora.targets", lora.targets, matrices)
    pairs = {}
    for name in (name for name in matrices if re.search(lora.targets, name)):
        stack, inputs, outputs = _axes(name, leaves[name].shape)
        a, b = low_rank_pair(name)
        shape, scale = (*stack, *inputs, lora.rank), math.prod(inputs) ** -0.5
        pairs[a] = scale * jax.random.normal(tree.fold_in(key, a), shape)
        pairs[b] = jnp.zeros((*stack, lora.rank, *outputs))
    return tree.unflatten({**leaves, **pairs})


def scaled(params: dict, lora: sections.Lora) -> dict:
    """The parameters as the model reads them: every B times alpha / rank."""
    if not lora.rank:
        return params
    return tree.map_with_name(
        lambda name, x: x * (lora.alpha / lora.rank) if name.endswith(LOW_RANK[1]) else x, params
    )


def merged(params: dict, lora: sections.Lora) -> dict:
    """Every matrix plus alpha / rank · A B, in the matrix's dtype, without the pairs."""
    leaves = tree.flatten(scaled(params, lora))
    matrices = {n: w for n, w in leaves.items() if not n.endswith(LOW_RANK)}
    for name, w in matrices.items():
        if (names := low_rank_pair(name))[0] in leaves:
            stack, inputs, outputs = _axes(name, w.shape)
            rows, columns = (*stack, math.prod(inputs), -1), (*stack, -1, math.prod(outputs))
            a, b = (leaves[n].astype(jnp.float32) for n in names)
            product = jnp.matmul(a.reshape(rows), b.reshape(columns), precision="highest")
            matrices[name] = (w.astype(jnp.float32) + product.reshape(w.shape)).astype(w.dtype)
    return tree.unflatten(matrices)


def merging(lora: sections.Lora, mesh: jax.sharding.Mesh) -> Callable[[dict], dict]:
    """`merged`, compiled, for parameters on a mesh; their own tree if there are no pairs."""
    if not lora.rank:
        return lambda params: params
    merge = functools.partial(merged, lora=lora)

    def on_mesh(params: dict) -> dict:
        with jax.set_mesh(mesh):
            shardings = sharding.shardings(jax.eval_shape(merge, params), mesh)
            return jax.jit(merge, out_shardings=shardings)(params)

    return on_mesh


def _axes(name: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """The shape of a matrix as those of its stack, its inputs and its outputs."""
    inputs, outputs = AXES[name.rpartition("/")[2]]
    first = len(shape) - inputs - outputs
    return shape[:first], shape[first : first + inputs], shape[first + inputs :]
