"""Shows that a run is alive, and ends one that makes no progress."""

import contextlib
import faulthandler
import os
import pathlib
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping

from moe_jax import config as configs
from moe_jax import files, stopping, strict_json
from moe_jax.parallel import distributed, watchdog
from moe_jax.training import goodput

WRITE_SECONDS = 10
EVALUATION = "evaluation"  # a phase that may take as long as it takes


class Pulse:
    """Knows what a run does and since when; a thread of `watched` looks at it.

    The first process writes heartbeat.json into the workdir: step, phase, seconds in this phase,
    Unix time, host and process id, and the seconds spent on each part of `goodput.PARTS`. If its
    time is old, the run is dead.

    Args:
      began: when the run began, on `time.monotonic`.
      spent: the seconds of each part that the run's checkpoint says.
    """

    def __init__(
        self,
        guards: configs.Guards,
        workdir: pathlib.Path,
        began: float | None = None,
        spent: Mapping[str, float] | None = None,
    ):
        self._guards = guards
        self._path = workdir / "heartbeat.json" if distributed.is_first() else None
        self._now = (0, "start", time.monotonic())
        self.clock = goodput.Clock(began, spent, self._path)

    def at(self, step: int, phase: str) -> None:
        """Notes that the run begins a phase, such as "data", of the step after `step`."""
        self._now = (step, phase, time.monotonic())
        self.clock.begin(goodput.PART_OF_PHASE.get(phase, phase))

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        over = threading.Event()
        thread = threading.Thread(target=self._watch, args=(over,), daemon=True, name="pulse")
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self._write("ended")

    def _watch(self, over: threading.Event) -> None:
        reported, written = None, -float("inf")
        guards = self._guards
        pause = min(1.0, *(s / 4 for s in (guards.stall_seconds, guards.stall_end_seconds) if s))
        while not over.wait(pause):
            step, phase, since = now = self._now
            seconds = time.monotonic() - since
            if time.monotonic() - written > WRITE_SECONDS:
                self._write(phase)
                written = time.monotonic()
            if phase == EVALUATION:
                continue
            if guards.stall_seconds and seconds > guards.stall_seconds and reported != now:
                reported = now
                watchdog.say(f"no progress for {seconds:.0f} s in {_named(step, phase)}:")
                faulthandler.dump_traceback(sys.stderr, all_threads=True)
            if guards.stall_end_seconds and seconds > guards.stall_end_seconds:
                watchdog.say(
                    f"ended: {_named(step, phase)} made no progress for {seconds:.0f} s "
                    "(config.guards.stall_end_seconds); run again to go on from the newest "
                    "checkpoint"
                )
                os._exit(stopping.EXIT_PREEMPTED)

    def _write(self, phase: str) -> None:
        if self._path is None:
            return
        step, _, since = self._now
        beat = {
            "step": step,
            "phase": phase,
            "seconds": round(time.monotonic() - since, 1),
            "time": round(time.time(), 1),
            "host": socket.gethostname(),
            "process": os.getpid(),
            "spent": {part: round(s, 6) for part, s in self.clock.seconds().items()},
        }
        with contextlib.suppress(OSError):  # a full disk ends the run at its checkpoint, not here
            files.write_text(self._path, strict_json.text(beat) + "\n")


def _named(step: int, phase: str) -> str:
    return f"the {phase} after step {step}"
