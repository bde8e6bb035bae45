"""Whole runs as a person starts them, and what they leave: shared by the tests of this folder."""

import os
import pathlib
import random
import subprocess
import sys

import jax
import jax.numpy as jnp

from moe_jax.training import checkpoint, metrics

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 40
# Ten saves, so that a good part of the time is inside of one.
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
    config.training.update(num_steps=STEPS, batch_size=8, log_every=1)
    config.evaluation.update(every_steps=15, batch_size=8, max_batches=1, final_max_batches=1)
    config.checkpoint.update(every_steps=4, keep=10)
    return config
"""
# Fields of a row of metrics.jsonl that depend on the clock.
CLOCK = ("tokens_per_second", "data_wait", "mfu")
# Without it jax compiles again what it compiled in less than a second.
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def write_config(folder: pathlib.Path) -> pathlib.Path:
    """A config file with its text and its cache beside it."""
    rng = random.Random(0)
    words = [f"{rng.randrange(16**3):x}" for _ in range(50)]
    (folder / "text").mkdir()
    for i in range(20):
        (folder / "text" / f"{i}.txt").write_text(" ".join(rng.choices(words, k=200)))
    values = {"SOURCE": str(folder / "text"), "CACHE": str(folder / "cache"), "STEPS": STEPS}
    text = CONFIG
    for name, value in values.items():
        text = text.replace(f"={name}", f"={value!r}")
    (folder / "config.py").write_text(text)
    return folder / "config.py"


def start(config_file, workdir, *flags, **environment) -> subprocess.Popen:
    """train.py; its messages come with `ended`."""
    script = str(ROOT / "scripts" / "train.py")
    # A kill may leave half a program in the cache, which other tests do not have to read.
    environment["JAX_COMPILATION_CACHE_DIR"] = str(pathlib.Path(config_file).parent / "compiled")
    return subprocess.Popen(
        [sys.executable, script, f"--config={config_file}", f"--workdir={workdir}", *flags],
        env={**os.environ, **ENVIRONMENT, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen) -> tuple[int, str]:
    """(exit status, messages) of a program that is ending."""
    said = process.communicate()[1]
    return process.returncode, said


def finish(config_file, workdir, *flags) -> str:
    """Runs it to its end; returns its messages."""
    code, said = ended(start(config_file, workdir, *flags))
    assert code == 0, said
    return said


def shapes(folder: pathlib.Path) -> dict:
    """The leaves of a checkpoint's state by name, to restore on one device."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=here)
        for name, (shape, dtype) in checkpoint.described(folder)["leaves"].items()
    }


def digests(workdir: pathlib.Path, step: int) -> dict:
    return checkpoint.described(workdir / "checkpoints" / str(step))["digests"]


def restored(workdir: pathlib.Path, unbroken: pathlib.Path) -> tuple[int, bool]:
    """The step that a run in `workdir` would go on from, 0 for none, and whether its state is
    bitwise the one that the unbroken run had there, if it saved that step too."""
    abstract = shapes(unbroken / "checkpoints" / str(STEPS))
    found = checkpoint.restore_latest(workdir / "checkpoints", abstract)
    if found is None:
        return 0, True
    both = found.step in checkpoint.steps(unbroken / "checkpoints")
    return found.step, not both or digests(workdir, found.step) == digests(unbroken, found.step)


def rows(workdir: pathlib.Path) -> list[dict]:
    """The rows of metrics.jsonl without what depends on the clock."""
    found = metrics.read(workdir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in found]


def unfinished(workdir: pathlib.Path) -> set[tuple[str, int]]:
    """The folders of saves that have not ended, each with its inode: names come again."""
    try:
        entries = [
            e for e in os.scandir(workdir / "checkpoints") if "orbax-checkpoint-tmp" in e.name
        ]
        return {(entry.name, entry.inode()) for entry in entries}
    except FileNotFoundError:
        return set()
