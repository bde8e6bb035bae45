"""The pure train step: state and batch in, state and metrics out."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import struct
from ml_collections import ConfigDict

from moe_jax import model
from moe_jax.model import transformer
from moe_jax.ops import cross_entropy
from moe_jax.parallel import sharding
from moe_jax.training import losses
from moe_jax.training.state import TrainState

Batch = dict[str, jax.Array]  # tokens, targets, segment_ids, positions: [B, T] int32


@struct.dataclass
class StepMetrics:
    loss: jax.Array  # cross-entropy, nats per token
    load_balancing_loss: jax.Array  # before its coefficient; 0 for a dense model
    router_z_loss: jax.Array
    gradient_norm: jax.Array  # before clipping
    skipped: jax.Array  # loss or gradient were not finite, and the update was not made
    tokens_per_expert_LE: jax.Array | None
    dropped_L: jax.Array | None  # assignments beyond the capacity of their expert


def make_train_step(
    config: model.ModelConfig,
    training: ConfigDict,
    optimizer: optax.GradientTransformation,
    seed: int = 0,
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """The step for `training.accumulation_steps` microbatches of a batch."""

    def objective(params, batch, num_tokens, key):
        """Sums to the batch's loss over its microbatches, for each is divided by all tokens."""
        shared = transformer.Shared(batch["positions"], batch["segment_ids"], key)
        x_BTD, router = transformer.hidden_states(params, batch["tokens"], shared, config)
        sums = cross_entropy.cross_entropy(
            x_BTD,
            transformer.unembedding(params),
            batch["targets"],
            (batch["segment_ids"] > 0) / num_tokens,
            z_coefficient=training.logit_z_coefficient,
        )
        balance = z = jnp.zeros(())
        counts_LE = dropped_L = None
        if router is not None:
            # Over one microbatch: averaged over several, this is not the loss over all of them.
            share = 1 / training.accumulation_steps
            balance = share * losses.load_balancing_loss(
                router,
                num_experts_per_tok=config.num_experts_per_tok,
                scope=training.load_balancing_scope,
                divide_by_k=training.load_balancing_divide_by_k,
            )
            z = share * losses.router_z_loss(router)
            counts_LE = router.tokens_per_expert_E.sum(axis=1)
            dropped_L = router.num_dropped.sum(axis=1)
        total = (
            sums.total
            + training.load_balancing_coefficient * balance
            + training.router_z_coefficient * z
        )
        return total, (sums.nats, balance, z, counts_LE, dropped_L)

    gradient = jax.grad(objective, has_aux=True)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        num_tokens = jnp.maximum(jnp.sum(batch["segment_ids"] > 0), 1)
        key = jax.random.fold_in(jax.random.key(seed), state.step) if config.draws else None
        whole = gradient if training.accumulation_steps == 1 else accumulate
        grads, sums = whole(state.params, batch, num_tokens, key)
        loss, balance, z, counts_LE, dropped_L = sums
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        new = TrainState(state.step, optax.apply_updates(state.params, updates), opt_state)
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
        state = state.replace(step=state.step + 1)
        return state, StepMetrics(loss, balance, z, norm, ~finite, counts_LE, dropped_L)

    def accumulate(params, batch, num_tokens, key):
        """Sums gradients and metrics over microbatches, each spread over all batch shards."""
        N = training.accumulation_steps
        microbatches = jax.tree.map(
            lambda x: x.reshape(x.shape[0] // N, N, *x.shape[1:]).swapaxes(0, 1), batch
        )

        def add(total, numbered):
            number, microbatch = numbered
            own_key = None if key is None else jax.random.fold_in(key, number)
            part = gradient(params, microbatch, num_tokens, own_key)
            return jax.tree.map(jnp.add, total, part), None

        first = jax.tree.map(lambda x: x[0], microbatches)
        shapes = jax.eval_shape(gradient, params, first, num_tokens, key)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.scan(add, zeros, (jnp.arange(N), microbatches))[0]

    return train_step


def jitted(config: ConfigDict, model_config: model.ModelConfig, optimizer, state_shardings, mesh):
    """The step of a run, its state donated, compiled for a mesh when it is first called."""
    return jax.jit(
        make_train_step(model_config, config.training, optimizer, config.seed),
        in_shardings=(state_shardings, jax.NamedSharding(mesh, sharding.BATCH)),
        out_shardings=(state_shardings, None),
        donate_argnums=0,
    )
