"""Results by run and by group: overrides as columns, statistics over seeds, what is left."""

import csv
import json

import numpy as np
import pytest

from moe_jax import config as configs
from moe_jax.report import records
from moe_jax.sweep import arms, plan, results, status
from moe_jax.training import flops
from tests.report import made_up
from tests.sweep import stand_in
from tests.sweep.stand_in import execute, read


@pytest.fixture
def folder(tmp_path):
    stand_in.write(tmp_path)
    return tmp_path


MOE = {"init.source": "@dense", "model.num_experts": 4, "training.num_steps": 500}
RECIPES = arms.over("init.upcycle.recipe", ["naive", "drop"])
SWEEP = arms.seeds(arms.chain(arms.named({"dense": {}}), arms.product(MOE, RECIPES)), (1, 2, 3))


def rows_of(path):
    with open(path) as file:
        return {next(iter(row.values())): row for row in csv.DictReader(file)}


def test_a_group_has_the_mean_deviation_and_interval_of_its_seeds(folder):
    runs = read(folder, SWEEP)
    execute(folder, runs)
    rows = rows_of(folder / "out" / "groups.csv")
    assert list(rows) == ["dense", "naive", "drop"]
    row = rows["drop"]
    assert (row["runs"], row["done"], row["init.source"]) == ("3", "3", "@dense")
    assert (row["model.num_experts"], row["init.upcycle.recipe"]) == ("4", "drop")
    # The losses 2.1, 2.2 and 2.3; Student's t of 2 degrees of freedom is 4.3027 at 97.5 %.
    half = 4.302653 * 0.1 / np.sqrt(3)
    found = [float(row[f"loss_{end}"]) for end in ("mean", "deviation", "low", "high")]
    np.testing.assert_allclose(found, [2.2, 0.1, 2.2 - half, 2.2 + half], rtol=1e-6)
    table = results.table(runs).splitlines()
    assert [line.split()[0] for line in table] == ["group", "dense", "naive", "drop"]
    assert "2.2000 ± 0.2484 (0.1000)" in table[2] and "3/3" in table[2]


def test_one_seed_has_no_interval_and_an_unfinished_group_no_numbers(folder):
    runs = read(folder, SWEEP)
    execute(folder, runs, chosen=[run for run in runs if run.name == "dense_s1"])
    rows = rows_of(folder / "out" / "groups.csv")
    dense, drop = rows["dense"], rows["drop"]
    assert (dense["done"], dense["loss_mean"], dense["loss_low"]) == ("1", "2.1", "")
    assert (drop["done"], drop["loss_mean"]) == ("0", "")


def test_overrides_are_columns_as_the_file_has_them(folder):
    runs = read(folder, SWEEP)
    execute(folder, runs, chosen=())
    row = rows_of(folder / "out" / "results.csv")["drop_s2"]
    shown = {key: row[key] for key in ("group", "seed", "init.source", "init.upcycle.recipe")}
    assert shown == {
        "group": "drop", "seed": "2", "init.source": "@dense_s2", "init.upcycle.recipe": "drop"
    }  # fmt: skip


def test_equal_work_counts_once_in_a_group(folder):
    runs = read(folder, [stand_in.entry("a_s1", seed=1), stand_in.entry("a2_s1", seed=1)])
    assert [len(group.runs) for group in results.groups(runs)] == [1]


def test_a_sweep_and_its_report_have_the_same_groups(folder, tmp_path):
    other = arms.named({"other": {"seed": 9, "training.num_steps": 700}})
    of_other = arms.named({"of_other": {**MOE, "init.source": "@other"}})
    shared = arms.seeds(arms.product(of_other, RECIPES), 2)
    runs = read(folder, arms.chain(SWEEP, other, shared))
    found = []
    for place, run in enumerate(runs):
        workdir = made_up.write_run(run.workdir, seed=run.seed, start=4.0, end=3.0)
        config = configs.parse(list(run.flags))
        (workdir / "config.json").write_text(json.dumps(config.to_dict()))
        found.append(records.read_record(run.name, place, workdir))
    of_report = {r.name: group.name for group in records.groups(found) for r in group.records}
    assert of_report == {run.name: run.group for run in runs}


