"""The standing committee: experts that have a high load whatever the text is about."""

import dataclasses
import itertools

import numpy as np

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
    chance: the mean `jaccard` of random groups of this size.
    p_shared: p-value that independent groups of this size overlap as much or more.
    p_labels: p-value that labels without a meaning give groups that differ as much or more.
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
    p_labels: float
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
    """The standing committee of one layer, with two permutation nulls.

    Args:
      count_UE: assignments of each unit to each expert. A unit is what keeps its label together:
        a document. Single tokens are units too, but the tokens of a document are not independent,
        so that p_labels is then too small.
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
    top_GE = _top(count_GE[used_G], size)
    observed, rng = mean_jaccard(top_GE), np.random.default_rng(seed)
    shared = [mean_jaccard(rng.permuted(top_GE, axis=1)) for _ in range(draws)]
    by_chance = []
    for _ in range(draws):
        drawn_GE = _by_label(count_UE, rng.permutation(label_U), num_labels)
        by_chance.append(mean_jaccard(_top(drawn_GE[used_G], size)))
    share_GE = routing.share(count_GE[used_G])
    mean_E = share_GE.mean(axis=0)
    members = [e for e in np.argsort(-mean_E, kind="stable").tolist() if top_GE[:, e].all()]
    return Committee(
        size=size,
        members=tuple(members),
        share=float(mean_E[members].sum()),
        gini=float(gini(share_GE).mean()),
        jaccard=observed,
        chance=float(np.mean(shared)),
        p_shared=(1 + sum(value >= observed - 1e-12 for value in shared)) / (1 + draws),
        p_labels=(1 + sum(value <= observed + 1e-12 for value in by_chance)) / (1 + draws),
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


def _top(count_GE: np.ndarray, size: int) -> np.ndarray:
    """bool [G, E]: each row's busiest experts; of equal ones, those with the lower index."""
    top_GE = np.zeros(count_GE.shape, bool)
    order_GE = np.argsort(-count_GE, axis=1, kind="stable")
    np.put_along_axis(top_GE, order_GE[:, :size], True, axis=1)
    return top_GE


def _by_label(count_UE: np.ndarray, label_U: np.ndarray, num_labels: int) -> np.ndarray:
    label_GU = np.arange(num_labels)[:, None] == label_U
    # BLAS has no integers; float64 holds them to 2^53.
    return (label_GU.astype(np.float64) @ count_UE.astype(np.float64)).astype(np.int64)
