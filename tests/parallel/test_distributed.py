"""Two processes of four devices are one of eight: the same rows, losses, and decisions."""

import functools
import itertools
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from moe_jax import config as configs
from moe_jax import model
from moe_jax.data import batches, packing, prepare, tokenizers
from moe_jax.data.corpus import TokenizedCorpus
from moe_jax.parallel import distributed, jax_private, sharding, watchdog
from moe_jax.parallel import mesh as meshes
from moe_jax.training import balance, optimizer, step
from moe_jax.training.state import TrainState

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 3


def settings_of(folder: pathlib.Path):
    config = configs.default()
    config.model.update(
        vocab_size=259, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_experts=4, num_experts_per_tok=2, remat="none",
    )  # fmt: skip
    config.mesh.update(fsdp=4, expert=2)
    config.data.update(source=str(folder / "text"), sequence_length=16, validation_fraction=0.0)
    config.data.cache_dir = str(folder / "cache")
    config.optimizer.learning_rate = 1e-2
    config.training.update(num_steps=STEPS, batch_size=8)
    return configs.resolve(config)


def open_corpus(settings) -> TokenizedCorpus:
    return prepare.open_corpus(
        settings.data.source,
        "train",
        tokenizers.load("bytes"),
        validation_fraction=0.0,
        cache=pathlib.Path(settings.data.cache_dir),
    )


def train(settings) -> dict:
    """The rows that this process feeds in each step, and the losses that it sees."""
    mesh = meshes.make(vars(settings.mesh))
    tx = optimizer.adamw(settings.optimizer, STEPS)

    def create():
        params = model.init(settings.model, jax.random.key(0))
        return TrainState.create(params, tx, balance.initial(settings.model, settings.balance))

    shardings = sharding.shardings(jax.eval_shape(create), mesh)
    state = meshes.under(mesh, jax.jit(create, out_shardings=shardings))()
    train_step = meshes.under(mesh, step.jitted(settings, tx, shardings, mesh))
    corpus = distributed.first_alone(functools.partial(open_corpus, settings), ValueError)
    on_batch = jax.NamedSharding(mesh, sharding.BATCH)
    rows = distributed.rows_of(on_batch.addressable_devices, on_batch, 8)
    plan = packing.RowPlan(corpus.pairs, sequence_length=16, seed=0)
    text = batches.batches(corpus, plan, batch_size=8, rows=rows)
    fed, losses = [], []
    for batch in itertools.islice(text, STEPS):
        fed.append(dict(zip(rows.tolist(), batch.tokens_BT.tolist(), strict=True)))
        state, values = train_step(state, batches.to_device(batch, on_batch, rows, 8))
        losses.append([float(values.loss), float(values.gradient_norm)])
    embedding = distributed.whole(state.params["embed"]["tokens"])
    return {"fed": fed, "losses": losses, "embedding": np.asarray(embedding).tolist()}


def disagree() -> dict:
    """The outcome when process 1 alone fails, has another config, or gets a signal."""
    me = jax_private.process_id()
    said = {"exchanged": distributed.exchange({"process": me}), "first": distributed.of_first(me)}
    try:
        with distributed.together(RuntimeError):
            if me == 1:
                raise RuntimeError("no such file")
    except RuntimeError as error:
        said["failure"] = str(error)
    try:
        distributed.check_equal("the seed", str(me))
    except ValueError as error:
        said["difference"] = str(error)
    largest = distributed.Largest(meshes.make({**dict.fromkeys(meshes.AXES, 1), "data": -1}))
    said["signals"] = [largest(signal.SIGTERM if me == n == 1 else 0) for n in range(4)]
    return said


if __name__ == "__main__":
    folder, port, process = sys.argv[1:]
    distributed.initialize(f"localhost:{port}", 2, int(process))
    with distributed.ending_together():
        result = train(settings_of(pathlib.Path(folder))) | disagree()
    (pathlib.Path(folder) / f"{process}.json").write_text(json.dumps(result))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "text").mkdir()
    for i in range(10):
        (folder / "text" / f"{i}.txt").write_text(f"one, two and {i} are {i * i} " * 10)
    return folder


@pytest.fixture(scope="module")
def two(folder):
    """The reports of two processes, each with four of the devices."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")
    environ = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), str(port), str(process)],
            env=environ,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    for process in started:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    return [json.loads((folder / f"{process}.json").read_text()) for process in range(2)]


def test_two_processes_train_as_one_on_the_same_rows(two, folder):
    one = train(settings_of(folder))
    for n in range(STEPS):
        first, second = ({int(row): tokens for row, tokens in p["fed"][n].items()} for p in two)
        assert not set(first) & set(second)
        assert first | second == one["fed"][n]
    # All processes see one and the same number; that of another number of processes differs by
    # the order in which sums over devices are taken.
    assert two[0]["losses"] == two[1]["losses"]
    assert two[0]["embedding"] == two[1]["embedding"]
    np.testing.assert_allclose(two[0]["losses"], one["losses"], rtol=2e-6)
    np.testing.assert_allclose(two[0]["embedding"], one["embedding"], atol=2e-5)


def test_what_one_process_meets_both_know(two):
    for process in two:
        assert process["exchanged"] == [{"process": 0}, {"process": 1}]
        assert process["first"] == 0
        assert "the seed of process 1 is not that of process 0" in process["difference"]
        # Process 1 got it at call 1; both see it at call 2: no step waits for the others' answer.
        assert process["signals"] == [0, 0, signal.SIGTERM, 0]
    assert [process["failure"] for process in two] == ["process 1: no such file", "no such file"]


@pytest.mark.parametrize("sizes", [(8, 1, 1, 1), (1, 4, 2, 1), (2, 2, 1, 2), (1, 2, 1, 4)])
@pytest.mark.parametrize("owner", [lambda d: d.id // 4, lambda d: d.id % 2, lambda d: d.id // 2])
def test_the_processes_feed_exactly_the_rows_that_their_devices_hold(sizes, owner):
    mesh = meshes.make(dict(zip(meshes.AXES, sizes, strict=False)))
    on_batch = jax.NamedSharding(mesh, sharding.BATCH)
    batch = jax.device_put(np.arange(16), on_batch)
    for process in sorted({owner(device) for device in jax.devices()}):
        devices = [device for device in jax.devices() if owner(device) == process]
        held = [s.data for s in batch.addressable_shards if s.device in devices]
        rows = distributed.rows_of(devices, on_batch, 16)
        np.testing.assert_array_equal(rows, np.unique(held))


def test_a_process_is_lost_when_its_beat_has_stopped_for_longer_than_it_may():
    heard = {}
    limit = watchdog.SILENT_SECONDS
    assert watchdog._silent(heard, [("0", "1"), ("1", "1")], 0) == []
    assert watchdog._silent(heard, [("0", "2"), ("1", "1")], limit) == []
    assert watchdog._silent(heard, [("0", "3"), ("1", "1")], limit + 1) == ["1"]
    assert watchdog._silent(heard, [("0", "4"), ("1", "2")], limit + 2) == []
