"""The results of a sweep: results.csv by run, groups.csv by group, and a table for a terminal."""

import csv
import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax import files
from moe_jax.analysis import answers, measures
from moe_jax.report import comparisons
from moe_jax.sweep.plan import Run

DONE, FAILED, STOPPED, BLOCKED, PENDING = "done", "failed", "stopped", "blocked", "pending"
LOSSES = ("loss", "bits_per_byte")
RESULT_COLUMNS = f"""steps tokens training_flops {" ".join(LOSSES)} parent_tokens
    parent_training_flops parameters active_parameters router seconds""".split()
RESULTS, GROUPS = "results.csv", "groups.csv"


@dataclasses.dataclass(frozen=True)
class Statistic:
    """A number over the finished runs of a group.

    deviation: with n - 1; None for a single run. interval: 95 % of the mean, Student's t; None for
    a single run.
    """

    mean: float
    deviation: float | None
    interval: tuple[float, float] | None

    def cells(self) -> list:
        low, high = self.interval or ("", "")
        return [self.mean, "" if self.deviation is None else self.deviation, low, high]


def statistic(values: Sequence[float]) -> Statistic | None:
    """Mean, deviation and interval of a number of each seed; None without a value."""
    if not values:
        return None
    mean, half = float(np.mean(values)), comparisons.spread(values)
    if half is None:
        return Statistic(mean, None, None)
    return Statistic(mean, float(np.std(values, ddof=1)), (mean - half, mean + half))


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs of a sweep that differ only in their seeds.

    overrides: those that its runs share, with the groups of their sources for the sources.
    results: the columns of each finished run, equal runs once.
    """

    name: str
    runs: tuple[Run, ...]
    overrides: Mapping[str, Any]
    results: tuple[Mapping[str, Any], ...]

    def statistic(self, column: str) -> Statistic | None:
        values = [kept.get(column) for kept in self.results]
        return statistic([value for value in values if isinstance(value, int | float)])


def distinct(runs: Sequence[Run]) -> list[Run]:
    """The first run of each id: equal runs have one workdir."""
    found: dict[str, Run] = {}
    for run in runs:
        found.setdefault(run.run_id, run)
    return list(found.values())


def groups(runs: Sequence[Run]) -> list[Group]:
    """The groups in the order of their first runs."""
    members: dict[str, list[Run]] = {}
    for run in distinct(runs):
        members.setdefault(run.group, []).append(run)
    group_of = {run.name: run.group for run in runs}
    found = []
    for name, own in members.items():
        overrides = {key: value for key, value in own[0].overrides.items() if key != "seed"}
        if own[0].sources:
            overrides["init.source"] = ",".join(f"@{group_of[s]}" for s in own[0].sources)
        finished = tuple(_columns(result) for run in own if (result := run.result))
        found.append(Group(name, tuple(own), overrides, finished))
    return found


def write(
    workdir: pathlib.Path, runs: Sequence[Run], status: Mapping[str, str], errors: Mapping[str, str]
) -> None:
    """Writes results.csv, one row per run, and groups.csv, one row per group, into the workdir.

    Both have the overrides as columns; the numbers of an unfinished run are empty.
    """
    keys = overridden(runs)
    columns = (*RESULT_COLUMNS, *measures.columns({}), *answers.columns({}))
    rows: list[list] = [
        ["name", "run_id", "status", "group", "seed", *keys, *columns, "workdir", "error"]
    ]
    for run in runs:
        found = _columns(run.result or {})
        row = [run.name, run.run_id, status[run.name], run.group, run.seed]
        row += [run.overrides.get(key, "") for key in keys] + [found[name] for name in columns]
        rows.append([*row, run.workdir, errors.get(run.name, "")])
    _write(workdir / RESULTS, rows)

    facts = [name for name in RESULT_COLUMNS if name not in (*LOSSES, "router", "seconds")]
    numbers = [*LOSSES, *measures.columns({}), *answers.columns({})]
    ends = ("mean", "deviation", "low", "high")
    ended = [f"{name}_{end}" for name in numbers for end in ends]
    rows = [["group", "runs", "done", *keys, *facts, *ended]]
    for group in groups(runs):
        row = [group.name, len(group.runs), len(group.results)]
        row += [group.overrides.get(key, "") for key in keys]
        row += [number.mean if (number := group.statistic(name)) else "" for name in facts]
        for name in numbers:
            number = group.statistic(name)
            row += number.cells() if number else [""] * len(ends)
        rows.append(row)
    _write(workdir / GROUPS, rows)


def _write(path: pathlib.Path, rows: Iterable[Sequence]) -> None:
    with files.whole_file(path) as unfinished, open(unfinished, "w", newline="") as file:
        csv.writer(file).writerows(rows)


def overridden(runs: Sequence[Run]) -> list[str]:
    """The keys that some run overrides, without the seed."""
    return list(dict.fromkeys(key for run in runs for key in run.overrides if key != "seed"))


def _columns(result: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a result.json."""
    own = {name: result.get(name, "") for name in RESULT_COLUMNS}
    return own | dict(measures.columns(result)) | dict(answers.columns(result))


def table(runs: Sequence[Run]) -> str:
    """A line per group with what differs between the groups, its seeds and its numbers.

    A number with several seeds is "mean ± half of the 95 % interval (deviation)".
    """
    every = groups(runs)
    keys = overridden(runs)
    values = {key: [group.overrides.get(key, "") for group in every] for key in keys}
    differing = [key for key in keys if len({str(value) for value in values[key]} - {""}) > 1]
    numbers = ("bits_per_byte", "loss", "effective_experts")
    shown = [n for n in numbers if any(group.statistic(n) for group in every)]
    head = ["group", *(key.rpartition(".")[2] for key in differing), "seeds", *shown]
    rows = [head]
    for place, group in enumerate(every):
        seeds = f"{len(group.results)}/{len(group.runs)}"
        own = [str(values[key][place]) for key in differing]
        rows.append([group.name, *own, seeds, *(_cell(group.statistic(n)) for n in shown)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _cell(found: Statistic | None) -> str:
    if found is None:
        return "-"
    if found.interval is None:
        return f"{found.mean:.4f}"
    return f"{found.mean:.4f} ± {found.interval[1] - found.mean:.4f} ({found.deviation:.4f})"
