"""Where curves cross, and what runs cost: worked by hand."""

import dataclasses
import re

import numpy as np
import pytest

from moe_jax.report import catch_up, records, tables
from tests.report import made_up

X = np.array([0.0, 1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        pytest.param([4, 3, 2, 1], [3, 3, 3, 3], (1.0, 1, 0), id="at a point"),
        pytest.param([4, 3.5, 2, 1], [3, 3, 3, 3], (1 + 1 / 3, 1, 0), id="between points"),
        pytest.param([1, 1, 1, 4], [3, 3, 3, 3], (2 + 2 / 3, 1, 1), id="b passes a"),
        pytest.param([4, 2, 4, 2], [3, 3, 3, 3], (2.5, 3, 0), id="the last of three"),
        pytest.param([4, 2, 2, 4], [3, 3, 3, 3], (2.5, 2, 1), id="the last of two"),
        pytest.param([2, 2, 2, 2], [3, 3, 3, 3], (None, 0, 0), id="does not cross"),
        pytest.param([4, 3, 4, 5], [3, 3, 3, 3], (None, 0, 1), id="touches"),
        pytest.param([4, 3, 3, 1], [3, 3, 3, 3], (2.0, 1, 0), id="equal for a while"),
        pytest.param([3, 3, 2, 2], [3, 3, 3, 3], (None, 0, 0), id="equal at first"),
        pytest.param([3 - 1e-8, 4, 4, 2], [3] * 4, (2.5, 1, 0), id="a tie at the start"),
        pytest.param([3 + 1e-8, 4, 4, 4], [3] * 4, (None, 0, 1), id="throughout after a tie"),
        pytest.param([3 - 1e-8, 3 + 1e-8, 3, 3], [3] * 4, (None, 0, None), id="ties only"),
        pytest.param([3, 3, 3, 3], [3, 3, 3, 3], (None, 0, None), id="equal"),
    ],
)
def test_the_last_crossing(a, b, expected):
    found = catch_up.crossing(X, np.array(a, float), X, np.array(b, float))
    assert (found.at, found.number, found.ahead) == pytest.approx(expected)
    back = catch_up.crossing(X, np.array(b, float), X, np.array(a, float))
    ahead = None if expected[2] is None else 1 - expected[2]
    assert (back.at, back.number, back.ahead) == pytest.approx((*expected[:2], ahead))


def test_curves_are_compared_where_both_are_known():
    """a falls from 4 at 0 to 1 at 3; b is 2.2 from 1 on: they meet at (4 - 2.2) = 1.8."""
    a = np.array([0.0, 3.0]), np.array([4.0, 1.0])
    b = np.array([1.0, 5.0]), np.array([2.2, 2.2])
    assert catch_up.crossing(*a, *b).at == pytest.approx(1.8)
    apart = catch_up.crossing(*a, b[0] + 2, b[1])
    assert apart.is_apart and apart.at is None


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    folders = made_up.write_sweep(root, arms=3, seeds=3)
    return [records.read_record(n, i, f) for i, (n, f) in enumerate(folders.items())]


def curve(run, values):
    """The run with another held-out curve, whose blocks are all at its mean."""
    rows = []
    for at, bits in enumerate(values):
        nats = bits * np.log(2) * 1000
        validation = {"bits_per_byte": bits, "blocks": [[nats, 1000.0, 1000.0]] * 20}
        rows.append({"step": at, "tokens": at, "validation": validation})
    return dataclasses.replace(run, rows=rows)


def by_name(runs):
    return {group.name: group for group in records.groups(runs)}


def test_an_interval_over_seeds_holds_the_crossings_of_the_seeds(runs):
    offsets = {1: -0.1, 2: 0.0, 3: 0.1}
    changed = []
    for run in runs:
        shift = offsets.get(run.config["seed"], 0)
        own = [4 + shift, 3 + shift, 2 + shift, 1 + shift]
        changed.append(curve(run, own if run.name.startswith("naive") else [2.5] * 4))
    groups = by_name(changed)
    found = catch_up.catch_up(groups["naive"], groups["dense_continued"])
    assert found.crossing.at == pytest.approx(1.5) and found.over == "seeds" and found.share == 1
    assert 1.4 <= found.interval[0] < 1.5 < found.interval[1] <= 1.6
    none = catch_up.catch_up(groups["drop_0.5"], groups["dense_continued"])
    assert none.crossing.at is None and none.interval is None


def test_an_interval_over_text_is_narrow_where_blocks_agree(runs):
    naive, control = (run for run in runs if run.name in ("naive_s1", "dense_continued_s1"))
    pair = [curve(naive, [4, 3, 2, 1]), curve(control, [2.5] * 4)]
    a, b = records.groups(pair)
    found = catch_up.catch_up(a, b)
    assert found.over == "text" and found.share == 1
    assert found.interval == pytest.approx((1.5, 1.5))
    del pair[0].rows[0]["validation"]["blocks"]
    bare = catch_up.catch_up(*records.groups(pair))
    assert bare.interval is None and bare.share is None and bare.crossing.at == pytest.approx(1.5)


