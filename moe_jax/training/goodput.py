"""Goodput: the shares of a run's wall time that went into training steps and into everything else.

The parts are those of Google's ml-goodput and MegaScale (arXiv 2402.15627, section 5): time in
which the model trained, and the kinds of time in which it did not.
"""

import pathlib
import time
from collections.abc import Mapping

from moe_jax import strict_json

# part -> its meaning; the shares of all parts add up to 1.
PARTS = {
    "compute": "training steps whose updates are in the model",
    "data": "waiting for batches while the device had nothing to do",
    "checkpoint": "copying the state and waiting for the save before",
    "compile": "compiling the train step, or reading it from the cache",
    "evaluation": "evaluators, with their compilation",
    "start": "everything before the first step: text, parameters, restoring",
    "lost": "steps that were made again after a crash or a rewind, and updates that were skipped",
}
PART_OF_PHASE = {
    "step": "compute",
    "wait for data": "compute",  # the device computes meanwhile; `Clock.waited` moves the rest
    "compilation and step": "compile",
    "save": "checkpoint",
}


class Clock:
    """Adds up the seconds of each part, of this process and of those that it resumes.

    Args:
      began: when the run began, on `time.monotonic`; until now is its start.
      before: the seconds that its checkpoint says.
      heartbeat: the file with the seconds when the last process ended. What that process computed
        after its checkpoint is lost.
    """

    def __init__(
        self,
        began: float | None = None,
        before: Mapping[str, float] | None = None,
        heartbeat: pathlib.Path | None = None,
    ):
        self._since, self._part = time.monotonic(), "start"
        kept = dict.fromkeys(PARTS, 0.0) | dict(before or {})
        ended = kept | _seconds_in(heartbeat)
        self._seconds = ended | {part: kept[part] for part in ("compute", "data")}
        self._seconds["lost"] += max(0.0, sum(ended.values()) - sum(self._seconds.values()))
        self._seconds["start"] += self._since - (self._since if began is None else began)

    def begin(self, part: str) -> None:
        now = time.monotonic()
        self._seconds[self._part] += now - self._since
        self._since, self._part = now, part

    def waited(self, seconds: float) -> None:
        """Moves seconds in which the device had nothing to do from compute to data."""
        self._seconds["compute"] -= seconds
        self._seconds["data"] += seconds

    def seconds(self) -> dict[str, float]:
        """The seconds of each part up to now."""
        running = self._seconds[self._part] + time.monotonic() - self._since
        return {**self._seconds, self._part: running}


def _seconds_in(heartbeat: pathlib.Path | None) -> dict[str, float]:
    """The seconds of each part in a heartbeat.json; {} if there is none, or a damaged one."""
    try:
        found = strict_json.read_object(heartbeat).get("spent") if heartbeat else None
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and are_seconds(found) else {}


def are_seconds(spent: Mapping) -> bool:
    """True for the seconds of known parts."""
    is_number = (isinstance(s, int | float) and 0 <= s < 1e300 for s in spent.values())
    return spent.keys() <= PARTS.keys() and all(is_number)


def shares(seconds: Mapping[str, float], skipped: float = 0.0) -> dict[str, float]:
    """The share of the wall time of each part.

    skipped: the share of the steps that made no update; so much of the compute is lost.
    """
    total = max(sum(seconds.values()), 1e-9)
    lost = seconds["compute"] * skipped
    changed = {"compute": seconds["compute"] - lost, "lost": seconds["lost"] + lost}
    return {part: round(s / total, 6) for part, s in {**seconds, **changed}.items()}


def line(shares: Mapping[str, float]) -> str:
    """The line at the end of a run, largest part first after compute."""
    rest = sorted((part for part in shares if part != "compute"), key=lambda p: -shares[p])
    others = ", ".join(f"{part} {shares[part]:.1%}" for part in rest)
    return f"goodput: {shares['compute']:.1%} of the wall time in training steps ({others})"
