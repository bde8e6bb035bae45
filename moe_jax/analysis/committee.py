"""The standing committee: experts that have a high load whatever the text is about."""

import dataclasses
import itertools

import numpy as np
from scipy import sparse

from moe_jax.analysis import routing


@dataclasses.dataclass(frozen=True)
class Committee:
    """The experts that are in the top group of every label, in one layer.

    size: the number of experts in a label's top group.
    members: the experts of all top groups, by falling share.
    share: the members' share of the assignments, mean over labels; its base line is members/E.
    gini: how unevenly the load is spread over experts, mean over labels: 0 evenly, 1 - 1/E for one
      expert with everything.
    jaccard: the mean over pairs of labels of |both top groups| / |either|: 1 for equal groups.
    chance, p_shared: the mean `jaccard` of independent random groups of this size, and the p-value
      that these overlap as much or more.
    shuffled, p_labels: the mean `jaccard` of labels without a meaning, permuted over units, and the
      p-value that their groups differ as much or more.
    divergence, p_divergence: the mean Jensen-Shannon divergence in bits between the whole loads of
      two labels, and the p-value that labels without a meaning diverge as much or more. It finds
      differences that leave the top groups as they are.
    n: the number of units whose labels were permuted.
    draws: the number of permutations of each null.
    """

    size: int
    members: tuple[int, ...]
    share: float
    gini: float
    jaccard: float
    chance: float
    p_shared: float
    shuffled: float
    p_labels: float
    divergence: float
    p_divergence: float
    n: int
    draws: int


def committee(
    count_UE: np.ndarray,
    label_U: np.ndarray,
    *,
    num_labels: int,
    size: int,
    draws: int = 999,
    seed: int = 0,
) -> Committee:
    """The standing committee of one layer, with its permutation nulls.

    Args:
      count_UE: assignments of each unit to each expert. A unit is what keeps its label together:
        a document. Single tokens are units too, but the tokens of a document are not independent,
        so that the p-values are then too small.
      label_U: the label of each unit, in 0 … G - 1.
      size: the size of a label's top group, such as the experts per token.

    Raises: ValueError for fewer than two labels with assignments, or a size that is not in 1 … E.
    """
    count_UE, label_U = np.asarray(count_UE, np.int64), np.asarray(label_U)
    E = count_UE.shape[1]
    count_GE = _by_label(count_UE, label_U, num_labels)
    used_G = count_GE.sum(axis=1) > 0
    if used_G.sum() < 2 or not 1 <= size <= E:
        raise ValueError(
            f"a committee of size={size} among {E} experts over {int(used_G.sum())} labels cannot "
            f"be; give a size from 1 to {E} and text of two labels or more"
        )
    count_GE = count_GE[used_G]
    top_GE, rng = _top(count_GE, size), np.random.default_rng(seed)
    jaccard, divergence = mean_jaccard(top_GE), _mean_divergence(count_GE)
    shared_D = np.array([mean_jaccard(rng.permuted(top_GE, axis=1)) for _ in range(draws)])
    shuffled_D, divergence_D = np.zeros(draws), np.zeros(draws)
    for d in range(draws):
        drawn_GE = _by_label(count_UE, rng.permutation(label_U), num_labels)[used_G]
        shuffled_D[d] = mean_jaccard(_top(drawn_GE, size))
        divergence_D[d] = _mean_divergence(drawn_GE)
    share_GE = routing.share(count_GE)
    mean_E = share_GE.mean(axis=0)
    members = [e for e in np.argsort(-mean_E, kind="stable").tolist() if top_GE[:, e].all()]
    return Committee(
        size=size,
        members=tuple(members),
        share=float(mean_E[members].sum()),
        gini=float(gini(share_GE).mean()),
        jaccard=jaccard,
        chance=float(shared_D.mean()),
        p_shared=_p_value(shared_D >= jaccard - 1e-12),
        shuffled=float(shuffled_D.mean()),
        p_labels=_p_value(shuffled_D <= jaccard + 1e-12),
        divergence=divergence,
        p_divergence=_p_value(divergence_D >= divergence - 1e-12),
        n=len(label_U),
        draws=draws,
    )


def gini(count_XE: np.ndarray) -> np.ndarray:
    """The Gini coefficient of each load: 0 when even, 1 - 1/E when one expert has it all.

    It is the mean absolute difference of two experts' shares, over twice the mean share.
    """
    share_XE = np.sort(routing.share(count_XE), axis=-1)
    E = share_XE.shape[-1]
    weight_E = 2 * np.arange(1, E + 1) - E - 1
    return (share_XE * weight_E).sum(axis=-1) / E


def mean_jaccard(top_GE: np.ndarray) -> float:
    """The mean over pairs of rows of the Jaccard index of two sets, given as booleans."""
    pairs = itertools.combinations(range(len(top_GE)), 2)
    first_P, second_P = np.array(list(pairs)).T
    both_P = (top_GE[first_P] & top_GE[second_P]).sum(axis=1)
    return float((both_P / (top_GE[first_P] | top_GE[second_P]).sum(axis=1)).mean())


def _mean_divergence(count_GE: np.ndarray) -> float:
    return float(routing.label_divergences(count_GE)[np.triu_indices(len(count_GE), 1)].mean())


def _p_value(as_extreme_D: np.ndarray) -> float:
    return (1 + int(as_extreme_D.sum())) / (1 + len(as_extreme_D))


def _top(count_GE: np.ndarray, size: int) -> np.ndarray:
    """bool [G, E]: each row's busiest experts; of equal ones, those with the lower index."""
    top_GE = np.zeros(count_GE.shape, bool)
    order_GE = np.argsort(-count_GE, axis=1, kind="stable")
    np.put_along_axis(top_GE, order_GE[:, :size], True, axis=1)
    return top_GE


def _by_label(count_UE: np.ndarray, label_U: np.ndarray, num_labels: int) -> np.ndarray:
    U = len(label_U)
    ones_U = np.ones(U, np.int64)
    return sparse.csr_array((ones_U, (label_U, np.arange(U))), (num_labels, U)) @ count_UE
