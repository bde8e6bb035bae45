"""The sentences and tables of a report."""

from collections.abc import Sequence

from moe_jax import untrusted
from moe_jax.analysis import answers, measures
from moe_jax.evaluation.text_metrics import METRICS
from moe_jax.report import catch_up, comparisons, markup, recovery
from moe_jax.report.markup import Cell
from moe_jax.report.records import (
    Group,
    Record,
    continued,
    is_control,
    parent_of,
)

MOST_ROWS = 60  # of the table of crossings
EMPTY = Cell("")


def sentences(every: Sequence[Group]) -> list[str]:
    """A sentence on the best group against each other group, the nearest first."""
    first = comparisons.best(every)
    if first is None:
        return ["No run has a held-out loss."]
    if len(every) == 1:
        half = comparisons.spread(first.bits)
        width = "" if half is None else f" ± {half:.3f}"
        return [f"{first.name}: {first.mean_bits:.3f}{width} bits/byte, {_seeds(first)}."]
    lines = []
    for other in sorted(every, key=lambda group: group.mean_bits):
        if other is first:
            continue
        if difference := comparisons.between(first, other):
            lines.append(comparisons.sentence(difference))
        elif not len(other.bits):
            lines.append(f"{other.name} has no held-out loss.")
        else:
            lines.append(f"{first.name} and {other.name} cannot be compared: their texts differ.")
    return lines


def _seeds(group: Group) -> str:
    n = len(group.bits)
    return f"n = {n} seed{'s' if n > 1 else ''}"


def methods(every: Sequence[Group]) -> str:
    """The methods of the intervals that the page shows."""
    first = comparisons.best(every)
    found = [comparisons.between(first, other) for other in every if first and other is not first]
    used = {difference.over for difference in found if difference}
    return " ".join(text for over, text in comparisons.METHODS.items() if over in used)


def summary(every: Sequence[Group]) -> str:
    """A row per group, with its differences to its parent and to its dense control."""
    rows, formats = [], [(measures.columns, ".1f")]
    if any("preferences" in group.first.result for group in every):
        formats.append((answers.columns, ".3g"))
    for group in every:
        result = group.first.result
        half = comparisons.spread(group.bits)
        width = "" if half is None else f" ± {half:.3f}"
        loss = group.mean("loss")
        row = {
            "run": Cell(group.name),
            "bits/byte": _number(group.mean_bits if len(group.bits) else None, ".3f", width),
            "seeds": Cell(str(len(group.records)), len(group.records)),
            "against parent": _difference(group, parent_of(group, every)),
            "against dense continued": _difference(group, continued(group, every)),
            "nats/token": _number(loss, ".3f"),
            "tokens": _number(result["tokens"], "tokens"),
            "parameters": _number(result["parameters"], "count"),
            "active": _number(result["active_parameters"], "count"),
        }
        for columns, form in formats:
            for name, value in group.averages(columns).items():
                row[name.replace("_", " ")] = _number(value, form)
        rows.append(row)
    best = comparisons.proven_best(every)
    return markup.table(rows, best=None if best is None else list(every).index(best))


def each_run(records: Sequence[Record]) -> str:
    """A row per run, for groups of several seeds."""
    rows = [
        {
            "run": Cell(record.name),
            "seed": Cell(str(record.config.get("seed", "")), record.config.get("seed")),
            "bits/byte": _number(record.result["bits_per_byte"], ".4f"),
            "nats/token": _number(record.result["loss"], ".4f"),
        }
        for record in records
    ]
    return markup.table(rows)


def _difference(group: Group, other: Group | None) -> Cell:
    difference = comparisons.between(group, other) if other else None
    if difference is None:
        return EMPTY
    interval = comparisons.interval_in_words(difference)
    return Cell(f"{comparisons.signed(difference.value)} {interval}".strip(), difference.value)


UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))


def _short(value: float) -> str:
    """A number as "1.05 M"."""
    unit, letter = next((u for u in UNITS if value >= u[0]), (1, ""))
    return f"{value / unit:.3g} {letter}".strip()


def _number(value: float | None, form: str, after: str = "") -> Cell:
    """A number as ".3f", as a count with a unit ("1.05 M"), or in general; "—" for None."""
    if value is None:
        return Cell("—")
    if form in ("tokens", "count"):
        return Cell(_short(value), value)
    return Cell(f"{value:{form}}{after}", value)


