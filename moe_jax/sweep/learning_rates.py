"""Short runs show which learning rate a run should have after upcycling.

No published rule says that. NVIDIA restarts at the peak of pre-training (He et al., arXiv
2410.07524), and Drop-Upcycling at 2/3 of it (arXiv 2502.19261): the loss then rises first, for as
long as billions of tokens at full size. A rate that is too low learns little.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from moe_jax import adviser
from moe_jax import config as configs
from moe_jax.config.sections import Optimizer
from moe_jax.hf import folders
from moe_jax.report import comparisons, recovery
from moe_jax.report.records import Group, Record, groups, read_record
from moe_jax.sweep import arms
from moe_jax.sweep.plan import Run
from moe_jax.training import metrics

RANGE_TEST = "range_test"
EVALUATIONS = 20  # of the held-out loss in each run
RANGE = 4.0  # the last rate of the range test, relative to the config's peak
FAR = 0.1  # the rise of the loss, relative to the start's, that counts as too high a rate


CONSTANT = {
    **{"schedule": "cosine", "final_learning_rate_ratio": 1.0, "warmup_steps": 0},
    **{"decay_steps": 0, "initial_learning_rate_ratio": 0.0},
}


def constant(rate: float | None) -> dict | None:
    """The overrides for a constant rate; None for none."""
    return {"optimizer": {**CONSTANT, "learning_rate": rate}} if rate else None


# The overrides of each arm, given the config's optimizer and the parent's last rate; None if it
# cannot be run.
ARMS: dict[str, Callable[[Optimizer, float | None], dict | None]] = {
    "re-warmed": lambda optimizer, last: {},  # the config's own schedule
    "inherited": lambda optimizer, last: constant(last),
    "minimum": lambda optimizer, last: constant(
        optimizer.learning_rate * optimizer.final_learning_rate_ratio
    ),
}


def last_rate(sources: Iterable[configs.Source]) -> float | None:
    """The learning rate of the last step, up to its checkpoint, of the first source that is a run.

    Raises: ValueError for a damaged metrics.jsonl.
    """
    for source in sources:
        path = source.folder / "metrics.jsonl"
        if folders.is_folder(source.folder) or not path.is_file():
            continue
        rows = [
            row for row in metrics.read(path) if source.step is None or row["step"] <= source.step
        ]
        rates = [rate for row in rows if isinstance(rate := row.get("learning_rate"), float)]
        if rates:
            return rates[-1]
    return None


def entries(
    settings: configs.Run,
    given: Mapping[str, str],
    *,
    steps: int,
    seeds: int,
    inherited: float | None,
) -> list[dict]:
    """The runs as `sweep.plan.runs_of` reads them: a range test, then each arm with each seed.

    The range test raises the rate linearly from 0 to RANGE times the config's peak (Smith, arXiv
    1506.01186, section 3.3). An arm makes the first steps of the config's training. Equal arms are
    made once. All evaluations are on the sample of held-out text of the loss curve.

    Args: given: overrides of the config's file by dotted key.

    Raises: ValueError for settings that measure nothing.
    """
    optimizer, training = settings.optimizer, settings.training
    steps = min(steps, training.last_step or steps)
    if not settings.init.sources:
        raise ValueError("--measure starts from a trained model: set --config.init.source=DIR")
    if steps < 2 or seeds < 1:
        raise ValueError(f"--steps={steps} and --seeds={seeds} must be at least 2 and 1")
    if optimizer.warmup_steps >= steps:
        raise ValueError(
            f"--steps={steps} ends before the warm-up, config.optimizer.warmup_steps="
            f"{optimizer.warmup_steps}: use more steps, or a shorter warm-up"
        )
    every = max(steps // EVALUATIONS, 1)
    one_sample = {"every_steps": every, "final_max_batches": settings.evaluation.max_batches}
    all_runs = {**given, "seed": settings.seed, "evaluation": one_sample}
    top = {"learning_rate": RANGE * optimizer.learning_rate, "warmup_steps": steps}
    test = {
        "optimizer": {**CONSTANT, **top},
        "training": {"num_steps": steps, "num_epochs": 0.0, "stop_step": 0, "log_every": every},
    }
    made = {name: make(optimizer, inherited) for name, make in ARMS.items()}
    distinct: dict[str, dict] = {}
    for name, own in made.items():
        if own is not None and own not in distinct.values():
            distinct[name] = own
    measured = arms.product({**all_runs, "training.stop_step": steps}, arms.named(distinct))
    return arms.chain(
        arms.product(all_runs, arms.named({RANGE_TEST: test})),
        arms.seeds(measured, seeds) if seeds > 1 else measured,
    )


@dataclasses.dataclass(frozen=True)
class Arm:
    """The result of one arm. rate: the peak of its schedule. bits: bits per byte of held-out text
    at the end, in the mean over seeds."""

    name: str
    rate: float
    seeds: int
    bits: float
    recovery: recovery.Recovery | None


@dataclasses.dataclass(frozen=True)
class Advice:
    """The findings of the runs.

    range_test: (learning rate, held-out bits per byte) from the start on. arms: the best first.
    tied: the arms that cannot be told from the best. differences: of the best from each other arm.
    least: with one seed, the smallest difference that is ranked; else None.
    steps, of_steps: those of an arm, and of the whole training.
    """

    range_test: list[tuple[float, float]]
    arms: list[Arm]
    tied: list[str]
    differences: list[comparisons.Difference]
    least: float | None
    steps: int
    of_steps: int


def advice(runs: Sequence[Run], parent: Record | None) -> Advice | None:
    """The findings of the finished runs; None without a finished arm.

    Raises: ValueError for a damaged file of a run.
    """
    tests = [run for run in runs if run.name == RANGE_TEST]
    ended = [run for run in runs if run.result and run not in tests]
    every = [read_record(run.name, place, run.workdir) for place, run in enumerate(ended)]
    found = [group for group in groups(every) if len(group.bits)]
    if not found:
        return None
    shown = every if parent is None else [*every, parent]
    ranked = sorted(found, key=lambda group: group.mean_bits)
    peaks = [run.settings.optimizer.learning_rate if run.settings else 0.0 for run in ended]
    rows = [
        Arm(
            group.name,
            peaks[group.first.place],
            len(group.bits),
            group.mean_bits,
            recovery.recovery(group, shown),
        )
        for group in ranked
    ]
    pairs = [comparisons.between(ranked[0], other) for other in ranked[1:]]
    differences = [pair for pair in pairs if pair is not None]
    alone = all(len(group.bits) == 1 for group in ranked)
    least = max(map(least_difference, ranked)) if alone else None
    tied = [d.b for d in differences if not _is_sure(d, least)]
    settings, steps = ended[0].settings, every[0].result["steps"]
    of_steps = settings.training.num_steps if settings else 0
    kept = [row for run in tests for row in metrics.read(run.workdir / "metrics.jsonl")]
    return Advice(range_of(kept), rows, tied, differences, least, steps, of_steps)


def _is_sure(difference: comparisons.Difference, least: float | None) -> bool:
    """True if several seeds, or with one seed the text and the scatter, show the difference."""
    if least is None:
        return difference.over == comparisons.SEEDS and difference.is_clear
    return difference.is_clear and abs(difference.value) >= least


def least_difference(group: Group) -> float:
    """The smallest difference, in bits per byte, that a single run can show: twice the standard
    deviation of a difference of two evaluations about their trend.

    The trend is taken out of the second half of the evaluations by second differences y[i-1] -
    2 y[i] + y[i+1], whose variance is 6 times that of independent values. It is inf with less than
    three evaluations.
    """
    _, bits = group.curve("validation", "bits_per_byte")
    late = bits[0, bits.shape[1] // 2 :]
    if len(late) < 3:
        return math.inf
    scatter = math.sqrt(float(np.square(np.diff(late, 2)).mean()) / 6)
    return 2 * math.sqrt(2) * scatter


def range_of(rows: Sequence[Mapping]) -> list[tuple[float, float]]:
    """(learning rate, held-out bits per byte) of each evaluation; its losses are finite."""
    rates = {row["step"]: row["learning_rate"] for row in rows if "learning_rate" in row}
    evaluated = [row for row in rows if "validation" in row]
    found = [(rates.get(row["step"], 0.0), row["validation"]["bits_per_byte"]) for row in evaluated]
    return [(rate, bits) for rate, bits in found if bits is not None]


def in_words(advice: Advice) -> str:
    """The range test, the arms and what to take, as text for a terminal."""
    lines = _range_in_words(advice.range_test)
    head = ("arm", "rate", "bits/byte", "dip", "tokens to recover", "seeds")
    table = []
    for arm in advice.arms:
        dip = back = "unknown"
        if arm.recovery:
            dip, tokens = f"+{arm.recovery.dip:.3f}", arm.recovery.tokens
            back = "not yet" if tokens is None else f"{tokens:,.0f}"
        table.append((arm.name, f"{arm.rate:.2e}", f"{arm.bits:.4f}", dip, back, str(arm.seeds)))
    lines += [f"Arms after {advice.steps} steps, the best first:", *adviser.aligned(head, table)]
    if first := advice.arms[0].recovery:
        whose = "their parent's" if first.of_parent else "that"
        lines.append(f"They start from {first.start:.3f}, and have recovered at {whose}, ")
        lines[-1] += f"{first.target:.3f}."
    lines += ["", *map(comparisons.sentence, advice.differences), "", verdict(advice)]
    return "\n".join(lines)


def verdict(advice: Advice) -> str:
    """The lines that name the arm to take, and how sure that is."""
    best = advice.arms[0]
    if advice.tied:
        words = f"Take {best.name}, or {' or '.join(advice.tied)}: they cannot be told apart."
    elif advice.differences:
        words = f"Take {best.name}: it is ahead of every other arm."
    else:
        words = f"Only {best.name} has a result."
    if advice.least is None:
        words += f" This rests on {best.seeds} seeds."
    elif advice.least < math.inf:
        words += (
            f" One seed cannot rank differences below {advice.least:.4f} bits/byte, twice the "
            "scatter of the evaluations; seeds may differ by more, which --seeds=3 measures."
        )
    else:
        words += " One seed with so few evaluations ranks nothing; use more --steps and --seeds."
    if advice.steps < advice.of_steps:
        words += (
            f" These are the first {advice.steps} of {advice.of_steps} steps: a rate that falls "
            "later has most of its gain ahead, so an arm that is behind here may end ahead."
        )
    return words


def _range_in_words(points: Sequence[tuple[float, float]]) -> list[str]:
    if len(points) < 2:
        return ["The range test has no result.", ""]
    (_, start), *later = points
    shown = later[1::2] or later
    table = [(f"{rate:.2e}", f"{bits:.3f}", f"{bits - start:+.3f}") for rate, bits in shown]
    rises = []
    for limit in (start, (1 + FAR) * start):
        first = next(
            (f"at a rate of {rate:.2e}" for rate, bits in later if bits > limit), "nowhere"
        )
        rises.append(first)
    head = ("rate", "bits/byte", "against the start")
    said = f"The held-out loss starts from {start:.3f}. It first rises above that {rises[0]}, "
    said += f"and {FAR:.0%} above it {rises[1]}."
    return ["Range test, with a rising rate:", *adviser.aligned(head, table), said, ""]
