"""Lowers the train step of a config from shapes alone, for any mesh.

The mesh may belong to a topology that this machine does not have: `dryrun/topologies.py`.
"""

import collections
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax import model, tree
from moe_jax.config import Run
from moe_jax.model import exchange_cost
from moe_jax.ops import attention_kernels
from moe_jax.parallel import sharding
from moe_jax.training import balance, lora, objective, optimizer, step
from moe_jax.training.state import TrainState


def abstract_state(settings: Run, mesh: jax.sharding.Mesh) -> TrainState:
    """Shapes and dtypes of a run's state, with their shardings.

    Raises: ValueError for a model that does not fit the mesh.
    """
    tx = optimizer.adamw(settings.optimizer, settings.training.num_steps)
    router_state = balance.initial(settings.model, settings.balance)

    def create(key):
        params = lora.added(model.init(settings.model, key), settings.lora, key)
        return TrainState.create(params, tx, router_state)

    shapes = jax.eval_shape(create, jax.random.key(0))
    state: Any = sharding.abstract(shapes, mesh)
    return state


def state_bytes(state: TrainState) -> int:
    """Bytes per device of a state from `abstract_state`."""
    return _bytes(state)


def _bytes(arrays: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(arrays)
    )


def bytes_due(settings: Run, state: TrainState, num_tokens: float) -> int:
    """Bytes that a step must move to and from a device's main memory: a lower bound.

    It reads the state once and writes once what it updates. In the computation's dtype, each
    microbatch reads the weights in both passes, and writes each block's input and reads it again;
    the step writes the gradients and reads them again, because their norm comes before the update.
    Everything else could stay on the chip.

    Args:
      state: from `abstract_state`.
      num_tokens: the tokens of one device.
    """
    model_config = settings.model
    itemsize = jnp.dtype(model_config.dtype).itemsize
    trained, frozen = optimizer.split(state.params, settings.optimizer.frozen)
    weights = {**state.params, "embed": {}} if "unembed" in state.params else state.params
    number = {
        name: _bytes(part) / tree.FLOAT32.itemsize
        for name, part in (("trained", trained), ("weights", weights))
    }
    inputs = num_tokens * model_config.hidden_size * model_config.num_hidden_layers
    in_computation = 2 * settings.training.accumulation_steps * number["weights"]
    in_computation += 2 * (number["trained"] + inputs)
    return int(2 * state_bytes(state) - _bytes(frozen) + itemsize * in_computation)


def lower(settings: Run, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    """The train step that `train.run` would run on this mesh, without a teacher.

    Raises: ValueError, like `abstract_state`.
    """
    state = abstract_state(settings, mesh)
    leaf = functools.partial(jax.ShapeDtypeStruct, sharding=jax.NamedSharding(mesh, sharding.BATCH))
    batch = objective.batch_shapes(settings, leaf)
    tx = optimizer.adamw(settings.optimizer, settings.training.num_steps)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    with jax.set_mesh(mesh):
        platforms = (mesh.devices.flat[0].platform,)
        traced = step.jitted(settings, tx, shardings, mesh).trace(state, batch)
        return traced.lower(lowering_platforms=platforms)


def filled_rows(settings: Run, mesh: jax.sharding.Mesh) -> float:
    """The fraction of rows in the experts' grouped matmuls that are not padding.

    This is the argument `filled` of `hlo.product_flops`.
    """
    model_config = settings.model
    if not model_config.num_experts:
        return 1.0
    rows = settings.training.batch_size // settings.training.accumulation_steps
    num_tokens = rows * settings.data.sequence_length // sharding.batch_shards(mesh.shape)
    with jax.set_mesh(mesh):
        mode = exchange_cost.choose(model_config, num_tokens)
    return exchange_cost.filled(mode, model_config.dispatch, mesh.shape)


def kernel_flops(settings: Run, mesh: jax.sharding.Mesh) -> dict[str, int]:
    """FLOPs of one call of splash attention on one device, for `hlo.product_flops`.

    Layers with different windows call kernels with the same name; for these it returns the mean
    over layers.
    """
    model_config, T = settings.model, settings.data.sequence_length
    if T % 128:  # splash attention refuses such rows
        return {}
    rows = settings.training.batch_size // settings.training.accumulation_steps
    cut = math.prod(mesh.shape[axis] for axis in sharding.TENSOR)
    heads = model_config.num_attention_heads * model_config.head_size // cut
    per_pair = 2 * heads * rows // sharding.batch_shards(mesh.shape)
    total = collections.Counter[str]()
    for kind in model_config.block_kinds:
        total.update(attention_kernels.splash_kernels(T, kind.window))
    layers = model_config.num_hidden_layers
    return {name: per_pair * pairs // layers for name, pairs in total.items()}
