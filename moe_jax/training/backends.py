"""Back ends that show a run's metrics: TensorBoard, Weights & Biases and Trackio.

Each is written by a thread of its own: a fault of it stops no run, and delays none but for at most
20 seconds at the end.
"""

import dataclasses
import importlib.metadata
import pathlib
import queue
import re
import threading
import uuid
from collections.abc import Callable, Iterable
from typing import Protocol

import tensorboardX
from tensorboardX.proto import plugin_hparams_pb2, summary_pb2

from moe_jax import files, spelling, stopping, strict_json
from moe_jax.config import ConfigError
from moe_jax.parallel import distributed

ROWS, SECONDS = 1000, 10  # rows that wait at most, and the time to write them at the end
PROJECT = "moe_jax"  # the project of runs in back ends that sort runs into projects


class Backend(Protocol):
    """An open back end, used by one thread; its functions may be slow, hang, or raise any type."""

    def add(self, step: int, scalars: dict[str, float]) -> None: ...

    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of `BACKENDS`.

    `package` is the distribution that it needs. `open` is called in the back end's thread with the
    workdir, which has config.json, and the step that the run goes on from (0 for one that begins).
    """

    package: str
    open: Callable[[pathlib.Path, int], Backend]


class TensorBoard:
    """Event files in <workdir>/tensorboard; rows that the run writes again replace the old ones.

    The page "HParams" of TensorBoard shows the runs of a group as one, with their mean.
    """

    def __init__(self, workdir: pathlib.Path, resume_step: int):
        folder = str(workdir / "tensorboard")
        self._writer = tensorboardX.SummaryWriter(folder, purge_step=resume_step or None)
        config = strict_json.read_object(workdir / "config.json")
        if group := _group(config):
            self._writer.file_writer.add_summary(_session(group, config.get("seed")))

    def add(self, step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases, which keeps its files in <workdir>/wandb and heeds the environment
    variables of the library: WANDB_MODE=offline sends nothing."""

    def __init__(self, workdir: pathlib.Path, resume_step: int):
        import wandb

        config = strict_json.read_object(workdir / "config.json")
        self._run = wandb.init(
            project=PROJECT,
            name=workdir.name,
            group=_group(config),
            id=_id(workdir, "wandb", resume_step),
            resume="allow",
            dir=str(workdir),
            config=config,
            settings=wandb.Settings(console="off", silent=True),
        )
        # The library's own count of rows only grows: it would drop the rows of a run that goes on
        # from a checkpoint before its last row.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def add(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log({**scalars, "step": step})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of Trackio in the database of this machine, TRACKIO_DIR; `trackio show` shows it."""

    def __init__(self, workdir: pathlib.Path, resume_step: int):
        import trackio

        config = strict_json.read_object(workdir / "config.json")
        self._run = trackio.init(
            project=PROJECT,
            name=f"{workdir.name}-{_id(workdir, 'trackio', resume_step)}",
            group=_group(config),
            resume="allow",
            config=config,
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )

    def add(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log(scalars, step=step)

    def close(self) -> None:
        self._run.finish()


BACKENDS = {
    "tensorboard": Row("tensorboardX", TensorBoard),
    "wandb": Row("wandb", Wandb),
    "trackio": Row("trackio", Trackio),
}


def _id(workdir: pathlib.Path, name: str, resume_step: int) -> str:
    """The run's id in a back end. It is kept in the workdir, so that a run that goes on is the same
    run there; a run that begins is a new one."""
    path = workdir / f"{name}_id.txt"
    if resume_step and path.is_file():
        known = path.read_text(encoding="utf-8").strip()
        if re.fullmatch("[0-9a-f]{12}", known):
            return known
    new = uuid.uuid4().hex[:12]
    files.write_text(path, f"{new}\n")
    return new


def _group(config: dict) -> str | None:
    """The run's group, training.run_group; None without one, as in configs of older versions."""
    return config.get("training", {}).get("run_group") or None


def _session(group: str, seed: int | None) -> summary_pb2.Summary:
    """The record with which TensorBoard's HParams sorts runs into groups."""
    start = plugin_hparams_pb2.SessionStartInfo(group_name=group)
    start.hparams["run_group"].string_value = group
    if seed is not None:
        start.hparams["seed"].number_value = seed
    content = plugin_hparams_pb2.HParamsPluginData(session_start_info=start, version=0)
    plugin = summary_pb2.SummaryMetadata.PluginData(
        plugin_name="hparams", content=content.SerializeToString()
    )
    metadata = summary_pb2.SummaryMetadata(plugin_data=plugin)
    value = summary_pb2.Summary.Value(tag="_hparams_/session_start_info", metadata=metadata)
    return summary_pb2.Summary(value=[value])


def check(names: tuple[str, ...]) -> None:
    """Refuses back ends, given as `training.log_to`, that this machine does not have.

    Raises: ConfigError for an unknown name, a name given twice, or a package that is not installed.
    """
    key = "config.training.log_to"
    for name in names:
        if name not in BACKENDS:
            raise ConfigError(spelling.unknown(key, name, BACKENDS))
        if names.count(name) > 1:
            raise ConfigError(f"{key}={names!r} names {name!r} twice; name it once")
        package = BACKENDS[name].package
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise ConfigError(
                f"{key}={names!r}: {name} needs a package that is not installed; "
                f"pip install {package}, or leave {name} out"
            ) from None


class Writer:
    """Writes scalars to one back end in the order in which they come; rows beyond `ROWS` that wait
    are dropped and counted.

    metrics.jsonl has the same numbers, so a fault is reported once and is not worth a run.
    """

    def __init__(self, name: str, workdir: pathlib.Path, resume_step: int):
        self._name = name
        self._rows: queue.Queue = queue.Queue(ROWS)
        self._dropped, self._failed = 0, False
        arguments = (BACKENDS[name].open, workdir, resume_step)
        self._thread = threading.Thread(
            *(None, self._write, f"{stopping.NOT_WAITED_FOR}{name}", arguments), daemon=True
        )
        self._thread.start()

    def add(self, step: int, scalars: dict[str, float]) -> None:
        try:
            self._rows.put_nowait((step, scalars))
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Waits for the rows to be written, but not for a thread that hangs."""
        try:
            self._rows.put(None, timeout=SECONDS)
            self._thread.join(SECONDS)
        except queue.Full:
            pass
        if self._failed:
            return
        if self._thread.is_alive():
            self._say("it hangs")
        elif self._dropped:
            self._say(f"it is slow, {self._dropped} dropped")

    def _say(self, why: str) -> None:
        distributed.say(f"{self._name} lacks rows that metrics.jsonl has: {why}")

    def _write(self, open_backend, workdir: pathlib.Path, resume_step: int) -> None:
        row: tuple | None = ()
        try:
            backend = open_backend(workdir, resume_step)
            while (row := self._rows.get()) is not None:
                backend.add(*row)
            backend.close()
        except BaseException as error:  # whatever the library raises, SystemExit too
            self._failed = True
            stopping.abandon(self._name)
            self._say(" ".join(repr(error).split())[:200])
            while row is not None:  # so that the queue never fills
                row = self._rows.get()


def close(writers: Iterable[Writer]) -> None:
    """Closes all at the same time, so that several that hang delay a run no longer than one."""
    threads = [threading.Thread(target=writer.close, daemon=True) for writer in writers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
