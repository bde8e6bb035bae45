"""Compute accounting of runs, and the cost at which one group's held-out curve crosses another's.

The papers of upcycling ask when training from scratch, or training the dense parent further,
catches up (Komatsuzaki et al., arXiv 2212.05055, section 4; Muennighoff et al., arXiv 2409.02060,
section 4.1.5).
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Sequence

import numpy as np

from moe_jax.report import comparisons
from moe_jax.report.records import Group, Record, parents_of

FEWEST_DRAWS = 200  # that cross, for an interval
# Bits per byte: smaller differences are ties. Equal models differ by their float32 rounding, about
# 1e-8 of a mean over the text; the page shows thousandths, and another seed differs by more.
TIE = 1e-6


@dataclasses.dataclass(frozen=True)
class Cost:
    """The training cost of a run alone and with its parents'. Hours are wall time times devices;
    None if they are not recorded."""

    tokens: int
    flops: float
    hours: float | None
    tokens_with_parents: int
    flops_with_parents: float
    hours_with_parents: float | None


def cost(record: Record, records: Sequence[Record]) -> Cost:
    """The cost of a run; `records` are those shown, in which its parents may be."""
    result, hours = record.result, device_hours(record)
    before = _parents_hours(record, records)
    return Cost(
        result["tokens"],
        result["training_flops"],
        hours,
        result["tokens"] + (result.get("parent_tokens") or 0),
        result["training_flops"] + result["parent_training_flops"],
        None if hours is None or before is None else hours + before,
    )


def device_hours(record: Record) -> float | None:
    """Device hours of a run and of the processes that it resumed.

    Runs of versions that did not record them have their training steps counted from metrics.jsonl,
    which leaves out evaluation and start-up.
    """
    seconds = record.result.get("device_seconds")
    if isinstance(seconds, int | float):
        return seconds / 3600
    devices = re.search(r" x (\d+)$", record.result["device"])
    total = 0.0
    for before, row in itertools.pairwise([{"tokens": 0}, *record.training_rows]):
        if not row.get("tokens_per_second"):
            return None
        total += (row["tokens"] - before["tokens"]) / row["tokens_per_second"]
    return total * int(devices[1]) / 3600 if devices and total else None


def hours_are_of_steps(record: Record) -> bool:
    """True if `device_hours` counts training steps only."""
    return record.result.get("device_seconds") is None


def _parents_hours(record: Record, records: Sequence[Record], depth: int = 0) -> float | None:
    """The hours behind a run's start: as it records them, or those of its parents among the runs
    shown, if it started from their ends."""
    seconds = record.result.get("parent_device_seconds")
    if isinstance(seconds, int | float):
        return seconds / 3600
    if not record.sources:
        return 0.0
    shown = parents_of(record, records)
    ends = [parent.result["steps"] for parent in shown]
    steps = [source.step for source in record.sources]
    if not shown or depth > 2 or any(s not in (None, e) for s, e in zip(steps, ends, strict=True)):
        return None
    hours = [device_hours(parent) for parent in shown]
    hours += [_parents_hours(parent, records, depth + 1) for parent in shown]
    known = [h for h in hours if h is not None]
    return sum(known) if len(known) == len(hours) else None


# The costs that curves are drawn and crossed against: name -> (cost at a token count, per run).
Axis = Callable[[Record, np.ndarray], np.ndarray]


def tokens(record: Record, at: np.ndarray) -> np.ndarray:
    """Tokens after the parent."""
    return at


def flops(record: Record, at: np.ndarray) -> np.ndarray:
    """Training FLOPs after the parent."""
    return at * record.result["training_flops"] / max(record.result["tokens"], 1)


def flops_with_parents(record: Record, at: np.ndarray) -> np.ndarray:
    """Training FLOPs with the parents'."""
    return flops(record, at) + record.result["parent_training_flops"]


@dataclasses.dataclass(frozen=True)
class Crossing:
    """The last crossing of two curves, after which their order stays that of their ends.

    at: the cost; None if they do not cross.
    number: the crossings in the common range.
    ahead: the index (0 or 1) of the curve that is lower at the end; None if they are equal at all
      points, or have no common range.
    is_apart: True if they have no common range.
    """

    at: float | None
    number: int
    ahead: int | None
    is_apart: bool = False


