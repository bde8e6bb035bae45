"""Measures of routing, as pure functions of the counts of `routing_counts`.

A count array whose last axis is experts (E) is a load. `count_GE` may be the assignments over all
slots (`Counts.label_GE`) or over the first one (`Counts.first_GE`).
"""

import dataclasses

import numpy as np
from scipy import optimize, special

from moe_jax.analysis import measures, routing_counts
from moe_jax.analysis.routing_counts import Counts

CHANCE_DRAWS = 20
FEWEST_UNITS = 20  # for an interval
STANDARD_ERRORS = 1.959964  # on either side, for 95 %
RARE = 0.01  # an expert with a smaller share of a layer's assignments is hardly used


def share(count_XE: np.ndarray) -> np.ndarray:
    """Each expert's fraction of the assignments, in float64; a row without any stays 0.

    With labels as rows this is the load that Drop-Upcycling draws for each domain and layer
    (Nakamura et al., arXiv 2502.19261); its base line is 1/E.
    """
    count_XE = np.asarray(count_XE, np.float64)
    return count_XE / np.maximum(count_XE.sum(axis=-1, keepdims=True), 1)


def specialisation(count_GE: np.ndarray, tokens_G: np.ndarray) -> np.ndarray:
    """[G, E]: the fraction of a label's tokens whose set of experts contains this one.

    Domain specialisation (Muennighoff et al., OLMoE, arXiv 2409.02060, §5.3). Its base line is k/E
    for all k slots (`Counts.label_GE`) and 1/E for the first slot alone (`Counts.first_GE`).
    """
    return np.asarray(count_GE, np.float64) / np.maximum(tokens_G, 1)[:, None]


def effective_experts(count_XE: np.ndarray) -> np.ndarray:
    """exp(entropy of the shares): E when the load is even, 1 when one expert has it all."""
    return measures.effective_number(share(count_XE))


def busiest_share(count_XE: np.ndarray, number: int = 2) -> np.ndarray:
    """The share of a layer's assignments that its busiest experts have; even: number/E."""
    return np.sort(share(count_XE), axis=-1)[..., -number:].sum(axis=-1)


def rarely_used(count_LE: np.ndarray, below: float = RARE) -> int:
    """The number of (layer, expert) pairs with less than this share of the layer's assignments."""
    return int((share(count_LE) < below).sum())


def js_divergence(count_XE: np.ndarray, other_XE: np.ndarray) -> np.ndarray:
    """The Jensen-Shannon divergence of two loads, in bits: 0 for equal shares, 1 for disjoint ones.

    It is the mean Kullback-Leibler divergence of both shares from their mean, with logarithms to
    base 2 (Lin, IEEE Transactions on Information Theory 37, 1991); times ln 2 it is in nats. It is
    nan for a load without assignments.
    """
    # scipy's jensenshannon is nan for loads that differ by rounding, as the root of a negative sum.
    p_XE, q_XE = share(count_XE), share(other_XE)
    mean_XE = (p_XE + q_XE) / 2
    bits_X = (special.rel_entr(p_XE, mean_XE) + special.rel_entr(q_XE, mean_XE)).sum(axis=-1)
    empty_X = (p_XE.sum(axis=-1) == 0) | (q_XE.sum(axis=-1) == 0)
    return np.where(empty_X, np.nan, bits_X.clip(min=0) / (2 * np.log(2)))


def label_divergences(count_GE: np.ndarray) -> np.ndarray:
    """[G, G]: the Jensen-Shannon divergence between the loads of each two labels, in bits."""
    count_GE = np.asarray(count_GE)
    return np.stack([js_divergence(count_GE, row_E[None]) for row_E in count_GE])


