"""Whole runs: broken off and gone on with, compiled once, and refused in one line."""

import functools
import json
import logging
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from moe_jax import config as configs
from moe_jax import stopping, train
from moe_jax.commands import train as train_command
from moe_jax.training import checkpoint, metrics

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = """
from moe_jax import config as configs

def get_config():
    config = configs.default()
    config.model.update(
        vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_experts=4, num_experts_per_tok=2,
    )
    config.data.update(source=SOURCE, sequence_length=32, validation_fraction=0.2, cache_dir=CACHE)
    config.optimizer.learning_rate = 1e-2
    config.training.update(num_steps=56, batch_size=8, log_every=2)
    config.evaluation.update(every_steps=20, batch_size=8, max_batches=2)
    config.checkpoint.every_steps = 7
    return config
"""
CLOCK_FIELDS = ("tokens_per_second", "data_wait", "mfu")


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    rng = random.Random(0)
    words = [f"{rng.randrange(16**3):x}" for _ in range(50)]
    for i in range(20):
        text = " ".join(rng.choice(words) for _ in range(200))
        (folder / f"{i}.txt").write_text(text)
    path = folder / "config.py"
    cache = os.path.join(folder, "cache")
    path.write_text(CONFIG.replace("SOURCE", repr(str(folder))).replace("CACHE", repr(cache)))
    return str(path)


def command(config_file, workdir, *flags):
    script = str(ROOT / "scripts" / "train.py")
    return [sys.executable, script, f"--config={config_file}", f"--workdir={workdir}", *flags]


def without_clock(workdir):
    rows = metrics.read(workdir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in CLOCK_FIELDS} for row in rows]


@pytest.fixture(scope="module")
def unbroken(config_file, tmp_path_factory):
    """A whole run in this process; its log of compilations beside it."""
    workdir = tmp_path_factory.mktemp("runs") / "unbroken"
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("jax")
    logger.addHandler(handler)
    try:
        with jax.log_compiles():
            result = train.run(configs.resolve(configs.load(config_file)), workdir)
    finally:
        logger.removeHandler(handler)
    return workdir, result, messages


def test_a_run_leaves_what_it_promises(unbroken):
    workdir, result, _ = unbroken
    for name in ("config.json", "metrics.jsonl", "tensorboard", "checkpoints/56", "result.json"):
        assert (workdir / name).exists(), name
    assert result["tokens"] == 56 * 8 * 32
    rows = metrics.read(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(2, 57, 2))
    assert [row["step"] for row in rows if "validation" in row] == [0, 20, 40, 56]
    # The curve is of two batches, the result of all held-out text.
    assert all(
        row["validation"]["held_out_tokens"] <= 2 * 8 * 32
        for row in rows[::-1]
        if "validation" in row
    )
    assert result["held_out_tokens"] > 3 * rows[-1]["validation"]["held_out_tokens"]
    assert result["loss"] == pytest.approx(rows[-1]["validation"]["loss"], rel=0.05)
    assert result["loss"] < rows[0]["validation"]["loss"] - 1
    # Bytes are the tokens, but for one end in each of the documents.
    assert result["bits_per_byte"] == pytest.approx(result["loss"] / np.log(2), rel=0.01)
    blocks_R3 = np.array(result["blocks"])
    assert blocks_R3[:, 1].sum() == result["held_out_tokens"]
    nats, tokens, num_bytes = blocks_R3.sum(axis=0)
    assert result["loss"] == pytest.approx(nats / tokens, rel=1e-6)
    bits = nats / np.log(2) / num_bytes  # of rounded sums, of a short text
    assert result["bits_per_byte"] == pytest.approx(bits, rel=1e-4)
    assert result["device_seconds"] == pytest.approx(8 * result["seconds"], rel=0.01)
    assert result["parent_device_seconds"] == 0 and result["command"]
    assert sum(result["goodput"].values()) == pytest.approx(1, abs=1e-3)
    assert result["goodput"]["compile"] > 0 and result["goodput"]["lost"] == 0
    health = rows[-1]["router"]
    np.testing.assert_allclose(np.sum(health["tokens_per_expert"], axis=1), 1, atol=1e-4)
    assert 1 <= health["effective_experts"][0] <= 4


def test_the_train_step_compiles_once(unbroken):
    compiled = [m for m in unbroken[2] if "Finished XLA compilation of jit(train_step)" in m]
    assert len(compiled) == 1


