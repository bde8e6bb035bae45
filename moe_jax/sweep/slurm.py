"""The launcher of runs as jobs of a Slurm cluster, through submitit."""

import contextlib
import dataclasses
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from moe_jax import files, spelling, stopping
from moe_jax.sweep import launchers
from moe_jax.sweep.launchers import Ended
from moe_jax.sweep.plan import Run
from moe_jax.sweep.results import FAILED, STOPPED

POLL_SECONDS, SQUEUE_SECONDS = 0.5, 20.0
KILL_SECONDS = 90.0  # longer than a cluster lets a job live after SIGTERM (KillWait: 30 s)
JOB = "slurm_job.txt"  # in a run's workdir: the number of its job
# submitit's names that are the same for all clusters; others are options of sbatch.
SHARED = ("timeout_min", "nodes", "cpus_per_task", "gpus_per_node", "tasks_per_node", "mem_gb")


@dataclasses.dataclass
class Job:
    """What runs on a node of the cluster: one run's command. It returns the exit status."""

    command: list[str]
    log: str

    def __call__(self) -> int:
        # Slurm sends SIGUSR2, with which it announces the end of a job, to every process of it.
        ignoring = ["sh", "-c", "trap '' USR2; exec \"$@\"", "sh", *self.command]
        with open(self.log, "a") as output:
            self._process = subprocess.Popen(
                ignoring, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
        while (code := self._process.poll()) is None:
            time.sleep(POLL_SECONDS)
        if code == stopping.EXIT_PREEMPTED:
            # Slurm has told it to end, and will end this process too: a job that it puts into the
            # queue again must have no result yet.
            time.sleep(KILL_SECONDS)
        return code

    def checkpoint(self) -> Any:
        """Called by submitit in a signal's handler before a job is taken off its node: the run
        saves, and the job that is put into the queue again goes on from there."""
        import submitit

        self._process.terminate()
        with contextlib.suppress(ChildProcessError):  # `poll` may have been interrupted: not wait()
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(Job(self.command, self.log))


class Slurm:
    """Jobs of a Slurm cluster. They go on in the queue if the sweep is stopped or killed, and the
    same command finds them again by the numbers in the runs' workdirs."""

    def __init__(self, train: Sequence[str], workdir: pathlib.Path, options: Mapping[str, str]):
        """Opens submitit's executor, which keeps its files in <workdir>/slurm.

        Args:
          options: those of sbatch ("partition") and of submitit ("timeout_min"); "cluster" may be
            "local", for submitit's own executor on this machine.

        Raises: ValueError if submitit or Slurm is missing, or an option is unknown.
        """
        self._submitit, self._train = _submitit(), train
        self._cluster = options.get("cluster", "slurm")
        if self._cluster not in ("slurm", "local"):
            near = spelling.did_you_mean(self._cluster, ("slurm", "local"))
            raise ValueError(f"--slurm.cluster={self._cluster}: use slurm or local{near}")
        folder = workdir.absolute() / "slurm"
        try:
            self._executor = self._submitit.AutoExecutor(folder=folder, cluster=self._cluster)
            self._executor.update_parameters(**_parameters(options))
        except (RuntimeError, NameError, TypeError) as error:
            raise ValueError(f"--launcher=slurm: {' '.join(str(error).split())[:300]}") from None
        self._folder, self._lock = folder, threading.Lock()
        self._stopped = threading.Event()

    def launch(self, run: Run) -> Ended:
        began = time.monotonic()
        run.workdir.mkdir(parents=True, exist_ok=True)
        number = run.workdir / JOB
        with self._lock:  # submitit's executor is not meant for several threads
            job: Any = self._known(number) or self._submit(run, number)
        while not job.paths.result_pickle.exists():
            if self._stopped.wait(POLL_SECONDS):
                return Ended(STOPPED, f"job {job.job_id} goes on", time.monotonic() - began)
            if self._is_lost(job):
                number.unlink(missing_ok=True)
                words = f"job {job.job_id} left the queue without a result"
                return Ended(FAILED, words, time.monotonic() - began)
        number.unlink(missing_ok=True)
        seconds = time.monotonic() - began
        try:
            code = job.result()
        except Exception as error:  # submitit's, or whatever was raised on the node
            return Ended(FAILED, f"job {job.job_id}: {' '.join(str(error).split())[:300]}", seconds)
        log = run.workdir / launchers.LOG
        return launchers.ended(code, launchers.last_line(log) or "it said nothing", seconds)

    def stop(self) -> None:
        self._stopped.set()

    def _submit(self, run: Run, number: pathlib.Path) -> Any:
        command = [sys.executable, *run.command(self._train)[1:]]
        log = run.workdir / launchers.LOG
        log.unlink(missing_ok=True)
        self._executor.update_parameters(name=f"{run.name}-{run.run_id}")
        job = self._executor.submit(Job(command, str(log)))
        files.write_text(number, f"{job.job_id}\n")
        return job

    def _known(self, number: pathlib.Path) -> Any:
        """The job that an earlier sweep has submitted, if it has not ended or has a result."""
        if not number.is_file():
            return None
        kinds = {"slurm": (self._submitit.SlurmJob, _in_queue)}
        kinds["local"] = self._submitit.LocalJob, _is_running
        make, goes_on = kinds[self._cluster]
        job: Any = make(self._folder, number.read_text().strip())
        return job if job.paths.result_pickle.exists() or goes_on(job.job_id) else None

    def _is_lost(self, job: Any) -> bool:
        """True for a job that is neither in the queue nor has a result, as one that was cancelled.

        It asks only from time to time.
        """
        if self._cluster != "slurm":
            ended = job.done() and not _is_running(job.job_id)  # an earlier sweep's is always done
            return ended and not job.paths.result_pickle.exists()
        asked = getattr(job, "asked", 0.0)
        if time.monotonic() - asked < SQUEUE_SECONDS:
            return False
        job.asked = time.monotonic()
        if _in_queue(job.job_id):
            return False
        time.sleep(2)  # a network file system may show the result late
        return not job.paths.result_pickle.exists()


def _submitit() -> Any:
    """The package; it would replace the handlers of Python's logging when it is imported."""
    asked = os.environ.get("SUBMITIT_LOG_LEVEL")
    os.environ.setdefault("SUBMITIT_LOG_LEVEL", "NOCONFIG")
    try:
        import submitit
    except ImportError:
        raise ValueError(
            "--launcher=slurm needs a package that is not installed; pip install submitit"
        ) from None
    finally:
        if asked is None:  # a job on a node says what happens to it
            del os.environ["SUBMITIT_LOG_LEVEL"]
    return submitit


def _is_running(number: str) -> bool:
    """True for the process of a job of submitit's local executor; False where there is no /proc."""
    try:
        words = pathlib.Path("/proc", number, "cmdline").read_bytes()
    except OSError:
        return False
    return b"submitit" in words  # a process that has ended has no words, another one others


def _in_queue(number: str) -> bool:
    """True if Slurm knows the job as one that has not ended, or does not answer."""
    command = ["squeue", "--noheader", f"--jobs={number}", "--format=%T"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return True
    if asked.returncode:
        return "Invalid job id" not in asked.stderr
    ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
    return asked.stdout.strip() not in ("", *ended)


def _parameters(options: Mapping[str, str]) -> dict[str, Any]:
    """Options as submitit's parameters; a number is an int."""
    found: dict[str, Any] = {}
    for name, text in options.items():
        if name != "cluster":
            shown = name if name in SHARED else f"slurm_{name}"
            found[shown] = int(text) if text.isdigit() else text
    return found
