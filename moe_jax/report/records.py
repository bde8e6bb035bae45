"""Finished runs as records, and groups of runs that differ only in their seeds."""

import dataclasses
import hashlib
import json
import math
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax import config as configs
from moe_jax import strict_json, untrusted
from moe_jax.model.router import ROUTERS
from moe_jax.training import metrics

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", (0, (4, 1, 1, 1, 1, 1)), ":")
SCORES = "multiple_choice"  # the evaluator in whose rows each score is a number
MOST_LOOKS = len(COLOURS)  # that a reader can tell apart
# Config keys that say where a run keeps its files and rows, and change none of its numbers.
OF_THE_MACHINE = (
    *(("data", "cache_dir"), ("data", "workers"), ("checkpoint", "directory")),
    *(("training", "log_to"), ("training", "run_group"), ("profile", "steps")),
)


def look(place: int) -> dict[str, Any]:
    """The colour, marker and dashes of a curve, which are the same in all figures."""
    looks = {"color": COLOURS, "marker": MARKERS, "linestyle": DASHES}
    return {key: values[place % len(values)] for key, values in looks.items()}


@dataclasses.dataclass(frozen=True)
class Record:
    """A finished run: its config, result.json and metrics.jsonl rows."""

    name: str
    place: int  # its index among all runs, so that its colour does not change when others finish
    config: dict
    result: dict
    rows: list[dict]
    folder: pathlib.Path

    @property
    def look(self) -> dict[str, Any]:
        return look(self.place)

    @property
    def is_sparse(self) -> bool:
        return self.result["tokens_per_expert"] is not None

    @property
    def sources(self) -> list[configs.Source]:
        named = str(self.config["init"]["source"])
        return [configs.source_of(part) for part in named.split(",")] if named else []

    @property
    def source(self) -> str:
        """The text that the run was trained on: its `data.source`, or the names of its mixture."""
        data = self.config["data"]
        mixture = data.get("mixture") or {}
        pairs = [*mixture.get("sources", ()), *mixture.get("shares", ())]
        return ", ".join(dict.fromkeys(str(pair[0]) for pair in pairs)) or data["source"]

    @property
    def training_rows(self) -> list[dict]:
        return [row for row in self.rows if "loss" in row]

    @property
    def validation_rows(self) -> list[dict]:
        return [row for row in self.rows if "validation" in row]

    @property
    def text(self) -> tuple:
        """Runs with different values of this were evaluated on different texts."""
        data, unigram = self.config["data"], self.result["byte_unigram_bits"]
        return self.source, data.get("validation_fraction"), round(unigram, 9)


NUMBERS = (
    *("steps", "tokens", "training_flops", "parent_training_flops"),
    *("parameters", "active_parameters", "byte_unigram_bits"),
)
OTHERS = {
    "versions": dict,
    "per_language": dict,
    "samples": list,
    "device": str,
    "tokens_per_expert": list | None,
    "blocks": list | None,
    "loss": int | float | None,  # None if it is not finite
    "bits_per_byte": int | float | None,
}


def read_record(name: str, place: int, folder: pathlib.Path) -> Record:
    """The record of a finished run's workdir; its name mentions a router that does not learn.

    Raises: ValueError for a damaged file, or one that is not as a run writes it.
    """
    untrusted.check_folder(folder)
    config = strict_json.read_object(folder / "config.json")
    for section, key in (("init", "source"), ("data", "source"), ("model", "router")):
        inner = config.get(section)
        if not isinstance(inner, dict) or not isinstance(inner.get(key, 0), str | None):
            raise ValueError(f"{folder / 'config.json'} is not as a run writes it: {section}.{key}")
    result = strict_json.read_object(folder / "result.json")
    kinds = {**dict.fromkeys(NUMBERS, int | float), **OTHERS}
    for key, kind in kinds.items():
        if not isinstance(value := result.get(key), kind):
            raise ValueError(
                f"{folder / 'result.json'} is not as a run writes it: {key}={str(value)[:40]!r}"
            )
    rows = metrics.read(folder / "metrics.jsonl")
    for row in rows:
        if not _is_row(row):
            where = f"{folder / 'metrics.jsonl'}, a row of step {row['step']},"
            raise ValueError(f"{where} is not as a run writes it; remove the line")
    router = ROUTERS.get(config["model"]["router"])
    if router and not router.learned:
        name += f" ({config['model']['router'].replace('_', ' ')})"
    return Record(untrusted.label(name), place, config, result, rows, folder)


