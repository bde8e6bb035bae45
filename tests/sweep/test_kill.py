"""A sweep of real runs that is killed again and again, and one on submitit's local executor."""

import csv
import importlib.util
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = """
from moe_jax import config as configs
from moe_jax.sweep import arms

def get_config():
    config = configs.default()
    config.model.update(
        vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2,
    )
    config.data.update(source={text!r}, sequence_length=32, cache_dir={cache!r})
    config.data.validation_fraction = 0.2
    config.training.update(num_steps={steps}, batch_size=8, log_every=5, log_to=())
    config.checkpoint.every_steps = 5
    return config

def get_sweep():
    moe = {{"init.source": "@dense", "init.upcycle.recipe": "naive", "seed": 1}}
    moe |= {{"model.num_experts": 4, "model.num_experts_per_tok": 2}}
    dense, naive = arms.named({{"dense": {{}}}}), arms.named({{"naive": moe}})
    return arms.chain(dense, arms.seeds(naive, 2))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "text").mkdir()
    for i in range(20):
        text = " ".join(f"{(i * 7919 + j * 104729) % 4096:x}" for j in range(200))
        (folder / "text" / f"{i}.txt").write_text(text)
    return folder


def command(folder, workdir, *options, steps=40):
    config = CONFIG.format(text=str(folder / "text"), cache=str(folder / "cache"), steps=steps)
    (folder / "config.py").write_text(config)
    start = [sys.executable, str(ROOT / "scripts" / "sweep.py"), f"--config={folder}/config.py"]
    return [*start, f"--workdir={folder / workdir}", *options]


def execute(command):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def rows(workdir, name="results.csv"):
    """The rows without what depends on the time and the place."""
    with open(workdir / name) as file:
        kept = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in ("seconds", "workdir")} for row in kept]


def trainers(folder):
    """The processes of runs in a folder."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if f"--workdir={folder}/" in words and "train.py" in words:
            found.append(int(path.parent.name))
    return found


@pytest.mark.long
@pytest.mark.skipif(not pathlib.Path("/proc/self/cmdline").exists(), reason="needs Linux's /proc")
def test_a_sweep_that_is_killed_ten_times_ends_as_an_unbroken_one(folder):
    execute(command(folder, "whole"))
    chance, kills, killed = random.Random(0), 0, folder / "killed"
    while True:
        sweep = subprocess.Popen(
            command(folder, "killed"),
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        patience = chance.uniform(1.5, 12) if kills < 10 else None
        try:
            _, said = sweep.communicate(timeout=patience)
            assert sweep.returncode == 0, said[-2000:]
            if kills >= 10:
                break
            # Done before ten kills: a finished run is begun anew, as if its last writes were lost.
            for path in killed.glob("*/result.json"):
                path.unlink()
        except subprocess.TimeoutExpired:
            sweep.kill()  # its runs go on
            sweep.communicate()
            kills += 1
            if kills % 2:
                for number in trainers(killed):
                    os.kill(number, signal.SIGKILL)
    assert rows(killed) == rows(folder / "whole")
    assert rows(killed, "groups.csv") == rows(folder / "whole", "groups.csv")
    assert not trainers(killed)


@pytest.mark.long
def test_submitits_local_executor_gives_the_same_results(folder):
    if importlib.util.find_spec("submitit") is None:
        pytest.skip("submitit, an optional extra, is not installed")
    if not (folder / "whole" / "results.csv").exists():
        execute(command(folder, "whole"))
    options = ["--launcher=slurm", "--slurm.cluster=local", "--slurm.timeout_min=30"]
    began = time.time()
    said = execute(command(folder, "jobs", *options))
    assert rows(folder / "jobs") == rows(folder / "whole")
    assert len(list((folder / "jobs" / "slurm").glob("*_result.pkl"))) == 3
    assert "naive_s1: done" in said and time.time() - began < 300
