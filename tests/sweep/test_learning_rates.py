"""advise --measure: what its runs are, what it reads from them, and what it says."""

import json
import math
import types

import numpy as np
import pytest

from moe_jax import config as configs
from moe_jax.commands import advise
from moe_jax.report import figures
from moe_jax.sweep import learning_rates, plan
from moe_jax.training import optimizer
from tests.report import made_up

CONFIG = """
from moe_jax import config as configs

def get_config():
    config = configs.default()
    config.seed = 5
    config.model.preset = "quickstart"
    config.model.num_experts = 8
    config.model.num_experts_per_tok = 2
    config.init.source = SOURCE
    config.init.upcycle.recipe = "naive"
    config.data.tokenizer = "bytes"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 10
    config.training.num_steps = 1000
    return config
"""
# Instead of training, it copies the files of a run that was made up.
TRAIN = """
import pathlib, shutil, sys
flags = dict(flag.removeprefix("--").split("=", 1) for flag in sys.argv[1:])
workdir = pathlib.Path(flags["workdir"])
name = workdir.name.rsplit("-", 1)[0]
made = pathlib.Path(__file__).parent / "made" / name
if not made.is_dir():
    sys.exit("train.py: no " + name)
shutil.copytree(made, workdir, dirs_exist_ok=True)
"""


@pytest.fixture
def folder(tmp_path):
    """A config, its parent, and a stand-in for train.py."""
    (tmp_path / "train.py").write_text(TRAIN)
    parent = made_up.write_run(tmp_path / "dense", seed=0, start=6.0, end=3.42)
    (tmp_path / "config.py").write_text(CONFIG.replace("SOURCE", repr(str(parent))))
    return tmp_path


def runs_of(folder, given=None, *, steps=100, seeds=1, inherited=3e-4):
    given = given or {}
    settings = configs.resolve(configs.load(str(folder / "config.py"), given))
    how = {"steps": steps, "seeds": seeds, "inherited": inherited}
    found = learning_rates.entries(settings, given, **how)
    runs = plan.runs_of(str(folder / "config.py"), found, folder / "out")
    return {run.name: run for run in runs}


def rates(run):
    """The rate of each step by the schedule that training has."""
    made = run.settings.training
    schedule = optimizer.schedule(run.settings.optimizer, made.num_steps)
    return np.array([schedule(step) for step in range(made.last_step)])


def test_the_schedules_are_a_ramp_the_configs_own_start_and_two_constant_rates(folder):
    runs = runs_of(folder)
    assert list(runs) == ["range_test", "re-warmed", "inherited", "minimum"]
    ramp = 8e-3 * np.arange(1, 101) / 100
    np.testing.assert_allclose(rates(runs["range_test"]), ramp, rtol=1e-5)
    whole = configs.resolve(configs.load(str(folder / "config.py")))
    own = optimizer.schedule(whole.optimizer, 1000)
    np.testing.assert_allclose(rates(runs["re-warmed"]), [own(i) for i in range(100)], rtol=1e-6)
    np.testing.assert_allclose(rates(runs["inherited"]), 3e-4, rtol=1e-6)
    np.testing.assert_allclose(rates(runs["minimum"]), 2e-4, rtol=1e-6)


def test_seeds_count_from_the_configs_and_more_of_them_keep_the_first_run(folder):
    one, three = runs_of(folder), runs_of(folder, seeds=3)
    assert [three[f"minimum_s{n}"].seed for n in range(3)] == [5, 6, 7]
    assert {run.run_id for run in one.values()} < {run.run_id for run in three.values()}
    assert {run.group for run in three.values()} == set(one)


def test_equal_arms_are_one_and_a_wsd_schedule_or_epochs_do_no_harm(folder):
    assert "minimum" not in runs_of(folder, inherited=2e-4)
    assert "inherited" not in runs_of(folder, inherited=None)
    given = {"optimizer.schedule": "wsd", "optimizer.decay_steps": "50"}
    np.testing.assert_allclose(rates(runs_of(folder, given)["minimum"]), 2e-4, rtol=1e-6)
    given = {"training.num_steps": "0", "training.num_epochs": "2"}
    runs = runs_of(folder, given)
    assert [run.settings.training.last_step for run in runs.values()] == [100] * 4


@pytest.mark.parametrize(
    ("given", "how", "message"),
    [
        ({"init.source": "", "init.upcycle.recipe": ""}, {}, "set --config.init.source=DIR"),
        ({}, {"steps": 10}, "--steps=10 ends before the warm-up"),
        ({}, {"seeds": 0}, "--seeds=0 must be at least 2 and 1"),
    ],
)
def test_settings_that_measure_nothing_are_refused(folder, given, how, message):
    with pytest.raises(ValueError, match=message):
        runs_of(folder, given, **how)