def coactivation(pairs_EE: np.ndarray) -> np.ndarray:
    """[E, E]: N_ij / N_i, the fraction of expert i's tokens that also go to expert j; N_ii is 1.

    All pairs of a token's experts count, as in the formula of Muennighoff et al. (OLMoE, arXiv
    2409.02060, §5.2), and not only neighbours in the order of the gates. It is not symmetric. Its
    base line for i ≠ j is (k - 1)/(E - 1). A row of an expert without tokens is 0.
    """
    pairs_EE = np.asarray(pairs_EE, np.float64)
    return pairs_EE / np.maximum(np.diagonal(pairs_EE), 1)[:, None]


def most_coactive(coactivation_EE: np.ndarray, number: int) -> np.ndarray:
    """The experts of the strongest pairs, strongest first, so that partners stand side by side.

    A heatmap of `coactivation_EE[np.ix_(order, order)]` shows the experts with the most to show.
    """
    strength_EE = np.maximum(coactivation_EE, coactivation_EE.T)
    first, second = np.triu_indices(len(strength_EE), 1)
    falling = np.argsort(-strength_EE[first, second], kind="stable")
    pairs = np.stack([first[falling], second[falling]], axis=1)
    order = dict.fromkeys([*pairs.ravel().tolist(), *range(len(strength_EE))])
    return np.array(list(order)[:number], np.int64)


@dataclasses.dataclass(frozen=True)
class Gates:
    """The router's confidence in one layer.

    probability_P: the mean of the largest, second and third probability; the first is the mean
      confidence, 1/E for a router that knows nothing and 1 for a certain one.
    weight_A: the mean gate of each slot, as the layer applies it.
    of_means_R: the ratio of the first to the second mean probability, and of the second to third.
    quartiles_RQ: the 25th, 50th and 75th percentile over tokens of the same ratios of one token.
      They are exact to a bin of 4.4 %, and 65536 means that or more.
    """

    probability_P: np.ndarray
    weight_A: np.ndarray
    of_means_R: np.ndarray
    quartiles_RQ: np.ndarray


def gates(counts: Counts) -> Gates:
    """Confidence and gate ratios, which Skywork-MoE follows (Wei et al., arXiv 2406.06563, fig. 3).

    A ratio of 1 means that the router does not tell the two experts apart. The third probability
    is missing if there are two experts.
    """
    mean_P = counts.mean_probability_P
    quartiles = [_ratio_quantiles(row_B) for row_B in np.asarray(counts.ratio_RB)]
    return Gates(
        probability_P=mean_P,
        weight_A=counts.mean_weight_A,
        of_means_R=mean_P[:-1] / np.maximum(mean_P[1:], np.finfo(np.float64).tiny),
        quartiles_RQ=np.array(quartiles).reshape(-1, 3),
    )


def _ratio_quantiles(count_B: np.ndarray) -> list[float]:
    """The quartiles of a histogram of ratios, interpolated within a bin on the log scale."""
    below_B = np.concatenate([[0], np.cumsum(count_B, dtype=np.int64)])
    wanted_Q = np.array([0.25, 0.5, 0.75]) * below_B[-1]
    bin_Q = np.clip(np.searchsorted(below_B, wanted_Q, side="left") - 1, 0, len(count_B) - 1)
    part_Q = (wanted_Q - below_B[bin_Q]) / np.maximum(np.asarray(count_B)[bin_Q], 1)
    part_Q = np.where(bin_Q == len(count_B) - 1, 1, part_Q)  # the last bin has no upper end
    return (2.0 ** ((bin_Q + part_Q) / routing_counts.BINS_PER_OCTAVE)).tolist()


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """One layer's vocabulary specialisation for one kind of id.

    mean: the mean over all ids seen of the largest share of an expert; num_ids is their number.
    mean_frequent: the same over the ids that occur often enough to be listed.
    chance: the mean over all ids seen if experts had nothing to do with ids. It is far above 1/E,
      because an id that occurs once has one expert.
    id_I, expert_I, share_I, occurrences_I: the frequent ids, the most specialised first, with the
      expert that has the largest share of each.
    """

    mean: float
    num_ids: int
    mean_frequent: float
    chance: float
    id_I: np.ndarray
    expert_I: np.ndarray
    share_I: np.ndarray
    occurrences_I: np.ndarray


