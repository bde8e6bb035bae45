"""Statistics of languages: by hand, against libraries, on planted families and without any."""

import functools
import itertools
import json
import lzma
import pathlib

import numpy as np
import pytest
import sklearn.metrics
from scipy import cluster, stats
from scipy.spatial import distance

import moe_jax
from moe_jax.analysis import language_families, languages

L, E = 3, 8
CORPORA = pathlib.Path(moe_jax.__file__).parent / "data" / "corpora"
# Three families, of which the first has two branches, and two languages without relatives.
FAMILIES = [*"AAAAAAAA", *"BBBBB", *"CCCC", "D", "E"]
BRANCHES = ["A1"] * 4 + ["A2"] * 4 + FAMILIES[8:]


def planted(seed=0, tokens=4000, strength=1.0):
    """Counts [L, G, E] of languages whose routing drifts down a known tree."""
    rng = np.random.default_rng(seed)
    drifts = {name: rng.normal(size=(L, E)) for name in sorted({*FAMILIES, *BRANCHES})}
    counts = []
    for family, branch in zip(FAMILIES, BRANCHES, strict=True):
        own_LE = rng.normal(size=(L, E))
        logits_LE = strength * (drifts[family] + 0.7 * drifts[branch]) + 0.3 * own_LE
        p_LE = np.exp(logits_LE) / np.exp(logits_LE).sum(axis=1, keepdims=True)
        counts.append(rng.multinomial(tokens, p_LE))
    return np.stack(counts, axis=1)


def tree_distances():
    """0 to itself, 1 within a branch, 2 within a family, 3 between families."""
    far = languages.same_family(FAMILIES) + languages.same_family(BRANCHES) + 1
    return far - np.diag(np.diagonal(far))


def random_distances(seed, G=12):
    return distance.squareform(distance.pdist(np.random.default_rng(seed).normal(size=(G, 5))))


@pytest.fixture(scope="module")
def vector_GX():
    return languages.vectors(planted())


def test_vectors_and_specificity_by_hand():
    vector_GX = languages.vectors([[[2, 2], [1, 3]], [[0, 5], [6, 2]]])
    assert vector_GX.tolist() == [[0.5, 0.5, 0, 1], [0.25, 0.75, 0.75, 0.25]]
    found = languages.specificity(vector_GX, 2)
    assert found.share_LE.tolist() == [[0.5, 0.75], [0.75, 1]]
    assert found.language_LE.tolist() == [[0, 1], [1, 0]]


def test_a_language_without_tokens_is_refused():
    with pytest.raises(ValueError, match="language number 1 has no tokens in some layer"):
        languages.vectors([[[1, 1], [0, 0]]])


def test_distances_by_hand():
    """Blocks (1, 0 | 1/2, 1/2) and (0, 1 | 1/2, 1/2): 1 bit apart in one of two layers."""
    vector_GX = np.array([[1, 0, 0.5, 0.5], [0, 1, 0.5, 0.5]])
    assert languages.distances(vector_GX)[0, 1] == pytest.approx(np.sqrt(1 / 2))
    assert languages.distances(vector_GX, "euclidean")[0, 1] == pytest.approx(np.sqrt(2))
    assert languages.distances(vector_GX, "cosine")[0, 1] == pytest.approx(1 - 0.5 / 1.5)
    layers = languages.layer_distances(vector_GX, 2)
    np.testing.assert_allclose(layers[:, 0, 1], [1, 0], atol=1e-7)


def test_the_divergence_is_the_mean_of_the_layers(vector_GX):
    of_layers = languages.layer_distances(vector_GX, L)
    mean_GG = np.square(of_layers).mean(axis=0)
    np.testing.assert_allclose(np.square(languages.distances(vector_GX)), mean_GG, atol=1e-12)


def test_the_divergence_is_that_of_scipy_and_no_nan_for_languages_that_differ_by_rounding(
    vector_GX,
):
    reference = distance.pdist(vector_GX, "jensenshannon") / np.sqrt(np.log(2))
    np.testing.assert_allclose(languages.js_distances(vector_GX), reference, rtol=1e-9)
    twins_GX = vector_GX * (1 + 1e-15 * np.random.default_rng(0).normal(size=vector_GX.shape))
    both = [
        languages.js_distances(np.stack(pair)) for pair in zip(vector_GX, twins_GX, strict=True)
    ]
    np.testing.assert_allclose(both, 0, atol=1e-7)


def test_mantel_is_the_rank_correlation_of_scipy_and_its_p_that_of_all_permutations():
    a_GG, b_GG = random_distances(0, G=6), random_distances(1, G=6)
    b_GG = b_GG + 0.7 * a_GG
    pairs = np.triu_indices(6, 1)
    for method, reference in (("spearman", stats.spearmanr), ("pearson", stats.pearsonr)):
        found = languages.mantel(a_GG, b_GG, method=method, permutations=4999)
        assert found.statistic == pytest.approx(reference(a_GG[pairs], b_GG[pairs])[0])
        every = [
            reference(a_GG[pairs], b_GG[np.ix_(p, p)][pairs])[0]
            for p in itertools.permutations(range(6))
        ]
        exact = np.mean(np.array(every) >= found.statistic - 1e-12)
        assert found.p == pytest.approx(exact, abs=4 * np.sqrt(exact / 4999))
        assert found.n == 6 and found.chance == pytest.approx(0, abs=0.05)


