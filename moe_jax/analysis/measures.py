"""One table of measures: each row says its unit, how it comes from sums and how it is shown.

All outputs read this table: the training loop and the evaluators write the measures to
metrics.jsonl, train.py to result.json, a sweep to results.csv, and a report plots them.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from moe_jax.model import routing
from moe_jax.model.routing import RouterStats

TRAINING, VALIDATION = "training", "validation"


@dataclasses.dataclass(frozen=True)
class Sums:
    """The sums of a training step, or of an evaluation on held-out text.

    router: fields of `RouterStats` by name, each with a leading axis of sparse layers.
    router_kind: the router's name, so that forced balance is not mistaken for learned balance.
    """

    router: Mapping[str, np.ndarray]
    router_kind: str
    capacity_factor: float
    phase: str  # TRAINING or VALIDATION

    @property
    def load_LE(self) -> np.ndarray:
        return np.asarray(self.router["tokens_per_expert_E"], np.float64)

    @property
    def share_LE(self) -> np.ndarray:
        """Each expert's fraction of the assignments, summing to 1 in each layer."""
        return self.load_LE / np.maximum(self.load_LE.sum(axis=1, keepdims=True), 1)


@dataclasses.dataclass(frozen=True)
class Panel:
    """A panel of the report's router figure: one number for all layers, over training."""

    title: str
    label: str
    reduce: Callable[[list], float]


@dataclasses.dataclass(frozen=True)
class Measure:
    """`value` maps `Sums` to a number, or to a list with one entry per sparse layer.

    needs: the fields of `RouterStats` that it is computed from, which the step then sums.
    phases: the phases in which it is written to metrics.jsonl, under "router".
    column: reduces all layers to one number for results.csv and the report's summary; without it
      the measure is in neither.
    panel: how the report plots it.
    """

    unit: str
    value: Callable[[Sums], Any]
    needs: tuple[str, ...] = ("tokens_per_expert_E",)
    phases: tuple[str, ...] = (TRAINING, VALIDATION)
    in_result: bool = False
    column: Callable[[list], float] | None = None
    panel: Panel | None = None


def tokens_per_expert(sums: Sums) -> list:
    """Each expert's fraction of the assignments."""
    return sums.share_LE.round(5).tolist()


def effective_experts(sums: Sums) -> list:
    """exp(entropy of the shares): E when balanced, 1 when collapsed."""
    return effective_number(sums.share_LE).round(4).tolist()


def effective_number(share_XE: np.ndarray) -> np.ndarray:
    """exp(entropy) of shares that sum to 1 over the last axis."""
    log_XE = np.log(np.where(share_XE > 0, share_XE, 1))
    return np.exp(-(share_XE * log_XE).sum(axis=-1))


def max_violation(sums: Sums) -> list:
    """(largest load - mean) / mean (Wang et al., arXiv 2408.15664)."""
    return (sums.share_LE.max(axis=1) * sums.share_LE.shape[1] - 1).round(4).tolist()


def dead_experts(sums: Sums) -> list:
    """The number of experts with less than 1 % of the balanced load."""
    return (sums.share_LE < 0.01 / sums.share_LE.shape[1]).sum(axis=1).tolist()


def virtual_drop_rate(sums: Sums) -> list:
    """The fraction of assignments that `capacity_factor` would drop, the batch as one group."""
    return routing.virtual_drop_rate(sums.load_LE, sums.capacity_factor).round(5).tolist()


def dropped_share(sums: Sums) -> list:
    """The fraction of the assignments that were dropped."""
    return (sums.router["num_dropped"] / sums.load_LE.sum(axis=1).clip(min=1)).round(5).tolist()


MEASURES: dict[str, Measure] = {
    "kind": Measure("", lambda sums: sums.router_kind),
    "tokens_per_expert": Measure("share of assignments", tokens_per_expert, in_result=True),
    "effective_experts": Measure(
        "experts",
        effective_experts,
        in_result=True,
        column=np.mean,
        panel=Panel("Effective experts, mean of layers", "exp(entropy of load)", np.mean),
    ),
    "max_violation": Measure(
        "mean loads",
        max_violation,
        panel=Panel("Max violation, worst layer", "(largest load − mean) / mean", np.max),
    ),
    "dead_experts": Measure(
        "experts",
        dead_experts,
        panel=Panel("Dead experts, all layers", "under 1 % of an even load", np.sum),
    ),
    "virtual_drop_rate": Measure("share of assignments", virtual_drop_rate),
    "dropped_share": Measure(
        "share of assignments",
        dropped_share,
        needs=("tokens_per_expert_E", "num_dropped"),
        phases=(TRAINING,),
    ),
}


def router_sums(stats: RouterStats | None) -> dict | None:
    """The fields of the statistics that measures and balance rules need, summed over batch shards.

    None for a dense model, which has no statistics.
    """
    if stats is None:
        return None
    needed = {"tokens_per_expert_E", "num_dropped"}
    needed.update(*(measure.needs for measure in MEASURES.values()))
    return {name: jnp.sum(getattr(stats, name), axis=1) for name in sorted(needed)}


def rows(sums: Sums) -> dict[str, object]:
    """The measures of this phase by name: the entry "router" of a row of metrics.jsonl."""
    return {
        name: measure.value(sums)
        for name, measure in MEASURES.items()
        if sums.phase in measure.phases
    }


def result(sums: Sums | None) -> dict[str, object]:
    """The measures that result.json keeps; each is None for a dense model."""
    kept = {name: m for name, m in MEASURES.items() if m.in_result or m.column}
    return {name: None if sums is None else m.value(sums) for name, m in kept.items()}


def columns(result: Mapping[str, Any]) -> dict[str, float | str]:
    """The columns of results.csv, one number each, from a result.json; "" for a missing one."""
    return {
        name: "" if result.get(name) is None else float(m.column(result[name]))
        for name, m in MEASURES.items()
        if m.column
    }
