"""A sweep: runs one process for each run of a sweep file, and writes a table of the results."""

import concurrent.futures
import csv
import dataclasses
import graphlib
import hashlib
import json
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from moe_jax import config as configs
from moe_jax import files, spelling, stopping, strict_json, untrusted
from moe_jax.analysis import answers, measures
from moe_jax.config import checks, program
from moe_jax.model.config import ModelConfig

DONE, FAILED, STOPPED, BLOCKED, PENDING = "done", "failed", "stopped", "blocked", "pending"
ENTRY = {"name", "overrides", "after"}  # the keys of an entry of get_sweep()
RESULT_COLUMNS = """steps tokens training_flops loss bits_per_byte parent_tokens
    parent_training_flops parameters active_parameters router seconds""".split()


@dataclasses.dataclass(frozen=True)
class Run:
    """One entry of get_sweep(). Its id is a hash of its resolved config, so equal runs have equal
    ids."""

    name: str
    run_id: str
    workdir: pathlib.Path
    flags: tuple[str, ...]  # --config and its overrides, as arguments of the command train
    sources: tuple[str, ...]  # the runs that it starts from
    after: tuple[str, ...]  # the runs that it waits for, even if they fail

    def command(self, train: Sequence[str]) -> list[str]:
        """The command of this run; `train` begins with "python" and starts the command train as a
        script or a module."""
        return [*train, f"--workdir={self.workdir}", *self.flags]

    @property
    def begun(self) -> bool:
        return (self.workdir / "config.json").exists()

    @property
    def result(self) -> dict | None:
        """The run's result.json; None if it is not finished, or the file is damaged."""
        try:
            return strict_json.read_object(self.workdir / "result.json")
        except (ValueError, FileNotFoundError):
            return None


def read(path: str, workdir: pathlib.Path) -> list[Run]:
    """The runs of the sweep file FILE[:arg], ordered so that each follows those it waits for.

    An entry of get_sweep() is {"name", "overrides": {dotted key: value}, "after": [names]}. The
    value "@NAME" of init.source stands for that run's workdir, "@NAME@STEP" for its checkpoint of a
    step, "@A,@B" for several. A run's workdir is <workdir>/<name>-<id>.

    Raises: ConfigError for a mistake in any run, before anything is started.
    """
    if "," in str(workdir):
        raise configs.ConfigError(f"--workdir={workdir}: commas separate parents; use none")
    entries = {}
    for entry in _get_sweep(path):
        if unknown := set(entry) - ENTRY:
            key = min(unknown)
            meant = spelling.did_you_mean(key, ENTRY)
            raise configs.ConfigError(f"{path}: a sweep entry has the unknown key {key!r}{meant}")
        name = str(entry.get("name", ""))
        if not re.fullmatch(r"[\w.+=-]+", name):
            raise configs.ConfigError(f"{path}: name={name!r}; use letters, digits and ._+=- only")
        if name in entries:
            raise configs.ConfigError(f"{path}: two runs are named {name!r}; rename one")
        entries[name] = entry
    runs: dict[str, Run] = {}
    models: dict[str, ModelConfig] = {}
    for name in _in_order(path, entries):
        overrides = dict(entries[name]["overrides"])
        starts = _sources(overrides)
        sources = tuple(name for name, _ in starts)
        with checks.refusing(f"run {name!r}: "):
            config = configs.load(path, overrides)
            models[name] = configs.resolve(config, parent=models.get(next(iter(sources), ""))).model
        if sources:
            config.init.source = ",".join(f"@{runs[s].run_id}{at}" for s, at in starts)
            overrides["init.source"] = ",".join(f"{runs[s].workdir}{at}" for s, at in starts)
        resolved = json.dumps(config.to_dict(), sort_keys=True)
        run_id = hashlib.sha256(resolved.encode()).hexdigest()[:10]
        same = next((run for run in runs.values() if run.run_id == run_id), None)
        kept = [] if same else sorted(workdir.glob(f"*-{run_id}"))
        runs[name] = Run(
            name=name,
            run_id=run_id,
            workdir=same.workdir if same else kept[0] if kept else workdir / f"{name}-{run_id}",
            flags=(f"--config={path}", *(f"--config.{k}={v}" for k, v in overrides.items())),
            sources=sources,
            after=entries[name]["after"],
        )
        with checks.refusing():
            untrusted.check_folder(runs[name].workdir)
    return list(runs.values())


