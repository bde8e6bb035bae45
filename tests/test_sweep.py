"""Sweeps: ids that name the work, an order, what a failure stops and what it does not."""

import csv
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from moe_jax import config as configs
from moe_jax import sweep

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = """
from moe_jax import config as configs

def get_config():
    config = configs.default()
    config.model.preset = "quickstart"
    return config

def get_sweep():
    return SWEEP
"""
# Stands in for scripts/train.py: fails at seed 13, waits at seed 60, leaves a result otherwise.
TRAIN = """
import json, pathlib, sys, time
flags = dict(flag.removeprefix("--").split("=", 1) for flag in sys.argv[1:])
workdir, seed = pathlib.Path(flags["workdir"]), flags.get("config.seed", "0")
with open(workdir.parent / "order.txt", "a") as order:
    order.write(workdir.name.rsplit("-", 1)[0] + chr(10))
source = flags.get("config.init.source")
if source is not None:
    assert (pathlib.Path(source) / "result.json").exists()
if seed == "13":
    sys.exit("train.py: out of luck")
(workdir / "config.json").write_text("{}")
if seed == "60":
    time.sleep(60)
(workdir / "result.json").write_text(json.dumps({"steps": 1, "loss": 2.0, "bits_per_byte": 3.0}))
"""


DATACLASS = """
from __future__ import annotations
import dataclasses

@dataclasses.dataclass
class Arm:
    name: str
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "out").mkdir()
    return tmp_path


def read(folder, entries):
    path = folder / "config.py"
    path.write_text(CONFIG.replace("SWEEP", repr(entries)))
    return sweep.read(str(path), folder / "out")


def execute(folder, runs, **options):
    return sweep.execute(runs, ["python", str(folder / "train.py")], folder / "out", **options)


def order(folder):
    return (folder / "out" / "order.txt").read_text().split()


def entry(name, after=(), **overrides):
    return {"name": name, "overrides": overrides, "after": list(after)}


PARENT = entry("parent")
CHILD = entry("child", **{"init.source": "@parent", "seed": 1})


def test_an_id_names_the_resolved_work_and_not_the_name_or_the_place(folder, tmp_path_factory):
    ids = {run.name: run.run_id for run in read(folder, [PARENT, CHILD])}
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    renamed = [entry("x"), entry("y", **{"init.source": "@x", "seed": 1})]
    assert [run.run_id for run in read(elsewhere, renamed)] == [ids["parent"], ids["child"]]
    # Another parent makes the child other work too.
    changed = read(folder, [entry("parent", **{"seed": 5}), CHILD])
    assert not {run.run_id for run in changed} & set(ids.values())


def test_a_source_comes_before_its_children_and_is_given_as_its_workdir(folder):
    runs = read(folder, [CHILD, PARENT])
    assert [run.name for run in runs] == ["parent", "child"]
    assert f"--config.init.source={runs[0].workdir}" in runs[1].flags
    at_step = entry("at_step", **{"init.source": "@parent@240", "seed": 1})
    *_, child, other = read(folder, [PARENT, CHILD, at_step])
    assert f"--config.init.source={runs[0].workdir}@240" in other.flags
    assert other.sources == child.sources == ("parent",) and other.run_id != child.run_id
    assert execute(folder, runs) == {"parent": "done", "child": "done"}
    assert order(folder) == ["parent", "child"]


def test_a_failed_run_ends_only_the_runs_that_start_from_it(folder):
    runs = read(
        folder,
        [
            entry("bad", seed=13),
            entry("child", **{"init.source": "@bad", "seed": 2}),
            entry("grandchild", **{"init.source": "@child", "seed": 3}),
            entry("waits", after=["bad"], seed=4),
            entry("other", seed=5),
        ],
    )
    status = execute(folder, runs)
    assert status == {
        "bad": "failed",
        "child": "blocked",
        "grandchild": "blocked",
        "waits": "done",
        "other": "done",
    }
    with open(folder / "out" / "results.csv") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert {name: row["status"] for name, row in rows.items()} == status
    assert rows["bad"]["error"] == "exit 1: train.py: out of luck"
    assert (rows["other"]["loss"], rows["other"]["bits_per_byte"]) == ("2.0", "3.0")


def test_finished_runs_are_skipped_and_equal_work_is_done_once(folder):
    runs = read(folder, [entry("a", seed=1), entry("same", seed=1), entry("b", seed=2)])
    assert set(execute(folder, runs).values()) == {"done"}
    assert order(folder) == ["a", "b"]
    again = read(folder, [entry("renamed", seed=1), entry("b", seed=2), entry("c", seed=3)])
    assert set(execute(folder, again).values()) == {"done"}
    assert order(folder) == ["a", "b", "c"]


def test_several_runs_go_at_a_time_only_where_asked(folder):
    # Two that would wait a minute each, stopped together: both have begun.
    runs = read(folder, [entry("a", seed=60), entry("b", seed=60, **{"data.sequence_length": 9})])
    script = f"""
