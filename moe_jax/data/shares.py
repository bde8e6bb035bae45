"""The stages of a mixture: the shares of its sources from a batch on, and kinds of weights."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

DIGITS = 9  # of a share: the last bits of a power differ between machines


@dataclasses.dataclass(frozen=True)
class Size:
    """The size of a source's text."""

    tokens: int
    documents: int


@dataclasses.dataclass(frozen=True)
class Weights:
    """A kind of weights: `of` makes them from given shares, sizes and an exponent, by source."""

    of: Callable[[Mapping[str, float], Mapping[str, Size], float], Mapping[str, float]]
    about: str


# With the exponent alpha, a source of n tokens has the share n^alpha / sum of n^alpha (Lample and
# Conneau, arXiv 1901.07291, section 3.1, where n is the number of sentences).
WEIGHTS: dict[str, Weights] = {
    "fixed": Weights(lambda shares, sizes, alpha: shares, "those of mixture.shares"),
    "proportional": Weights(
        lambda shares, sizes, alpha: {name: size.tokens for name, size in sizes.items()},
        "the numbers of tokens",
    ),
    "temperature": Weights(
        lambda shares, sizes, alpha: {n: size.tokens**alpha for n, size in sizes.items()},
        "the numbers of tokens to the power of mixture.exponent",
    ),
    "uniform": Weights(lambda shares, sizes, alpha: dict.fromkeys(sizes, 1.0), "equal"),
}


def normalised(weights: Mapping[str, float]) -> dict[str, float]:
    """The shares, which sum to 1, of sources with positive weights."""
    total = math.fsum(weights.values())
    return {n: round(w / total, DIGITS) for n, w in weights.items() if round(w / total, DIGITS)}


@dataclasses.dataclass(frozen=True)
class Stage:
    """The shares of sources from a batch on, counted as if no batch were left out.

    most_rows: the rows that a source may give in the whole run; a source without one has no limit.
    """

    first_batch: int
    shares: Mapping[str, float]
    most_rows: Mapping[str, int]

    @classmethod
    def of_json(cls, value: Any) -> "Stage":
        """A stage from what `to_json` returned. Raises: ValueError for anything else."""
        match value:
            case [int() as first, dict() as shares, dict() as most_rows] if first >= 0:
                are_shares = all(type(w) in (int, float) and 0 < w <= 1 for w in shares.values())
                if are_shares and all(type(n) is int and n >= 0 for n in most_rows.values()):
                    return cls(first, shares, most_rows)
        raise ValueError(f"it is no stage of a mixture: {str(value)[:80]}")

    def to_json(self) -> list:
        return [self.first_batch, dict(self.shares), dict(self.most_rows)]

    def changes_to(self, other: "Stage") -> list[str]:
        """The differences of another stage, as "source NAME: OLD -> NEW"."""
        lines = []
        for name in dict.fromkeys([*self.shares, *other.shares]):
            old, new = (stage.shares.get(name, 0.0) for stage in (self, other))
            if old != new:
                lines.append(f"source {_shown(name)}: {old:g} -> {new:g}")
        for name in dict.fromkeys([*self.most_rows, *other.most_rows]):
            most = [stage.most_rows.get(name, "any number of") for stage in (self, other)]
            if most[0] != most[1]:
                lines.append(f"source {_shown(name)}: at most {most[0]} -> {most[1]} rows")
        return lines


def _shown(name: str) -> str:
    return name or "data.source"


def resumed(before: Sequence[Stage], now: Sequence[Stage], batch: int) -> tuple[list[Stage], list]:
    """The stages of a run that goes on at a batch, and what changed, in lines.

    Those `before` hold for the batches already seen, and those of the config `now` from `batch` on.
    """
    seen = [stage for stage in before if stage.first_batch < batch]
    if not seen:
        return list(now), []
    old, new = (
        next(stage for stage in reversed(stages) if stage.first_batch <= batch)
        for stages in (before, now)
    )
    later = [stage for stage in now if stage.first_batch > batch]
    changes = old.changes_to(new)
    if old.first_batch == batch or changes:
        seen.append(dataclasses.replace(new, first_batch=batch))
    return seen + later, [f"{change} from batch {batch} on" for change in changes]
