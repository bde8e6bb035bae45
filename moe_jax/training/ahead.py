"""The train step of a config compiled from shapes alone, for any mesh.

The mesh may be one of a topology that this machine does not have:
`jax.experimental.topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices`.
"""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from moe_jax import config as configs
from moe_jax import model
from moe_jax.parallel import sharding
from moe_jax.training import balancing, optimizer, step
from moe_jax.training.state import TrainState


def lower(config: ConfigDict, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    """The train step that `train.run` would run on this mesh, but for a teacher.

    Raises: ConfigError for a model that cannot be; ValueError for one that does not fit the mesh.
    """
    model_config = configs.model_config(config)
    tx = optimizer.adamw(config.optimizer, config.training.num_steps)
    router_state = balancing.initial(model_config, config.training)
    shapes = jax.eval_shape(
        lambda: TrainState.create(model.init(model_config, jax.random.key(0)), tx, router_state)
    )
    state = sharding.abstract(shapes, mesh)
    size = (config.training.batch_size, config.data.sequence_length)
    batch_sharding = jax.NamedSharding(mesh, sharding.BATCH)
    batch = {
        name: jax.ShapeDtypeStruct(size, jnp.int32, sharding=batch_sharding)
        for name in ("tokens", "targets", "segment_ids", "positions")
    }
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    train_step = step.jitted(config, model_config, tx, state_shardings, mesh)
    with jax.set_mesh(mesh):
        platform = mesh.devices.flat[0].platform
        return train_step.trace(state, batch).lower(lowering_platforms=(platform,))
