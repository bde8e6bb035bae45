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
from moe_jax.analysis import answers, measures
from moe_jax.data.batches import Batch
from moe_jax.model import transformer
from moe_jax.model.routing import BY_SHARD, Counted
from moe_jax.ops import cross_entropy
from moe_jax.training import balance, distillation, preferences
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
    pairs: bool = False  # its batches are pairs of answers (`data.preferences`), not text
    unpaired: bool = False  # one answer of a pair may be missing


def next_token(context: Context) -> Loss:
    """Next-token cross-entropy in nats, plus the auxiliary losses and a distillation loss."""
    run = context.run
    total_weight = _total_weight(context.batch)
    counted, router_losses = _router_losses(context)

    def loss(params, microbatch, key):
        x_BTD, stats = hidden_states(params, microbatch, key, run.model, counted)
        unembed_DV = transformer.unembedding(params)
        weights_BT = microbatch.weights_BT / total_weight
        with jax.named_scope("unembedding_loss"):
            sums = cross_entropy.cross_entropy(
                x_BTD,
                unembed_DV,
                microbatch.targets_BT,
                weights_BT,
                z_coefficient=run.objective.logit_z_coefficient,
            )
        router_total, terms = router_losses(params, stats)
        total = run.objective.distillation.cross_entropy_coefficient * sums.total + router_total
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
        return total, Measures(
            loss=sums.nats,
            terms=terms,
            router=measures.router_sums(stats),
            shortfall_LEH=_shortfalls(stats, counted),
        )

    return loss


def _teacher(objective: configs.Objective) -> Mapping[str, str]:
    section = objective.distillation
    return {"teacher": section.source} if section.coefficient else {}


def preference(context: Context, row: preferences.Loss) -> Loss:
    """A loss on pairs of answers, the mean over the batch's pairs or answers, plus the auxiliary
    losses.

    The reference is a frozen model, or `batch.reference_BT` if that was computed beforehand.
    """
    run, settings = context.run, context.run.objective.preference
    number = answers.counts(answers.tokens(context.batch))
    counted, router_losses = _router_losses(context)

    def forward(params, microbatch, key):
        """The final norm's output, the routers' statistics, the tokens' losses and their
        log-probabilities under the reference."""
        x_BTD, stats = hidden_states(params, microbatch, key, run.model, counted)
        reference_BT = _reference_log_probs(context, microbatch)
        nats_BT = token_losses(params, x_BTD, microbatch)
        return x_BTD, stats, nats_BT, reference_BT

    def log_ratios(microbatch, key):
        *_, nats_BT, reference_BT = forward(context.params, microbatch, key)
        return jnp.sum(answers.sums(-nats_BT, reference_BT, microbatch).log_ratio_BPK)

    # One more forward pass if there are several microbatches: the mean is over the whole batch.
    baseline = context.over_microbatches(log_ratios) if row.baseline else jnp.zeros(())
    baseline = jax.lax.stop_gradient(baseline) / jnp.maximum(number["answers"], 1)

    def loss(params, microbatch, key):
        x_BTD, stats, nats_BT, reference_BT = forward(params, microbatch, key)

        def of_tokens(nats_BT):
            found = answers.sums(-nats_BT, reference_BT, microbatch)
            total = row.summed(found, baseline, settings) / jnp.maximum(number[row.over], 1)
            return total, answers.measured(found, number, settings.beta)

        # The gradient by the tokens' losses, then theirs by the parameters, without all logits.
        (value, terms), slope_BT = jax.value_and_grad(of_tokens, has_aux=True)(nats_BT)
        along = cross_entropy.cross_entropy(
            x_BTD, transformer.unembedding(params), microbatch.targets_BT, slope_BT
        ).total
        router_total, router_terms = router_losses(params, stats)
        total = value + along - jax.lax.stop_gradient(along) + router_total
        return total, Measures(
            loss=value,
            terms=terms | router_terms,
            router=measures.router_sums(stats),
            shortfall_LEH=_shortfalls(stats, counted),
        )

    return loss


def token_losses(params: dict, x_BTD: jax.Array, batch: Batch) -> jax.Array:
    """The cross-entropy of each target in nats, [B, T], without a gradient."""
    x_BTD, unembed_DV = jax.lax.stop_gradient((x_BTD, transformer.unembedding(params)))
    return cross_entropy.token_losses(x_BTD, unembed_DV, batch.targets_BT)