def test_a_run_that_stops_at_a_step_is_the_unbroken_one_there_and_goes_on(
    unbroken, config_file, tmp_path
):
    workdir = tmp_path / "run"
    load = functools.partial(configs.load, config_file)
    result = train.run(configs.resolve(load({"training.stop_step": 49})), workdir)
    assert (result["steps"], result["tokens"]) == (49, 49 * 8 * 32)
    kept = pathlib.Path(shutil.copytree(unbroken[0], tmp_path / "unbroken"))
    shutil.rmtree(kept / "checkpoints" / "56")
    states = (state_in(folder, config_file) for folder in (workdir, kept))
    jax.tree.map(np.testing.assert_array_equal, *states)
    whole = train.run(configs.resolve(load()), workdir)
    before, after = result["device_seconds"], 8 * whole["seconds"]
    assert before < whole["device_seconds"] <= before + after + 1  # both processes count
    assert whole["device_seconds"] > after
    assert [row for row in without_clock(workdir) if row["step"] != 49] == without_clock(
        unbroken[0]
    )
    states = (state_in(folder, config_file) for folder in (workdir, unbroken[0]))
    jax.tree.map(np.testing.assert_array_equal, *states)
    with pytest.raises(configs.ConfigError, match="stop_step=49, but .* is at step 56 already"):
        train.run(configs.resolve(load({"training.stop_step": 49})), workdir)
    with pytest.raises(configs.ConfigError, match="stop_step=57 is beyond num_steps=56"):
        configs.resolve(load({"training.stop_step": 57}))


def test_a_run_asks_itself_to_stop_when_its_time_is_over(config_file, tmp_path, heard):
    asked = []
    with stopping.requests(asked.append):
        train_command._stop_in(0.01)
        time.sleep(0.2)
        assert asked == [signal.SIGTERM]
        train_command._stop_in(0.01)  # and not twice, which would end this process
        time.sleep(0.2)
    refused = command(config_file, tmp_path / "run", "--max_hours=0")
    refused = subprocess.run(refused, capture_output=True, text=True)
    assert refused.returncode == 2 and "--max_hours=0 must be a finite number" in refused.stderr


def test_a_second_signal_ends_at_once(config_file, tmp_path, heard):
    """In a step, after which the first would save and end the run with 75."""
    flags = ("--config.training.num_steps=1000000", "--config.evaluation.every_steps=0")
    process = started(config_file, tmp_path / "run", *flags)
    process.send_signal(signal.SIGSTOP)  # both are there when it goes on
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCONT):
        process.send_signal(number)
    assert process.wait() == 130


def started(config_file, workdir, *flags):
    """A run that has logged a step."""
    process = subprocess.Popen(
        command(config_file, workdir, *flags), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not metrics.read(workdir / "metrics.jsonl") and process.poll() is None:
        time.sleep(0.005)
    return process


def state_in(workdir, config_file):
    restored = {}

    def keep(directory, abstract, original=checkpoint.restore_latest, **how):
        restored["state"] = original(directory, abstract, **how).state
        raise configs.ConfigError("seen")

    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(checkpoint, "restore_latest", keep)
        with pytest.raises(configs.ConfigError, match="seen"):
            train.run(configs.resolve(configs.load(config_file)), workdir)
    return restored["state"]


BAD_FLAGS = {
    "--config.optimizer.learning_rate=nan": "learning_rate=nan is not a finite number",
    "--config.optimizer.learning_rat=1": "did you mean config.optimizer.learning_rate",
    "--config.training.num_steps=1.5": "num_steps",
    "--config.training.batch_size=ten": "batch_size",
    "--config.model.num_experts_per_tok=5": "num_experts_per_tok=5 is more than num_experts=4",
    "--config.training.batch_size=12": "batch_size .*=12 is not divisible by the 8 batch shards",
    "--config.mesh.data=3": "mesh data=3.* does not fit 8",
    "--config.model.hidden_size=20": "axis of size 20 is not divisible by the mesh's fsdp axis",
    "--config.data.source=does/not/exist": "'does/not/exist' matches no file",
    "--config.balance.load_balancing_scope=all": "did you mean 'all_layers'. Use one of",
    "--config.init.upcycle.recipe=drop": "needs a parent; set config.init.source",
    "--config.init.source=does/not/exist": "has no checkpoints",
    "--config.seed=-1": "seed=-1 must not be negative",
    "--config.seed=9999999999": "must be less than",
    "--config.optimizer.no_weight_decay=(": "is not a regular expression",
    "--config.optimizer.weight_decay=inf": "is not a finite number",
    "--config.evaluation.batch_size=-8": "must be more than 0",
    "--config.model.grouped_matmul=hots": "grouped_matmul implementation='hots' is unknown",
    "--config.model.preset=llama": "is unknown: did you mean 'llama-2-7b'. Use one of",
    "positional": "unexpected argument 'positional'",
}


@pytest.mark.parametrize("flag", BAD_FLAGS)
def test_a_mistake_is_refused_in_one_line_before_anything_is_written(flag, config_file, tmp_path):
    with pytest.raises(configs.ConfigError, match=BAD_FLAGS[flag]) as error:
        train.run(
            configs.resolve(configs.parse([f"--config={config_file}", flag])), tmp_path / "run"
        )
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["--config.optimizer.learning_rate=nan", "--config.seeed=1"])
def test_the_command_line_says_it_in_under_two_seconds_and_exits_2(flag, config_file, tmp_path):
    def seconds_of_children():  # of processors, not of a busy machine's clock
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    began = seconds_of_children()
    ended = subprocess.run(
        command(config_file, tmp_path / "run", flag), capture_output=True, text=True
    )
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1 and ended.stderr.startswith("train.py: ")
    assert not (tmp_path / "run").exists()
    assert seconds_of_children() - began < 2