def test_mantel_by_hand():
    """Points 0, 1, 3, 7 on a line against themselves, in any unit: 1, and 1 of 24 orders is so."""
    line_GG = np.abs(np.subtract.outer([0, 1, 3, 7], [0, 1, 3, 7])).astype(float)
    found = languages.mantel(line_GG, 5 * line_GG**2, permutations=2399)
    assert found.statistic == pytest.approx(1)
    assert found.p == pytest.approx(1 / 24, abs=0.015)
    assert found.interval is None  # too few languages


def test_an_interval_stays_within_the_possible_range_and_needs_ten_languages():
    at = np.random.default_rng(0).normal(size=12)
    line_GG = np.abs(np.subtract.outer(at, at))
    noisy_GG = line_GG + np.abs(np.subtract.outer(at**2, at**2)) / 9
    low, high = languages.mantel(line_GG, noisy_GG, permutations=9).interval
    assert 0.5 < low < high <= 1
    of_nine = languages.mantel(line_GG[:9, :9], noisy_GG[:9, :9], permutations=9)
    assert of_nine.interval is None


def test_mantel_refuses_what_says_nothing():
    with pytest.raises(ValueError, match="give four or more"):
        languages.mantel(np.zeros((3, 3)), np.zeros((3, 3)))
    with pytest.raises(ValueError, match="all distances are equal"):
        languages.mantel(random_distances(0), languages.same_family("ABCDEFGHIJKL"))


def test_silhouette_is_that_of_scikit_learn_over_languages_with_relatives(vector_GX):
    distance_GG = languages.distances(vector_GX)
    found = languages.family_silhouette(distance_GG, FAMILIES, permutations=9)
    each_G = sklearn.metrics.silhouette_samples(distance_GG, FAMILIES, metric="precomputed")
    assert found.statistic == pytest.approx(each_G[:17].mean())
    assert found.n == 17


def test_silhouette_and_purity_by_hand():
    """On a line: a at 0 and 1, b at 10 and 12, c at 2 (alone)."""
    at = np.array([0.0, 1, 10, 12, 2])
    distance_GG, families = np.abs(at[:, None] - at), ["a", "a", "b", "b", "c"]
    found = languages.family_silhouette(distance_GG, families, permutations=0)
    # Nearest other family: c at 2 and 1 for a, at 8 and 10 for b.
    by_hand = np.mean([(2 - 1) / 2, (1 - 1) / 1, (8 - 2) / 8, (10 - 2) / 10])
    assert found.statistic == pytest.approx(by_hand)
    found = languages.knn_purity(distance_GG, families, permutations=0)
    assert found.statistic == 1  # a tie at 1: its relative comes before c
    found = languages.knn_purity(distance_GG, families, k=2, permutations=0)
    assert found.statistic == 1 / 2 and found.n == 4


def test_purity_is_that_of_a_loop_and_its_chance_that_of_random_neighbours(vector_GX):
    distance_GG = languages.distances(vector_GX)
    found = languages.knn_purity(distance_GG, FAMILIES, k=3, permutations=400)
    looped = []
    for g in range(17):
        near = sorted((h for h in range(len(FAMILIES)) if h != g), key=lambda h: distance_GG[g, h])
        looped.append(np.mean([FAMILIES[h] == FAMILIES[g] for h in near[:3]]))
    assert found.statistic == pytest.approx(np.mean(looped))
    expected = np.mean([(FAMILIES.count(f) - 1) / 18 for f in FAMILIES[:17]])
    assert found.chance == pytest.approx(expected, abs=0.02)


def test_families_without_relatives_are_refused():
    for families in ("ABCDE", "AAAAA"):
        with pytest.raises(ValueError, match="give two families or more, one of them with two"):
            languages.knn_purity(random_distances(0, G=5), families)


def test_the_jackknife_of_a_mean_is_its_textbook_interval():
    values = np.random.default_rng(0).normal(size=20)
    low, high = languages._jackknife(
        lambda chosen: values[chosen].mean(), 20, np.arange(20), values.mean()
    )
    error = values.std(ddof=1) / np.sqrt(20)
    assert (low, high) == pytest.approx(
        (values.mean() - 1.96 * error, values.mean() + 1.96 * error)
    )


TESTS = {
    "mantel": lambda d, f, **k: languages.mantel(d, languages.same_family(f), **k),
    "silhouette": languages.family_silhouette,
    "purity": functools.partial(languages.knn_purity, k=3),
}


