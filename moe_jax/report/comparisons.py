"""Differences of held-out loss between groups of runs, with intervals, in numbers and in words."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import special

from moe_jax.report.records import Group, Record

Values = Sequence[float] | np.ndarray
LEVEL = 0.95
DRAWS = 2000
FEWEST_BLOCKS = 10  # of held-out text, for an interval
SEEDS, TEXT, NOTHING = "seeds", "text", ""  # the units that an interval is over
METHODS = {
    SEEDS: "Intervals over seeds: 95 %, Student's t, equal spread assumed.",
    TEXT: "Intervals over text, of two runs with one seed each: 95 %, paired bootstrap over "
    "blocks of the held-out text; another seed may differ by more.",
    NOTHING: "Two single runs have no interval unless both have kept the losses of blocks of text.",
}


@dataclasses.dataclass(frozen=True)
class Difference:
    """`value` is the bits per byte of group `a` minus those of group `b`.

    interval: 95 %; None if there is nothing to compute it from.
    over: SEEDS, TEXT or NOTHING: what the interval is over.
    """

    a: str
    b: str
    value: float
    interval: tuple[float, float] | None
    over: str
    num_seeds: tuple[int, int]

    @property
    def is_clear(self) -> bool:
        """True if the interval excludes zero."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def between(a: Group, b: Group) -> Difference | None:
    """The difference of two groups; None if one has no loss, or their texts differ.

    With two runs or more in a group, the interval is over seeds; otherwise it is over the blocks of
    the held-out text if both runs have kept them.
    """
    x, y = a.bits, b.bits
    if not len(x) or not len(y) or a.first.text != b.first.text:
        return None
    interval, over = student(x, y), SEEDS
    if interval is None:
        interval, over = over_text(blocks_of(a.first), blocks_of(b.first)), TEXT
    value = float(x.mean() - y.mean())
    return Difference(
        a.name, b.name, value, interval, over if interval else NOTHING, (len(x), len(y))
    )


def student(x: Values, y: Values) -> tuple[float, float] | None:
    """Student's interval of mean(x) - mean(y) with pooled variance; None for less than 3 values.

    One of them may have a single value: its spread is then assumed to be the other's.
    """
    freedom = len(x) + len(y) - 2
    if freedom < 1:
        return None
    squares = sum(float(np.square(v - np.mean(v)).sum()) for v in (np.array(x), np.array(y)))
    error = math.sqrt(squares / freedom * (1 / len(x) + 1 / len(y)))
    half = float(special.stdtrit(freedom, (1 + LEVEL) / 2)) * error
    middle = float(np.mean(x) - np.mean(y))
    return middle - half, middle + half


def spread(x: Values) -> float | None:
    """Half the width of Student's interval of a mean; None for a single value."""
    if len(x) < 2:
        return None
    t = float(special.stdtrit(len(x) - 1, (1 + LEVEL) / 2))
    return t * float(np.std(x, ddof=1)) / math.sqrt(len(x))


def blocks_of(record: Record, row: dict | None = None) -> np.ndarray | None:
    """[R, 3]: nats, tokens and bytes of each block of the held-out text, of result.json or of the
    validation of a row; None if they are not kept."""
    kept = (record.result if row is None else row["validation"]).get("blocks")
    if kept is None:
        return None
    blocks = np.array(kept, np.float64)
    whole = blocks.ndim == 2 and blocks.shape[1] == 3 and np.isfinite(blocks).all()
    return blocks if whole and len(blocks) >= FEWEST_BLOCKS else None


def draws(num_blocks: int, number: int = DRAWS) -> np.ndarray:
    """[draws, R] float64: how often each block is drawn, with replacement; the same each time."""
    equal = np.full(num_blocks, 1 / num_blocks)
    return np.random.default_rng(0).multinomial(num_blocks, equal, number).astype(np.float64)


def bits(blocks_R3: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Bits per byte for each draw of the blocks."""
    return weights @ blocks_R3[:, 0] / math.log(2) / (weights @ blocks_R3[:, 2])


def paired(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    """True if two lists of blocks are of the same parts of the same text."""
    return a is not None and b is not None and np.array_equal(a[:, 1:], b[:, 1:])


def over_text(a: np.ndarray | None, b: np.ndarray | None) -> tuple[float, float] | None:
    """Percentile bootstrap of the difference of two runs on the same blocks, which are drawn
    together (Efron, "Bootstrap methods", Annals of Statistics 7, 1979)."""
    if a is None or b is None or not paired(a, b):
        return None
    weights = draws(len(a))
    low, high = percentiles(bits(a, weights) - bits(b, weights))
    return low, high


def percentiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, [50 - 50 * LEVEL, 50 + 50 * LEVEL])
    return float(low), float(high)


def signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def interval_in_words(difference: Difference) -> str:
    if difference.interval is None:
        return ""
    low, high = map(signed, difference.interval)
    return f"[{low}, {high}]"


def count_in_words(difference: Difference) -> str:
    """The number of seeds, "n = 1 seed" or "n = 3 and 1 seeds"."""
    n, m = difference.num_seeds
    numbers = f"{n}" if n == m else f"{n} and {m}"
    return f"n = {numbers} seed{'s' if n + m > 2 else ''}"


def verdict(difference: Difference) -> str:
    """A difference is called lower or higher only if several seeds show it."""
    if difference.over == NOTHING:
        return "possibly noise, no interval"
    if not difference.is_clear:
        return "within noise"
    if difference.over == SEEDS:
        return "lower" if difference.value < 0 else "higher"
    return "more than the noise of the text, but another seed may differ"


def sentence(difference: Difference) -> str:
    """ "naive −0.006 bits/byte against drop_0.5 [−0.009, −0.003]: within noise, n = 1 seed."""
    interval = interval_in_words(difference)
    return (
        f"{difference.a} {signed(difference.value)} bits/byte against {difference.b}"
        f"{interval and ' ' + interval}: {verdict(difference)}, {count_in_words(difference)}."
    )


def best(groups: Sequence[Group]) -> Group | None:
    """The group with the lowest loss; None if none has a loss."""
    found = [group for group in groups if len(group.bits)]
    return min(found, key=lambda group: group.mean_bits, default=None)


def proven_best(groups: Sequence[Group]) -> Group | None:
    """The best group if its difference to each other group is clear over seeds of both."""
    first = best(groups)
    others = [between(first, other) for other in groups if first and other is not first]
    clear = [d and d.over == SEEDS and d.is_clear and min(d.num_seeds) > 1 for d in others]
    return first if clear and all(clear) else None