def _is_row(row: dict) -> bool:
    validation = row.get("validation", {"bits_per_byte": None})
    if not isinstance(validation, dict) or type(row.get("tokens")) is not int:
        return False
    numbers = row.get("loss"), validation.get("bits_per_byte", "none")
    return all(isinstance(number, int | float | None) for number in numbers)


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Runs whose configs are equal but for the seed; most groups have one run.

    place: its index among the groups, which decides its look.
    """

    name: str
    place: int
    records: tuple[Record, ...]

    @property
    def look(self) -> dict[str, Any]:
        return look(self.place)

    @property
    def first(self) -> Record:
        return self.records[0]

    @property
    def bits(self) -> np.ndarray:
        """The final held-out bits per byte of its runs that have one."""
        values = np.array([r.result["bits_per_byte"] for r in self.records], np.float64)
        return values[np.isfinite(values)]

    @property
    def mean_bits(self) -> float:
        return float(self.bits.mean()) if len(self.bits) else math.inf

    def mean(self, key: str) -> float | None:
        """The mean of a number of result.json over its runs; None if one has none."""
        values: list[Any] = [record.result.get(key) for record in self.records]
        return None if None in values else float(np.mean(values))

    def averages(self, columns: Callable[[dict], Mapping[str, float | str]]) -> dict:
        """The mean of each column of results.csv over the runs that have it; None if none has."""
        rows = [columns(record.result) for record in self.records]
        values = {name: [float(row[name]) for row in rows if row[name] != ""] for name in rows[0]}
        return {name: float(np.mean(own)) if own else None for name, own in values.items()}

    def curve(self, phase: str, value: str) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, values [runs, points]) at the steps that all of its runs have logged.

        phase: "training", "validation", "score", "preferences" or "layers", whose value is the mean
          of the sparse layers. A missing value is NaN.
        """
        values_of: dict[str, Callable[[Record], dict]] = {
            "training": lambda run: {row["tokens"]: row[value] for row in run.training_rows},
            "validation": lambda run: {
                row["tokens"]: row["validation"][value] for row in run.validation_rows
            },
            "score": lambda run: _of_evaluator(run, SCORES, value),
            "preferences": lambda run: _of_evaluator(run, "preferences", value),
            "layers": lambda run: {
                row["tokens"]: np.mean(row[value]) for row in run.rows if value in row
            },
        }
        curves = [values_of[phase](record) for record in self.records]
        tokens = sorted(set.intersection(*map(set, curves)))
        values = [[points[at] for at in tokens] for points in curves]
        return np.array(tokens, np.float64), np.array(values, np.float64).reshape(len(curves), -1)


def _of_evaluator(run: Record, name: str, value: str) -> dict:
    """A number of an evaluator's rows by tokens."""
    return {
        row["tokens"]: row[name][value]
        for row in run.rows
        if isinstance(row.get(name), dict) and value in row[name]
    }


def groups(records: Sequence[Record]) -> list[Group]:
    """The records grouped by their configs without seeds, in the order of their first runs.

    Sources count as equal if they are in one group. Of two runs with the same seed, which would be
    equal, the first counts.
    """
    found: dict[str, dict[Any, Record]] = {}
    keys = _Keys(records)
    for record in records:
        key = keys[record.name] if "seed" in record.config else record.name
        found.setdefault(key, {}).setdefault(record.config.get("seed"), record)
    alone = all(len(same) == 1 for same in found.values())
    names = group_names([[record.name for record in same.values()] for same in found.values()])
    return [
        Group(name, next(iter(same.values())).place if alone else place, tuple(same.values()))
        for place, (name, same) in enumerate(zip(names, found.values(), strict=True))
    ]


