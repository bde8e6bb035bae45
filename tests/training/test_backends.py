"""A back end that fails, hangs or is slow stops and delays no run; real ones get all rows."""

import contextlib
import dataclasses
import importlib.util
import json
import sqlite3
import sys
import threading
import time
import types

import pytest
from tensorboardX.proto import event_pb2, plugin_hparams_pb2

from moe_jax import __main__ as entry
from moe_jax import stopping
from moe_jax.commands import train
from moe_jax.config import ConfigError
from moe_jax.training import backends, metrics


class Sound:
    def __init__(self, workdir, resume_step):
        self.rows = []

    def add(self, step, scalars):
        self.rows.append((step, scalars))

    def close(self):
        pass


def full(*_):
    raise OSError(28, "No space left on device")


def hang(*_):
    threading.Event().wait()


@pytest.fixture(autouse=True)
def _threads_of_one_test_do_not_count_in_another(monkeypatch, tmp_path):
    monkeypatch.setattr(stopping, "NOT_WAITED_FOR", f"{tmp_path}: ")
    monkeypatch.setattr(stopping, "_abandoned", set())


def leave(*_):
    raise SystemExit(1)


def faulty(**functions):
    return type("Faulty", (Sound,), functions)


FAULTS = {
    "opening fails": (faulty(__init__=full), "No space left"),
    "opening hangs": (faulty(__init__=hang), "it hangs"),
    "opening ends the program": (faulty(__init__=leave), "SystemExit"),
    "adding fails": (faulty(add=full), "No space left"),
    "adding hangs": (faulty(add=hang), "it hangs"),
    "adding is slow": (faulty(add=lambda *_: time.sleep(0.01)), "it is slow"),
    "closing fails": (faulty(close=full), "No space left"),
    "closing hangs": (faulty(close=hang), "it hangs"),
}


def replace(monkeypatch, name, opener):
    row = dataclasses.replace(backends.BACKENDS[name], open=opener)
    monkeypatch.setitem(backends.BACKENDS, name, row)


@pytest.mark.parametrize("fault", FAULTS)
def test_rows_are_taken_at_once_the_end_comes_and_one_line_says_why(
    fault, tmp_path, monkeypatch, capsys
):
    backend, said = FAULTS[fault]
    monkeypatch.setattr(backends, "SECONDS", 0.2)
    monkeypatch.setattr(backends, "ROWS", 5)
    replace(monkeypatch, "tensorboard", backend)
    writer = backends.Writer("tensorboard", tmp_path, 0)
    began = time.monotonic()
    for step in range(20):
        writer.add(step, {"loss": 1.0})
    assert time.monotonic() - began < 0.1
    writer.close()
    assert time.monotonic() - began < 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("tensorboard lacks rows that metrics.jsonl has: ") and said in line
    assert stopping.hangs() == (said != "it is slow")  # then there is no orderly end


@pytest.mark.parametrize("name", backends.BACKENDS)
def test_a_fault_of_one_back_end_takes_no_row_from_the_others(name, tmp_path, monkeypatch, capsys):
    opened = []
    for other in backends.BACKENDS:
        replace(monkeypatch, other, lambda *a: opened.append(Sound(*a)) or opened[-1])
    replace(monkeypatch, name, faulty(add=full))
    with metrics.writer(tmp_path, resume_step=0, log_to=tuple(backends.BACKENDS)) as write:
        for step in range(3):
            write({"step": step, "loss": 2.0, "router": {"load": [1, 2], "z": 3.0}, "text": "a"})
    assert [backend.rows for backend in opened] == [
        [(step, {"loss": 2.0, "router/z": 3.0}) for step in range(3)]
    ] * (len(backends.BACKENDS) - 1)
    assert len(metrics.read(tmp_path / "metrics.jsonl")) == 3
    assert capsys.readouterr().err.startswith(f"{name} lacks rows")


@pytest.mark.parametrize("status", [0, 2, 3])
def test_the_program_ends_without_waiting_for_a_library_that_hangs(status, tmp_path, monkeypatch):
    """Weights & Biases waits for its server at an orderly end: 90 s without a network."""

    def run():
        monkeypatch.setattr(backends, "SECONDS", 0.1)
        replace(monkeypatch, "tensorboard", faulty(__init__=hang))
        backends.Writer("tensorboard", tmp_path, 0).close()
        if status:
            raise SystemExit(status)

    left = []
    monkeypatch.setattr(train, "main", run)
    monkeypatch.setattr(stopping, "leave", left.append)
    with contextlib.suppress(SystemExit):
        entry.run("train")
    assert left == [status]


