"""The pure train step: state and batch in, state and metrics out."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import struct

from moe_jax import model
from moe_jax.config import Run
from moe_jax.model import transformer
from moe_jax.ops import cross_entropy
from moe_jax.parallel import sharding
from moe_jax.training import balancing, losses, optimizer
from moe_jax.training.state import TrainState

Batch = dict[str, jax.Array]  # tokens, targets, segment_ids, positions: [B, T] int32


@struct.dataclass
class StepMetrics:
    """Losses are before their coefficients. What is off, or of a dense model's routers, is None."""

    loss: jax.Array  # cross-entropy, nats per token
    distillation_loss: jax.Array | None
    router: losses.RouterLosses | None
    load_balancing_coefficients_L: jax.Array | None  # where they adapt
    gradient_norm: jax.Array  # before clipping
    skipped: jax.Array  # loss or gradient were not finite, and the update was not made
    tokens_per_expert_LE: jax.Array | None
    dropped_L: jax.Array | None  # assignments beyond the capacity of their expert


@struct.dataclass
class _Sums:
    """What the microbatches of a step add up to, beside their gradients."""

    loss: jax.Array
    distillation_loss: jax.Array | None
    router: losses.RouterLosses | None
    tokens_per_expert_LE: jax.Array | None
    dropped_L: jax.Array | None


def make_train_step(
    settings: Run,
    tx: optax.GradientTransformation,
    *,
    teacher: model.ModelConfig | None = None,
) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """The step for `settings.training.accumulation_steps` microbatches of a batch.

    It is a function of (state, batch), and of the teacher's parameters where there is a teacher.

    Args:
      teacher: the model to distil from, as `settings.objective.distillation` says.
    """
    config, balance, terms = settings.model, settings.balance, settings.objective
    frozen, N = settings.optimizer.frozen, settings.training.accumulation_steps
    two_passes = N > 1 and balance.load_balancing_over == "window" and config.num_experts > 0

    def hidden_states(params, batch, key, config=config):
        shared = transformer.Shared(batch["positions"], batch["segment_ids"], key)
        return transformer.hidden_states(params, batch["tokens"], shared, config)

    def train_step(state: TrainState, batch: Batch, teacher_params: dict | None = None):
        num_tokens = jnp.maximum(jnp.sum(batch["segment_ids"] > 0), 1)
        key = (
            jax.random.fold_in(jax.random.key(settings.seed), state.step) if config.draws else None
        )
        router_losses = functools.partial(
            losses.router_losses,
            balance=balance,
            accumulation_steps=N,
            num_experts_per_tok=config.num_experts_per_tok,
            num_tokens=num_tokens,
            coefficients_L=state.router_state.coefficients_L,
        )
        slope = router_parts = None
        if two_passes:
            stats = over_microbatches(
                lambda microbatch, key: hidden_states(state.params, microbatch, key)[1], batch, key
            )
            (_, router_parts), slope = losses.slope(router_losses, stats)

        def objective(params, microbatch, key):
            """Sums to the batch's loss over its microbatches, for each is divided by all tokens."""
            params = optimizer.without_gradient(params, frozen)
            x_BTD, stats = hidden_states(params, microbatch, key)
            unembed_DV = transformer.unembedding(params)
            weight_BT = (microbatch["segment_ids"] > 0) / num_tokens
            sums = cross_entropy.cross_entropy(
                x_BTD,
                unembed_DV,
                microbatch["targets"],
                weight_BT,
                z_coefficient=terms.logit_z_coefficient,
            )
            total, parts, divergence = sums.total, None, None
            if slope is not None:
                total += losses.along(slope, stats)
            elif stats is not None:
                router_total, parts = router_losses(stats)
                total += router_total
            if teacher is not None:
                teacher_x_BTC, _ = hidden_states(teacher_params, microbatch, None, teacher)
                divergence = losses.distillation_loss(
                    x_BTD,
                    unembed_DV,
                    *jax.lax.stop_gradient(
                        (teacher_x_BTC, transformer.unembedding(teacher_params))
                    ),
                    weight_BT,
                    temperature=terms.distillation.temperature,
                )
                total += terms.distillation.coefficient * divergence
            counts_LE = dropped_L = None
            if stats is not None:
                counts_LE, dropped_L = (
                    x.sum(axis=1) for x in (stats.tokens_per_expert_E, stats.num_dropped)
                )
            return total, _Sums(sums.nats, divergence, parts, counts_LE, dropped_L)

        gradient = functools.partial(jax.grad(objective, has_aux=True), state.params)
        grads, sums = over_microbatches(gradient, batch, key)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(sums.loss) & jnp.isfinite(norm)

        counts_LE, dropped_L = sums.tokens_per_expert_LE, sums.dropped_L

        def updated(state, grads):
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            if balance.bias_update_rate:
                params = balancing.with_updated_biases(
                    params, config, balance.bias_update_rate, counts_LE, frozen
                )
            router_state = balancing.adapted(
                state.router_state, config, balance.adaptive, counts_LE, dropped_L
            )
            return TrainState(state.step, params, opt_state, router_state)

        # Not by selecting each array: XLA:CPU then computes the moments once for themselves and
        # again for the parameters (25 million of them, 116 ms against 46).
        new = jax.lax.cond(finite, updated, lambda state, _: state, state, grads)
        return new.replace(step=state.step + 1), StepMetrics(
            loss=sums.loss,
            distillation_loss=sums.distillation_loss,
            router=router_parts if two_passes else sums.router,
            load_balancing_coefficients_L=state.router_state.coefficients_L,
            gradient_norm=norm,
            skipped=~finite,
            tokens_per_expert_LE=counts_LE,
            dropped_L=dropped_L,
        )

    def over_microbatches(function, batch, key):
        """The sum of `function` over microbatches, each spread over all batch shards."""
        if N == 1:
            return function(batch, key)
        microbatches = jax.tree.map(
            lambda x: x.reshape(x.shape[0] // N, N, *x.shape[1:]).swapaxes(0, 1), batch
        )

        def add(total, numbered):
            number, microbatch = numbered
            own_key = None if key is None else jax.random.fold_in(key, number)
            return jax.tree.map(jnp.add, total, function(microbatch, own_key)), None

        first = jax.tree.map(lambda x: x[0], microbatches)
        shapes = jax.eval_shape(function, first, key)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.scan(add, zeros, (jnp.arange(N), microbatches))[0]

    return train_step


def jitted(
    settings: Run,
    tx: optax.GradientTransformation,
    state_shardings: TrainState,
    mesh: jax.sharding.Mesh,
    teacher: model.ModelConfig | None = None,
) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """The step of a run, its state donated, compiled for a mesh when it is first called.

    The teacher's parameters stay where they lie.
    """
    train_step = make_train_step(settings, tx, teacher=teacher)
    of_teacher = () if teacher is None else (None,)
    return jax.jit(
        train_step,
        in_shardings=(state_shardings, jax.NamedSharding(mesh, sharding.BATCH), *of_teacher),
        out_shardings=(state_shardings, jax.NamedSharding(mesh, jax.P())),
        donate_argnums=0,
    )
