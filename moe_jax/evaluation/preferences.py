"""Measures of a model's log-probabilities of held-out pairs of answers."""

import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp

from moe_jax import model
from moe_jax.analysis import answers
from moe_jax.data.batches import Batch
from moe_jax.model import transformer
from moe_jax.ops import cross_entropy


def make_eval_step(config: model.ModelConfig, beta: float) -> Callable:
    """(params, batch with a reference) -> the sums of the measures, and the counts of answers."""

    def eval_step(params: dict, batch: Batch):
        shared = transformer.Shared(batch.positions_BT, batch.segment_ids_BT)
        x_BTD, _ = transformer.hidden_states(params, batch.tokens_BT, shared, config)
        unembed_DV = transformer.unembedding(params)
        nats_BT = cross_entropy.token_losses(x_BTD, unembed_DV, batch.targets_BT)
        assert batch.reference_BT is not None
        found = answers.sums(-nats_BT, batch.reference_BT, batch)
        sums = {n: jnp.sum(row.value(found, beta)) for n, row in answers.MEASURES.items()}
        return sums, answers.counts(found.tokens_BPK)

    return eval_step


def evaluate(
    eval_step: Callable, params: dict, batches: Iterable[Batch]
) -> dict[str, float | int | None]:
    """Each measure's mean over all batches, None over nothing, and the number of whole pairs."""
    found = [jax.device_get(eval_step(params, batch)) for batch in batches]
    sums = {name: math.fsum(float(one[name]) for one, _ in found) for name in found[0][0]}
    number = {name: sum(float(one[name]) for _, one in found) for name in found[0][1]}
    means = {
        name: sums[name] / number[row.over] if number[row.over] else None
        for name, row in answers.MEASURES.items()
    }
    return {**means, "pairs": int(number["pairs"])}