def test_losses_that_stay_not_finite_end_the_run_with_3(unbroken, config_file, tmp_path):
    config = configs.load(config_file, {"optimizer.learning_rate": 1e30, "training.num_steps": 30})
    with pytest.raises(SystemExit) as ended:
        train.run(configs.resolve(config), tmp_path / "run")
    assert ended.value.code == 3


def test_a_run_does_not_go_on_with_a_text_that_changed_in_its_place(unbroken, config_file):
    workdir, _, _ = unbroken
    path = next(pathlib.Path(config_file).parent.glob("*.txt"))
    text = path.read_text()
    path.write_text(text.swapcase())
    try:
        with pytest.raises(configs.ConfigError, match="holds another .* text than when the run"):
            train.run(configs.resolve(configs.load(config_file)), workdir)
    finally:
        path.write_text(text)


def test_a_workdir_in_use_and_one_of_another_model_are_refused(unbroken, config_file):
    workdir, _, _ = unbroken
    lock = train._lock(workdir)
    with pytest.raises(configs.ConfigError, match="another run is using it"):
        train.run(configs.resolve(configs.load(config_file)), workdir)
    lock.close()
    for key, value in (("seed", 9), ("training.batch_size", 16)):
        with pytest.raises(configs.ConfigError, match=f"{key}={value} differs from the .* began"):
            train.run(configs.resolve(configs.load(config_file, {key: value})), workdir)
    for changes, named in (
        ({"model.intermediate_size": 64}, "moe_intermediate_size is 64, not 32;"),
        ({"model.num_hidden_layers": 2, "model.num_experts": 8}, "num_hidden_layers is 2, not 1; "),
        ({"model.num_experts": 0}, "num_experts is 0, not 4; "),
        ({"model.qk_norm": "head"}, "qk_norm is 'head', not 'none'; "),
        ({"optimizer.frozen": "embed"}, "optimizer.frozen is 'embed', not ''; "),
    ):
        other = configs.resolve(configs.load(config_file, changes))
        message = f"has another model or optimizer: {named}.*give another --workdir"
        with pytest.raises(configs.ConfigError, match=message):
            train.run(other, workdir)
    shorter = configs.resolve(configs.load(config_file, {"training.num_steps": 40}))
    with pytest.raises(configs.ConfigError, match="num_steps=40, but .* is at step 56 already"):
        train.run(shorter, workdir)
    assert json.loads((workdir / "config.json").read_text())["model"]["intermediate_size"] == 32


def test_too_little_memory_is_answered_with_the_settings_that_need_less(
    config_file, tmp_path, monkeypatch, capsys
):
    def exhausted(*_, **how):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr(train, "run", exhausted)
    monkeypatch.setattr(sys, "argv", command(config_file, tmp_path / "run")[1:])
    with pytest.raises(SystemExit) as ended:
        train_command.main()
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "out of memory (RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.)" in line
    assert "accumulation_steps=2" in line and "remat=full" in line and "mesh.fsdp" in line


@pytest.mark.long
def test_skipped_records_are_in_metrics_result_and_output_and_one_too_many_ends_the_run(
    config_file, tmp_path
):
    lines = [json.dumps({"content": f"text {n} " * 40}) + "\n" for n in range(200)]
    lines[7] = lines[9] = "broken\n"
    (tmp_path / "a.jsonl").write_text("".join(lines))
    flags = ("source=a.jsonl", "text_field=content", "skip_damaged=%d")
    flags = ["--config.training.num_steps=2", *(f"--config.data.{flag}" for flag in flags)]
    said, workdir = [], tmp_path / "run"
    for most, status in ((0, 2), (1, 2), (2, 0)):
        run = command(config_file, workdir, *flags[:-1], flags[-1] % most)
        done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        said.append(done.stderr)
    assert (
        said[0].splitlines()[-1].endswith('a.jsonl:8 is not a JSON object with "content"; mend it')
    )
    assert "a.jsonl:10 is not" in said[1].splitlines()[-1] and "skip_damaged=1)" in said[1]
    assert said[2].count("skipped 1 of at most 2: a.jsonl:8") == 1
    counts = {"not a JSON object": 2}
    result = json.loads((workdir / "result.json").read_text())
    assert result["skipped_records"] == {"train": counts, "validation": counts}
    rows = metrics.read(workdir / "metrics.jsonl")
    assert all(row["skipped_records"] == {"train": 2, "validation": 2} for row in rows)