@pytest.mark.parametrize("metric", languages.METRICS)
def test_a_planted_tree_of_languages_is_recovered(vector_GX, metric):
    distance_GG = languages.distances(vector_GX, metric)
    found = languages.mantel(distance_GG, tree_distances(), permutations=999)
    assert found.p < 0.01 and found.statistic > 0.3
    assert found.interval[0] > 0
    for test in TESTS.values():
        assert test(distance_GG, FAMILIES, permutations=999).p < 0.01
    clusters = cluster.hierarchy.fcluster(languages.linkage(distance_GG), 5, "maxclust")
    assert sklearn.metrics.adjusted_rand_score(FAMILIES, clusters) > 0.6


def test_a_planted_tree_is_recovered_in_each_layer(vector_GX):
    for distance_GG in languages.layer_distances(vector_GX, L):
        assert languages.mantel(distance_GG, tree_distances(), permutations=999).p < 0.01


@pytest.mark.parametrize(
    "name", ["mantel", "silhouette", pytest.param("purity", marks=pytest.mark.long)]
)
def test_shuffled_families_give_uniform_p(name, vector_GX):
    """200 draws, Kolmogorov-Smirnov. Ties make the p of the purity larger, never smaller."""
    distance_GG, rng = languages.distances(vector_GX), np.random.default_rng(0)
    p = [
        TESTS[name](distance_GG, rng.permutation(FAMILIES).tolist(), permutations=79, seed=seed).p
        for seed in range(200)
    ]
    alternative = "greater" if name == "purity" else "two-sided"
    assert stats.kstest(p, "uniform", alternative=alternative).pvalue > 0.05


def test_the_map_puts_relatives_together_and_is_the_same_each_time(vector_GX):
    position_G2 = languages.tsne(vector_GX)
    assert position_G2.shape == (19, 2)
    np.testing.assert_array_equal(position_G2, languages.tsne(vector_GX))
    distance_GG = distance.squareform(distance.pdist(position_G2))
    assert languages.knn_purity(distance_GG, FAMILIES, permutations=199).p < 0.01


def test_a_file_of_distances_is_read_and_matched_by_language(tmp_path):
    path = tmp_path / "distances.csv"
    path.write_text(",por,deu, xyz\npor,0,.5,1\ndeu,.5,0,2e-1\nxyz,1,.2,0\n\n")
    found = languages.read_distances(path)
    assert found.names == ("por", "deu", "xyz")
    assert found.distance_GG.tolist() == [[0, 0.5, 1], [0.5, 0, 0.2], [1, 0.2, 0]]
    both = languages.align(["de", "en-us", "pt-br"], found.names)
    assert (both.ours.tolist(), both.theirs.tolist()) == ([0, 2], [1, 0])
    assert (both.only_ours, both.only_theirs) == (("en-us",), ("xyz",))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "0 languages in its first row"),
        (",a\na,0\n", "1 languages in its first row"),
        (",a,b\na,0,1\nc,1,0\n", "first column has 'c' where the first row differs"),
        (",a,b\na,0,1\n", "first column has '1 rows' where"),
        (",a,a\na,0,1\na,1,0\n", "language 'a' is named twice"),
        (",a,b\na,0,1\nb,1\n", "line 3 has 2 cells, not 3"),
        (",a,b\na,0,x\nb,1,0\n", "line 2 has 'x', which is not a distance"),
        (",a,b\na,0,nan\nb,1,0\n", "line 2 has 'nan'"),
        (",a,b\na,0,-1\nb,-1,0\n", "line 2 has '-1'"),
        (",a,b\na,1,0\nb,0,1\n", "not symmetric with a diagonal of 0"),
        (",a,b\na,0,1\nb,2,0\n", "not symmetric"),
    ],
)
def test_a_wrong_file_of_distances_is_refused_in_one_line(tmp_path, text, words):
    path = tmp_path / "distances.csv"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        languages.read_distances(path)
    assert words in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="is not a file"):
        languages.read_distances(tmp_path / "missing.csv")


def test_the_table_of_families_is_that_of_the_embedded_probe_and_has_the_embedded_corpus():
    def records(name):
        with lzma.open(CORPORA / name, "rt", encoding="utf-8") as lines:
            return [json.loads(line) for line in itertools.islice(lines, 71)]

    of_probe = {r["language"]: r["family"] for r in records("udhr_languages.jsonl.xz")}
    assert language_families.FAMILIES == of_probe
    assert set(language_families.SHORT.values()) <= set(of_probe)
    of_corpus = {r["lang"] for r in records("lo_parallel19.jsonl.xz")}
    assert len(of_corpus) == 19 and all(map(language_families.family, of_corpus))


@pytest.mark.parametrize(
    ("tag", "code", "family"),
    [
        ("pt-BR", "por", "Indo-European"),
        ("zh_cn", "cmn", "Sino-Tibetan"),
        ("eus", "eus", "Basque"),
        ("software_help/general", "software_help/general", None),
        ("swriter", "swriter", None),
    ],
)
def test_tags_have_one_code_for_one_language(tag, code, family):
    assert language_families.canonical(tag) == code
    assert language_families.family(tag) == family
