"""The values of each item under one or more measures, with intervals and paired comparisons."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from moe_jax.evaluation import comparison


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """The result of a model on items.

    labels: one for each item; "" for none.
    values: by measure, a value from 0 to 1 for each item, [N]. The first measure comes first in
      tables.
    facts: counts that a reader has to know, such as the tokens that were left out.
    """

    labels: tuple[str, ...]
    values: Mapping[str, np.ndarray]
    facts: Mapping[str, float]

    def report(self, *, seed: int = 0) -> dict[str, Any]:
        """The mean and the 95 % interval of each measure, for all items and by label."""
        named = sorted(set(self.labels) - {""})
        return {
            "n": len(self.labels),
            **self.facts,
            **_means(self.values, seed),
            "labels": {
                label: {"n": int(own_N.sum()), **_means(_only(self.values, own_N), seed)}
                for label in named
                for own_N in [np.array(self.labels) == label]
            },
        }

    def compare(self, other: "Outcomes", *, seed: int = 0) -> dict[str, Any]:
        """The paired comparison with another model, by measure."""
        return {
            name: dataclasses.asdict(comparison.compare(values_N, other.values[name], seed=seed))
            for name, values_N in self.values.items()
        }


def cut_line(number: int) -> str:
    """The line of a report for contexts that were truncated from the left."""
    return f"{number} contexts are longer than the model's limit, and lack their first tokens"


def _only(values: Mapping[str, np.ndarray], own_N: np.ndarray) -> dict[str, np.ndarray]:
    return {name: values_N[own_N] for name, values_N in values.items()}


def _means(values: Mapping[str, np.ndarray], seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, values_N in values.items():
        found[name] = float(values_N.mean())
        found[f"{name}_interval"] = comparison.interval(values_N, seed=seed)
    return found
