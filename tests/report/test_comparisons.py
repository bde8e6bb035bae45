"""Groups of seeds, differences and intervals: by hand, and against scipy.stats."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from moe_jax.report import comparisons, records, results, tables
from tests.report import made_up


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return made_up.write_sweep(root, arms=2, seeds=3)


@pytest.fixture
def runs(folders):
    return [records.read_record(n, i, f) for i, (n, f) in enumerate(folders.items())]


def group(name, *bits, blocks=(), text="a"):
    """A group whose runs have these losses, and nothing else."""
    found = [
        records.Record(
            f"{name}{i}",
            i,
            {"data": {"source": text}, "init": {"source": ""}},
            {"bits_per_byte": b, "byte_unigram_bits": 1.0, "blocks": blocks or None},
            [],
            None,
        )
        for i, b in enumerate(bits)
    ]
    return records.Group(name, 0, tuple(found))


def names(groups):
    return {g.name: [record.name for record in g.records] for g in groups}


def test_runs_that_differ_in_their_seeds_only_are_one_group(runs):
    found = names(records.groups(runs))
    assert list(found) == ["dense", "dense_continued", "scratch", "naive", "drop_0.5"]
    assert found["naive"] == ["naive_s1", "naive_s2", "naive_s3"]


def test_another_value_makes_another_group_and_another_folder_of_files_does_not(runs):
    changed = {r.name: r for r in runs}
    naive = changed["naive_s1"]
    naive.config["data"] = {**naive.config["data"], "cache_dir": "elsewhere"}
    assert len(records.groups(runs)) == 5
    naive.config["data"] = {**naive.config["data"], "validation_fraction": 0.1}
    assert names(records.groups(runs))["naive_s1"] == ["naive_s1"]


def test_a_seed_counts_once(runs):
    twin = dataclasses.replace(runs[-1], name="again")
    found = records.groups([*runs, twin])
    assert len(found[-1].records) == 3
    assert records.left_out([*runs, twin], found) == [twin]
    assert records.left_out(runs, records.groups(runs)) == []


def test_children_of_parents_of_several_seeds_are_one_group(tmp_path):
    written = made_up.write_sweep(tmp_path, arms=1, seeds=2, parents=2)
    runs = [records.read_record(n, i, f) for i, (n, f) in enumerate(written.items())]
    found = records.groups(runs)
    assert names(found)["naive"] == ["naive_s1", "naive_s2"]
    assert names(found)["dense"] == ["dense_s0", "dense_s1"]
    by_name = {g.name: g for g in found}
    arms = names(found)
    del arms["dense"]
    assert names(results.arms(runs)) == arms
    del arms["dense_continued"]
    assert names(results.sparse(runs)) == arms
    assert records.parent_of(by_name["naive"], found) is by_name["dense"]
    assert records.continued(by_name["naive"], found) is by_name["dense_continued"]


def test_runs_that_name_each_other_as_sources_are_grouped(runs):
    runs[0].config["init"]["source"] = "runs/naive_s1"  # a stranger's workdirs
    assert names(records.groups(runs))["naive"] == ["naive_s2", "naive_s3"]


def test_relations_are_those_of_the_lineage_and_missing_without_the_runs(runs):
    found = records.groups(runs)
    dense, continued, scratch, naive, drop = found
    assert [records.parent_of(g, found) for g in found] == [None, dense, None, dense, dense]
    assert [records.continued(g, found) for g in found] == [None, None, None, continued, continued]
    without = [scratch, naive, drop]
    assert [records.parent_of(g, without) for g in without] == [None] * 3
    assert [records.continued(g, without) for g in without] == [None] * 3


def test_the_dense_control_is_known_without_the_parent_and_not_from_another_one(runs):
    without = records.groups([run for run in runs if run.name != "dense"])
    continued, scratch, naive, drop = without
    assert [records.continued(g, without) for g in without] == [None, None, continued, continued]
    for run in drop.records:
        run.config["init"]["source"] = "runs/x/other"
    assert records.continued(drop, without) is None


def test_runs_that_share_only_the_name_of_their_parent_have_no_control_where_two_are_shown(runs):
    """Two parents of one folder name: the whole paths decide."""
    dense = next(run for run in runs if run.name == "dense")
    twin = dataclasses.replace(dense, name="twin", config={**dense.config, "seed": 9})
    for run in runs:
        if run.name.startswith("naive"):
            run.config["init"]["source"] = "runs/y/dense"
    found = {group.name: group for group in records.groups([*runs, twin])}
    every = list(found.values())
    assert records.continued(found["naive"], every) is None
    assert records.continued(found["drop_0.5"], every) is found["dense_continued"]


@pytest.mark.parametrize(
    ("x", "y"), [([1.0, 1.2, 1.1], [1.3, 1.5]), ([2.0], [1.0, 1.1, 1.5]), ([1, 2], [1, 2])]
)
def test_the_interval_over_seeds_is_students(x, y):
    expected = stats.ttest_ind(x, y, equal_var=True).confidence_interval(0.95)
    if len(x) > 1:  # scipy wants two values on each side
        np.testing.assert_allclose(comparisons.student(x, y), expected, rtol=1e-9)
    else:
        half = stats.t.ppf(0.975, len(y) - 1) * np.std(y, ddof=1) * math.sqrt(1 + 1 / len(y))
        middle = x[0] - np.mean(y)
        np.testing.assert_allclose(comparisons.student(x, y), [middle - half, middle + half])


def test_the_interval_by_hand():
    """Means 2 and 4, pooled variance (2 + 2) / 2; Student's quantile for 2 degrees is 4.302653."""
    low, high = comparisons.student([1, 3], [3, 5])
    error = math.sqrt((2 + 2) / 2 * (1 / 2 + 1 / 2))
    assert (low, high) == pytest.approx((-2 - 4.302653 * error, -2 + 4.302653 * error), rel=1e-6)
    assert comparisons.student([1], [2]) is None


