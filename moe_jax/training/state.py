"""What a training run carries from step to step, and what each step measures."""

import jax
import jax.numpy as jnp
import optax
from flax import struct


@struct.dataclass
class RouterState:
    """What balance rules remember from step to step; without leaves where they remember nothing."""

    coefficients_L: jax.Array | None = None  # the load-balancing loss's, of each sparse layer


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
        """The state before the first step; `router_state` as `balance.initial` gives it."""
        zero = jnp.zeros((), jnp.int32)
        return cls(zero, params, optimizer.init(params), router_state or RouterState())


@struct.dataclass
class Measures:
    """Sums over the microbatches of a step; what describes the step as a whole comes last.

    `terms` are an objective's parts before their coefficients, each divided so that the
    microbatches add up to the batch's. `router` holds the fields of `RouterStats` that rules and
    measures ask for (`analysis.measures.router_sums`), [L, ...]; it is None for a dense model.
    """

    loss: jax.Array  # the objective's own, without the terms: for text nats per token
    terms: dict[str, jax.Array] = struct.field(default_factory=dict)
    router: dict[str, jax.Array] | None = None
    # None until all microbatches are summed.
    gradient_norm: jax.Array | None = None  # before clipping
    skipped: jax.Array | None = None  # loss or gradient were not finite; no update was made
    load_balancing_coefficients_L: jax.Array | None = None  # where they adapt

    @property
    def tokens_per_expert_LE(self) -> jax.Array | None:
        return None if self.router is None else self.router["tokens_per_expert_E"]

    @property
    def dropped_L(self) -> jax.Array | None:
        """Assignments beyond the capacity of their expert."""
        return None if self.router is None else self.router["num_dropped"]
