"""Languages as points in the space of experts, and whether relatives are near to each other.

A language's vector has one block per sparse layer, each the shares of the layer's experts (LOLA,
Srivastava et al., arXiv 2409.11272). X is the length of a vector, L·E.
"""

import csv
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from scipy import cluster, stats
from scipy.spatial import distance
from sklearn import manifold

from moe_jax import untrusted
from moe_jax.analysis import language_families, routing

MOST_LANGUAGES = 2000  # of a file of distances
FEWEST_FOR_INTERVAL = 10  # languages: with fewer, a jackknife's error is a guess
INTERVAL = 1.96  # standard errors on either side: 95 %


@dataclasses.dataclass(frozen=True)
class Finding:
    """A statistic with what a claim needs.

    p: the one-sided p-value of a permutation test, (1 + permutations as large)/(1 + permutations).
    n: the number of languages that the statistic is computed from.
    interval: the statistic plus and minus 1.96 jackknife standard errors over languages; None if
      there are too few.
    chance: the mean of the statistic over the permutations.
    """

    statistic: float
    p: float
    n: int
    interval: tuple[float, float] | None
    chance: float


@dataclasses.dataclass(frozen=True)
class Specificity:
    """share_LE: the largest share that an expert has in any language; even routing gives 1/E.
    language_LE: the index of that language.
    """

    share_LE: np.ndarray
    language_LE: np.ndarray


def vectors(count_LGE: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """[G, X]: the languages' vectors, from each layer's counts of the first expert, [G, E].

    Raises: ValueError for a language without tokens.
    """
    count_LGE = np.asarray(count_LGE)
    empty_G = (count_LGE.sum(axis=2) == 0).any(axis=0)
    if empty_G.any():
        raise ValueError(
            f"language number {int(empty_G.argmax())} has no tokens in some layer; leave it out"
        )
    share_LGE = routing.share(count_LGE)
    return np.moveaxis(share_LGE, 0, 1).reshape(count_LGE.shape[1], -1)


def specificity(vector_GX: np.ndarray, num_layers: int) -> Specificity:
    """Each expert's largest share over languages (LOLA, arXiv 2409.11272)."""
    share_GLE = vector_GX.reshape(len(vector_GX), num_layers, -1)
    return Specificity(share_GLE.max(axis=0), share_GLE.argmax(axis=0))


def js_distances(vector_GX: np.ndarray) -> np.ndarray:
    """Condensed Jensen-Shannon distances: the root of the mean over layers of the divergence in
    bits, so from 0 to 1. The root is a metric (Endres and Schindelin, IEEE Transactions on
    Information Theory 49, 2003)."""
    # A whole vector's shares are its blocks over L, so their divergence is the mean over layers.
    return distance.squareform(np.sqrt(routing.label_divergences(vector_GX)), checks=False)


# Each row is a function from vectors to scipy's condensed distances.
METRICS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "js": js_distances,
    "cosine": functools.partial(distance.pdist, metric="cosine"),
    "euclidean": functools.partial(distance.pdist, metric="euclidean"),
}


def distances(vector_GX: np.ndarray, metric: str = "js") -> np.ndarray:
    """[G, G]: the distance between each two languages, by a row of METRICS."""
    return distance.squareform(METRICS[metric](vector_GX))


def layer_distances(vector_GX: np.ndarray, num_layers: int, metric: str = "js") -> np.ndarray:
    """[L, G, G]: the distances in each layer alone."""
    return np.stack([distances(block, metric) for block in np.split(vector_GX, num_layers, 1)])


def linkage(distance_GG: np.ndarray) -> np.ndarray:
    """[G - 1, 4]: hierarchical clustering by average linkage, in scipy's form.

    The leaves are ordered so that neighbours are as near as the tree allows.
    """
    condensed = distance.squareform(distance_GG, checks=False)
    return cluster.hierarchy.linkage(condensed, "average", optimal_ordering=True)


