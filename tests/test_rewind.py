"""Whole runs that go back to a checkpoint: by hand, by themselves, and with batches left out."""

import json
import os
import random
import shutil
import sys

import jax
import numpy as np
import pytest

from moe_jax import config as configs
from moe_jax import train
from moe_jax.commands import train as train_command
from moe_jax.training import checkpoint, guards, metrics

CONFIG = """
from moe_jax import config as configs

def get_config():
    config = configs.default()
    config.model.update(
        vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2,
    )
    config.data.update(source=SOURCE, sequence_length=32, validation_fraction=0.2, cache_dir=CACHE)
    config.optimizer.learning_rate = 1e-2
    config.training.update(num_steps=20, batch_size=8, log_every=1)
    config.evaluation.update(batch_size=8, final_max_batches=1)
    config.checkpoint.update(every_steps=5, keep=9)
    config.guards.update(spike_sigma=6.0, spike_window=4)
    return config
"""


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """The runs of this file share their compiled functions, also those that compile quickly."""
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewind")
    rng = random.Random(0)
    (folder / "text").mkdir()
    for i in range(8):
        text = " ".join(f"{rng.randrange(99):x}" for _ in range(300))
        (folder / "text" / f"{i}.txt").write_text(text)
    path = folder / "config.py"
    path.write_text(
        CONFIG.replace("SOURCE", repr(str(folder / "text"))).replace(
            "CACHE", repr(str(folder / "cache"))
        )
    )
    return str(path)


def run(config_file, workdir, **changes):
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    return train.run(configs.resolve(configs.load(config_file, changes)), workdir)


def losses(workdir):
    return {r["step"]: r["loss"] for r in metrics.read(workdir / "metrics.jsonl") if "loss" in r}


def final_digests(workdir):
    return checkpoint.described(workdir / "checkpoints" / "20")["digests"]


@pytest.fixture(scope="module")
def unbroken(config_file, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    run(config_file, workdir)
    return workdir


@pytest.fixture
def spike_at_13(unbroken, monkeypatch):
    """The loss that step 13 of the unbroken run had is a spike, wherever it is seen."""
    spiking = np.float32(losses(unbroken)[13])

    def is_spike(before, loss, norm, sigma):
        return jax.numpy.abs(loss - spiking) < 1e-6

    monkeypatch.setattr(guards, "is_spike", is_spike)


def test_the_update_of_a_spike_is_not_made(config_file, unbroken, spike_at_13, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken, workdir)
    from_10 = {"checkpoint__resume_from": 10, "checkpoint__every_steps": 1}
    result = run(config_file, workdir, training__stop_step=14, **from_10)
    digests = {
        step: checkpoint.described(workdir / "checkpoints" / str(step))["digests"]
        for step in (12, 13, 14)
    }
    assert result["skipped_steps"] == 1
    assert "step 13: a spike of the loss or gradient, no update was made" in capsys.readouterr().err
    changed = [
        {name for name in before if before[name] != after[name]}
        for before, after in ((digests[12], digests[13]), (digests[13], digests[14]))
    ]
    assert changed[0] == {"step", "history/losses_W", "history/gradient_norms_W"}
    assert any(name.startswith("params") for name in changed[1])


def test_a_run_goes_back_by_itself_and_leaves_the_batches_out(
    config_file, unbroken, spike_at_13, tmp_path, capsys, monkeypatch
):
    """What it does then is what a person gets from resume_from and skip_batches."""
    command = ["train.py", f"--config={config_file}", f"--workdir={tmp_path / 'by-itself'}"]
    monkeypatch.setattr(sys, "argv", [*command, "--config.guards.rewind_after=1"])
    train_command.main()
    said = capsys.readouterr().err
    assert "step 13 is a spike again: the run goes back to its newest checkpoint" in said
    assert "leaves out the batches to 12" in said and "going on from step 10" in said
    data = checkpoint.newest_data(tmp_path / "by-itself" / "checkpoints")
    assert data["left_out"] == [[10, 12]]
    result = json.loads((tmp_path / "by-itself" / "result.json").read_text())
    assert result["goodput"]["lost"] > 0  # the steps 11 to 13
    assert list(losses(tmp_path / "by-itself")) == list(range(1, 21))

    by_hand = tmp_path / "by-hand"
    run(config_file, by_hand, training__stop_step=15)
    run(config_file, by_hand, checkpoint__resume_from=10, data__skip_batches=((10, 12),))
    assert final_digests(by_hand) == final_digests(tmp_path / "by-itself")
    assert "checkpoint of step 15 is renamed to 15.left-1" in capsys.readouterr().err
    assert losses(by_hand)[12] != losses(unbroken)[12]


def test_the_same_command_again_does_not_go_back_again(config_file, unbroken, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken, workdir)
    back = {"checkpoint__resume_from": 5}
    run(config_file, workdir, training__stop_step=12, **back)
    assert checkpoint.steps(workdir / "checkpoints") == [5, 10, 12]
    capsys.readouterr()
    run(config_file, workdir, **back)
    assert "going on from step 12" in capsys.readouterr().err
    assert final_digests(workdir) == final_digests(unbroken)
    with pytest.raises(configs.ConfigError, match="no checkpoint of step 7; it has 5, 10, 12"):
        run(config_file, workdir, checkpoint__resume_from=7)
    with pytest.raises(configs.ConfigError, match=r"\(3, 25\), but the run at step 20 has been tr"):
        run(config_file, workdir, data__skip_batches=((3, 25),), **back)
    with pytest.raises(configs.ConfigError, match="pairs .first, last. of whole numbers"):
        run(config_file, workdir, data__skip_batches=(3,))


@pytest.mark.long
def test_the_guard_can_be_turned_on_and_off_in_a_run_that_is_there(config_file, tmp_path):
    workdir = tmp_path / "run"
    for stop_step, sigma, window in ((5, 0.0, 4), (10, 6.0, 4), (15, 6.0, 8), (20, 0.0, 4)):
        changes = {"guards__spike_sigma": sigma, "guards__spike_window": window if sigma else 128}
        run(config_file, workdir, training__stop_step=stop_step, **changes)
        leaves = checkpoint.described(workdir / "checkpoints" / str(stop_step))["leaves"]
        shape = leaves.get("history/losses_W", [[0]])[0]
        assert shape == ([window] if sigma else [0])


def test_it_goes_back_a_few_times_and_then_ends_with_3(config_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(guards, "MOST_REWINDS", 1)
    monkeypatch.setattr(guards, "is_spike", lambda before, loss, norm, sigma: loss > 0)
    command = ["train.py", f"--config={config_file}", f"--workdir={tmp_path / 'run'}"]
    monkeypatch.setattr(sys, "argv", [*command, "--config.guards.rewind_after=2"])
    with pytest.raises(SystemExit) as ended:
        train_command.main()
    assert ended.value.code == 3
    said = capsys.readouterr().err
    assert said.count("goes back to its newest checkpoint") == 2 and "batches to 3" in said
    assert "the run went back 1 times; lower config.optimizer.learning_rate" in said


def test_a_run_without_room_for_a_checkpoint_is_refused_before_anything_is_written(
    config_file, tmp_path, monkeypatch
):
    full = type("Full", (), {"f_bavail": 1, "f_frsize": 1, "f_files": 0})
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    with pytest.raises(OSError, match="0.00 MB are free and a checkpoint takes 0.13 MB"):
        run(config_file, tmp_path / "run")
    assert not (tmp_path / "run").exists()
