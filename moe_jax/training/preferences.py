"""One table of losses on pairs of answers; each is a row of `objective.OBJECTIVES` too."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax.analysis import answers
from moe_jax.config.objectives import Preference


@dataclasses.dataclass(frozen=True)
class Loss:
    """`of` maps (log-ratios, baseline, settings) to the loss of each slot.

    Log-ratios are [B, P, K], of chosen and rejected answers, and the result [B, P]; for a loss that
    is not `paired` it is [B, P, K], of each answer alone. Slots without a pair, or without an
    answer, are left out afterwards.

    per_token: the log-ratios are means over an answer's tokens instead of sums.
    baseline: the loss needs the mean log-ratio of all answers of the batch, without gradient.
    """

    of: Callable[[jax.Array, jax.Array, Preference], jax.Array]
    paired: bool = True
    per_token: bool = False
    baseline: bool = False

    @property
    def over(self) -> str:
        """The count that the loss is a mean over."""
        return "pairs" if self.paired else "answers"

    def summed(
        self, found: answers.Answers, baseline: jax.Array, settings: Preference
    ) -> jax.Array:
        """The sum over the pairs, or the answers, that are there."""
        ratio_BPK = found.per_token_BPK if self.per_token else found.log_ratio_BPK
        there = found.there_BPK.all(axis=-1) if self.paired else found.there_BPK
        return jnp.sum(jnp.where(there, self.of(ratio_BPK, baseline, settings), 0))


def sigmoid(ratio_BPK: jax.Array, baseline: jax.Array, settings: Preference) -> jax.Array:
    """-log sigmoid(beta · margin): Rafailov et al., arXiv 2305.18290, eq. 7."""
    return -jax.nn.log_sigmoid(settings.beta * _margin(ratio_BPK))


def conservative(ratio_BPK: jax.Array, baseline: jax.Array, settings: Preference) -> jax.Array:
    """`sigmoid` with label smoothing: a share of the pairs is taken to be the wrong way round.

    Mitchell, "A note on DPO with noisy preferences" (ericmitchell.ai/cdpo.pdf), eq. 3.
    """
    logit_BP, share = settings.beta * _margin(ratio_BPK), settings.label_smoothing
    right_BP, wrong_BP = jax.nn.log_sigmoid(logit_BP), jax.nn.log_sigmoid(-logit_BP)
    return -(1 - share) * right_BP - share * wrong_BP


def squared(ratio_BPK: jax.Array, baseline: jax.Array, settings: Preference) -> jax.Array:
    """(margin - 1 / (2 beta))^2: IPO, Azar et al., arXiv 2310.12036, eq. 17."""
    return (_margin(ratio_BPK) - 1 / (2 * settings.beta)) ** 2


def prospect(ratio_BPK: jax.Array, baseline: jax.Array, settings: Preference) -> jax.Array:
    """1 - sigmoid(± beta · (log-ratio - z)): KTO, Ethayarajh et al., arXiv 2402.01306, eq. 8.

    Both kinds of answers have weight 1. The paper estimates z, the divergence from the reference,
    from answers to other prompts; here it is the mean log-ratio of the batch's own answers, if that
    is positive.
    """
    sign_K = jnp.array([1.0, -1.0])
    return 1 - jax.nn.sigmoid(sign_K * settings.beta * (ratio_BPK - jnp.maximum(baseline, 0)))


def _margin(ratio_BPK: jax.Array) -> jax.Array:
    return ratio_BPK[..., answers.CHOSEN] - ratio_BPK[..., answers.REJECTED]


LOSSES: dict[str, Loss] = {
    "dpo": Loss(sigmoid),
    # Length-normalised as in Tülu 3 (Lambert et al., arXiv 2411.15124, eq. 6).
    "dpo_norm": Loss(sigmoid, per_token=True),
    "cdpo": Loss(conservative),
    # On mean log-ratios, as its authors told the makers of TRL, whose "ipo" it equals.
    "ipo": Loss(squared, per_token=True),
    "kto": Loss(prospect, paired=False, baseline=True),
}