def tsne(vector_GX: np.ndarray, *, perplexity: float = 30.0, seed: int = 0) -> np.ndarray:
    """[G, 2]: t-SNE with the settings of LOLA: learning rate 250, start from the main components.

    Few languages have fewer neighbours: the perplexity is at most (G - 1)/3. Distances between far
    points, and sizes of groups, mean nothing in such a map.
    """
    perplexity = min(perplexity, (len(vector_GX) - 1) / 3)
    # The exact method is fast for so few points, and starts no threads.
    rest = {"init": "pca", "method": "exact", "random_state": seed}
    model = manifold.TSNE(perplexity=perplexity, learning_rate=250.0, **rest)
    return model.fit_transform(vector_GX)


def same_family(families: Sequence[str]) -> np.ndarray:
    """[G, G]: distances by family, 0 within and 1 between families."""
    families_G = np.array(list(families))
    return (families_G[:, None] != families_G).astype(np.float64)


def mantel(
    distance_GG: np.ndarray,
    other_GG: np.ndarray,
    *,
    method: str = "spearman",
    permutations: int = 9999,
    seed: int = 0,
) -> Finding:
    """The correlation of two distance matrices, tested by permuting the languages of one.

    Mantel, Cancer Research 27 (1967). A large statistic means that languages which are far by one
    distance are far by the other. The base line is 0.

    Args: method: "spearman" correlates ranks, "pearson" the distances themselves.

    Raises: ValueError for fewer than four languages, or equal distances throughout.
    """
    G = len(distance_GG)
    if G < 4:
        raise ValueError(f"a Mantel test of {G} languages says nothing; give four or more")
    correlate = functools.partial(_correlation, distance_GG, other_GG, method)
    prepared_GG = _standard(distance_GG, method), _standard(other_GG, method)
    if not all(np.any(standard_GG) for standard_GG in prepared_GG):
        raise ValueError("all distances are equal; a correlation needs some that differ")

    def of_order(order_G):
        return float(np.vdot(prepared_GG[0], prepared_GG[1][np.ix_(order_G, order_G)])) / 2

    return _finding(of_order, G, correlate, np.arange(G), permutations, seed)


def family_silhouette(
    distance_GG: np.ndarray, families: Sequence[str], *, permutations: int = 999, seed: int = 0
) -> Finding:
    """The mean silhouette of languages that have relatives, tested by permuting the families.

    A language's silhouette is (b - a)/max(a, b) with a the mean distance to its relatives and b
    that to the nearest other family (Rousseeuw, Journal of Computational and Applied Mathematics
    20, 1987): 1 if families are far apart, below 0 if another family is nearer. Languages without
    relatives are other families for the rest, and have no silhouette themselves.

    Raises: ValueError if no two languages are relatives, or all are.
    """
    family_G = _family_numbers(families)

    def of(order_G, chosen_G):
        return _silhouette(distance_GG[np.ix_(chosen_G, chosen_G)], family_G[order_G][chosen_G])

    return _family_finding(of, family_G, permutations, seed)


def knn_purity(
    distance_GG: np.ndarray,
    families: Sequence[str],
    *,
    k: int = 1,
    permutations: int = 999,
    seed: int = 0,
) -> Finding:
    """The fraction of relatives among the k nearest languages, mean over those with relatives.

    It is 1 if all k nearest are relatives, which a family of fewer than k + 1 cannot reach. Its
    base line is `chance`, the mean over permutations of the families. Of equal distances the
    language that comes first is nearer.

    Raises: ValueError if no two languages are relatives, or all are.
    """
    family_G = _family_numbers(families)

    def of(order_G, chosen_G):
        return _purity(distance_GG[np.ix_(chosen_G, chosen_G)], family_G[order_G][chosen_G], k)

    # A jackknife does not work for nearest neighbours: their share changes in steps.
    found = _family_finding(of, family_G, permutations, seed)
    return dataclasses.replace(found, interval=None)


