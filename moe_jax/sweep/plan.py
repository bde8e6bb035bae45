"""The runs of a sweep file: what each is, what it waits for, and the group that it belongs to."""

import contextlib
import dataclasses
import fnmatch
import graphlib
import hashlib
import json
import operator
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from moe_jax import config as configs
from moe_jax import spelling, strict_json, untrusted
from moe_jax.config import checks, program
from moe_jax.model.config import ModelConfig
from moe_jax.report import records
from moe_jax.sweep import arms

ENTRY = {"name", "overrides", "after"}  # the keys of an entry of get_sweep()


@dataclasses.dataclass(frozen=True)
class Run:
    """One entry of get_sweep(). Its id is a hash of its resolved config, so equal runs have equal
    ids. Runs of one group differ only in their seeds and in those of their parents."""

    name: str
    run_id: str
    workdir: pathlib.Path
    flags: tuple[str, ...]  # --config and its overrides, as arguments of the command train
    sources: tuple[str, ...] = ()  # the runs that it starts from
    after: tuple[str, ...] = ()  # the runs that it waits for, even if they fail
    group: str = ""
    seed: int = 0
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # as in the file
    settings: configs.Run | None = None

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
    """`runs_of` the entries that get_sweep() of the file FILE[:arg] returns."""
    return runs_of(path, _get_sweep(path), workdir)


def runs_of(path: str, sweep: Sequence[Mapping], workdir: pathlib.Path) -> list[Run]:
    """The runs of a list, whose config is that of FILE[:arg]; each follows those it waits for.

    An entry is {"name", "overrides": {dotted key: value}, "after": [names]}; a dict as a value has
    the keys of a section, and None gives a key its default. The value "@NAME" of init.source stands
    for that run's workdir, "@NAME@STEP" for its checkpoint of a step, "@A,@B" for several. A run's
    workdir is <workdir>/<name>-<id>.

    Raises: ConfigError for a mistake in any run, before anything is started.
    """
    if "," in str(workdir):
        raise configs.ConfigError(f"--workdir={workdir}: commas separate parents; use none")
    entries = {}
    for entry in _checked(path, sweep):
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
    logged = set()
    for name in _in_order(path, entries):
        overrides = _with_defaults(entries[name]["overrides"])
        starts = _sources(overrides)
        sources = tuple(name for name, _ in starts)
        with checks.refusing(f"run {name!r}: "):
            config = configs.load(path, overrides)
            settings = configs.resolve(config, parent=models.get(next(iter(sources), "")))
        models[name] = settings.model
        if settings.training.log_to and not settings.training.run_group:
            logged.add(name)
        if sources:
            config.init.source = ",".join(f"@{runs[s].run_id}{at}" for s, at in starts)
            overrides["init.source"] = ",".join(f"{runs[s].workdir}{at}" for s, at in starts)
        run_id = _digest(config)
        if sources:
            config.init.source = ",".join(f"@{runs[s].group}{at}" for s, at in starts)
        same = next((run for run in runs.values() if run.run_id == run_id), None)
        kept = [] if same else sorted(workdir.glob(f"*-{run_id}"))
        runs[name] = Run(
            name=name,
            run_id=run_id,
            workdir=same.workdir if same else kept[0] if kept else workdir / f"{name}-{run_id}",
            flags=(f"--config={path}", *(f"--config.{k}={v}" for k, v in overrides.items())),
            sources=sources,
            after=entries[name]["after"],
            group=_digest(config, without_seed=True),
            seed=settings.seed,
            overrides=entries[name]["overrides"],
            settings=settings,
        )
        with checks.refusing():
            untrusted.check_folder(runs[name].workdir)
    return _with_groups(list(runs.values()), logged)