def test_the_last_rate_is_that_of_the_parents_checkpoint(tmp_path):
    rows = [{"step": s, "learning_rate": r} for s, r in ((10, 4e-3), (20, 2e-3), (30, 4e-4))]
    lines = [json.dumps(row) for row in [*rows, {"step": 30, "validation": {}}]]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    run, at_20 = configs.source_of(str(tmp_path)), configs.source_of(f"{tmp_path}@20")
    none = configs.source_of(str(tmp_path / "none"))
    assert learning_rates.last_rate([none, run]) == 4e-4
    assert learning_rates.last_rate([at_20]) == 2e-3
    assert learning_rates.last_rate([none]) is None


def scattered(values):
    return types.SimpleNamespace(curve=lambda *_: (np.arange(len(values)), np.array([values])))


def test_the_least_difference_is_that_of_the_scatter_and_not_of_the_trend():
    straight = np.linspace(4, 3, 40)
    assert learning_rates.least_difference(scattered(straight)) == pytest.approx(0, abs=1e-12)
    noise = np.random.default_rng(0).normal(0, 0.01, 40_000)
    found = learning_rates.least_difference(scattered(3 + noise))
    assert found == pytest.approx(2 * math.sqrt(2) * 0.01, rel=0.02)
    assert learning_rates.least_difference(scattered([4.0, 3.0])) == math.inf


def write_arms(folder, ends, seeds=1):
    """Made-up arms that end at these bits per byte, as the stand-in finds them."""
    moe = {"num_experts": 8, "recipe": "naive", "source": str(folder / "dense")}
    made_up.write_run(folder / "made" / "range_test", seed=5, start=3.45, end=4.2, **moe)
    for name, end in ends.items():
        for n in range(seeds):
            at = folder / "made" / (f"{name}_s{n}" if seeds > 1 else name)
            made_up.write_run(at, seed=5 + n, start=3.45, end=end, **moe)
            config = json.loads((at / "config.json").read_text())
            config["optimizer"] = {"arm": name}  # its group
            (at / "config.json").write_text(json.dumps(config))


def measure(folder, monkeypatch, *flags):
    monkeypatch.chdir(folder)
    program = str(folder / "advise.py")
    arguments = ["--measure", "--config=config.py", "--workdir=out", "--steps=240", *flags]
    monkeypatch.setattr("sys.argv", [program, *arguments])
    monkeypatch.setattr(figures, "draw", lambda records: {})  # they take seconds
    with pytest.raises(SystemExit) as end:
        advise.main()
    return end.value.code


def test_the_command_executes_the_runs_and_says_what_to_take(folder, monkeypatch, capsys):
    write_arms(folder, {"re-warmed": 3.9, "inherited": 3.3, "minimum": 3.6}, seeds=3)
    assert measure(folder, monkeypatch, "--seeds=3", "--inherited_rate=3e-4") == 0
    said = capsys.readouterr().out
    assert said.startswith("10 runs in 4 groups, ")
    assert "Take inherited: it is ahead of every other arm" in said
    assert "the first 240 of 1000 steps" in said
    kept = json.loads((folder / "out" / "advice.json").read_text())
    assert [arm["name"] for arm in kept["arms"]] == ["inherited", "minimum", "re-warmed"]
    assert [arm["rate"] for arm in kept["arms"]] == [3e-4, 2e-4, 2e-3]
    assert kept["tied"] == [] and kept["least"] is None and len(kept["range_test"]) == 13
    assert kept["arms"][0]["recovery"]["of_parent"] is True
    page = (folder / "out" / "report.html").read_text()
    assert "Dip and recovery" in page and "range_test" not in page.split("<h2>Commands")[0]
    assert measure(folder, monkeypatch, "--seeds=3", "--inherited_rate=3e-4") == 0
    assert ": starts" not in capsys.readouterr().out  # all runs are done


def test_one_seed_says_below_what_it_ranks_nothing_and_a_failed_arm_is_left_out(
    folder, monkeypatch, capsys
):
    write_arms(folder, {"re-warmed": 3.3, "inherited": 3.3})
    assert measure(folder, monkeypatch, "--inherited_rate=3e-4") == 1
    said = capsys.readouterr().out
    assert "Take " in said and "they cannot be told apart" in said
    assert "One seed cannot rank differences below 0.0" in said
    kept = json.loads((folder / "out" / "advice.json").read_text())
    assert {arm["name"] for arm in kept["arms"]} == {"re-warmed", "inherited"}
    assert kept["least"] > 0


def test_mistakes_are_refused_in_one_line(folder, monkeypatch, capsys):
    for flags in (["--json"], ["--moe_tokens=3"], ["--config.seeed=1"], ["--steps=3"]):
        assert measure(folder, monkeypatch, *flags) == 2
        assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr("sys.argv", ["advise.py", "--config=config.py", "--workdir=out"])
    with pytest.raises(SystemExit, match="2"):
        advise.main()
    assert capsys.readouterr().err == "advise.py: --workdir needs --measure\n"