def crossing(x_a: np.ndarray, y_a: np.ndarray, x_b: np.ndarray, y_b: np.ndarray) -> Crossing:
    """Where two curves cross in their common range, interpolated linearly between their points.

    The last of several crossings is given: before it one could not yet say who ends ahead. Touching
    is no crossing; curves that are equal for a while cross at the end of that stretch. Differences
    below TIE are equal.
    """
    low, high = max(x_a[0], x_b[0]), min(x_a[-1], x_b[-1])
    if low >= high:
        return Crossing(None, 0, None, is_apart=True)
    x = np.union1d(x_a, x_b)
    x = x[(x >= low) & (x <= high)]
    difference = np.interp(x, x_a, y_a) - np.interp(x, x_b, y_b)
    difference[np.abs(difference) < TIE] = 0
    unequal = np.flatnonzero(difference)
    if not len(unequal):
        return Crossing(None, 0, None)
    ahead = int(difference[unequal[-1]] > 0)
    pairs = zip(unequal, unequal[1:], strict=False)
    ends = [int(j) for i, j in pairs if difference[i] * difference[j] < 0]
    if not ends:
        return Crossing(None, 0, ahead)
    j = ends[-1]
    before, after = difference[j - 1], difference[j]
    at = x[j - 1] + (x[j] - x[j - 1]) * before / (before - after)
    return Crossing(float(at), len(ends), ahead)


@dataclasses.dataclass(frozen=True)
class CatchUp:
    """The crossing of two groups' held-out curves.

    interval: 95 % of the places of the draws' crossings; None if too few draws cross.
    share: the fraction of the draws that cross with the same curve ahead; None without draws.
    over: comparisons.SEEDS, TEXT or NOTHING: what is drawn.
    """

    a: str
    b: str
    crossing: Crossing
    interval: tuple[float, float] | None
    share: float | None
    over: str


def catch_up(a: Group, b: Group, axis: Axis = tokens, with_interval: bool = True) -> CatchUp | None:
    """When group `a` passes `b` or is passed; None if their texts differ or a curve has < 2 points.

    The interval is over seeds if both groups have several, and over blocks of the held-out text if
    both groups have one run that kept them. A draw takes the runs of a group, or the blocks of
    both, with replacement.
    """
    if a.first.text != b.first.text:
        return None
    curves = [_curves(group, axis) for group in (a, b)]
    if any(len(x) < 2 for x, _ in curves):
        return None
    (x_a, y_a), (x_b, y_b) = curves
    found = crossing(x_a, y_a.mean(axis=0), x_b, y_b.mean(axis=0))
    drawn, over = _drawn(a, b, axis) if with_interval else ([], comparisons.NOTHING)
    if not drawn:
        return CatchUp(a.name, b.name, found, None, None, comparisons.NOTHING)
    same = [c.at for c in drawn if c.at is not None and c.ahead == found.ahead]
    enough = found.at is not None and len(same) >= FEWEST_DRAWS
    interval = comparisons.percentiles(np.array(same)) if enough else None
    return CatchUp(a.name, b.name, found, interval, len(same) / len(drawn), over)


def _curves(group: Group, axis: Axis) -> tuple[np.ndarray, np.ndarray]:
    """(cost, bits per byte [runs, points]) at the evaluations that all runs have."""
    at, values = group.curve("validation", "bits_per_byte")
    kept = np.isfinite(values).all(axis=0) if len(at) else np.zeros(0, bool)
    return axis(group.first, at[kept]), values[:, kept]


def _drawn(a: Group, b: Group, axis: Axis, number: int = 1000) -> tuple[list[Crossing], str]:
    """The crossings of drawn curves, and what was drawn; no crossings if nothing can be."""
    sides, over = [], comparisons.NOTHING  # (costs, bits per byte [draws, points]) of each group
    if len(a.records) > 1 and len(b.records) > 1:
        rng, over = np.random.default_rng(0), comparisons.SEEDS
        for group in (a, b):
            x, values = _curves(group, axis)
            n = len(values)
            sides.append((x, values[rng.integers(0, n, (number, n))].mean(axis=1)))
    elif len(a.records) == len(b.records) == 1:
        kept = [found for group in (a, b) if (found := _blocks(group.first))]
        if len(kept) == 2 and comparisons.paired(kept[0][1][0], kept[1][1][0]):
            over = comparisons.TEXT
            for group, (at, blocks) in zip((a, b), kept, strict=True):
                weights = comparisons.draws(len(blocks[0]), number)
                bits = [comparisons.bits(block_R3, weights) for block_R3 in blocks]
                sides.append((axis(group.first, at), np.stack(bits, axis=1)))
    if not sides:
        return [], over
    (x_a, drawn_a), (x_b, drawn_b) = sides
    pairs = zip(drawn_a, drawn_b, strict=True)
    return [crossing(x_a, y_a, x_b, y_b) for y_a, y_b in pairs], over


def _blocks(record: Record) -> tuple[np.ndarray, list[np.ndarray]] | None:
    """(tokens, the blocks of each evaluation) of a run; None if one has none, or other blocks."""
    rows = {row["tokens"]: comparisons.blocks_of(record, row) for row in record.validation_rows}
    found = [rows[at] for at in sorted(rows)]
    kept = [x for x in found if x is not None and comparisons.paired(x, found[0])]
    if not kept or len(kept) < len(found):
        return None
    return np.array(sorted(rows), np.float64), kept
