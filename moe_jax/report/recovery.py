"""The course of the held-out loss after a start from a parent: the dip, and the way back.

An upcycled run gets worse at first, because its learning rate warms up again and its moments start
at zero.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from moe_jax.report import comparisons
from moe_jax.report.catch_up import TIE
from moe_jax.report.records import Group, Record, parents_of


@dataclasses.dataclass(frozen=True)
class Recovery:
    """Bits per byte on the sample of the run's loss curve, in the mean over a group's runs.

    dip: the highest loss above the start's; 0 if none is above it.
    target: the loss to come back to: the parent's, or the start's if the parent's is not known on
      the same sample.
    tokens: trained tokens until the loss is at the target for good; 0 if it is never above it, None
      if it is still above it at the end.
    """

    start: float
    dip: float
    target: float
    of_parent: bool
    tokens: float | None


def recovery(group: Group, records: Sequence[Record]) -> Recovery | None:
    """None for a group without a parent, or that was not evaluated at step 0 and later; `records`
    are those that the parents may be among."""
    if not group.first.sources:
        return None
    tokens, bits = group.curve("validation", "bits_per_byte")
    if len(tokens) < 2 or tokens[0] or not np.isfinite(bits := bits.mean(axis=0)).all():
        return None
    parents = [_parents_loss(record, records) for record in group.records]
    known = [loss for loss in parents if loss is not None]
    of_parent = len(known) == len(parents)
    target = float(np.mean(known) if of_parent else bits[0])
    dip = max(float((bits - bits[0]).max()), 0.0)
    return Recovery(float(bits[0]), dip, target, of_parent, _back(tokens, bits, target))


def _back(tokens: np.ndarray, bits: np.ndarray, target: float) -> float | None:
    """The tokens at which a curve last falls to the target, linearly between evaluations."""
    above = np.flatnonzero(bits > target + TIE)
    if not len(above):
        return 0.0
    i = above[-1]
    if i + 1 == len(bits):
        return None
    share = (bits[i] - target) / (bits[i] - bits[i + 1])
    return float(tokens[i] + min(share, 1.0) * (tokens[i + 1] - tokens[i]))


def _parents_loss(record: Record, records: Sequence[Record]) -> float | None:
    """The loss of a run's only parent at the step that the run starts from, if both have kept the
    losses of the same blocks of text."""
    parents = parents_of(record, records)
    if len(parents) != 1:
        return None
    step = record.sources[0].step or parents[0].result["steps"]
    first = comparisons.blocks_of(record, record.validation_rows[0])
    for row in parents[0].validation_rows:
        if row["step"] == step and comparisons.paired(
            comparisons.blocks_of(parents[0], row), first
        ):
            return row["validation"]["bits_per_byte"]
    return None
