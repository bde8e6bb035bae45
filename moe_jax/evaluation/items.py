"""Files of items, multiple choice or short answers: results of a model, and two models compared."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from moe_jax import untrusted
from moe_jax.evaluation import json_lines, multiple_choice, outcomes, short_answers
from moe_jax.evaluation.answers import Settings
from moe_jax.evaluation.subject import Subject


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of items: how a line is read, and how a model is evaluated on items."""

    name: str
    parse: Callable[[dict[str, Any]], Any]
    evaluate: Callable[[Sequence[Any], Subject, Settings], outcomes.Outcomes]


# By the key that tells the kinds apart.
KINDS = {
    "choices": Kind(
        "multiple choice",
        multiple_choice.parse,
        lambda items, subject, settings: multiple_choice.evaluate(
            items, subject.tokenizer, subject.score
        ),
    ),
    "answers": Kind(
        "short answers",
        short_answers.parse,
        lambda items, subject, settings: short_answers.evaluate(
            items, lambda prompts: subject.answer(prompts, settings)
        ),
    ),
}


def read(path: str | pathlib.Path) -> tuple[Kind, list[Any]]:
    """The items of a file and their kind, which the first item decides.

    Raises: ValueError, with the line's number, for a line that is no item of this kind.
    """
    kinds: list[Kind] = []

    def parse(values: dict[str, Any]) -> Any:
        kinds.extend(kind for key, kind in KINDS.items() if key in values and not kinds)
        if not kinds:
            raise ValueError(f"it has none of {', '.join(map(repr, KINDS))}")
        return kinds[0].parse(values)

    found = json_lines.read(path, parse)
    return kinds[0], found


def report(
    load: Callable[[str], Subject],
    names: Sequence[str],
    path: str,
    settings: Settings,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """The first model's results on the items of a file, and the comparison with the second one's.

    Args:
      load: called with one of `names` at a time, so that one model is in memory.
    """
    kind, found = read(path)
    results: list[outcomes.Outcomes] = []
    models: list[dict[str, Any]] = []
    for name in names:
        subject = load(name)
        results.append(kind.evaluate(found, subject, settings))
        own = {"checkpoint": subject.name, **results[-1].report(seed=seed)}
        models.append({**own, "measures": list(results[-1].values)})
        del subject
    whole: dict[str, Any] = {"items": path, "kind": kind.name, "models": models}
    if len(results) > 1:
        whole["comparison"] = results[0].compare(results[1], seed=seed)
    return whole


ROW = "{:16} {:>8}" + " {:>30}" * 3


def text(report: dict[str, Any]) -> str:
    """The report as tables: one for each model, and one for the comparison."""
    lines = [f"{report['kind']}: {report['items']}"]
    for own in report["models"]:
        names = own["measures"]
        lines += ["", own["checkpoint"], _row("label", "items", names)]
        for label, row in {"all": own, **own["labels"]}.items():
            lines.append(_row(untrusted.label(label), row["n"], [_mean(row, n) for n in names]))
        if chance := own.get("chance"):
            lines.append(f"chance: {chance:.3f}")
        if cut := own["contexts_cut"]:
            lines.append(outcomes.cut_line(cut))
    if "comparison" in report:
        first, second = (own["checkpoint"] for own in report["models"])
        lines += ["", f"{first} minus {second}, on the same items"]
        lines += [_difference(name, row) for name, row in report["comparison"].items()]
    return "\n".join(lines)


def _row(label: str, number: object, cells: Sequence[str]) -> str:
    return ROW.format(label, number, *[*cells, "", "", ""][:3]).rstrip()


def _mean(row: dict[str, Any], name: str) -> str:
    interval = row[f"{name}_interval"]
    shown = "too few items" if interval is None else "{:.3f} – {:.3f}".format(*interval)
    return f"{row[name]:.3f} ({shown})"


def _difference(name: str, row: dict[str, Any]) -> str:
    interval = row["interval"]
    shown = "too few items" if interval is None else "{:+.3f} – {:+.3f}".format(*interval)
    tests = {"bootstrap": row["p_bootstrap"], "McNemar": row["p_mcnemar"]}
    values = ", ".join(f"p = {p:.3g} ({test})" for test, p in tests.items() if p is not None)
    counts = f"n = {row['n']}, {row['better']} better, {row['worse']} worse"
    return f"{name}: {row['difference']:+.3f} ({shown}); {values}; {counts}"
