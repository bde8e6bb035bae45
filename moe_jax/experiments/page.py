"""The page of results, docs/results.md: made from the rows of studies and their config files alone.

A comparison is paired over seeds: the runs of one seed share their parent and the order of their
text.
"""

import ast
import dataclasses
import pathlib
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from moe_jax.config import program
from moe_jax.experiments import rows, statistics
from moe_jax.experiments.rows import Row
from moe_jax.experiments.study import BITS, Comparison, Question, Study
from moe_jax.report import catch_up, comparisons

PAGE = "docs/results.md"
LEVEL = 0.05  # of a test, after the correction


@dataclasses.dataclass(frozen=True)
class Measure:
    """A number of a run that groups are compared by; None where it has none."""

    title: str
    value: Callable[[Row], float | None]
    digits: int = 3


def _mean(values: Sequence[float] | None) -> float | None:
    return None if values is None else float(np.mean(values))


def _early(row: Row) -> float:
    """The first point of the curve from a quarter of the run's tokens on."""
    return next(bits for tokens, bits in row.curve if tokens >= row.tokens / 4)


def _dip(row: Row) -> float:
    bits = [bits for _, bits in row.curve]
    return max(bits) - bits[0]


MEASURES = {
    BITS: Measure("bits per byte on the test split", lambda row: row.test_bits_per_byte),
    "worst_label": Measure(
        "bits per byte on the test split, of the worst label",
        lambda row: max(row.test_bits_by_label.values()),
    ),
    "start": Measure(
        "bits per byte on the validation sample, at step 0", lambda row: row.curve[0][1]
    ),
    "early": Measure(
        "bits per byte on the validation sample, after a quarter of the steps", _early
    ),
    "dip": Measure("rise of the validation loss above the start's, in bits per byte", _dip),
    "effective_experts": Measure(
        "effective experts, mean of the layers", lambda row: _mean(row.effective_experts), 2
    ),
    "expert_similarity": Measure(
        "similarity of the experts, mean of the layers", lambda row: _mean(row.expert_similarity)
    ),
    "max_violation_mean": Measure(
        "largest violation of balance over training, worst layer", lambda r: r.max_violation_mean, 2
    ),
    "divergence": Measure(
        "divergence between languages' routing, in bits, mean of the layers",
        lambda row: row.languages["divergence"] if row.languages else None,
    ),
    "family": Measure(
        "correlation of languages' routing distance with family (Mantel)",
        lambda row: row.languages["family"] if row.languages else None,
    ),
}