def test_several_that_hang_delay_the_end_as_one_does(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(backends, "SECONDS", 0.5)
    for name in backends.BACKENDS:
        replace(monkeypatch, name, faulty(close=hang))
    began = time.monotonic()
    with metrics.writer(tmp_path, resume_step=0, log_to=tuple(backends.BACKENDS)):
        pass
    assert time.monotonic() - began < 1.2
    assert capsys.readouterr().err.count("it hangs") == 3


def test_a_back_end_from_outside_gets_the_rows(tmp_path, monkeypatch, capsys):
    opened = []
    row = backends.Row("numpy", lambda *a: opened.append((a, Sound(*a))) or opened[-1][1])
    monkeypatch.setitem(backends.BACKENDS, "toy", row)
    backends.check(("toy",))
    with metrics.writer(tmp_path, resume_step=7, log_to=("toy",)) as write:
        write({"step": 8, "loss": 1.5})
    [(arguments, toy)] = opened
    assert arguments == (tmp_path, 7) and toy.rows == [(8, {"loss": 1.5})]
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "line"),
    [
        (("wandbb",), "log_to='wandbb' is unknown: did you mean 'wandb'"),
        (("tensorboard", "tensorboard"), "names 'tensorboard' twice; name it once"),
        (
            ("tensorboard", "absent"),
            "absent needs .*; pip install no-such-package, or leave",
        ),
    ],
)
def test_a_back_end_that_is_not_there_is_refused(names, line, monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "absent", backends.Row("no-such-package", Sound))
    with pytest.raises(ConfigError, match=line):
        backends.check(names)


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A workdir for real back ends, which send nothing and leave nothing outside."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"seed": 3}')
    return tmp_path / "run"


def write_rows(name, workdir, resume_step, steps):
    with metrics.writer(workdir, resume_step=resume_step, log_to=(name,)) as write:
        for step in steps:
            write({"step": step, "loss": 1 / step})


def of_trackio(workdir) -> list[dict[int, float]]:
    """The losses by step of each run in Trackio's database."""
    [path] = (workdir.parent / "trackio").glob("*.db")
    with sqlite3.connect(path) as database:
        rows = database.execute("select run_name, step, metrics from metrics").fetchall()
    runs: dict = {}
    for run, step, values in rows:
        runs.setdefault(run, {})[step] = json.loads(values)["loss"]
    return list(runs.values())


def of_wandb(workdir) -> list[dict[int, float]]:
    """The losses by step of each run in the files of Weights & Biases."""
    from wandb.proto import wandb_internal_pb2

    runs: dict = {}
    for path in sorted(workdir.glob("wandb/offline-run-*/*.wandb")):
        content = path.read_bytes()[7:]
        assert len(content) < 2**15, "a record may go on in the next block of LevelDB's log format"
        while content:  # checksum (4 bytes), length (2), kind (1), data
            size = int.from_bytes(content[4:6], "little")
            record = wandb_internal_pb2.Record.FromString(content[7 : 7 + size])
            row = {i.key or i.nested_key[0]: i.value_json for i in record.history.item}
            if row:
                runs.setdefault(path.stem, {})[int(row["step"])] = float(row["loss"])
            content = content[7 + size :]
    return list(runs.values())


def values_of_tensorboard(workdir):
    [path] = (workdir / "tensorboard").glob("events.out.tfevents.*")
    content = path.read_bytes()
    while content:  # TFRecord: length (8 bytes), its checksum (4), data, checksum (4)
        size = int.from_bytes(content[:8], "little")
        yield from event_pb2.Event.FromString(content[12 : 12 + size]).summary.value
        content = content[16 + size :]


def test_tensorboard_knows_the_group_and_the_seed_of_a_run(workdir):
    config = {"seed": 3, "training": {"run_group": "drop_0.5"}}
    (workdir / "config.json").write_text(json.dumps(config))
    write_rows("tensorboard", workdir, 0, (1,))
    session, loss = values_of_tensorboard(workdir)
    assert (session.tag, session.metadata.plugin_data.plugin_name) == (
        "_hparams_/session_start_info", "hparams"
    )  # fmt: skip
    content = plugin_hparams_pb2.HParamsPluginData.FromString(session.metadata.plugin_data.content)
    start = content.session_start_info
    assert (start.group_name, start.hparams["seed"].number_value) == ("drop_0.5", 3)
    assert (loss.tag, loss.simple_value) == ("loss", 1)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
@pytest.mark.parametrize("group", ["drop_0.5", ""])
def test_other_back_ends_are_opened_with_the_group(name, group, workdir, monkeypatch):
    """With a stand-in for the library: what it does with the argument is its own."""
    (workdir / "config.json").write_text(json.dumps({"training": {"run_group": group}}))
    opened = {}
    stand_in = types.ModuleType(name)
    stand_in.Settings = dict
    run = types.SimpleNamespace(define_metric=lambda *_, **how: None)
    stand_in.init = lambda **how: opened.update(how) or run
    monkeypatch.setitem(sys.modules, name, stand_in)
    backends.BACKENDS[name].open(workdir, 0)
    assert opened["group"] == (group or None)


@pytest.mark.parametrize(("name", "read"), [("wandb", of_wandb), ("trackio", of_trackio)])
def test_a_run_that_goes_on_is_the_same_run_in_a_real_back_end(name, read, workdir, capsys):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name}, an optional extra, is not installed")
    write_rows(name, workdir, 0, (1, 2, 3))
    write_rows(name, workdir, 2, (3, 4))  # from a checkpoint before the last row
    assert read(workdir) == [{step: pytest.approx(1 / step) for step in (1, 2, 3, 4)}]
    write_rows(name, workdir, 0, (1,))
    assert len(read(workdir)) == 2
    assert "lacks rows" not in capsys.readouterr().err