@dataclasses.dataclass(frozen=True)
class NamedDistances:
    """A distance matrix with the names of its rows."""

    names: tuple[str, ...]
    distance_GG: np.ndarray


@dataclasses.dataclass(frozen=True)
class Aligned:
    """The languages that two sides have in common.

    ours, theirs: indices of the same languages on either side.
    only_ours, only_theirs: the names that are left out.
    """

    ours: np.ndarray
    theirs: np.ndarray
    only_ours: tuple[str, ...]
    only_theirs: tuple[str, ...]


def read_distances(path: str | pathlib.Path) -> NamedDistances:
    """The distances of a CSV that names the languages in its first row and in its first column.

    Raises: ValueError in one line, with the file and the line, for a table that is not square, has
      unlike or repeated names, an entry that is not a number of 0 or more, a diagonal that is not
      0, or is not symmetric.
    """
    if not pathlib.Path(path).is_file():
        raise ValueError(f"{path} is not a file")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = [line for line in csv.reader(file) if any(map(str.strip, line))]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as CSV: {error}") from None
    for problem in _problems(lines):
        raise ValueError(f"{path}: {problem}")
    names = tuple(cell.strip() for cell in lines[0][1:])
    return NamedDistances(names, np.array([line[1:] for line in lines[1:]], np.float64))


def align(ours: Sequence[str], theirs: Sequence[str]) -> Aligned:
    """Matches names that are the same language, such as "pt-br" and "por"."""
    known = {language_families.canonical(name): i for i, name in enumerate(theirs)}
    found = [(i, known.get(language_families.canonical(name))) for i, name in enumerate(ours)]
    pairs = np.array([pair for pair in found if pair[1] is not None], np.int64).reshape(-1, 2)
    return Aligned(
        ours=pairs[:, 0],
        theirs=pairs[:, 1],
        only_ours=tuple(ours[i] for i, j in found if j is None),
        only_theirs=tuple(name for j, name in enumerate(theirs) if j not in pairs[:, 1]),
    )


def _problems(lines: list[list[str]]):
    lines = [[untrusted.label(cell.strip()) for cell in line] for line in lines]
    names = lines[0][1:] if lines else []
    if not 2 <= len(names) <= MOST_LANGUAGES:
        yield (
            f"{len(names)} languages in its first row; give an empty cell and 2 to "
            f"{MOST_LANGUAGES} names"
        )
    if repeated := [name for name in names if names.count(name) > 1]:
        yield f"language {repeated[0]!r} is named twice; keep one"
    if (rows := [line[0] for line in lines[1:]]) != names:
        odd = next((r for r, n in zip(rows, names, strict=False) if r != n), f"{len(rows)} rows")
        yield f"first column has {odd!r} where the first row differs; name the same languages"
    for number, line in enumerate(lines[1:], 2):
        if len(line) != len(names) + 1:
            yield f"line {number} has {len(line)} cells, not {len(names) + 1}"
        for cell in line[1:]:
            if not _is_distance(cell):
                yield f"line {number} has {cell!r}, which is not a distance of 0 or more"
    matrix = np.array([line[1:] for line in lines[1:]], np.float64)
    if np.diagonal(matrix).any() or not np.allclose(matrix, matrix.T):
        yield "not symmetric with a diagonal of 0; give distances, not similarities"


def _is_distance(cell: str) -> bool:
    try:
        return 0 <= float(cell) < np.inf
    except ValueError:
        return False


def _standard(distance_GG: np.ndarray, method: str) -> np.ndarray:
    """The distances, or their ranks, centred and scaled, so that a correlation is a product."""
    condensed = distance.squareform(np.asarray(distance_GG, np.float64), checks=False)
    values = stats.rankdata(condensed) if method == "spearman" else condensed
    values = values - values.mean()
    norm = np.linalg.norm(values)
    return distance.squareform(values / norm if norm > 1e-12 else np.zeros_like(values))