def test_the_name_of_a_group_is_in_the_config_and_not_in_the_id(folder):
    one = read(folder, SWEEP[:1])
    several = read(folder, SWEEP)
    assert one[0].run_id == several[0].run_id
    [mine] = read(folder, arms.product(SWEEP[:1], {"training.run_group": "mine"}))
    assert mine.run_id == one[0].run_id and mine.flags[-1] == "--config.training.run_group=mine"
    assert not any("run_group" in flag for flag in one[0].flags)
    groups = [configs.parse(list(run.flags)).training.run_group for run in several]
    assert groups == [run.group for run in several] and set(groups) == {"dense", "naive", "drop"}
    silent = [{**run, "overrides": {**run["overrides"], "training.log_to": ()}} for run in SWEEP]
    assert not any("run_group" in flag for run in read(folder, silent) for flag in run.flags)


def test_status_counts_what_is_done_and_estimates_what_is_left(folder):
    runs = read(folder, SWEEP)
    assert status.measured(runs) is None and status.assumed().flops > 1e6
    execute(folder, runs, chosen=[run for run in runs if run.name == "dense_s1"])
    rate = status.measured(runs)  # the stand-in says 5 seconds
    assert rate.seconds(status.cost(runs[0])) == pytest.approx(5)
    moe = next(run for run in runs if run.group == "drop")
    moe.workdir.mkdir()
    (moe.workdir / "config.json").write_text("{}")
    (moe.workdir / "metrics.jsonl").write_text('{"step": 250, "tokens": 1, "loss": 2.0}\n')
    lines = {line.split()[0]: line.split() for line in status.table(runs).splitlines() if line}
    assert lines["dense_s1"][1:4] == ["done", "1000/1000", "3.000"]
    half = status.duration(rate.seconds(status.cost(moe)) / 2)
    assert lines[moe.name][1:] == ["begun", "250/500", "-", half]
    assert lines["naive_s1"][1:4] == ["pending", "0/500", "-"]
    assert lines["1"][:5] == ["1", "of", "9", "runs", "done,"]


def test_a_number_of_epochs_is_unknown_until_a_run_has_stored_its_steps(folder):
    epochs = {"training.num_steps": 0, "training.num_epochs": 1.0}
    runs = read(folder, arms.named({"whole": epochs, "dense": {}}))
    whole, dense = runs
    for finished in (0, 1):
        shown = status.listing(runs, ["python"])
        assert "unknown" in shown.splitlines()[0] and "without 1 run whose steps" in shown
        assert status.table(runs).splitlines()[1].split()[2] == ("1/?" if finished else "0/?")
        whole.workdir.mkdir(exist_ok=True)
        (whole.workdir / "metrics.jsonl").write_text('{"step": 1, "tokens": 1, "loss": 2.0}\n')
    (whole.workdir / "result.json").write_text('{"seconds": 5.0, "bits_per_byte": 3.0}')
    assert status.measured(runs) is None  # nothing is divided by a cost of 0
    stored = {"training": {"num_steps": 500, "num_epochs": 0.0}}
    (whole.workdir / "config.json").write_text(json.dumps(stored))
    assert status.steps(whole) == 500 and 2 * status.cost(whole) == status.cost(dense)
    assert status.measured(runs).seconds(status.cost(dense)) == pytest.approx(10)
    assert "unknown" not in status.listing(runs, ["python"])


def test_estimated_flops_are_those_of_the_result(folder):
    runs = read(folder, SWEEP)
    dense = configs.resolve(configs.parse(list(runs[0].flags))).model
    for run in (runs[0], runs[-1]):
        settings = configs.resolve(configs.parse(list(run.flags)), parent=dense)
        costs = flops.costs(settings, ())
        tokens = settings.training.last_step * costs.tokens_per_step
        assert status.cost(run) == pytest.approx(tokens * costs.model_flops_per_token)


def test_durations_read_at_a_glance():
    shown = [status.duration(seconds) for seconds in (4.4, 89, 90, 3600, 5400, 3 * 86400)]
    assert shown == ["4s", "89s", "2m", "60m", "1.5h", "3.0d"]


def test_only_matches_groups_too(folder):
    runs = read(folder, SWEEP)
    assert {run.group for run in plan.only(runs, "drop")} == {"drop", "dense"}