def _get_sweep(path: str) -> list[dict]:
    """The entries of a file, each with its overrides and the runs that it waits for."""
    try:
        entries = list(program.call(path, "get_sweep"))
    except configs.ConfigError as error:
        alone = "scripts/train.py runs a file without a sweep"
        raise configs.ConfigError(f"{error}; {alone}") from None
    except Exception as error:  # a user's file can raise any type
        raise configs.ConfigError(f"{path}: {error!r}") from error
    found = []
    for entry in entries:
        if not isinstance(entry, dict):
            raise configs.ConfigError(f"{path}: a sweep entry is {entry!r}; use a dict")
        overrides = entry.get("overrides") or {}
        if not isinstance(overrides, dict) or any(isinstance(v, dict) for v in overrides.values()):
            raise configs.ConfigError(
                f"{path}: overrides={overrides!r} of run {entry.get('name')!r}; use a dict of "
                "dotted keys, such as {'optimizer.learning_rate': 1e-3}"
            )
        found.append({**entry, "overrides": overrides, "after": tuple(entry.get("after") or ())})
    return found


def _in_order(path: str, entries: dict[str, dict]) -> list[str]:
    needs = {}
    for name, entry in entries.items():
        needs[name] = [*entry["after"], *(name for name, _ in _sources(entry["overrides"]))]
        for other in needs[name]:
            if other not in entries:
                known = ", ".join(entries)
                raise configs.ConfigError(
                    f"{path}: run {name!r} waits for {other!r}, which is none of {known}"
                )
    try:
        return list(graphlib.TopologicalSorter(needs).static_order())
    except graphlib.CycleError as error:
        circle = " -> ".join(error.args[1])
        raise configs.ConfigError(f"{path}: runs wait for each other: {circle}") from None


def _sources(overrides: dict) -> list[tuple[str, str]]:
    """(NAME, "" or "@STEP") of the runs that init.source names: "@NAME", "@A,@B@240"."""
    source = str(overrides.get("init.source", ""))
    if not source.startswith("@"):
        return []
    found = [configs.source_of(part.removeprefix("@")) for part in source.split(",")]
    return [(str(one.folder), str(one).removeprefix(str(one.folder))) for one in found]


def execute(
    runs: list[Run], train: Sequence[str], workdir: pathlib.Path, *, max_parallel: int = 1
) -> dict[str, str]:
    """Starts all unfinished runs, at most `max_parallel` at a time; returns each run's status.

    If a run fails, only the runs that start from it are not run. `results.csv` is rewritten after
    every run. A run's output goes to <its workdir>/log.txt, or to the terminal if runs are started
    one by one.

    Raises: SystemExit 75 after SIGTERM or Ctrl-C; running processes get SIGTERM and save.
    """
    status = {run.name: DONE if run.result else PENDING for run in runs}
    errors: dict[str, str] = {}
    processes: list[subprocess.Popen] = []
    stopped = False

    def stop(_):
        nonlocal stopped
        stopped = True
        for process in processes:
            process.terminate()

    with stopping.requests(stop):
        with concurrent.futures.ThreadPoolExecutor(max_parallel) as pool:
            running: dict[concurrent.futures.Future, Run] = {}
            while True:
                for run in (run for run in runs if status[run.name] == PENDING):
                    if lost := [s for s in run.sources if status[s] in (FAILED, BLOCKED)]:
                        status[run.name] = BLOCKED
                        errors[run.name] = f"its source {lost[0]} {status[lost[0]]}"
                        continue
                    waits = any(status[name] == PENDING for name in run.after)
                    waits |= any(status[source] != DONE for source in run.sources)
                    waits |= any(run.run_id == other.run_id for other in running.values())
                    if len(running) < max_parallel and not waits and not stopped:
                        in_terminal = max_parallel == 1 and sys.stderr.isatty()
                        _announce(runs, run, "goes on" if run.begun else "starts")
                        task = pool.submit(_launch, run, train, in_terminal, processes)
                        running[task] = run
                write_results(workdir / "results.csv", runs, status, errors)
                if not running:
                    break
                finished, _ = concurrent.futures.wait(
                    running, return_when=concurrent.futures.FIRST_COMPLETED
                )
                for task in finished:
                    run = running.pop(task)
                    ended, error, seconds = task.result()
                    for other in runs:
                        if other.run_id == run.run_id:
                            status[other.name] = ended
                            errors[other.name] = error
                    news = f"{ended} after {seconds:.0f} s ({error})"
                    if result := ended == DONE and run.result:
                        news = f"done in {seconds:.0f} s, held-out {result['loss']:.3f} nats/token"
                        news += f", {result['bits_per_byte']:.3f} bits/byte"
                    _announce(runs, run, news)
    if stopped:
        print("stopped; run the same command again to go on", file=sys.stderr)
        raise SystemExit(stopping.EXIT_PREEMPTED)
    return status