@dataclasses.dataclass(frozen=True)
class Published:
    """A study with its rows. config: the path of its file, as a command names it."""

    config: str
    docstring: str
    study: Study
    rows: Sequence[Row]

    @property
    def groups(self) -> dict[str, list[Row]]:
        """The rows of each group, in the order of their first runs."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.group, []).append(row)
        return found


def read(root: pathlib.Path) -> list[Published]:
    """The studies under <root>/configs/experiments that have rows, the bench first.

    Raises: ValueError for a file that is not as this program writes it, or a study without
      get_study().
    """
    found = []
    for path in sorted((root / "configs" / "experiments").glob("*/*.jsonl")):
        config = path.with_suffix(".py")
        docstring = ast.get_docstring(ast.parse(config.read_text(encoding="utf-8"))) or ""
        study = program.call(str(config), "get_study")
        name = config.relative_to(root).as_posix()
        found.append(Published(name, docstring, study, rows.read(path)))
    return sorted(found, key=lambda one: (not one.config.count("/bench/"), one.config))


def text(studies: Sequence[Published]) -> str:
    """The generated part of the page, in Markdown."""
    if not studies:
        return "No study has rows yet."
    titles = [one.docstring.partition("\n")[0] for one in studies]
    contents = "\n".join(f"- [{title}](#{_anchor(title)})" for title in titles)
    return "\n\n".join([contents, *map(_of_study, studies)])


def _anchor(heading: str) -> str:
    """The name that GitHub gives a heading in links."""
    return re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-")


def _of_study(one: Published) -> str:
    first, _, rest = one.docstring.partition("\n")
    tables = [_of_question(question, one.groups) for question in one.study.questions]
    tables += _crossings(one)
    conclusion = _as_markdown(one.study.conclusion)
    parts = [f"## {first}", conclusion, "### How was it measured?", _as_markdown(rest)]
    parts += [_facts(one), _groups(one), *tables]
    return "\n\n".join(part.strip("\n") for part in parts if part)


def _as_markdown(docstring: str) -> str:
    """The paragraphs of a docstring, each on one line; indented ones are commands, and one that
    sends the reader to this page is left out."""
    shown = []
    for paragraph in textwrap.dedent(docstring).strip("\n").split("\n\n"):
        if PAGE in paragraph:
            continue
        if paragraph.startswith("    "):
            shown.append(f"```bash\n{textwrap.dedent(paragraph)}\n```")
        else:
            shown.append(" ".join(paragraph.split()))
    return "\n\n".join(shown)


def _facts(one: Published) -> str:
    distinct = {row.run_id: row for row in one.rows}.values()
    hours = sum(row.seconds for row in distinct) / 3600
    versions = [", ".join(f"{n} {v}" for n, v in row.versions.items()) for row in distinct]
    of_all = [[row.hardware for row in distinct], versions, [row.commit for row in distinct]]
    hardware, software, commits = (", ".join(dict.fromkeys(values)) for values in of_all)
    return (
        f"{len(distinct)} runs in {len(one.groups)} groups; {hours:.1f} hours of processes on "
        f"{hardware}; {software}; commit {commits}."
    )


def _groups(one: Published) -> str:
    """A line for each group, the lowest test loss first."""
    head = ["group", "n", "test bits/byte", "validation", "tokens", "FLOPs", "with parents"]
    head += ["parameters (active)", "effective experts", "similarity"]
    lines = []
    ranked = sorted(
        one.groups.items(), key=lambda item: np.mean([r.test_bits_per_byte for r in item[1]])
    )
    for name, own in ranked:
        first = own[0]
        sizes = f"{first.parameters / 1e6:.2f} M"
        sizes += (
            "" if first.effective_experts is None else f" ({first.active_parameters / 1e6:.2f} M)"
        )
        every = first.training_flops + first.parent_training_flops
        cells = [name, str(len(own)), _cell(own, MEASURES[BITS])]
        cells += [_cell(own, Measure("", lambda row: row.validation_bits_per_byte))]
        cells += [
            f"{first.tokens / 1e6:.2f} M",
            f"{first.training_flops:.2e}",
            f"{every:.2e}",
            sizes,
        ]
        cells += [_cell(own, MEASURES[key]) for key in ("effective_experts", "expert_similarity")]
        lines.append(cells)
    return _table(head, lines)


def _cell(own: Sequence[Row], measure: Measure) -> str:
    values = [value for row in own if (value := measure.value(row)) is not None]
    if not values:
        return "–"
    half = comparisons.spread(values)
    shown = f"{np.mean(values):.{measure.digits}f}"
    return shown if half is None else f"{shown} ± {half:.{measure.digits}f}"


def by_seed(
    comparison: Comparison, groups: Mapping[str, Sequence[Row]], measure: Measure
) -> list[float]:
    """The comparison for each seed that all of its groups have."""
    values = []
    for name in comparison.weights:
        own = {row.number: measure.value(row) for row in groups.get(name, ())}
        values.append({number: value for number, value in own.items() if value is not None})
    weights = list(comparison.weights.values())
    return [
        sum(weight * own[seed] for weight, own in zip(weights, values, strict=True))
        for seed in sorted(set.intersection(*map(set, values)))
    ]


def measure_of(name: str) -> Measure:
    """A row of MEASURES; or the loss of the label whose name follows "label/"."""
    label = name.removeprefix("label/")
    if label == name:
        return MEASURES[name]
    title = f"bits per byte on the test split, of the label {label}"
    return Measure(title, lambda row: row.test_bits_by_label[label])


def _of_question(question: Question, groups: Mapping[str, Sequence[Row]]) -> str:
    measure = measure_of(question.measure)
    every = {c.label: by_seed(c, groups, measure) for c in question.comparisons}
    found = {label: statistics.paired(values) for label, values in every.items() if values}
    tests = {label: paired.p for label, paired in found.items() if paired.p is not None}
    corrected = dict(zip(tests, statistics.holm(list(tests.values())), strict=True))
    lines = []
    for label, paired in found.items():
        interval, p = "–", "–"
        difference = _signed(paired.mean, measure.digits)
        if paired.interval:
            low, high = (_signed(end, measure.digits) for end in paired.interval)
            interval, p = f"[{low}, {high}]", _p(tests[label])
        holm = _p(corrected[label]) if label in corrected else "–"
        if corrected.get(label, 1.0) < LEVEL:
            difference = f"**{difference}**"
        lines.append([label, difference, interval, str(paired.number), p, holm])
    if not lines:
        return f"### {question.text}\n\nNo run has been finished for it yet."
    head = ["comparison", f"difference in {measure.title}", "95 % interval", "n", "p", "Holm"]
    return f"### {question.text}\n\n{_table(head, lines)}"


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def crossings(a: Sequence[Row], b: Sequence[Row], *, of_flops: bool) -> list[catch_up.Crossing]:
    """The crossing of two groups' validation curves for each seed that both have."""
    theirs = {row.number: row for row in b}
    pairs = [(row, theirs[row.number]) for row in a if row.number in theirs]
    found = []
    for pair in pairs:
        curves = []
        for row in pair:
            tokens, bits = np.array(row.curve, np.float64).T
            cost = tokens * row.training_flops / row.tokens + row.parent_training_flops
            curves += [cost if of_flops else tokens, bits]
        found.append(catch_up.crossing(*curves))
    return found


def _crossings(one: Published) -> list[str]:
    lines = []
    for a, b in one.study.crossings:
        if not {a, b} <= one.groups.keys():
            continue
        cells = [f"{a}, {b}"]
        for of_flops in (False, True):
            found = crossings(one.groups[a], one.groups[b], of_flops=of_flops)
            cells.append(_places(found, (a, b), of_flops))
        lines.append(cells)
    if not lines:
        return []
    head = ["curves", "by tokens after the parents", "by FLOPs with parents"]
    return [f"### Where do the curves cross?\n\n{_table(head, lines)}"]


def _places(found: Sequence[catch_up.Crossing], names: tuple[str, str], of_flops: bool) -> str:
    """The place where the curves cross, and which is lower at the end, over the seeds."""
    if not found:
        return "–"
    if any(one.is_apart for one in found):
        return "no common range"
    places = [one.at for one in found if one.at is not None]
    ahead = [one.ahead for one in found]
    ends = [f"{name} in {ahead.count(i)}" for i, name in enumerate(names) if i in ahead]
    lower = f"lower at the end: {', '.join(ends) or 'none'} of {len(found)} seeds"
    if not places:
        return f"no crossing; {lower}"
    shown = [f"{at:.2e}" if of_flops else f"{at / 1e6:.2f} M" for at in (min(places), max(places))]
    return f"{len(places)} of {len(found)} seeds, at {' to '.join(dict.fromkeys(shown))}; {lower}"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, rule, *lines])