import pathlib
from moe_jax import sweep
folder = pathlib.Path({str(folder)!r})
runs = sweep.read(str(folder / "config.py"), folder / "out")
sweep.execute(runs, ["python", str(folder / "train.py")], folder / "out", max_parallel=2)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    while not all((run.workdir / "config.json").exists() for run in runs):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 75
    assert "run the same command again to go on" in said


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([entry("a"), entry("a", seed=1)], "two runs are named 'a'"),
        ([entry("a/b")], "name='a/b'"),
        ([entry("a", after=["b"])], "run 'a' waits for 'b', which is none of a"),
        ([entry("a", after=["b"]), entry("b", after=["a"])], "runs wait for each other: "),
        ([entry("a", **{"seeed": 1})], "run 'a': .*did you mean config.seed."),
        ([entry("a", **{"training.num_steps": -1})], "run 'a': config.training.num_steps=-1"),
        ([{"name": "a", "override": {}}], "unknown key 'override'; did you mean overrides"),
    ],
)
def test_a_mistake_in_any_run_is_refused_before_the_first(folder, entries, message):
    with pytest.raises(configs.ConfigError, match=message) as error:
        read(folder, entries)
    assert "\n" not in str(error.value)


def test_a_run_may_leave_its_model_to_a_parent_that_is_not_trained_yet(tmp_path):
    path = tmp_path / "sweep.py"
    path.write_text(
        "from moe_jax import config as configs\n\n"
        "def get_config():\n    return configs.default()\n\n"
        "def get_sweep():\n"
        "    moe = {'init.source': '@dense', 'init.upcycle.recipe': 'naive', "
        "'model.num_experts': 4}\n"
        "    return [{'name': 'dense', 'overrides': {'model.preset': 'quickstart'}},\n"
        "            {'name': 'moe', 'overrides': moe}]\n"
    )
    dense, moe = sweep.read(str(path), tmp_path / "runs")
    assert moe.sources == ("dense",) and f"--config.init.source={dense.workdir}" in moe.flags


def test_list_shows_every_command_and_starts_nothing(tmp_path):
    script = [sys.executable, str(ROOT / "scripts" / "sweep.py"), "--list"]
    flags = ["--config=configs/quickstart.py", f"--workdir={tmp_path / 'out'}"]
    listed = subprocess.run(
        [*script, *flags], cwd=ROOT, env=os.environ, capture_output=True, text=True, check=True
    )
    rows = [line.split() for line in listed.stdout.splitlines()]
    controls = ["dense", "scratch", "dense_continued"]
    assert [row[2] for row in rows] == [*controls, "naive", "drop_0.5", "drop_1.0"]
    assert {row[0] for row in rows} == {"pending"}
    assert all("scripts/train.py" in row for row in rows)
    assert not (tmp_path / "out").exists()
    assert json.dumps(listed.stderr) == '""'


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        (
            {"name": "a", "overrides": {"optimizer": {"learning_rate": 1e-3}}},
            "use a dict of dotted",
        ),
        ({"name": "a", "overrides": [("seed", 1)]}, "use a dict of dotted keys"),
        (["a", {"seed": 1}], "a sweep entry is .* use a dict"),
    ],
)
def test_an_entry_of_another_form_is_refused_in_one_line(entry, complaint, folder):
    with pytest.raises(configs.ConfigError, match=complaint):
        read(folder, [entry])


def test_none_and_a_dataclass_are_as_in_any_program(folder):
    entries = [
        {"name": "base", "overrides": None, "after": None},
        {"name": "full", "overrides": {"model.sliding_window": None}},
    ]
    assert [run.name for run in read(folder, entries)] == ["base", "full"]
    path = folder / "config.py"
    path.write_text(DATACLASS + CONFIG.replace("SWEEP", '[{"name": a.name} for a in [Arm("x")]]'))
    assert [run.name for run in sweep.read(str(path), folder / "out")] == ["x"]
    with pytest.raises(configs.ConfigError, match="commas separate parents"):
        sweep.read(str(path), folder / "a,1")