def vocabulary(count_VE: np.ndarray, *, frequent: int = 10, seed: int = 0) -> Vocabulary:
    """Vocabulary specialisation from `routing_counts.count_vocabulary`, summed over batches.

    Muennighoff et al., OLMoE (arXiv 2409.02060, §5.4) with k = 1: the share N_xi / N_x of an id's
    occurrences that expert i has. The chance level is the mean of random draws in which every
    occurrence chooses its expert by the layer's load. Means over no ids are nan.
    """
    count_VE = np.asarray(count_VE)
    total_V, largest_V = count_VE.sum(axis=1), count_VE.max(axis=1)
    seen_V = total_V > 0
    load_E = share(count_VE.sum(axis=0))
    rng = np.random.default_rng(seed)
    drawn = [
        _mean(rng.multinomial(total_V[seen_V], load_E).max(axis=1) / total_V[seen_V])
        for _ in range(CHANCE_DRAWS)
    ]
    share_V = largest_V / np.maximum(total_V, 1)
    id_I = np.flatnonzero(total_V >= frequent)
    id_I = id_I[np.lexsort([id_I, -total_V[id_I], -share_V[id_I]])]
    return Vocabulary(
        mean=_mean(share_V[seen_V]),
        num_ids=int(seen_V.sum()),
        mean_frequent=_mean(share_V[id_I]),
        chance=_mean(np.array(drawn)),
        id_I=id_I,
        expert_I=count_VE[id_I].argmax(axis=1),
        share_I=share_V[id_I],
        occurrences_I=total_V[id_I],
    )


def interval(sum_U: np.ndarray, size_U: np.ndarray) -> tuple[float, float] | None:
    """95 % of sum/size, a mean over tokens that are independent only between units.

    The ratio estimator's normal interval (Cochran, "Sampling techniques", 1977, equation 6.13);
    None for fewer than 20 units.
    """
    sum_U, size_U = np.asarray(sum_U, np.float64), np.asarray(size_U, np.float64)
    if (U := len(size_U)) < FEWEST_UNITS:
        return None
    mean = sum_U.sum() / size_U.sum()
    squares = ((sum_U - mean * size_U) ** 2).sum() * U / (U - 1)
    half = STANDARD_ERRORS * float(np.sqrt(squares)) / size_U.sum()
    return float(mean - half), float(mean + half)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")


@dataclasses.dataclass(frozen=True)
class Stability:
    """The agreement of two routers after the best matching of their experts.

    agreement: the fraction of assignments on which they agree; 1 for routers that differ in the
      order of experts only.
    chance: the largest agreement of a matching if the two routers were independent, given both
      loads; 1/E when these are even.
    matched_E: the other router's expert that matches each expert of the first.
    n: the number of assignments.
    """

    agreement: float
    chance: float
    matched_E: np.ndarray
    n: int


def stability(joint_EE: np.ndarray, num_assignments: int) -> Stability:
    """Agreement between seeds, from `routing_counts.count_joint` of their routers on one text.

    The permutation of experts that maximises the number of common assignments is found by the
    Hungarian method (Kuhn, Naval Research Logistics Quarterly 2, 1955; scipy's
    linear_sum_assignment).

    Args: num_assignments: tokens times experts per token.
    """
    joint_EE = np.asarray(joint_EE, np.int64)
    rows, matched_E = optimize.linear_sum_assignment(joint_EE, maximize=True)
    # Summed over the other router's experts, a token counts once for each of its k slots. The
    # best matching of independent routers pairs experts in the order of their loads.
    loads = [np.sort(share(joint_EE.sum(axis=axis))) for axis in (0, 1)]
    k_share = joint_EE.sum() / max(num_assignments, 1)
    return Stability(
        agreement=int(joint_EE[rows, matched_E].sum()) / max(num_assignments, 1),
        chance=float(k_share * (loads[0] * loads[1]).sum()),
        matched_E=matched_E,
        n=num_assignments,
    )