def test_a_crossing_in_flops_counts_each_runs_own(runs):
    """A token of the MoE costs 6.5 MFLOP and one of the dense run 4.1: at equal FLOPs the dense
    run is further on."""
    groups = by_name(runs)
    at = np.array([1000.0])
    assert catch_up.flops(groups["naive"].first, at) == pytest.approx([6.5e9])
    assert catch_up.flops(groups["dense_continued"].first, at) == pytest.approx([4.1e9])
    assert catch_up.flops_with_parents(groups["naive"].first, at) == pytest.approx([2.9065e12])


def test_a_cost_is_that_of_the_run_and_of_its_parents(runs):
    costs = {run.name: catch_up.cost(run, runs) for run in runs}
    dense, naive = costs["dense"], costs["naive_s1"]
    assert (dense.tokens, dense.tokens_with_parents) == (716800, 716800)
    assert (naive.tokens, naive.tokens_with_parents) == (245760, 962560)
    assert naive.flops_with_parents == naive.flops + 2.9e12
    assert (naive.hours, naive.hours_with_parents) == pytest.approx((90 / 3600, 210 / 3600))
    assert dense.hours_with_parents == pytest.approx(90 / 3600)


def test_hours_of_older_runs_are_of_their_steps_and_need_the_parent(runs):
    """5000 tokens per second, so 245,760 tokens take 49.152 s, here on 4 devices."""

    def old(run):
        left_out = ("device_seconds", "parent_device_seconds")
        result = {key: value for key, value in run.result.items() if key not in left_out}
        return dataclasses.replace(run, result={**result, "device": "TPU v5 x 4"})

    older = [old(run) for run in runs]
    naive = next(run for run in older if run.name == "naive_s1")
    own = 245760 / 5000 * 4 / 3600
    assert catch_up.device_hours(naive) == pytest.approx(own)
    parents = 716800 / 5000 * 4 / 3600
    assert catch_up.cost(naive, older).hours_with_parents == pytest.approx(own + parents)
    assert catch_up.cost(naive, [naive]).hours_with_parents is None  # the parent is not shown
    at_step = dataclasses.replace(naive, config={**naive.config, "init": {"source": "dense@350"}})
    assert catch_up.cost(at_step, older).hours_with_parents is None  # not from the parent's end
    untimed = dataclasses.replace(naive, rows=[])
    assert catch_up.device_hours(untimed) is None
    assert "training steps only" in tables.compute(records.groups(older), older)


def test_the_table_of_crossings_has_each_pair_with_a_control_once(runs):
    table = tables.crossings(records.groups(runs))
    rows = table.count("<tr>") - 1
    assert rows == 4 + 3  # four against dense_continued, three arms against scratch
    assert tables.crossings(records.groups([r for r in runs if r.name == "dense"])) == ""


def cells_of(runs):
    """The texts and sortable values of the only row of a table of crossings, and its note."""
    table = tables.crossings(records.groups(runs))
    cells = re.findall(r'<td data-value="(.*?)">(.*?)</td>', table)
    return [text for _, text in cells], [value for value, _ in cells], table.rpartition("<p")[2]


def test_each_cell_names_the_run_that_is_ahead_on_its_own_axis(runs):
    """A token of the MoE costs 6.5 / 4.1 of the dense run's: at the FLOPs of the dense run's end,
    of 3 tokens, it has seen 1.89 tokens, and its loss is 2.78 on a curve that falls to 1."""
    found = {run.name: run for run in runs}
    naive, control = found["naive_s1"], found["dense_continued_s1"]
    pair = [curve(naive, [3, 2.9, 2.77, 1]), curve(control, [2.8, 2.8, 2.8, 2.5])]
    pair = [
        dataclasses.replace(run, result={**run.result, "tokens": 3, "training_flops": flops})
        for run, flops in zip(pair, (3 * 6.5, 3 * 4.1), strict=True)
    ]
    texts, values, note = cells_of(pair)
    assert texts[0] == "naive_s1 and dense_continued_s1"
    assert texts[1].startswith("naive_s1 from 1.77 on [1.77, 1.77] (100%)")
    assert texts[2:] == ["dense_continued_s1 throughout"] * 2
    assert values[1:] == ["1.76923077", "", ""]
    assert "has neither" not in note


def test_the_note_says_why_several_seeds_against_one_have_no_interval(runs):
    names = ("naive_s1", "naive_s2", "naive_s3", "dense_continued_s1")
    shown = [run for run in runs if run.name in names]
    own = [[2.5] * 4 if run.name.startswith("dense") else [4, 3, 2, 1] for run in shown]
    texts, _, note = cells_of([curve(r, o) for r, o in zip(shown, own, strict=True)])
    assert texts[1] == "naive from 1.5 on" and "several seeds and the other has one" in note
