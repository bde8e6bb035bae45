"""Lists of runs for get_sweep(): products, pairs, chains and seeds of overrides.

    dense = arms.named({"dense": {}})
    moe = {"init.source": "@dense", "model.num_experts": 8}
    recipes = arms.over("init.upcycle.recipe", ["naive", "drop"])
    return arms.seeds(arms.chain(dense, arms.product(moe, recipes)), 3)

A run is {"name", "overrides": {dotted key: value}, "after": [names]}. An argument may also be a
dict of overrides, which is one run without a name.
"""

import builtins
import functools
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Runs = Sequence[Mapping[str, Any]]
Part = Runs | Mapping[str, Any]


def named(overrides: Mapping[str, Mapping[str, Any]], after: Sequence[str] = ()) -> list[dict]:
    """One run for each name and its overrides."""
    return [_run(name, own, after) for name, own in overrides.items()]


def over(key: str, values: Iterable) -> list[dict]:
    """One run for each value of a key, named "naive" for a text and "ratio=0.5" for others."""
    return [_run(_name(key, value), {key: value}) for value in values]


def product(*parts: Part) -> list[dict]:
    """Every combination of one run of each part: names joined by "-", overrides joined.

    Where two parts override one key, the later part wins.
    """
    return [functools.reduce(_joined, runs) for runs in itertools.product(*map(_runs, parts))]


def zip(*parts: Part) -> list[dict]:
    """The first runs of all parts joined as in `product`, the second ones, and so on.

    Raises: ValueError for parts of different lengths.
    """
    lists = [_runs(part) for part in parts]
    if len(lengths := {len(runs) for runs in lists}) > 1:
        raise ValueError(f"zip of {sorted(lengths)} runs; use parts of equal length, or product")
    return [functools.reduce(_joined, runs) for runs in builtins.zip(*lists, strict=True)]


def chain(*parts: Part) -> list[dict]:
    """The runs of all parts, one part after the other."""
    return [run for part in parts for run in _runs(part)]


def seeds(part: Part, numbers: int | Iterable[int]) -> list[dict]:
    """Each run once for each number (of 3: 0, 1, 2), named "naive_s0" and so on.

    The number is added to the run's own override of `seed`: an arm with "seed": 1 sees the text in
    another order than its parent with none. "@dense" and `after` stand for the run of the same
    number if that run is in the list, and otherwise for a run that all numbers share.
    """
    runs = _runs(part)
    every = range(numbers) if isinstance(numbers, int) else numbers
    own = {run["name"] for run in runs}
    return [_seeded(run, number, own) for number in every for run in runs]


def flat(overrides: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Overrides by dotted key; a dict as a value has the keys of a section."""
    found: dict[str, Any] = {}
    for key, value in overrides.items():
        is_section = isinstance(value, Mapping)
        found |= flat(value, f"{before}{key}.") if is_section else {f"{before}{key}": value}
    return found


def _run(name: str, overrides: Mapping[str, Any], after: Iterable[str] = ()) -> dict:
    return {"name": name, "overrides": flat(overrides), "after": list(after)}


def _runs(part: Part) -> list[dict]:
    if isinstance(part, Mapping):
        return [_run("", part)]
    return [
        _run(run.get("name", ""), run.get("overrides") or {}, run.get("after") or ())
        for run in part
    ]


def _joined(a: dict, b: dict) -> dict:
    name = "-".join(filter(None, (a["name"], b["name"])))
    after = dict.fromkeys([*a["after"], *b["after"]])
    return _run(name, {**a["overrides"], **b["overrides"]}, after)


def _seeded(run: dict, number: int, own: set[str]) -> dict:
    def of_number(name: str) -> str:
        return f"{name}_s{number}" if name in own else name

    overrides = {**run["overrides"], "seed": run["overrides"].get("seed", 0) + number}
    if isinstance(source := overrides.get("init.source"), str):
        parent = r"(^|,)@([\w.+=-]+)"  # "@A,@B@240": a checkpoint's step is no name
        renamed = re.sub(parent, lambda found: f"{found[1]}@{of_number(found[2])}", source)
        overrides["init.source"] = renamed
    return _run(of_number(run["name"]), overrides, map(of_number, run["after"]))


def _name(key: str, value: Any) -> str:
    """A run's name from one override."""
    shown = value if isinstance(value, str) and value else f"{key.rpartition('.')[2]}={value}"
    return re.sub(r"[^\w.+=-]+", "_", shown).strip("_")