def _launch(
    run: Run, train: Sequence[str], in_terminal: bool, processes: list[subprocess.Popen]
) -> tuple[str, str, float]:
    """Executes a run to its end: (status, the last line that it printed if it failed, seconds)."""
    began = time.monotonic()
    run.workdir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *run.command(train)[1:]]
    log = run.workdir / "log.txt"
    log.unlink(missing_ok=True)  # a file that is linked here keeps its content
    with open(log, "w") as output:
        out, err = (None, None) if in_terminal else (output, subprocess.STDOUT)
        # In a session of its own it gets one signal, this program's, and not Ctrl-C beside it.
        how: dict = {"stdin": subprocess.DEVNULL, "start_new_session": True}
        process = subprocess.Popen(command, stdout=out, stderr=err, **how)
        processes.append(process)
        code = process.wait()
        processes.remove(process)
    seconds = time.monotonic() - began
    if code == 0:
        return DONE, "", seconds
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = lines[-1] if lines else "see the terminal" if in_terminal else "it said nothing"
    error = f"exit {code}: {said}"
    if code < 0:
        error = f"killed by {signal.Signals(-code).name}; run the sweep again to go on"
    was_stopped = code in (stopping.EXIT_PREEMPTED, -signal.SIGTERM)
    return STOPPED if was_stopped else FAILED, error, seconds


def _announce(runs: list[Run], run: Run, news: str) -> None:
    print(f"[{runs.index(run) + 1}/{len(runs)}] {run.name}: {news}", flush=True)


def write_results(
    path: pathlib.Path, runs: list[Run], status: dict[str, str], errors: dict[str, str]
) -> None:
    """Writes one row per run; the numbers of an unfinished run are empty."""
    with files.whole_file(path) as unfinished, open(unfinished, "w", newline="") as file:
        rows = csv.writer(file)
        columns = (*RESULT_COLUMNS, *measures.columns({}), *answers.columns({}))
        rows.writerow(["name", "run_id", "status", *columns, "workdir", "error"])
        for run in runs:
            result = run.result or {}
            values = [result.get(column, "") for column in RESULT_COLUMNS]
            values += [*measures.columns(result).values(), *answers.columns(result).values()]
            error = errors.get(run.name, "")
            rows.writerow([run.name, run.run_id, status[run.name], *values, run.workdir, error])


def listing(runs: list[Run], train: Sequence[str]) -> str:
    """The lines of `--list`: each run's status, id, name and command."""
    rows = []
    for run in runs:
        state = DONE if run.result else "begun" if run.begun else PENDING
        rows.append(f"{state:8} {run.run_id}  {run.name:12} {shlex.join(run.command(train))}")
    return "\n".join(rows)