def _correlation(distance_GG, other_GG, method: str, chosen_G: np.ndarray) -> float:
    both = (_standard(d[np.ix_(chosen_G, chosen_G)], method) for d in (distance_GG, other_GG))
    return float(np.vdot(*both)) / 2


def _finding(of_order, G, of_chosen, jackknifed_G, permutations, seed) -> Finding:
    """A permutation test and a jackknife.

    Args: of_order: the statistic with the languages of one side in another order. of_chosen: the
      statistic of some languages alone. jackknifed_G: the languages that are left out in turn.
    """
    rng, statistic = np.random.default_rng(seed), of_order(np.arange(G))
    drawn = np.array([of_order(rng.permutation(G)) for _ in range(permutations)])
    return Finding(
        statistic=statistic,
        p=(1 + int((drawn >= statistic - 1e-12).sum())) / (1 + permutations),
        n=len(jackknifed_G),
        interval=_jackknife(of_chosen, G, jackknifed_G, statistic),
        chance=float(drawn.mean()) if permutations else float("nan"),
    )


def _jackknife(of_chosen, G, jackknifed_G, statistic: float) -> tuple[float, float] | None:
    """Efron and Stein, Annals of Statistics 9 (1981): each language is left out once."""
    n = len(jackknifed_G)
    without = np.array([of_chosen(np.delete(np.arange(G), g)) for g in jackknifed_G])
    if n < FEWEST_FOR_INTERVAL or not np.isfinite(without).all():
        return None
    error = np.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum())
    # Correlations and silhouettes are at most 1 from 0.
    return max(-1.0, float(statistic - INTERVAL * error)), min(
        1.0, float(statistic + INTERVAL * error)
    )


def _family_numbers(families: Sequence[str]) -> np.ndarray:
    family_G = np.unique(np.array(list(families)), return_inverse=True)[1]
    sizes = np.bincount(family_G)
    if len(sizes) < 2 or sizes.max() < 2:
        raise ValueError(
            f"{len(family_G)} languages of {len(sizes)} families have no relatives to compare with "
            "others; give two families or more, one of them with two languages"
        )
    return family_G


def _family_finding(of, family_G: np.ndarray, permutations: int, seed: int) -> Finding:
    G = len(family_G)
    everyone, related_G = np.arange(G), np.flatnonzero(np.bincount(family_G)[family_G] > 1)
    return _finding(
        lambda order_G: of(order_G, everyone),
        G,
        lambda chosen_G: of(everyone, chosen_G),
        related_G,
        permutations,
        seed,
    )


def _silhouette(distance_GG: np.ndarray, family_G: np.ndarray) -> float:
    member_GF = (family_G[:, None] == np.unique(family_G)).astype(np.float64)
    size_F = member_GF.sum(axis=0)
    related_G = member_GF @ size_F > 1
    sum_GF = distance_GG @ member_GF  # the language itself is at distance 0
    own_G = (sum_GF * member_GF).sum(axis=1) / np.maximum(member_GF @ size_F - 1, 1)
    other_G = np.where(member_GF > 0, np.inf, sum_GF / size_F).min(axis=1)
    silhouette_G = (other_G - own_G) / np.maximum(np.maximum(own_G, other_G), 1e-300)
    return float(silhouette_G[related_G].mean()) if related_G.any() else float("nan")


def _purity(distance_GG: np.ndarray, family_G: np.ndarray, k: int) -> float:
    related_G = np.bincount(family_G)[family_G] > 1
    away_GG = distance_GG + np.diag(np.full(len(distance_GG), np.inf))
    near_GK = np.argsort(away_GG, axis=1, kind="stable")[:, :k]
    pure_G = (family_G[near_GK] == family_G[:, None]).mean(axis=1)
    return float(pure_G[related_G].mean()) if related_G.any() else float("nan")
