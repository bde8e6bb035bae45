"""Where the runs of a sweep are started: processes of this machine, or jobs of a Slurm cluster.

A launcher's `launch` executes one run to its end, in a thread of its own.
"""

import contextlib
import dataclasses
import fcntl
import os
import pathlib
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import IO, Protocol

from moe_jax import command_line, stopping
from moe_jax.sweep.plan import Run
from moe_jax.sweep.results import DONE, FAILED, STOPPED

# The libraries' own threads; XLA's thread pool on a CPU has one thread per core that it may use.
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
POLL_SECONDS = 0.1
LAUNCHED, LOG = ".launched", "log.txt"  # files of a workdir


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a run ended: its status, the last line that it printed if it is not done, its seconds.

    is_mistake: it ended with the status of a mistake in its config, which another try would make
    again.
    """

    status: str
    error: str = ""
    seconds: float = 0.0
    is_mistake: bool = False


class Launcher(Protocol):
    def launch(self, run: Run) -> Ended: ...

    def stop(self) -> None:
        """Asks all runs to save and end, or stops waiting for them."""


class Local:
    """Processes of this machine, at most `max_parallel` at a time, which share its cores evenly."""

    def __init__(self, train: Sequence[str], max_parallel: int):
        self._train = train
        self._in_terminal = max_parallel == 1 and sys.stderr.isatty()
        self._processes: list[subprocess.Popen] = []
        self._stopped = threading.Event()
        self._shares: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
        for share in shares(available_cores(), max_parallel):
            self._shares.put(share)

    def launch(self, run: Run) -> Ended:
        began = time.monotonic()
        run.workdir.mkdir(parents=True, exist_ok=True)
        with open(run.workdir / LAUNCHED, "a") as lock:
            while not locked(lock):  # an earlier sweep was killed, and its run is at work still
                if self._stopped.wait(POLL_SECONDS):
                    return Ended(STOPPED, "not started")
            if run.result:
                return Ended(DONE, seconds=time.monotonic() - began)
            share = self._shares.get()
            try:
                code = self._execute(run, share, lock.fileno())
            finally:
                self._shares.put(share)
        said = last_line(run.workdir / LOG)
        said = said or ("see the terminal" if self._in_terminal else "it said nothing")
        return ended(code, said, time.monotonic() - began)

    def _execute(self, run: Run, share: list[int], lock: int) -> int:
        log = run.workdir / LOG
        log.unlink(missing_ok=True)  # a file that is linked here keeps its content
        with open(log, "w") as output, _on(share) as environment:
            out, err = (None, None) if self._in_terminal else (output, subprocess.STDOUT)
            # In a session of its own it gets one signal, this program's, not Ctrl-C beside it.
            how: dict = {"stdin": subprocess.DEVNULL, "start_new_session": True}
            command = [sys.executable, *run.command(self._train)[1:]]
            process = subprocess.Popen(
                command, stdout=out, stderr=err, env=environment, pass_fds=[lock], **how
            )
            self._processes.append(process)
        if self._stopped.is_set():
            process.terminate()
        code = process.wait()
        self._processes.remove(process)
        return code

    def stop(self) -> None:
        self._stopped.set()
        for process in list(self._processes):
            process.terminate()


def locked(lock: IO) -> bool:
    """Locks an open file unless another process holds its lock.

    A process that is started with the file open holds the lock until it ends, also if the one that
    started it is killed.
    """
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_running(workdir: pathlib.Path) -> bool:
    """True if a process of this machine that a sweep has started is at work in a run's workdir."""
    if not (path := workdir / LAUNCHED).is_file():
        return False
    with open(path) as lock:
        return not locked(lock)


def available_cores() -> list[int]:
    """The cores that this process may use; [] where the system does not tell."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def shares(cores: Sequence[int], number: int) -> list[list[int]]:
    """The cores in `number` parts whose sizes differ by at most one.

    If there are more parts than cores, several parts have the same core. A single part is [], which
    restricts nothing.
    """
    if number == 1 or not cores:
        return [[] for _ in range(number)]
    if number >= len(cores):
        return [[cores[place % len(cores)]] for place in range(number)]
    ends = [len(cores) * place // number for place in range(number + 1)]
    return [list(cores[a:b]) for a, b in zip(ends, ends[1:], strict=False)]


@contextlib.contextmanager
def _on(share: list[int]) -> Iterator[dict[str, str] | None]:
    """A process that this thread starts in the block may use only these cores; the environment that
    tells its libraries so."""
    if not share:
        yield None
        return
    before = os.sched_getaffinity(0)  # this thread's
    os.sched_setaffinity(0, share)
    try:
        yield os.environ | dict.fromkeys(THREADS, str(len(share)))
    finally:
        os.sched_setaffinity(0, before)


def last_line(log: pathlib.Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    return next((line for line in reversed(lines) if line.strip()), "")


def ended(code: int, said: str, seconds: float) -> Ended:
    """How a process ended, from its exit status or minus its signal."""
    if code == 0:
        return Ended(DONE, seconds=seconds)
    error = f"exit {code}: {said}"
    if code < 0:
        error = f"killed by {signal.Signals(-code).name}; run the sweep again to go on"
    was_stopped = code in (stopping.EXIT_PREEMPTED, -signal.SIGTERM)
    is_mistake = code == command_line.EXIT_MISTAKE
    return Ended(STOPPED if was_stopped else FAILED, error, seconds, is_mistake)
