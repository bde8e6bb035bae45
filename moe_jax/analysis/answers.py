"""Log-probabilities of chosen and rejected answers, and one table of measures of them.

The training step, the evaluator of held-out pairs, result.json and the results of a sweep read the
table. A reward is beta times an answer's log-ratio, its log-probability less that under the
reference model (Rafailov et al., arXiv 2305.18290, section 4, without the constant of the prompt).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from moe_jax.ops import bins

if TYPE_CHECKING:  # the commands that list these columns do not wait for grain
    from moe_jax.data.batches import Batch

CHOSEN, REJECTED = 0, 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Answers:
    """Sums over the tokens of each answer: [B, P, K], rows, pairs of a row, chosen and rejected.

    Slots without an answer have 0 tokens, and 0 everywhere.
    """

    log_prob_BPK: jax.Array  # nats
    reference_BPK: jax.Array  # nats, under the reference model
    square_BPK: jax.Array  # squares of the tokens' log-ratios
    tokens_BPK: jax.Array

    @property
    def there_BPK(self) -> jax.Array:
        return self.tokens_BPK > 0

    @property
    def log_ratio_BPK(self) -> jax.Array:
        return self.log_prob_BPK - self.reference_BPK

    @property
    def per_token_BPK(self) -> jax.Array:
        """The mean log-ratio of an answer's tokens."""
        return self.log_ratio_BPK / jnp.maximum(self.tokens_BPK, 1)


def sums(log_prob_BT: jax.Array, reference_BT: jax.Array, batch: "Batch") -> Answers:
    """The sums over each answer of log-probabilities of the targets, weighted by the batch."""
    ratio_BT = log_prob_BT - reference_BT
    by_answer = functools.partial(_by_answer, batch)
    return Answers(
        by_answer(log_prob_BT), by_answer(reference_BT), by_answer(ratio_BT**2), tokens(batch)
    )


def tokens(batch: "Batch") -> jax.Array:
    """The number of tokens of each answer, [B, P, K]."""
    return _by_answer(batch, jnp.ones_like(batch.weights_BT))


def _by_answer(batch: "Batch", values_BT: jax.Array) -> jax.Array:
    B, T = values_BT.shape
    S = T + T % 2
    segment_BT = jnp.where(batch.segment_ids_BT > 0, batch.segment_ids_BT - 1, S)  # S: no bin
    add = jax.vmap(functools.partial(bins.sum_by_bin, num_bins=S))
    return add(values_BT * batch.weights_BT, segment_BT).reshape(B, S // 2, 2)


def counts(tokens_BPK: jax.Array) -> dict[str, jax.Array]:
    """The numbers that measures are means over."""
    there_BPK = tokens_BPK > 0
    return {
        "pairs": jnp.sum(there_BPK.all(axis=-1)),
        "chosen": jnp.sum(there_BPK[..., CHOSEN]),
        "rejected": jnp.sum(there_BPK[..., REJECTED]),
        "answers": jnp.sum(there_BPK),
        "tokens": jnp.sum(tokens_BPK),
    }


@dataclasses.dataclass(frozen=True)
class Measure:
    """`value` maps (answers, beta) to an array, whose sum is divided by the count `over`."""

    unit: str
    over: str
    value: Callable[[Answers, float], jax.Array]
    title: str  # of its panel in a report


def reward_margin(answers: Answers, beta: float) -> jax.Array:
    """The reward of the chosen answer less that of the rejected one, of whole pairs."""
    reward_BPK = beta * answers.log_ratio_BPK
    margin_BP = reward_BPK[..., CHOSEN] - reward_BPK[..., REJECTED]
    return jnp.where(answers.there_BPK.all(axis=-1), margin_BP, 0)


def accuracy(answers: Answers, beta: float) -> jax.Array:
    """1 for a pair whose chosen answer has the larger reward, 0 if not, so also for equal ones."""
    return reward_margin(answers, beta) > 0


def reference_kl(answers: Answers, beta: float) -> jax.Array:
    """Half the squared log-ratios of the answers' tokens.

    It estimates the divergence from the reference to second order (estimator k2 of Schulman,
    joschu.net/blog/kl-approx.html), on the answers of the data instead of the model's own.
    """
    return answers.square_BPK / 2


def chosen_log_prob(answers: Answers, beta: float) -> jax.Array:
    return answers.log_prob_BPK[..., CHOSEN]


def rejected_log_prob(answers: Answers, beta: float) -> jax.Array:
    return answers.log_prob_BPK[..., REJECTED]


MEASURES: dict[str, Measure] = {
    "reward_margin": Measure("nats", "pairs", reward_margin, "Reward margin"),
    "preference_accuracy": Measure("share of pairs", "pairs", accuracy, "Pairs in the right order"),
    "reference_kl": Measure("nats per token", "tokens", reference_kl, "Distance to the reference"),
    "chosen_log_prob": Measure(
        "nats per answer", "chosen", chosen_log_prob, "Log-probability of chosen answers"
    ),
    "rejected_log_prob": Measure(
        "nats per answer", "rejected", rejected_log_prob, "Log-probability of rejected answers"
    ),
}


def columns(result: Mapping[str, Any]) -> dict[str, float | str]:
    """The columns of results.csv from a result.json; "" for what a run does not measure."""
    kept = result.get("preferences")
    values = kept if isinstance(kept, dict) else {}
    numbers = {name: values.get(name) for name in MEASURES}
    return {n: value if isinstance(value, int | float) else "" for n, value in numbers.items()}


def measured(
    answers: Answers, number: Mapping[str, jax.Array], beta: float
) -> dict[str, jax.Array]:
    """Each measure's sum over these answers, divided by its count among all: parts add up."""
    return {
        name: jnp.sum(row.value(answers, beta)) / jnp.maximum(number[row.over], 1)
        for name, row in MEASURES.items()
    }