def compute(every: Sequence[Group], records: Sequence[Record]) -> str:
    """FLOPs, tokens and device hours of each group's runs on average, with and without parents."""
    rows, of_steps = [], False
    for group in every:
        costs = [catch_up.cost(record, records) for record in group.records]
        row = {"run": Cell(group.name)}
        for head, field, form in (
            ("FLOP", "flops", ".3g"),
            ("FLOP with parents", "flops_with_parents", ".3g"),
            ("tokens", "tokens", "tokens"),
            ("tokens with parents", "tokens_with_parents", "tokens"),
            ("device hours", "hours", ".3g"),
            ("device hours with parents", "hours_with_parents", ".3g"),
        ):
            values = [getattr(cost, field) for cost in costs]
            mean = None if None in values else sum(values) / len(values)
            row[head] = _number(mean, form)
        row["waiting for data"] = _number(_data_wait(group), ".1%")
        row["goodput"] = _number(_goodput(group), ".0%")
        row["device"] = Cell(group.first.result["device"])
        rows.append(row)
        of_steps |= any(catch_up.hours_are_of_steps(record) for record in group.records)
    note = "Device hours are wall time, with start-up and evaluation, times devices; of several "
    note += (
        "seeds, the mean. “Waiting for data”: the share of the steps' time in which devices had "
        "nothing to do for want of a batch. Goodput is the share of the wall time in training "
        "steps that are in the model. “—”: not recorded."
    )
    if of_steps:
        note += " Runs of older versions: the time of their training steps only."
    return markup.table(rows) + markup.paragraph(note)


def _data_wait(group: Group) -> float | None:
    """The mean share of the steps' time in which the devices waited for a batch."""
    waits = [row.get("data_wait") for record in group.records for row in record.training_rows]
    shares = [wait for wait in waits if isinstance(wait, int | float)]
    return sum(shares) / len(shares) if shares else None


def _goodput(group: Group) -> float | None:
    """The mean share of the wall time in training steps; None if a run has not recorded it."""
    found = [record.result.get("goodput") for record in group.records]
    shares = [parts.get("compute") if isinstance(parts, dict) else None for parts in found]
    known = [share for share in shares if isinstance(share, int | float)]
    return sum(known) / len(known) if len(known) == len(shares) else None


def crossings(every: Sequence[Group]) -> str:
    """When each group passes the controls, which are dense runs that go on and sparse runs from
    scratch; "" without a control that another group can be compared with."""
    controls = [g for g in every if is_control(g) or (g.first.is_sparse and not g.first.sources)]
    rows: list[dict[str, Cell]] = []
    done, is_bare = set(), False
    for control in controls:
        for group in every:
            is_arm = group.first.is_sparse or is_control(group)
            if group is control or not is_arm or frozenset((group.name, control.name)) in done:
                continue
            done.add(frozenset((group.name, control.name)))
            drawn = len(rows) < MOST_ROWS  # the rest is only counted
            found = [catch_up.catch_up(group, control, axis, drawn) for axis in AXES.values()]
            if found[0] is not None:
                pairs = zip(AXES.items(), found, strict=True)
                cells = {h: _crossing(f, axis is not catch_up.tokens) for (h, axis), f in pairs}
                pair = f"{group.name} and {control.name}"
                rows.append({"runs": Cell(pair), **cells})
                is_bare |= drawn and any(
                    f and f.crossing.at is not None and not f.over for f in found
                )
    if not rows:
        return ""
    note = (
        "Which run has the lower held-out loss at equal cost, and from where on: the last crossing "
        "of the curves, interpolated linearly between evaluations. “Throughout”: there is none. "
        f"Differences below {catch_up.TIE:g} bits per byte are ties. Columns sort by the cost of "
        "the crossing. Brackets: 95 % of the crossings in 1000 draws of the seeds or, for single "
        "runs, of the blocks of the held-out text; a percentage is the share of draws that cross "
        "in that direction."
    )
    if is_bare:
        note += (
            " A crossing has neither if one side has several seeds and the other has one, or if "
            "single runs have not kept the losses of the same blocks."
        )
    left = len(rows) - MOST_ROWS
    if left > 0:
        note += f" {left} more pairs are not shown."
    return markup.table(rows[:MOST_ROWS]) + markup.paragraph(note)


AXES = {
    "tokens after the parent": catch_up.tokens,
    "FLOP after the parent": catch_up.flops,
    "FLOP with parents": catch_up.flops_with_parents,
}