class _Keys(dict):
    """The digest of each run's config without its seed and with the digests of its sources."""

    def __init__(self, records: Sequence[Record]):
        self._records = {record.name: record for record in records}

    def __missing__(self, name: str) -> str:
        record = self._records[name]
        self[name] = name  # while it is computed: a stranger's runs may name each other as sources
        config = {key: value for key, value in record.config.items() if key != "seed"}
        for section, key in OF_THE_MACHINE:
            if isinstance(inner := config.get(section), dict):
                config[section] = {k: value for k, value in inner.items() if k != key}
        config["init"] = {**config["init"], "source": ""}
        sources = []
        for source in record.sources:
            shown = _shown(source, list(self._records.values()))
            sources.append((self[shown.name] if shown else str(source.folder), source.step))
        text = json.dumps([config, sources], sort_keys=True)
        self[name] = hashlib.sha256(text.encode()).hexdigest()
        return self[name]


def _shown(source: configs.Source, records: Sequence[Record]) -> Record | None:
    """The run among the records that a config names as its source.

    Only the folder's own name is compared, because workdirs are moved and copied; no path of a
    config is followed.
    """
    found = [record for record in records if record.folder.name == source.folder.name]
    return found[0] if len(found) == 1 else None


def group_names(members: Sequence[Sequence[str]]) -> list[str]:
    """The name of each group: that of its runs without the numbers of seeds if they then agree."""
    names = []
    for own in members:
        end = r"[-_. ]*(?:seed|s)?[-_=. ]*(?<!\d)\d{1,6}$"
        bare = {re.sub(end, "", name) for name in own} - {""}
        agreed = f"{own[0]} …" if len(bare) > 1 or not bare else min(bare)
        names.append(own[0] if len(own) == 1 else agreed)
    again = {name for name in names if names.count(name) > 1}
    return [own[0] if name in again else name for name, own in zip(names, members, strict=True)]


def parents_of(record: Record, records: Sequence[Record]) -> list[Record]:
    """The runs among the records that this one starts from; [] unless all of them are shown."""
    shown = [_shown(source, records) for source in record.sources]
    return [] if None in shown else [found for found in shown if found is not None]


def parent_of(group: Group, every: Sequence[Group]) -> Group | None:
    """The group that a group starts from; of several, that with the lowest loss."""
    records = [record for other in every for record in other.records]
    starts = {parent.name for record in group.records for parent in parents_of(record, records)}
    found = [g for g in every if g is not group and any(r.name in starts for r in g.records)]
    return min(found, key=lambda g: g.mean_bits, default=None)


def continued(group: Group, every: Sequence[Group]) -> Group | None:
    """The dense runs that go on from the same parent, shown or not: the control of an upcycled
    group."""
    controls = [other for other in every if other is not group and is_control(other)]
    if parent := parent_of(group, every):
        controls = [other for other in controls if parent_of(other, every) is parent]
    else:
        starts = _starts(group, every)
        controls = [other for other in controls if starts & _starts(other, every)]
    return min(controls, key=lambda g: g.mean_bits, default=None)


def _starts(group: Group, every: Sequence[Group]) -> set[tuple[str, ...]]:
    """The sources of each run that has some, by the names of their folders, or by their paths if
    several runs that are shown have that name."""
    names = [record.folder.name for other in every for record in other.records]
    named = (
        tuple(
            str(source.folder) if names.count(source.folder.name) > 1 else source.folder.name
            for source in record.sources
        )
        for record in group.records
    )
    return {sources for sources in named if sources}


def left_out(records: Sequence[Record], every: Sequence[Group]) -> list[Record]:
    """The runs that count in no group, because a run of the same config and seed does."""
    counted = {record.name for group in every for record in group.records}
    return [record for record in records if record.name not in counted]


def is_control(group: Group) -> bool:
    """True for dense runs that go on from another run."""
    return not group.first.is_sparse and bool(group.first.sources)


def front(every: Sequence[Group], most: int) -> list[Group]:
    """At most this many groups, those with the lowest losses, in the order of their runs."""
    ranked = sorted(every, key=lambda group: group.mean_bits)[:most]
    return [group for group in every if group in ranked]


def looks(every: Sequence[Group]) -> dict[str, dict[str, Any]]:
    """The looks of the groups in front, by name: of all groups if a reader can tell them apart."""
    first = front(every, MOST_LOOKS)
    few = len(first) == len(every)
    return {group.name: group.look if few else look(i) for i, group in enumerate(first)}
