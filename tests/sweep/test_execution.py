"""Sweeps: ids that name the work, an order, what a failure stops and what it does not."""

import concurrent.futures
import csv
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from moe_jax import config as configs
from moe_jax.commands import sweep
from moe_jax.sweep import execution, launchers, plan, slurm
from tests.sweep import stand_in
from tests.sweep.stand_in import entry, execute, order, read

ROOT = pathlib.Path(__file__).parents[2]
DATACLASS = """
from __future__ import annotations
import dataclasses

@dataclasses.dataclass
class Arm:
    name: str
"""


@pytest.fixture
def folder(tmp_path):
    stand_in.write(tmp_path)
    return tmp_path


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
    assert (rows["other"]["loss"], rows["other"]["bits_per_byte"]) == ("2.5", "3.0")


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
from moe_jax.sweep import execution, launchers, plan
from tests.sweep import stand_in
from tests.sweep.stand_in import entry, execute, order, read
folder = pathlib.Path({str(folder)!r})
runs = plan.read(str(folder / "config.py"), folder / "out")
stand_in.execute(folder, runs, max_parallel=2)
"""
    how = {"stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    process = subprocess.Popen([sys.executable, "-c", script], **how)
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
    dense, moe = plan.read(str(path), tmp_path / "runs")
    assert moe.sources == ("dense",) and f"--config.init.source={dense.workdir}" in moe.flags


def test_list_shows_every_command_and_starts_nothing(tmp_path):
    script = [sys.executable, str(ROOT / "scripts" / "sweep.py"), "--list"]
    flags = ["--config=configs/quickstart.py", f"--workdir={tmp_path / 'out'}"]
    listed = subprocess.run(
        [*script, *flags], cwd=ROOT, env=os.environ, capture_output=True, text=True, check=True
    )
    *rows, total = [line.split() for line in listed.stdout.splitlines()]
    controls = ["dense", "scratch", "dense_continued"]
    assert [row[2] for row in rows] == [*controls, "naive", "drop_0.5", "drop_1.0"]
    assert {row[0] for row in rows} == {"pending"}
    assert all("scripts/train.py" in row for row in rows)
    assert sum(float(row[3]) for row in rows) == pytest.approx(float(total[5]), rel=0.01)
    assert " ".join(total[:7]).startswith("6 runs in 6 groups,") and total[6] == "FLOP,"
    assert not (tmp_path / "out").exists()
    assert json.dumps(listed.stderr) == '""'


def test_a_list_needs_no_workdir_and_all_else_does(monkeypatch, capsys):
    command = ["sweep.py", f"--config={ROOT / 'configs' / 'quickstart.py'}"]
    monkeypatch.setattr(sys, "argv", [*command, "--list"])
    sweep.main()
    assert capsys.readouterr().out.count(" --workdir=DIR/") == 6
    for more in ([], ["--status"]):
        monkeypatch.setattr(sys, "argv", [*command, *more])
        with pytest.raises(SystemExit, match="2"):
            sweep.main()
        assert "arguments are required: --workdir" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
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
    path.write_text(
        DATACLASS + stand_in.CONFIG.replace("SWEEP", '[{"name": a.name} for a in [Arm("x")]]')
    )
    assert [run.name for run in plan.read(str(path), folder / "out")] == ["x"]
    with pytest.raises(configs.ConfigError, match="commas separate parents"):
        plan.read(str(path), folder / "a,1")


def test_none_a_nested_dict_and_a_tuple_are_values_of_overrides(folder):
    own = {"optimizer": {"learning_rate": 1e-3}, "evaluation.prompts": ("a, b", "c")}
    [run, plain] = read(folder, [entry("a", **own), entry("b")])
    config = configs.parse(list(run.flags))
    assert (config.optimizer.learning_rate, config.evaluation.prompts) == (1e-3, ("a, b", "c"))
    # None is a key's default: this is the work of a run that does not override it.
    none = {"init.source": None, "model.sliding_window": None, "training.num_steps": None}
    [unset] = read(folder, [entry("c", **none)])
    assert unset.run_id == plain.run_id


def test_a_failed_run_is_tried_again_and_its_children_wait_for_it(folder, capsys):
    entries = [
        entry("once", seed=14),
        entry("child", **{"init.source": "@once", "seed": 1}),
        entry("always", seed=13),
        entry("mistake", seed=22),
    ]
    status = execute(folder, read(folder, entries), retries=2)
    assert status == {"once": "done", "child": "done", "always": "failed", "mistake": "failed"}
    assert {n: order(folder).count(n) for n in status} == {
        "once": 2, "child": 1, "always": 3, "mistake": 1
    }  # fmt: skip
    assert "always: goes on" not in (said := capsys.readouterr().out)
    assert "once: goes on (try 2 of 3)" in said


def test_only_executes_the_runs_that_match_and_those_that_they_start_from(folder):
    runs = read(folder, [PARENT, CHILD, entry("other", ["x"], seed=3), entry("x", seed=4)])
    assert [run.name for run in plan.only(runs, "ch*")] == ["parent", "child"]
    with pytest.raises(ValueError, match=r"--only=y\* matches none of parent, "):
        plan.only(runs, "ch*,y*")
    status = execute(folder, runs, chosen=plan.only(runs, "other"))  # it need not wait for x
    assert status == {"parent": "pending", "child": "pending", "other": "done", "x": "pending"}
    assert [run.name for run in plan.only(runs, "child,x")] == ["parent", "child", "x"]
    execute(folder, runs, chosen=plan.only(runs, "parent"))
    assert [run.name for run in plan.only(runs, "child")] == ["child"]


def test_a_loss_that_is_not_finite_is_unknown_and_ends_no_sweep(folder, capsys):
    train = folder / "train.py"
    train.write_text(train.read_text().replace("2 + int(seed) / 10", "None"))
    assert execute(folder, read(folder, [entry("a"), entry("b", seed=1)])) == dict.fromkeys(
        "ab", "done"
    )
    assert "held-out unknown nats/token, 3.000 bits/byte" in capsys.readouterr().out


def test_cores_are_shared_out_evenly_and_whole():
    assert launchers.shares([0, 1, 2, 3], 1) == [[]]  # no restriction
    assert launchers.shares([0, 1, 2, 3, 6], 2) == [[0, 1], [2, 3, 6]]
    assert launchers.shares([4, 5], 3) == [[4], [5], [4]]
    for number in range(2, 9):
        parts = launchers.shares(range(8), number)
        assert sorted(core for part in parts for core in part) == list(range(8))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.skipif(len(launchers.available_cores()) < 2, reason="one core cannot be shared")
def test_runs_at_the_same_time_have_cores_of_their_own(folder, monkeypatch):
    monkeypatch.setenv("SHARES", "")
    runs = read(folder, [entry("a", seed=1), entry("b", seed=2)])
    execute(folder, runs, max_parallel=2)
    shares = [json.loads((run.workdir / "share.json").read_text()) for run in runs]
    (a, a_threads), (b, b_threads) = shares
    assert not set(a) & set(b) and sorted(a + b) == launchers.available_cores()
    assert (a_threads, b_threads) == (str(len(a)), str(len(b)))


def test_a_run_that_a_killed_sweep_left_at_work_is_waited_for(folder):
    [run] = read(folder, [entry("a", seed=1)])
    run.workdir.mkdir()
    # It holds the file as a run does that was started with it open.
    script = "import sys, time; sys.stdin.read()"
    with open(run.workdir / launchers.LAUNCHED, "a") as lock:
        assert launchers.locked(lock)
        how = {"pass_fds": [lock.fileno()], "stdin": subprocess.PIPE}
        left = subprocess.Popen([sys.executable, "-c", script], **how)
    assert launchers.is_running(run.workdir)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(launchers.Local(stand_in.train(folder), 1).launch, run)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.5)
        (run.workdir / "result.json").write_text('{"loss": 1.0}')  # it ends, with a result
        left.communicate(b"")
        assert waiting.result().status == "done"
    assert run.result == {"loss": 1.0} and not (folder / "out" / "order.txt").exists()


def test_a_workdir_has_one_sweep_at_a_time(tmp_path):
    with execution.alone(tmp_path):
        with pytest.raises(ValueError, match="another sweep is using it"):
            with execution.alone(tmp_path):
                pass
    with execution.alone(tmp_path):
        pass


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--retries=-1"], "--retries=-1 must be at least 0"),
        (["--only=dens"], "--only=dens matches none of dense, scratch, "),
        (["--slurm.partition=gpu"], "--slurm.partition needs --launcher=slurm"),
        (["--config.seed=3"], "unrecognized arguments: --config.seed=3"),
        (["--launcher=slurm", "--slurm.cluster=slum"], "--slurm.cluster=slum: use slurm or local"),
        (["--launcher=slurm", "--slurm.cluster=local", "--slurm.tim=1"], "--launcher=slurm: "),
    ],
)
def test_a_mistake_in_an_option_is_one_line(options, line, tmp_path, monkeypatch, capsys):
    if "--launcher=slurm" in options and importlib.util.find_spec("submitit") is None:
        pytest.skip("submitit, an optional extra, is not installed")
    workdir = tmp_path / "out"
    command = ["sweep", f"--config={ROOT}/configs/quickstart.py", f"--workdir={workdir}"]
    monkeypatch.setattr(sys, "argv", [*command, *options])
    with pytest.raises(SystemExit) as ended:
        sweep.main()
    [said] = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and said.startswith(f"sweep: {line}")


def test_a_missing_submitit_is_named_with_its_command(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ValueError, match="pip install submitit"):
        slurm.Slurm(["python"], folder, {})


@pytest.mark.skipif(not pathlib.Path("/proc/self/cmdline").exists(), reason="needs Linux's /proc")
def test_a_job_of_the_local_executor_that_outlives_its_sweep_is_waited_for(folder, monkeypatch):
    if importlib.util.find_spec("submitit") is None:
        pytest.skip("submitit, an optional extra, is not installed")
    monkeypatch.setenv("SHARES", "1")  # the run takes a second
    [run] = read(folder, [entry("a", seed=5)])
    first, second = (
        slurm.Slurm(stand_in.train(folder), folder / "out", {"cluster": "local"}) for _ in "ab"
    )
    with concurrent.futures.ThreadPoolExecutor() as pool:
        sweep = pool.submit(first.launch, run)
        while not (run.workdir / "config.json").exists():
            time.sleep(0.01)
        first.stop()
        assert "goes on" in sweep.result().error
    assert second.launch(run).status == "done"
    assert order(folder) == ["a"]
