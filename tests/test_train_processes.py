"""Whole runs of several processes: stopped, killed, gone on with by another number of them."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from moe_jax.training import checkpoint, metrics

pytestmark = pytest.mark.long
ROOT = pathlib.Path(__file__).parents[1]
CONFIG = """
from moe_jax import config as configs

def get_config():
    config = configs.default()
    config.model.update(
        vocab_size=264, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=8, num_experts=4, num_experts_per_tok=2,
    )
    config.data.update(source=SOURCE, sequence_length=32, validation_fraction=0.2, cache_dir=CACHE)
    config.optimizer.learning_rate = 1e-3
    config.training.update(num_steps=60, batch_size=8, log_every=1)
    config.evaluation.update(batch_size=8, max_batches=2, final_max_batches=2)
    config.checkpoint.update(every_steps=10, keep=10)
    return config
"""
UPCYCLE = ["--config.init.upcycle.recipe=drop", "--config.training.num_steps=1"]
NOTHING_TRAINS = "--config.optimizer.frozen=."


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    for i in range(20):
        (folder / f"{i}.txt").write_text(f"{i} and {i * i} are {i + i * i}, " * 30)
    path = folder / "config.py"
    cache = str(folder / "cache")
    path.write_text(CONFIG.replace("SOURCE", repr(str(folder))).replace("CACHE", repr(cache)))
    return path


def start(config_file, workdir, *flags, num_processes=2, of_process=lambda process: []):
    """`num_processes` processes with 8 devices together; stdout and stderr in files of workdir."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    devices = f"device_count={8 // num_processes}"
    xla_flags = os.environ["XLA_FLAGS"].replace("device_count=8", devices)
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), f"--config={config_file}"]
    command += [f"--workdir={workdir}", f"--num_processes={num_processes}", *flags]
    if num_processes > 1:
        command.append(f"--coordinator=localhost:{port}")
    started = []
    for process in range(num_processes):
        own = [f"--process_id={process}"] if num_processes > 1 else []
        with open(f"{workdir}.{process}.txt", "w") as output:
            started.append(
                subprocess.Popen(
                    [*command, *own, *of_process(process)],
                    env={**os.environ, "XLA_FLAGS": xla_flags, "PYTHONPATH": str(ROOT)},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )
    return started


def finish(workdir, started) -> list[tuple[int, str]]:
    """(exit status, output) of each."""
    codes = [process.wait(timeout=300) for process in started]
    return [(code, said(workdir, process)) for process, code in enumerate(codes)]


def said(workdir, process) -> str:
    return pathlib.Path(f"{workdir}.{process}.txt").read_text()


def whole_run(config_file, workdir, *flags, num_processes) -> dict:
    for code, text in finish(
        workdir, start(config_file, workdir, *flags, num_processes=num_processes)
    ):
        assert code == 0, text
    return json.loads((workdir / "result.json").read_text())


@contextlib.contextmanager
def at_step(step, workdir, started):
    """The block when the run has logged `step`."""
    while all(process.poll() is None for process in started):
        if any(row["step"] >= step for row in metrics.read(workdir / "metrics.jsonl")):
            break
        time.sleep(0.005)
    yield


def losses(workdir):
    return [row["loss"] for row in metrics.read(workdir / "metrics.jsonl") if "loss" in row]


def test_a_run_stopped_killed_and_moved_to_one_process_ends_like_one_that_was_never_two(
    config_file, tmp_path
):
    whole = whole_run(config_file, tmp_path / "whole", num_processes=1)
    workdir = tmp_path / "broken"

    slow = "--config.evaluation.every_steps=1"  # so that 60 steps take longer than to see one
    started = start(config_file, workdir, slow)
    with at_step(13, workdir, started):
        started[1].send_signal(signal.SIGTERM)
    assert [code for code, _ in finish(workdir, started)] == [75, 75]
    stopped_at = checkpoint.steps(workdir / "checkpoints")[-1]
    assert 13 <= stopped_at < 40
    assert f"stopped by SIGTERM at step {stopped_at}; saved" in said(workdir, 0)
    assert "stopped by" not in said(workdir, 1)  # process 0 speaks for all

    started = start(config_file, workdir, slow)
    with at_step(stopped_at + 12, workdir, started):
        started[1].kill()
    began = time.monotonic()
    (code, text), _ = finish(workdir, started)
    assert time.monotonic() - began < 60
    assert code == 1
    assert "run the same command in all processes again" in text.splitlines()[-1]
    assert f"going on from step {stopped_at}" in text
    saved = checkpoint.steps(workdir / "checkpoints")[-1]
    assert stopped_at < saved < 60

    result = whole_run(config_file, workdir, num_processes=1)
    assert f"going on from step {saved}" in said(workdir, 0)
    # The order of sums over devices differs, and 60 steps let it grow.
    np.testing.assert_allclose(losses(workdir), losses(tmp_path / "whole"), rtol=1e-4)
    assert result["loss"] == pytest.approx(whole["loss"], rel=1e-4)


def test_the_end_of_process_0_ends_the_others_and_two_go_on(config_file, tmp_path):
    workdir = tmp_path / "run"
    started = start(config_file, workdir)
    with at_step(13, workdir, started):
        started[0].kill()
    began = time.monotonic()
    _, (code, text) = finish(workdir, started)
    assert time.monotonic() - began < 60
    assert code != 0 and ("another task died" in text or "lost another one" in text)
    whole_run(config_file, workdir, num_processes=2)
    assert "going on from step 10" in said(workdir, 0)
    assert len(losses(workdir)) == 60


# On the second mesh both processes hold all rows, and the parent is cut within its heads.
@pytest.mark.parametrize("mesh", [dict(fsdp=2, expert=2, tensor=2), dict(fsdp=1, tensor=8)])
def test_two_processes_upcycle_to_bitwise_the_same_mixture_as_one(mesh, config_file, tmp_path):
    axes = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
    parent = tmp_path / "parent"
    flags = ["--config.model.num_experts=0", "--config.training.num_steps=2"]
    whole_run(config_file, parent, *axes, *flags, num_processes=2)
    upcycle = [*axes, *UPCYCLE, f"--config.init.source={parent}", NOTHING_TRAINS]
    one, two = tmp_path / "one", tmp_path / "two"
    results = [
        whole_run(config_file, workdir, *upcycle, num_processes=n)
        for n, workdir in ((1, one), (2, two))
    ]
    first, second = (digests(workdir / "checkpoints" / "1") for workdir in (one, two))
    assert any("experts" in path for path in first)
    assert first == second
    np.testing.assert_allclose(losses(two), losses(one), rtol=2e-6)
    assert results[0]["expert_similarity"] == results[1]["expert_similarity"]


def digests(folder) -> dict:
    return checkpoint.described(folder)["digests"]


def test_a_damaged_part_is_taken_by_no_process(config_file, tmp_path):
    workdir = tmp_path / "run"
    short = "--config.training.num_steps=20"
    whole_run(config_file, workdir, short, num_processes=2)
    data = max((workdir / "checkpoints" / "20").rglob("d/*"), key=lambda p: p.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    whole_run(config_file, workdir, short, num_processes=2)
    assert "going on from step 10" in said(workdir, 0)


def test_processes_of_different_configs_are_refused(config_file, tmp_path):
    workdir = tmp_path / "run"
    ended = finish(
        workdir,
        start(config_file, workdir, of_process=lambda process: [f"--config.seed={process}"]),
    )
    for code, text in ended:
        assert code == 2
        assert "the config of process 1 is not that of process 0" in text
    assert not workdir.exists()
