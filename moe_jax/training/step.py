"""The pure train step: accumulates gradients, updates, and skips steps that are not finite or are
spikes."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from moe_jax import config as configs
from moe_jax import model
from moe_jax.data.batches import Batch
from moe_jax.parallel import sharding
from moe_jax.training import balance, guards, lora, objective, optimizer
from moe_jax.training.state import Measures, TrainState

Models = Mapping[str, model.ModelConfig]


def make_train_step(
    run: configs.Run, tx: optax.GradientTransformation, frozen_models: Models | None = None
) -> Callable[..., tuple[TrainState, Measures]]:
    """The step of a run: (state, batch, parameters of the frozen models by name) -> the new state
    and its measures.

    Only an objective with frozen models, for example a teacher, needs the last argument.
    """
    make_loss, frozen_configs = objective.choose(run.objective.name).make, frozen_models or {}

    def train_step(state: TrainState, batch: Batch, frozen_params: dict | None = None):
        key = jax.random.fold_in(jax.random.key(run.seed), state.step)
        summed = functools.partial(
            over_microbatches, batch=batch, key=key, number=run.training.accumulation_steps
        )
        loss = make_loss(
            objective.Context(
                run=run,
                params=lora.scaled(state.params, run.lora),
                batch=batch,
                router_state=state.router_state,
                frozen={n: (frozen_configs[n], p) for n, p in (frozen_params or {}).items()},
                over_microbatches=summed,
            )
        )

        trained, frozen = optimizer.split(state.params, run.optimizer.frozen)

        def of_trained(trained, microbatch, key):
            params = lora.scaled(optimizer.joined(trained, frozen), run.lora)
            return loss(params, microbatch, key)

        grads, measures = summed(functools.partial(jax.grad(of_trained, has_aux=True), trained))
        with jax.named_scope("optimizer"):
            norm = optax.tree.norm(grads)
        spiked, history = jnp.bool(False), state.history
        if history is not None:
            spiked = guards.is_spike(history, measures.loss, norm, run.guards.spike_sigma)
            history = guards.noted(history, state.step, measures.loss, norm)
        applied = jnp.isfinite(measures.loss) & jnp.isfinite(norm) & ~spiked

        def updated(state, grads):
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            params, router_state = balance.updated(params, state.router_state, run, measures)
            new = state.replace(params=params, opt_state=opt_state, router_state=router_state)
            return new, _all_finite(params)

        # With a `where` on each array, XLA:CPU would compute the moments twice, once for themselves
        # and once for the parameters: 116 ms instead of 46 ms for 25 million parameters.
        unchanged = jnp.bool(True)
        with jax.named_scope("optimizer"):
            new, sound = jax.lax.cond(
                *(applied, updated, lambda state, _: (state, unchanged)),
                *(dataclasses.replace(state, params=trained), grads),
            )
        params = optimizer.joined(new.params, frozen)
        return new.replace(params=params, step=state.step + 1, history=history), measures.replace(
            gradient_norm=norm,
            learning_rate=optimizer.learning_rate(
                run.optimizer, run.training.num_steps, state.opt_state
            ),
            skipped=~applied,
            spiked=spiked,
            diverged=~sound,
            load_balancing_coefficients_L=state.router_state.coefficients_L,
            shortfall_LEH=None,
        )

    return train_step


def _all_finite(params: dict) -> jax.Array:
    finite = jax.tree.map(lambda x: jnp.isfinite(x).all(), params)
    return jax.tree.reduce(jnp.logical_and, finite, jnp.bool(True))


def over_microbatches(function: Callable, *, batch: Batch, key: jax.Array, number: int):
    """Sums function(microbatch, key) over microbatches, each spread over all batch shards."""
    if number == 1:
        return function(batch, key)
    microbatches = jax.tree.map(
        lambda x: x.reshape(x.shape[0] // number, number, *x.shape[1:]).swapaxes(0, 1), batch
    )

    def add(total, numbered):
        i, microbatch = numbered
        return jax.tree.map(jnp.add, total, function(microbatch, jax.random.fold_in(key, i))), None

    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], microbatches), key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zeros, (jnp.arange(number), microbatches))[0]


def jitted(
    run: configs.Run,
    tx: optax.GradientTransformation,
    state_shardings: TrainState,
    mesh: jax.sharding.Mesh,
    frozen_models: Models | None = None,
) -> jax.stages.Wrapped:
    """The step of a run with its state donated, compiled for a mesh on its first call.

    The parameters of frozen models keep their shardings.
    """
    frozen = (None,) if frozen_models else ()
    return jax.jit(
        make_train_step(run, tx, frozen_models),
        in_shardings=(state_shardings, jax.NamedSharding(mesh, sharding.BATCH), *frozen),
        out_shardings=(state_shardings, jax.NamedSharding(mesh, jax.P())),
        donate_argnums=0,
    )