def only(runs: Sequence[Run], patterns: str) -> list[Run]:
    """The runs whose names or groups match one of the patterns ("drop*,naive_s?"), and the
    unfinished runs that they start from.

    Raises: ValueError if a pattern matches no run.
    """
    wanted = set()
    for pattern in patterns.split(","):
        both = {run.name: (run.name, run.group) for run in runs}
        found = {name for name, of in both.items() if fnmatch.filter(of, pattern)}
        if not found:
            raise ValueError(f"--only={pattern} matches none of {', '.join(both)}")
        wanted |= found
    unfinished = {run.name for run in runs if not run.result}
    for run in reversed(runs):  # a run comes after its sources
        if run.name in wanted & unfinished:
            wanted |= set(run.sources) & unfinished
    return [run for run in runs if run.name in wanted]


def _digest(config: Any, *, without_seed: bool = False) -> str:
    """A hash of what a run computes: of its config without the name of its group."""
    values = config.to_dict()
    del values["training"]["run_group"]
    if without_seed:
        del values["seed"]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]


def _with_groups(runs: list[Run], logged: set[str]) -> list[Run]:
    """The runs with the names of their groups; back ends of metrics get those of several runs."""
    members: dict[str, list[str]] = {}
    for run in runs:
        members.setdefault(run.group, []).append(run.name)
    names = dict(zip(members, records.group_names(list(members.values())), strict=True))
    return [
        dataclasses.replace(
            run,
            group=names[run.group],
            flags=(*run.flags, f"--config.training.run_group={names[run.group]}")
            if run.name in logged and len(members[run.group]) > 1
            else run.flags,
        )
        for run in runs
    ]


def _with_defaults(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The overrides with a key's default for None."""
    defaults, found = configs.default(), dict(overrides)
    for key in (key for key, value in overrides.items() if value is None):
        with contextlib.suppress(AttributeError):  # an unknown key, which `configs.load` refuses
            found[key] = operator.attrgetter(key)(defaults)
    return found


def _get_sweep(path: str) -> list[dict]:
    try:
        return list(program.call(path, "get_sweep"))
    except configs.ConfigError as error:
        alone = "scripts/train.py runs a file without a sweep"
        raise configs.ConfigError(f"{error}; {alone}") from None
    except Exception as error:  # a user's file can raise any type
        raise configs.ConfigError(f"{path}: {error!r}") from error


def _checked(path: str, entries: Sequence) -> list[dict]:
    """The entries of a list, each with its overrides and the runs that it waits for."""
    found = []
    for entry in entries:
        if not isinstance(entry, dict):
            raise configs.ConfigError(f"{path}: a sweep entry is {entry!r}; use a dict")
        overrides = entry.get("overrides") or {}
        if not isinstance(overrides, dict):
            raise configs.ConfigError(
                f"{path}: overrides={overrides!r} of run {entry.get('name')!r}; use a dict of "
                "dotted keys, such as {'optimizer.learning_rate': 1e-3}"
            )
        after = tuple(entry.get("after") or ())
        found.append({**entry, "overrides": arms.flat(overrides), "after": after})
    return found


def _in_order(path: str, entries: dict[str, dict]) -> list[str]:
    """The runs as in the file, but each after those that it waits for."""
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
        graphlib.TopologicalSorter(needs).prepare()
    except graphlib.CycleError as error:
        circle = " -> ".join(error.args[1])
        raise configs.ConfigError(f"{path}: runs wait for each other: {circle}") from None
    order: dict[str, None] = {}

    def visit(name: str) -> None:
        if name not in order:
            for other in needs[name]:
                visit(other)
            order[name] = None

    for name in entries:
        visit(name)
    return list(order)


def _sources(overrides: dict) -> list[tuple[str, str]]:
    """(NAME, "" or "@STEP") of the runs that init.source names: "@NAME", "@A,@B@240"."""
    source = str(overrides.get("init.source", ""))
    if not source.startswith("@"):
        return []
    found = [configs.source_of(part.removeprefix("@")) for part in source.split(",")]
    return [(str(one.folder), str(one).removeprefix(str(one.folder))) for one in found]
