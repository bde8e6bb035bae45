"""The sharding of every array along the axes of the mesh: one table of path rules."""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax import tree

# These shard the batch, and everything computed per token: along `expert`, attention is
# data-parallel and experts are expert-parallel.
BATCH_AXES = ("data", "fsdp", "expert")
BATCH = P(BATCH_AXES)
TENSOR = ("tensor", "edp")  # these shard the work on a token
EXPERT = ("edp", "expert")  # these shard the experts

# The first rule that matches decides. Paths in the optimizer state end in the path of their
# parameter. Block leaves have a leading axis of layers.
RULES = (
    (r"(^|/)(step|count|coefficients_L|history/\w+)$", P()),
    (r"(^|_|/)norm/(scale|bias)$", P()),
    (r"embed/tokens$", P(TENSOR, "fsdp")),
    (r"embed/positions$", P(None, "fsdp")),
    (r"(^|/)unembed$", P("fsdp", TENSOR)),
    (r"attention/experts/w[qkv]$", P(None, None, "fsdp", TENSOR)),
    (r"attention/experts/wo$", P(None, None, TENSOR, None, "fsdp")),
    (r"attention/w[qkv]$", P(None, "fsdp", TENSOR)),
    (r"attention/wo$", P(None, TENSOR, None, "fsdp")),
    (r"attention/b[qkv]$", P(None, TENSOR)),
    (r"attention/(bo|experts/b[qkvo])$", P()),
    (r"(mlp|shared)/(gate|up)$", P(None, "fsdp", TENSOR)),
    (r"(mlp|shared)/down$", P(None, TENSOR, "fsdp")),
    (r"(mlp|shared)/(gate|up)_bias$", P(None, TENSOR)),
    (r"(mlp|shared)/down_bias$", P()),
    # The pair of a matrix: A has its input axes and B its output axes; the rank is not sharded.
    (r"attention/experts/w[qkv]_lora_a$", P(None, None, "fsdp")),
    (r"attention/experts/w[qkv]_lora_b$", P(None, None, None, TENSOR)),
    (r"attention/experts/wo_lora_a$", P(None, None, TENSOR)),
    (r"attention/experts/wo_lora_b$", P(None, None, None, "fsdp")),
    (r"(attention/w[qkv]|(mlp|shared)/(gate|up))_lora_a$", P(None, "fsdp")),
    (r"(attention/w[qkv]|(mlp|shared)/(gate|up))_lora_b$", P(None, None, TENSOR)),
    (r"(attention/wo|(mlp|shared)/down)_lora_a$", P(None, TENSOR)),
    (r"(attention/wo|(mlp|shared)/down)_lora_b$", P(None, None, "fsdp")),
    (r"experts/(gate|up)_lora_a$", P(None, EXPERT, "fsdp")),
    (r"experts/(gate|up)_lora_b$", P(None, EXPERT, None, "tensor")),
    (r"experts/down_lora_a$", P(None, EXPERT, "tensor")),
    (r"experts/down_lora_b$", P(None, EXPERT, None, "fsdp")),
    (r"router/\w+$", P()),
    (r"experts/(gate|up)$", P(None, EXPERT, "fsdp", "tensor")),
    (r"experts/down$", P(None, EXPERT, "tensor", "fsdp")),
    (r"experts/(gate|up)_bias$", P(None, EXPERT, "tensor")),
    (r"experts/down_bias$", P(None, EXPERT)),
)


def spec_of(path: str) -> P:
    """The PartitionSpec for the path of a leaf; raises ValueError if no rule matches."""
    for pattern, spec in RULES:
        if re.search(pattern, path):
            return spec
    raise ValueError(f"no sharding rule matches {path}; add one to parallel/sharding.py")


def names_of(entry) -> tuple[str, ...]:
    """The mesh axes in one entry of a PartitionSpec."""
    return entry if isinstance(entry, tuple) else (entry,) if entry else ()


def specs(leaves) -> Any:
    """The tree of PartitionSpecs for a tree of parameters, optimizer state, or both."""
    return tree.map_with_name(lambda name, _: spec_of(name), leaves)


def shardings(leaves, mesh: jax.sharding.Mesh) -> object:
    """The tree of NamedShardings for arrays or their shapes.

    Raises: ValueError, naming the leaf, if one of its axes is not divisible by the mesh's.
    """

    def check(name, leaf):
        spec = spec_of(name)
        for size, entry in zip(leaf.shape, spec, strict=False):
            check_divisible(f"{name}: its axis of size {size}", size, mesh, names_of(entry))
        return NamedSharding(mesh, spec)

    return tree.map_with_name(check, leaves)


def check_divisible(what: str, size: int, mesh, axes: tuple[str, ...]) -> None:
    """Raises: ValueError unless the product of these mesh axes divides `size`."""
    axes = tuple(axis for axis in axes if mesh.shape[axis] > 1)
    if size % (parts := math.prod(mesh.shape[axis] for axis in axes)):
        keys = " x ".join(f"config.mesh.{axis}" for axis in axes)
        raise ValueError(
            f"{what} is not divisible by the mesh's {' x '.join(axes)} axis ({parts}); "
            f"set {keys} to a divisor of {size}"
        )


def abstract(leaves, mesh: jax.sharding.Mesh) -> Any:
    """Shapes and dtypes with the rules' shardings, as the target for restoring a checkpoint."""
    return jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
        leaves,
        shardings(leaves, mesh),
    )


def layer_specs(params: dict, prefix: str) -> object:
    """The specs of one layer's parameters (without the axis of layers) below the path `prefix`."""
    return jax.tree.map(lambda spec: P(*spec[1:]), specs({prefix: params})[prefix])


def all_gather(x: jax.Array, spec: P, *, keep: tuple[str, ...] = ()) -> jax.Array:
    """Inside shard_map: all-gathers an array sharded by `spec`, except along the axes in `keep`."""
    for axis, entry in enumerate(spec):
        if names := tuple(name for name in names_of(entry) if name not in keep):
            x = jax.lax.all_gather(x, names, axis=axis, tiled=True)
    return x


def own_part(x: jax.Array, spec: P) -> jax.Array:
    """Inside shard_map: this device's shard, by `spec`, of an array replicated on all devices."""
    for axis, entry in enumerate(spec):
        if names := names_of(entry):
            size = x.shape[axis] // jax.lax.axis_size(names)
            start = jax.lax.axis_index(names) * size
            x = jax.lax.dynamic_slice_in_dim(x, start, size, axis)
    return x


def constrain_batch(x: jax.Array) -> jax.Array:
    """Constrains an activation to be sharded only along the batch; does nothing without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, BATCH)


def batch_shards(sizes: Mapping[str, int]) -> int:
    """The number of shards of the batch on a mesh with these sizes, `mesh.shape`."""
    return math.prod(sizes[axis] for axis in BATCH_AXES)
