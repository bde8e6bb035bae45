"""What a training run carries from step to step."""

import jax
import jax.numpy as jnp
import optax
from flax import struct

from moe_jax.training.balancing import RouterState


@struct.dataclass
class TrainState:
    step: jax.Array
    params: dict
    opt_state: optax.OptState
    router_state: RouterState

    @classmethod
    def create(
        cls,
        params: dict,
        optimizer: optax.GradientTransformation,
        router_state: RouterState | None = None,
    ) -> "TrainState":
        """The state before the first step; `router_state` as `balancing.initial` gives it."""
        zero = jnp.zeros((), jnp.int32)
        return cls(zero, params, optimizer.init(params), router_state or RouterState())
