"""What a sweep has done and will take: the lines of --list, and the table of --status."""

import dataclasses
import shlex
import sys
import time
from collections.abc import Mapping, Sequence

import numpy as np

from moe_jax import strict_json
from moe_jax.sweep import launchers, results, slurm
from moe_jax.sweep.plan import Run
from moe_jax.sweep.results import DONE, PENDING
from moe_jax.training import flops, metrics

RUNNING, BEGUN = "running", "begun"
BEATS_SECONDS = 60.0  # a heartbeat this old is of a run that has ended; one is written every 10 s
REFRESH_SECONDS = 2.0
# Without a finished run: the share of this machine's peak that training at the quickstart's size
# reaches with its evaluation, and the seconds in which a run starts and compiles.
SHARE_OF_PEAK, START_SECONDS = 0.3, 20.0


@dataclasses.dataclass(frozen=True)
class Rate:
    """Model FLOPs per second of a run, evaluation included, the seconds until its first step, and
    where both come from."""

    flops: float
    start: float
    origin: str

    def seconds(self, flops: float) -> float:
        return self.start + flops / self.flops if flops else 0.0


def steps(run: Run) -> int:
    """The steps of a run; 0 for a number of epochs of a text that no process has read yet."""
    last = run.settings.training.last_step if run.settings else 0
    return last or _stored_steps(run)


def _stored_steps(run: Run) -> int:
    """The steps that a run with `training.num_epochs` has stored in its config.json, or 0."""
    try:
        found = strict_json.read_object(run.workdir / "config.json")["training"]["num_steps"]
    except (ValueError, OSError, KeyError, TypeError):
        return 0
    return found if isinstance(found, int) else 0


def cost(run: Run) -> float:
    """The model FLOPs of a run's training, without its parents'."""
    if run.settings is None:
        return 0.0
    length = run.settings.data.sequence_length
    tokens = steps(run) * run.settings.training.batch_size * length
    return tokens * flops.model_flops(run.settings.model, length)


def measured(runs: Sequence[Run]) -> Rate | None:
    """The rate of the finished runs; None if there is none."""
    pairs = ((cost(run), wall(run.result or {})) for run in runs)
    costs = [(flops, seconds) for flops, seconds in pairs if flops and seconds]
    if not costs:
        return None
    total, seconds = np.sum(costs, axis=0)
    return Rate(total / seconds, 0.0, f"as fast as the {len(costs)} finished")


def wall(result: Mapping) -> float:
    """The seconds of a run with those of the processes that it resumed."""
    seconds, device = result.get("device_seconds"), str(result.get("device", ""))
    count = device.rpartition(" x ")[2]
    if seconds and count.isdigit() and int(count):
        return seconds / int(count)
    return float(result.get("seconds") or 0.0)


def assumed() -> Rate:
    """A rate from a product of two matrices on this machine's cores."""
    matrix = np.ones((1024, 1024), np.float32)
    times = []
    for _ in range(4):  # the first one starts threads
        began = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - began)
    peak = 2 * len(matrix) ** 3 / min(times)
    share = f"{SHARE_OF_PEAK:.0%} of this CPU's {peak / 1e9:.0f} GFLOP/s; no run is finished yet"
    return Rate(SHARE_OF_PEAK * peak, START_SECONDS, share)


def state(run: Run) -> str:
    """done, running, begun (and not running now) or pending."""
    if run.result:
        return DONE
    if launchers.is_running(run.workdir) or time.time() - _beat(run).get("time", 0) < BEATS_SECONDS:
        return RUNNING
    return BEGUN if run.begun or (run.workdir / slurm.JOB).is_file() else PENDING


def _beat(run: Run) -> dict:
    """The run's heartbeat.json; {} if there is none, or the run has ended."""
    try:
        beat = strict_json.read_object(run.workdir / "heartbeat.json")
    except (ValueError, OSError):
        return {}
    return {} if beat.get("phase") == "ended" else beat


def _step(run: Run) -> int:
    return max(metrics.last_step(run.workdir / "metrics.jsonl"), _beat(run).get("step", 0))


def listing(runs: Sequence[Run], train: Sequence[str]) -> str:
    """The lines of `--list`: each run's state, id, name, FLOPs, time and command, and the sum."""
    rate = measured(runs) or assumed()
    width = max(len(run.name) for run in runs)
    rows = []
    for run in runs:
        shown = f"{cost(run):8.2e} {'~' + duration(rate.seconds(cost(run))):>7}"
        if not steps(run):
            shown = f"{'unknown':>8} {'':7}"
        command = shlex.join(run.command(train))
        rows.append(f"{state(run):8} {run.run_id}  {run.name:{width}} {shown} {command}")
    return "\n".join([*rows, total(runs, rate)])


def total(runs: Sequence[Run], rate: Rate | None = None) -> str:
    """A line with the number, the FLOPs and the estimated time of the runs."""
    rate = rate or measured(runs) or assumed()
    costs = [cost(run) for run in results.distinct(runs)]
    groups = len({run.group for run in runs})
    flops_of_all, seconds = sum(costs), sum(map(rate.seconds, costs))
    unknown = sum(not steps(run) for run in results.distinct(runs))
    but = f", without {_count(unknown, 'run')} whose steps depend on the text" if unknown else ""
    return (
        f"{_count(len(runs), 'run')} in {_count(groups, 'group')}, {flops_of_all:.2e} FLOP, "
        f"about {duration(seconds)} one by one{but} ({rate.origin})"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def duration(seconds: float) -> str:
    """Seconds as "45s", "7m", "3.2h" or "2.5d"."""
    for unit, letter, form in ((86400, "d", ".1f"), (3600, "h", ".1f"), (60, "m", ".0f")):
        if seconds >= 1.5 * unit:
            return f"{seconds / unit:{form}}{letter}"
    return f"{seconds:.0f}s"


def table(runs: Sequence[Run]) -> str:
    """The table of `--status`: each run's state, step, loss and remaining time, and the sum."""
    rate = measured(runs) or assumed()
    rows = [["run", "state", "step", "bits/byte", "left"]]
    left, running = 0.0, 0
    for run in results.distinct(runs):
        at = state(run)
        step = steps(run) if at == DONE else _step(run)
        rest = rate.seconds(cost(run) * (1 - min(step, steps(run)) / max(steps(run), 1)))
        left, running = left + rest, running + (at == RUNNING)
        bits = (run.result or {}).get("bits_per_byte")
        shown = "-" if bits is None else f"{bits:.3f}"
        rest_shown = duration(rest) if rest else ""
        rows.append([run.name, at, f"{step}/{steps(run) or '?'}", shown, rest_shown])
    number = sum(row[1] == DONE for row in rows[1:])
    end = f"{number} of {len(rows) - 1} runs done"
    if left:
        at_once = max(1, running)
        end += f", about {duration(left / at_once)} left with {at_once} at a time ({rate.origin})"
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{c:{w}}" for c, w in zip(row, widths, strict=True)) for row in rows]
    groups = ["", results.table(runs)] if number else []
    return "\n".join([*(line.rstrip() for line in lines), end, *groups])


def watch(runs: Sequence[Run]) -> None:
    """Prints the table; on a terminal again and again, until all runs are done or Ctrl-C."""
    while True:
        shown = table(runs)
        is_live = sys.stdout.isatty()
        print(f"\x1b[H\x1b[J{shown}" if is_live else shown, flush=True)
        if not is_live or all(run.result for run in runs):
            return
        time.sleep(REFRESH_SECONDS)