def _reference_log_probs(context: Context, batch: Batch) -> jax.Array:
    if batch.reference_BT is not None:
        return batch.reference_BT
    config, params = context.frozen["reference"]
    x_BTD, _ = hidden_states(params, batch, None, config)
    return -token_losses(params, x_BTD, batch)


def _reference(objective: configs.Objective) -> Mapping[str, str]:
    section, name = objective.preference, objective.name
    if not section.reference:
        raise configs.ConfigError(
            f"config.objective.name={name!r} needs a reference model; set "
            "objective.preference.reference, usually to the value of init.source"
        )
    for key, value in {
        "logit_z_coefficient": objective.logit_z_coefficient,
        "distillation.coefficient": objective.distillation.coefficient,
    }.items():
        if value:
            raise configs.ConfigError(
                f"config.objective.{key}={value} is for objective.name='next_token'; set it to 0"
            )
    return {"reference": section.reference}


OBJECTIVES: dict[str, Objective] = {
    "next_token": Objective(next_token, _teacher),
    **{
        name: Objective(
            functools.partial(preference, row=row), _reference, pairs=True, unpaired=not row.paired
        )
        for name, row in preferences.LOSSES.items()
    },
}


def batch_shapes(run: configs.Run, make: Callable) -> Batch:
    """`make(shape, dtype)` for each array of a run's batch.

    Raises: ConfigError for a run whose step needs a frozen model.
    """
    row, section = choose(run.objective.name), run.objective
    cached = row.pairs and section.preference.reference_log_probs == "cached"
    for name in () if cached else row.frozen_models(section):
        raise configs.ConfigError(
            f"a dry run has no {name} model; leave it out of config.objective, or cache its "
            "log-probabilities by objective.preference.reference_log_probs='cached'"
        )
    size = run.training.batch_size, run.data.sequence_length
    return Batch.of_shape(size, make, reference=cached)


def choose(name: str) -> Objective:
    """Raises: ConfigError for a name that is not in the table."""
    if name not in OBJECTIVES:
        raise configs.ConfigError(spelling.unknown("config.objective.name", name, OBJECTIVES))
    return OBJECTIVES[name]


def hidden_states(
    params: dict,
    batch: Batch,
    key: jax.Array | None,
    config: model.ModelConfig,
    counted: Counted = BY_SHARD,
):
    """The final norm's output for a batch, and the routers' statistics."""
    shared = transformer.Shared(batch.positions_BT, batch.segment_ids_BT, key, counted)
    return transformer.hidden_states(params, batch.tokens_BT, shared, config)


def _total_weight(batch: Batch) -> jax.Array:
    """The sum of the loss weights: the number of trained tokens, or of documents."""
    total = jnp.sum(batch.weights_BT)
    return jnp.where(total > 0, total, 1)


def _shortfalls(stats, counted: Counted) -> jax.Array | None:
    return stats.shortfall_EH.sum(axis=1) if counted.shortfalls else None


def _router_losses(context: Context) -> tuple[Counted, Callable]:
    """The statistics that the layers count, and a function of the parameters and these statistics:
    the sum of the auxiliary losses, and each of them."""
    run, batch = context.run, context.batch
    # Merged experts are not chosen between, so their load cannot be unbalanced.
    if not run.model.num_experts or run.model.dispatch == "merge":
        return BY_SHARD, lambda params, stats: (jnp.zeros(()), {})
    of_stats: Callable = functools.partial(
        balance.router_losses,
        balance=run.balance,
        num_experts_per_tok=run.model.num_experts_per_tok,
        num_tokens=jnp.maximum(jnp.sum(batch.segment_ids_BT > 0), 1),
        accumulation_steps=run.training.accumulation_steps,
        coefficients_L=context.router_state.coefficients_L,
    )
    several = run.training.accumulation_steps > 1
    if several and run.balance.load_balancing_over == "window":
        of_stats = _over_window(context, of_stats)

    def losses(params, stats):
        with jax.named_scope("balance"):
            total, terms = of_stats(stats)
            penalty, penalties = balance.penalties(
                params, run.balance, accumulation_steps=run.training.accumulation_steps
            )
            return total + penalty, terms | penalties

    return balance.counted(run.balance), losses


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
