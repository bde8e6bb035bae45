"""The state that a training run carries from step to step, and the measures of each step."""

import jax
import jax.numpy as jnp
import optax
from flax import struct

from moe_jax.training.guards import History


@struct.dataclass
class RouterState:
    """What the balance rules remember between steps; it has no leaves if they need none."""

    coefficients_L: jax.Array | None = None  # load-balancing coefficients of the sparse layers


@struct.dataclass
class TrainState:
    step: jax.Array
    params: dict
    opt_state: optax.OptState
    router_state: RouterState
    history: History | None = None  # None if the run does not look for spikes

    @classmethod
    def create(
        cls,
        params: dict,
        optimizer: optax.GradientTransformation,
        router_state: RouterState | None = None,
        history: History | None = None,
    ) -> "TrainState":
        """The state before the first step, with the `router_state` of `balance.initial` and the
        `history` of `guards.history`."""
        step = jnp.zeros((), jnp.int32)
        router_state = router_state or RouterState()
        return cls(step, params, optimizer.init(params), router_state, history)


@struct.dataclass
class Measures:
    """Sums over the microbatches of a step, followed by fields of the step as a whole.

    `terms` are an objective's parts before their coefficients, each scaled so that the microbatches
    add up to the value of the batch. `router` holds the fields of `RouterStats`, [L, ...], that
    rules and measures need (`analysis.measures.router_sums`); it is None for a dense model.
    """

    loss: jax.Array  # the objective without its terms: for text, nats per token
    terms: dict[str, jax.Array] = struct.field(default_factory=dict)
    router: dict[str, jax.Array] | None = None
    shortfall_LEH: jax.Array | None = None  # for quantile balancing; None after the step
    # None until all microbatches are summed.
    gradient_norm: jax.Array | None = None  # before clipping
    learning_rate: jax.Array | None = None  # this update's; the next one's if this one is skipped
    skipped: jax.Array | None = None  # True if no update was made
    spiked: jax.Array | None = None  # True if it was skipped because of a spike
    diverged: jax.Array | None = None  # True if the update made parameters non-finite
    load_balancing_coefficients_L: jax.Array | None = None  # None if they do not adapt

    @property
    def tokens_per_expert_LE(self) -> jax.Array | None:
        return None if self.router is None else self.router["tokens_per_expert_E"]
