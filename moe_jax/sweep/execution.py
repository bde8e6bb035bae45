"""Executes the runs of a sweep in their order, and keeps its results up to date."""

import concurrent.futures
import contextlib
import fcntl
import pathlib
import sys
from collections.abc import Iterator, Sequence

from moe_jax import stopping
from moe_jax.sweep import results
from moe_jax.sweep.launchers import Ended, Launcher
from moe_jax.sweep.plan import Run
from moe_jax.sweep.results import BLOCKED, DONE, FAILED, PENDING, STOPPED

LOCK = ".sweep.lock"


@contextlib.contextmanager
def alone(workdir: pathlib.Path) -> Iterator[None]:
    """Raises: ValueError if another sweep is executed in this workdir on this machine."""
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / LOCK, "a") as held:  # a file that is linked here keeps its content
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"--workdir={workdir}: another sweep is using it; wait, look at it with --status, "
                "or choose another"
            ) from None
        yield


class Execution:
    """The state of a sweep that is executed; nothing of it but the runs' own files is needed to go
    on after a kill.

    chosen: the runs to execute, by default all. status, errors: of each run by its name.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        launcher: Launcher,
        workdir: pathlib.Path,
        *,
        max_parallel: int = 1,
        retries: int = 0,
        chosen: Sequence[Run] | None = None,
    ):
        self._runs, self._launcher, self._workdir = runs, launcher, workdir
        self._max_parallel, self._retries = max_parallel, retries
        self._chosen = list(runs if chosen is None else chosen)
        self._tries: dict[str, int] = {}  # by id
        self._stopped = False
        self.status = {run.name: DONE if run.result else PENDING for run in runs}
        self.errors: dict[str, str] = {}

    def execute(self) -> dict[str, str]:
        """Starts all unfinished runs that are chosen; returns the status of every run.

        If a run fails, only the runs that start from it are not run. The results are rewritten
        after every run.

        Raises: SystemExit 75 after SIGTERM or Ctrl-C, when running processes have saved.
        """
        with stopping.requests(self._stop):
            with concurrent.futures.ThreadPoolExecutor(self._max_parallel) as pool:
                running: dict[concurrent.futures.Future[Ended], Run] = {}
                while True:
                    self._start(pool, running)
                    results.write(self._workdir, self._runs, self.status, self.errors)
                    if not running:
                        break
                    finished, _ = concurrent.futures.wait(
                        running, return_when=concurrent.futures.FIRST_COMPLETED
                    )
                    for task in finished:
                        self._end(running.pop(task), task.result())
        if self._stopped:
            print("stopped; run the same command again to go on", file=sys.stderr)
            raise SystemExit(stopping.EXIT_PREEMPTED)
        return self.status

    def _stop(self, _) -> None:
        self._stopped = True
        self._launcher.stop()

    def _start(self, pool: concurrent.futures.Executor, running: dict) -> None:
        """Starts the runs that wait for nothing, as many as there is room for."""
        names = {run.name for run in self._chosen}
        for run in (run for run in self._chosen if self.status[run.name] == PENDING):
            if lost := [s for s in run.sources if self.status[s] in (FAILED, BLOCKED)]:
                self.status[run.name] = BLOCKED
                self.errors[run.name] = f"its source {lost[0]} {self.status[lost[0]]}"
                continue
            waits = any(self.status[n] == PENDING for n in run.after if n in names)
            waits |= any(self.status[source] != DONE for source in run.sources)
            waits |= any(run.run_id == other.run_id for other in running.values())
            if len(running) < self._max_parallel and not waits and not self._stopped:
                tried = self._tries.get(run.run_id, 0)
                again = f" (try {tried + 1} of {self._retries + 1})" if tried else ""
                self._announce(run, ("goes on" if run.begun else "starts") + again)
                running[pool.submit(self._launcher.launch, run)] = run

    def _end(self, run: Run, ended: Ended) -> None:
        tries = self._tries[run.run_id] = self._tries.get(run.run_id, 0) + 1
        once_more = ended.status in (FAILED, STOPPED) and not ended.is_mistake
        once_more &= tries <= self._retries and not self._stopped
        for other in self._runs:
            if other.run_id == run.run_id:
                self.status[other.name] = PENDING if once_more else ended.status
                self.errors[other.name] = ended.error
        news = f"{ended.status} after {ended.seconds:.0f} s ({ended.error})"
        if ended.status == DONE:
            result = run.result or {}
            nats, bits = (_shown(result.get(name)) for name in results.LOSSES)
            news = f"done in {ended.seconds:.0f} s, held-out {nats} nats/token, {bits} bits/byte"
        self._announce(run, news)

    def _announce(self, run: Run, news: str) -> None:
        print(f"[{self._runs.index(run) + 1}/{len(self._runs)}] {run.name}: {news}", flush=True)


def _shown(loss: float | None) -> str:
    return "unknown" if loss is None else f"{loss:.3f}"  # a loss that is not finite is None
