"""Dip and recovery of runs that start from a parent: worked by hand."""

import dataclasses

import pytest

from moe_jax.report import records, recovery, tables
from tests.report import made_up
from tests.report.test_catch_up import by_name, curve


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    folders = made_up.write_sweep(root, arms=1, seeds=2)
    return [records.read_record(n, i, f) for i, (n, f) in enumerate(folders.items())]


def with_curves(runs, values, parent):
    """The runs, of which the upcycled ones have the curve `values`, and their parent ends at
    `parent` bits per byte."""
    changed = []
    for run in runs:
        if run.name == "dense":
            run = curve(run, [parent])
            run.rows[0]["step"] = run.result["steps"]
        elif run.name.startswith("naive"):
            run = curve(run, values)
        changed.append(run)
    return changed


@pytest.mark.parametrize(
    ("values", "parent", "expected"),
    [
        pytest.param([3, 5, 4, 2], 3, (3, 2, 3, 2.5), id="back between two evaluations"),
        pytest.param([4, 5, 4, 2], 3, (4, 1, 3, 2.5), id="a start above the parent's"),
        pytest.param([3, 5, 2, 4, 3], 3, (3, 2, 3, 4), id="back for good, at a point"),
        pytest.param([3, 5, 4, 3.5], 3, (3, 2, 3, None), id="not yet"),
        pytest.param([3, 2.5, 2, 1], 3, (3, 0, 3, 0), id="never above"),
        pytest.param([3 + 1e-8, 2.5, 2, 1], 3, (3, 0, 3, 0), id="a tie at the start"),
    ],
)
def test_dip_and_recovery(runs, values, parent, expected):
    changed = with_curves(runs, values, parent)
    found = recovery.recovery(by_name(changed)["naive"], changed)
    assert found.of_parent
    got = found.start, found.dip, found.target, found.tokens
    assert got == tuple(e if e is None else pytest.approx(e, abs=1e-6) for e in expected)


def test_the_mean_over_seeds_recovers_not_each_seed(runs):
    changed = with_curves(runs, [3, 5, 4, 2], 3)
    first, *others = (run for run in changed if run.name.startswith("naive"))
    raised = curve(first, [3, 5, 4, 3.8])  # never back alone; the mean is 2.9 at the end
    group = dataclasses.replace(by_name(changed)["naive"], records=(raised, *others))
    assert recovery.recovery(group, changed).tokens == pytest.approx(2 + 1 / 1.1)


def test_without_the_parents_loss_on_this_text_the_starts_counts(runs):
    changed = with_curves(runs, [3, 5, 4, 2], 1)
    alone = [run for run in changed if run.name != "dense"]
    other = [run for run in changed if run.name == "dense"]
    other[0].rows[0]["validation"]["blocks"][0][2] += 1  # bytes of another text
    for shown in (alone, changed):
        found = recovery.recovery(by_name(changed)["naive"], shown)
        assert (found.of_parent, found.target) == (False, pytest.approx(3))


def test_runs_without_a_parent_or_a_start_have_none(runs):
    groups = by_name(runs)
    assert recovery.recovery(groups["scratch"], runs) is None
    late = [dataclasses.replace(run, rows=run.rows[1:]) for run in groups["naive"].records]
    group = dataclasses.replace(groups["naive"], records=tuple(late))
    assert recovery.recovery(group, runs) is None


def test_the_table_has_a_row_for_each_group_with_a_parent(runs):
    table = tables.recoveries(records.groups(runs), runs)
    assert "naive" in table and "dense_continued" in table and "scratch" not in table
    assert tables.recoveries([by_name(runs)["scratch"]], runs) == ""
