"""The sections of a run's config about evaluation, checkpoints, guards and profiles.

`run.Run` holds one of each.
"""

import dataclasses
from collections.abc import Iterator

from moe_jax.config import checks
from moe_jax.config.checks import NOT_NEGATIVE, POSITIVE, SHARE
from moe_jax.config.section import Section, key
from moe_jax.config.sections import ROUTED, SPARSE
from moe_jax.model.fields import Need

PROMPTS = Need(lambda run: bool(run.evaluation.prompts), "config.evaluation.prompts")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation(Section, path="evaluation"):
    every_steps: int = key(
        0, "steps between evaluations on held-out text; 0 for one at the end only", NOT_NEGATIVE
    )
    intervals: tuple = key(
        (),
        "(name of another evaluator, steps between its runs) pairs; 0 for one at the end only",
        checks.intervals,
    )
    batch_size: int = key(32, "sequences per batch of held-out text, over all devices", POSITIVE)
    max_batches: int = key(
        0, "batches of held-out text in each evaluation during training; 0 for all", NOT_NEGATIVE
    )
    final_max_batches: int = key(
        0, "batches of held-out text in the final evaluation; 0 for all", NOT_NEGATIVE
    )
    test_split: bool = key(
        False, "the text's own test split is evaluated too, once, when the run ends"
    )
    prompts: tuple = key((), "texts for the trained model to continue", checks.texts)
    continuation_tokens: int = key(
        96, "number of tokens to continue a prompt with", POSITIVE, PROMPTS
    )
    multiple_choice: str = key(
        "",
        "a .jsonl of items {context, choices, answer[, label]} to answer by log-likelihood at "
        "each evaluation; empty for none",
    )
    num_experts_per_tok: int = key(
        0, "experts per token in evaluation; 0 for the model's own number", NOT_NEGATIVE, ROUTED
    )


EVALUATED = Need(lambda run: run.evaluation.every_steps > 0, "config.evaluation.every_steps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint(Section, path="checkpoint"):
    every_steps: int = key(
        1000, "steps between checkpoints; another one is saved at the end", POSITIVE
    )
    directory: str = key(
        "",
        "folder, or gs://BUCKET/FOLDER, that gets a folder of checkpoints named as the workdir; "
        "empty keeps them in the workdir",
    )
    keep: int = key(2, "number of newest checkpoints to keep", POSITIVE)
    keep_every: int = key(
        0, "also keeps the checkpoints of steps that are multiples of it; 0 for none", NOT_NEGATIVE
    )
    keep_best: int = key(
        *(0, "also keeps this many checkpoints with the lowest held-out loss", NOT_NEGATIVE),
        EVALUATED,
    )
    resume_from: int = key(
        0,
        "step of the checkpoint to go on from, once; later ones are renamed. 0 for the newest",
        NOT_NEGATIVE,
    )


SPIKES = Need(lambda run: run.guards.spike_sigma > 0, "config.guards.spike_sigma")
ALARMS = Need(lambda run: run.guards.alarm_rows > 0, "config.guards.alarm_rows")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guards(Section, path="guards"):
    """The reactions to spikes, collapsing routers and stalls."""

    spike_sigma: float = key(
        0.0,
        "standard deviations above its recent mean at which a loss or a gradient norm is a spike, "
        "whose update is skipped (OLMo-core uses 6); 0 for never",
        NOT_NEGATIVE,
    )
    spike_window: int = key(
        128, "number of steps that the recent mean and deviation are taken over", POSITIVE, SPIKES
    )
    rewind_after: int = key(
        0,
        "spikes in a row after which the run goes back to its newest checkpoint and leaves out the "
        "batches since; 0 for never",
        NOT_NEGATIVE,
        SPIKES,
    )
    alarm_rows: int = key(
        *(3, "rows in a row with the same alarm before it is printed; 0 for never", NOT_NEGATIVE),
        SPARSE,
    )
    collapse_share: float = key(
        0.1,
        "a router has collapsed if less than this share of the experts beyond k is in use, counted "
        "as effective experts",
        *(SHARE, SPARSE, ALARMS),
    )
    max_violation: float = key(
        0.0,
        "alarm if the largest load exceeds the mean by more than so many means; 0 for never",
        *(NOT_NEGATIVE, SPARSE, ALARMS),
    )
    data_wait: float = key(
        0.2, "share of the time spent waiting for batches at which a line says so", SHARE
    )
    stall_seconds: float = key(
        600.0,
        "seconds in a step, the data or a save after which all stacks are printed; 0 for never",
        NOT_NEGATIVE,
    )
    stall_end_seconds: float = key(
        7200.0,
        "seconds in a step, the data or a save after which the run ends with 75; 0 for never",
        NOT_NEGATIVE,
    )

    def problems(self) -> Iterator[str]:
        if 0 < self.stall_end_seconds < self.stall_seconds:
            yield (
                f"config.guards.stall_end_seconds={self.stall_end_seconds:g} is less than "
                f"stall_seconds={self.stall_seconds:g}; raise it, or lower the other"
            )


MOST_PROFILED = 50  # steps: the profiler's buffers drop events of a longer trace without a word


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile(Section, path="profile"):
    """The steps of which the run records a trace, its compiled step and its memory."""

    steps: tuple = key(
        (),
        "(first, last) of the steps to profile into the workdir's folder profile, counted from 1; "
        "step 1 compiles",
        checks.steps,
    )

    def problems(self) -> Iterator[str]:
        if self.steps and self.steps[1] - self.steps[0] >= MOST_PROFILED:
            yield (
                f"config.profile.steps={self.steps} are more than {MOST_PROFILED} steps, which the "
                "profiler does not hold; choose fewer"
            )
