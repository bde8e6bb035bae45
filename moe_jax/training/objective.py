"""One table of training objectives.

For each batch the step builds the objective's loss function from a `Context`:
(params, microbatch, key) -> (loss, Measures). It differentiates this function and sums over the
microbatches.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax import config as configs
from moe_jax import model, spelling
from moe_jax.analysis import measures
from moe_jax.data.batches import Batch
from moe_jax.model import transformer
from moe_jax.ops import cross_entropy
from moe_jax.training import balance, distillation
from moe_jax.training.state import Measures, RouterState

Loss = Callable[[dict, Batch, jax.Array | None], tuple[jax.Array, Measures]]


@dataclasses.dataclass(frozen=True)
class Context:
    """Everything that a step knows before its first microbatch.

    frozen: the config and the parameters, which have no gradient, of each frozen model.
    over_microbatches: sums a function of (microbatch, key) over the microbatches of the batch.
    """

    run: configs.Run
    params: dict
    batch: Batch
    router_state: RouterState
    frozen: Mapping[str, tuple[model.ModelConfig, dict]]
    over_microbatches: Callable[[Callable], Any]


@dataclasses.dataclass(frozen=True)
class Objective:
    """`make` returns the loss of one microbatch; these losses add up to the loss of the batch.

    `frozen_models` names the models needed besides the trained one, each with the run's workdir or
    Hugging Face folder to load it from.
    """

    make: Callable[[Context], Loss]
    frozen_models: Callable[[configs.Objective], Mapping[str, str]] = lambda objective: {}


def next_token(context: Context) -> Loss:
    """Next-token cross-entropy in nats, plus the auxiliary losses and a distillation loss."""
    run, batch = context.run, context.batch
    num_tokens = jnp.maximum(jnp.sum(batch.segment_ids_BT > 0), 1)
    router_losses: Callable = functools.partial(
        balance.router_losses,
        balance=run.balance,
        num_experts_per_tok=run.model.num_experts_per_tok,
        num_tokens=num_tokens,
        accumulation_steps=run.training.accumulation_steps,
        coefficients_L=context.router_state.coefficients_L,
    )
    # Merged experts are not chosen between, so their load cannot be unbalanced.
    chosen = run.model.num_experts > 0 and run.model.dispatch != "merge"
    several = run.training.accumulation_steps > 1
    if several and run.balance.load_balancing_over == "window" and chosen:
        router_losses = _over_window(context, router_losses)

    def loss(params, microbatch, key):
        x_BTD, stats = hidden_states(params, microbatch, key, run.model)
        unembed_DV = transformer.unembedding(params)
        weights_BT = microbatch.weights_BT / num_tokens
        with jax.named_scope("unembedding_loss"):
            sums = cross_entropy.cross_entropy(
                x_BTD,
                unembed_DV,
                microbatch.targets_BT,
                weights_BT,
                z_coefficient=run.objective.logit_z_coefficient,
            )
        total, terms = sums.total, {}
        if chosen:
            with jax.named_scope("balance"):
                router_total, terms = router_losses(stats)
            total += router_total
        if "teacher" in context.frozen:
            teacher, teacher_params = context.frozen["teacher"]
            teacher_x_BTC, _ = hidden_states(teacher_params, microbatch, None, teacher)
            divergence = distillation.distillation_loss(
                x_BTD,
                unembed_DV,
                *jax.lax.stop_gradient((teacher_x_BTC, transformer.unembedding(teacher_params))),
                weights_BT,
                temperature=run.objective.distillation.temperature,
            )
            total += run.objective.distillation.coefficient * divergence
            terms = terms | {"distillation_loss": divergence}
        return total, Measures(loss=sums.nats, terms=terms, router=measures.router_sums(stats))

    return loss


def _teacher(objective: configs.Objective) -> Mapping[str, str]:
    section = objective.distillation
    return {"teacher": section.source} if section.coefficient else {}


OBJECTIVES: dict[str, Objective] = {"next_token": Objective(next_token, _teacher)}


def choose(name: str) -> Objective:
    """Raises: ConfigError for a name that is not in the table."""
    if name not in OBJECTIVES:
        raise configs.ConfigError(spelling.unknown("config.objective.name", name, OBJECTIVES))
    return OBJECTIVES[name]


def hidden_states(params: dict, batch: Batch, key: jax.Array | None, config: model.ModelConfig):
    """The final norm's output for a batch, and the routers' statistics."""
    shared = transformer.Shared(batch.positions_BT, batch.segment_ids_BT, key)
    return transformer.hidden_states(params, batch.tokens_BT, shared, config)


def _over_window(context: Context, router_losses: Callable) -> Callable:
    """Auxiliary losses per microbatch whose gradients add up to that of the accumulation window.

    They cost a second forward pass, which sums the statistics of all microbatches.
    """
    run = context.run
    stats = context.over_microbatches(
        lambda microbatch, key: hidden_states(context.params, microbatch, key, run.model)[1]
    )
    (_, terms), slope = balance.slope(router_losses, stats)
    share = {name: term / run.training.accumulation_steps for name, term in terms.items()}
    return lambda stats: (balance.along(slope, stats), share)