def _crossing(found: catch_up.CatchUp | None, of_flops: bool) -> Cell:
    """The run that is ahead at the end of this axis, and the cost from which on it is."""
    if found is None:
        return EMPTY
    crossing = found.crossing
    if crossing.ahead is None:
        return Cell("no common range" if crossing.is_apart else "equal")
    ahead = (found.a, found.b)[crossing.ahead]
    if crossing.at is None:
        return Cell(f"{ahead} throughout")
    shown = (lambda value: f"{value:.3g}") if of_flops else _short
    text = f"{ahead} from {shown(crossing.at)} on"
    if found.interval:
        text += f" [{', '.join(map(shown, found.interval))}]"
    if found.share is not None:
        text += f" ({found.share:.0%})"
    if crossing.number > 1:
        text += f", the last of {crossing.number}"
    return Cell(text, crossing.at)


def recoveries(every: Sequence[Group], records: Sequence[Record]) -> str:
    """How far the loss of each group with a parent rises at first, and when it is back; "" if none
    has been evaluated at its start."""
    rows, at_start = [], False
    for group in every:
        if found := recovery.recovery(group, records):
            at_start |= not found.of_parent
            back = Cell("not yet") if found.tokens is None else _number(found.tokens, "tokens")
            rows.append(
                {
                    "run": Cell(group.name),
                    "bits/byte at the start": _number(found.start, ".3f"),
                    "to come back to": _number(found.target, ".3f"),
                    "dip": _number(found.dip, ".3f"),
                    "tokens to recover": back,
                }
            )
    if not rows:
        return ""
    note = (
        "On the text sample of the loss curves. The dip is the highest loss above the start's. A "
        "run has recovered when its loss has come back for good to its parent's"
    )
    note += ", or to its own at the start if the parent's is not shown." if at_start else "."
    return markup.table(rows) + markup.paragraph(note)


def of_texts(records: Sequence[Record]) -> str:
    """The reference-free metrics of each run's continuations; "" if no run has measured them."""
    measured = {record.name: record.result.get("sample_metrics") or {} for record in records}
    names = [name for name in METRICS if any(name in found for found in measured.values())]
    if not names:
        return ""
    rows = [
        {"run": Cell(run), **{name: _number(found.get(name), ".3g") for name in names}}
        for run, found in measured.items()
    ]
    meaning = (f"{name}: {METRICS[name].about} ({METRICS[name].better})" for name in names)
    few = "A few short texts: the numbers show repetition and the wrong language, not quality."
    return markup.table(rows) + markup.paragraph(". ".join([*meaning, few]))


def of_sources(every: Sequence[Group]) -> str:
    """What each source of a mixture has given to the first run of a group; "" without mixtures."""
    rows = []
    for group in every:
        result = group.first.result
        losses = result.get("per_source") or {}
        for name, given in (result.get("sources") or {}).items():
            bits = losses.get(name, {}).get("bits_per_byte")
            rows.append(
                {
                    "run": Cell(group.name),
                    "source": Cell(untrusted.label(name)),
                    "share of tokens": _number(100 * given["share"], ".2f", " %"),
                    "tokens": _number(given["tokens"], "tokens"),
                    "epochs": _number(given["epochs"], ".3g"),
                    "bits/byte": _number(bits, ".3f") if bits is not None else EMPTY,
                }
            )
    return markup.table(rows) if rows else ""


def versions(records: Sequence[Record]) -> dict[str, list[str]]:
    """The commit, versions and device in words -> the names of the runs that have them."""
    found: dict[str, list[str]] = {}
    for record in records:
        result = record.result
        known = {"commit": result.get("commit") or ""} | result["versions"]
        words = [f"{name} {version}" for name, version in known.items() if version]
        found.setdefault(", ".join([*words, f"device {result['device']}"]), []).append(record.name)
    return found


def skipped_records(records: Sequence[Record]) -> str:
    """How many records of each run's training text could not be used, by reason; "" if none."""
    found = []
    for record in records:
        by_split = record.result.get("skipped_records")
        counts = by_split.get("train") if isinstance(by_split, dict) else None
        if isinstance(counts, dict) and counts:
            words = [
                f"{untrusted.label(str(n))} {untrusted.label(why)}" for why, n in counts.items()
            ]
            found.append(f"{record.name} ({', '.join(words)})")
    return f"Records of the training text that were skipped: {'; '.join(found)}." if found else ""