def test_the_width_of_a_mean_is_students():
    x = [3.1, 3.3, 3.2]
    low, high = stats.t.interval(0.95, 2, np.mean(x), stats.sem(x))
    assert comparisons.spread(x) == pytest.approx((high - low) / 2)
    assert comparisons.spread([3.1]) is None


def blocks(nats):
    return [[float(n), 10.0, 20.0] for n in nats]


def test_the_interval_over_text_is_of_pairs():
    """A constant difference has no spread, though the blocks differ a lot; with noise the interval
    is that of scipy's bootstrap of the differences."""
    rng = np.random.default_rng(3)
    nats, noise = rng.uniform(10, 90, 40), rng.normal(0, 1, 40)
    a, b = np.array(blocks(nats)), np.array(blocks(nats + 2))
    expected = -2 / math.log(2) / 20
    assert comparisons.over_text(a, b) == pytest.approx((expected, expected))
    b[:, 0] += noise
    found = comparisons.over_text(a, b)
    differences = (a[:, 0] - b[:, 0]) / math.log(2) / 20
    how = {"method": "percentile", "n_resamples": 5000, "rng": np.random.default_rng(0)}
    theirs = stats.bootstrap((differences,), np.mean, **how).confidence_interval
    assert found == pytest.approx(tuple(theirs), abs=0.003)
    b[0, 2] = 21.0
    assert comparisons.over_text(a, b) is None  # other text


def test_a_sentence_says_difference_interval_and_n():
    a, b = group("a", 1.0, 1.1, 1.2), group("b", 2.0, 2.1, 2.2)
    difference = comparisons.between(a, b)
    low, high = stats.ttest_ind(a.bits, b.bits).confidence_interval(0.95)
    shown = f"[{low:.3f}, {high:.3f}]".replace("-", "−")
    words = f"a −1.000 bits/byte against b {shown}: lower, n = 3 seeds."
    assert comparisons.sentence(difference) == words
    assert comparisons.proven_best([a, b]) is a
    one = comparisons.between(a, group("c", 1.15))
    assert comparisons.sentence(one).endswith("within noise, n = 3 and 1 seeds.")
    assert comparisons.proven_best([a, group("c", 9.0)]) is None  # a single seed proves nothing


def test_single_runs_are_never_called_better():
    rng = np.random.default_rng(0)
    nats = rng.uniform(10, 90, 40)
    near = nats + rng.normal(0, 1, 40)
    same = group("same", 3.0, blocks=blocks(nats))
    other = group("near", 3.0, blocks=blocks(near - near.mean() + nats.mean()))
    assert comparisons.verdict(comparisons.between(same, other)) == "within noise"
    far = group("far", 3.5, blocks=blocks(nats + 9))
    sentence = comparisons.sentence(comparisons.between(same, far))
    assert "another seed may differ, n = 1 seed." in sentence
    bare = comparisons.sentence(comparisons.between(group("a", 3.0), group("b", 4.0)))
    assert bare == "a −1.000 bits/byte against b: possibly noise, no interval, n = 1 seed."


def test_runs_without_a_loss_or_on_another_text_are_said_to_be():
    groups = [group("a", 3.0), group("none", None), group("other", 2.9, text="b")]
    assert tables.sentences(groups) == [
        "other and a cannot be compared: their texts differ.",
        "none has no held-out loss.",
    ]
    assert tables.sentences([group("none", None)]) == ["No run has a held-out loss."]
    assert tables.sentences([group("a", 3.0)]) == ["a: 3.000 bits/byte, n = 1 seed."]
    assert tables.sentences([group("a", 3.0, 3.2)])[0].startswith(
        "a: 3.100 ± 1.271 bits/byte, n = 2"
    )
