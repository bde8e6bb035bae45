"""The report of `analyze` as tables of text."""

import itertools
from collections.abc import Iterable, Iterator

import numpy as np

from moe_jax import untrusted
from moe_jax.analysis import routing_summary

LAYER = "{:>5} {:>9} {:>8} {:>6} {:>10} {:>6} {:>6} {:>9} {:>9} {:>9} {:>7}"
LABEL = "{:16} {:16} {:>9} {:>9} {:>8} {:>8} {:>10}  {:16}"


def text(report: dict) -> str:
    """The report as tables."""
    E, k, name = report["experts"], report["experts_per_token"], untrusted.label
    lines = [
        f"{name(report['checkpoint'])} on {name(report['text'])}: {report['tokens']:,} tokens, "
        f"{k} of {E} experts per token",
        "",
        LAYER.format(
            *("layer", "effective", "busiest", "rarely", "confidence", "1st/", "2nd/"),
            *("vocab.", "vocab.", "vocab.", "between"),
        ),
        LAYER.format(
            *("", "experts", "two", "used", "", "2nd", "3rd"),
            *("input", "target", "predicted", "labels"),
        ),
    ]
    for number, row in report["layers"].items():
        ratios = [*row["gate_ratios"], None, None][:2]
        lines.append(
            LAYER.format(
                *(number, f"{row['effective_experts']:.2f}", f"{row['busiest_two_share']:.3f}"),
                *(row["rarely_used"], f"{row['confidence']:.3f}"),
                *(_number(ratio, 2) for ratio in ratios),
                *(
                    "{mean:.2f}/{chance:.2f}".format(**row["vocabulary"][kind])
                    for kind in routing_summary.VOCABULARIES
                ),
                _number(row["label_divergence"], 3),
            )
        )
    lines += [
        "1st/2nd, 2nd/3rd: ratios of the mean probabilities. Vocabulary: the mean over ids of the "
        "largest share of one expert, and the same by chance. Between labels: the mean "
        "Jensen-Shannon divergence in bits.",
        "",
        LABEL.format(
            *("label", "family", "tokens", "effective", "special.", "largest", "divergence"),
            "nearest",
        ),
    ]
    for label, row in report["labels"].items():
        lines.append(
            LABEL.format(
                *(name(label)[:16], name(row["family"] or "")[:16], f"{row['tokens']:,}"),
                *(f"{row['effective_experts']:.2f}", f"{row['specialisation']:.3f}"),
                f"{row['largest_share']:.3f}",
                *(_number(row["divergence"], 3), name(row["nearest"] or "")[:16]),
            )
        )
    lines += [
        f"Special.: the largest part of the label's tokens that one expert serves, {k / E:.3f} if "
        "even. Largest: the same of its assignments.",
        *_of_languages(report["languages"]),
    ]
    sections = (section(report) for key, section in SECTIONS.items() if report[key])
    return "\n".join([*lines, *itertools.chain(*sections)])


def _interval(row: dict, name: str) -> str:
    """A value with its interval, or alone."""
    between = row[f"{name}_interval"]
    return f"{row[name]:.3f}" + (" [{:.3f}, {:.3f}]".format(*between) if between else "")


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


WORDS = {
    "mantel": "correlation of routing distance with family (Mantel)",
    "silhouette": "silhouette of families",
    "purity": "nearest language is of the same family",
    "given_distances": "correlation of routing distance with the given one (Mantel)",
}


def _of_languages(found: dict | None) -> Iterator[str]:
    if found is None:
        return
    yield ""
    for key, words in WORDS.items():
        if finding := found.get(key):
            low, high = finding["interval"] or (None, None)
            interval = "" if low is None else f" [{low:.3f}, {high:.3f}]"
            yield (
                f"{words}: {finding['statistic']:.3f}{interval}, p = {finding['p']:.4f}, n = "
                f"{finding['n']}, by chance {finding['chance']:.3f}"
            )
    if left_out := found.get("left_out"):
        yield f"left out, in one of the two only: {', '.join(map(untrusted.label, left_out))}"


COMMITTEE = "{:>5} {:16} {:>6} {:>6} {:>8} {:>8} {:>7} {:>8} {:>7} {:>8} {:>7}"
COMPARED = "{:>5} {:>23} {:>7} {:>23} {:>7} {:>23} {:>7}"
STEP = "{:>9} {:>8} {:>8} {:>8} {:>8}"
COUPLING = "{:>5} {:>9} {:>8} {:>7} {:>4}"


def _section(title: str, form: str, head: Iterable[str], rows: Iterable[Iterable]) -> list[str]:
    """An empty line, a title, a head and the rows, each in this form."""
    return ["", title, form.format(*head), *(form.format(*row) for row in rows)]


def _of_committee(report: dict) -> list[str]:
    one = next(iter(report["committee"].values()))
    title = (
        f"members: experts among the {one['size']} busiest of every label; n = {one['n']:,} "
        f"stretches of text, {one['draws']} permutations"
    )
    head = (
        *("layer", "members", "share", "gini", "jaccard", "chance", "p"),
        *("shuffled", "p", "diverge", "p"),
    )
    names = (
        *("share", "gini", "jaccard", "chance", "p_shared"),
        *("shuffled", "p_labels", "divergence", "p_divergence"),
    )
    rows = []
    for number, row in report["committee"].items():
        members = " ".join(map(str, row["members"]))
        shown = members if len(members) < 17 else f"{len(row['members'])} experts"
        rows.append((number, shown, *(f"{row[name]:.3f}" for name in names)))
    return _section(title, COMMITTEE, head, rows)


def _of_comparison(report: dict) -> list[str]:
    one = next(iter(report["compared"].values()))
    title = (
        f"agreement with {untrusted.label(report['compared_with'])}: n = {one['n']:,} tokens in "
        f"{one['units']:,} stretches of text, 95 % intervals"
    )
    head = ("layer", "top-1", "chance", "top-k", "chance", "best matching", "chance")
    rows = []
    for number, row in report["compared"].items():
        pairs = (
            (_interval(row, name), f"{row[f'{name}_chance']:.3f}")
            for name in ("top_1", "top_k", "matched")
        )
        rows.append((number, *itertools.chain(*pairs)))
    return _section(title, COMPARED, head, rows)


def _of_steps(report: dict) -> list[str]:
    title = f"router saturation against {untrusted.label(report['checkpoint'])}, mean of the layers"
    head = ("step", "top-1", "chance", "top-k", "chance")
    names = ("top_1", "top_1_chance", "top_k", "top_k_chance")
    rows = (
        (step, *(f"{np.mean([row[name] for row in layers.values()]):.3f}" for name in names))
        for step, layers in report["steps"].items()
    )
    return _section(title, STEP, head, rows)


def _of_coupling(report: dict) -> list[str]:
    title = "share of the router's rows that their own expert answers the most; by chance 1/E"
    head = ("layer", "own rows", "chance", "p", "n")
    rows = (
        (number, f"{row['rows']:.3f}", f"{1 / row['n']:.3f}", f"{row['p']:.4f}", row["n"])
        for number, row in report["coupling"].items()
    )
    return _section(title, COUPLING, head, rows)


# By the key of the report, of whose rows it is made; left out without rows.
SECTIONS = {
    "committee": _of_committee,
    "compared": _of_comparison,
    "steps": _of_steps,
    "coupling": _of_coupling,
}
