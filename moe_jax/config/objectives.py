"""The sections of a run's config that say which loss is minimised."""

import dataclasses
from collections.abc import Iterator

from moe_jax.config.checks import NOT_NEGATIVE, POSITIVE, SHARE, one_of
from moe_jax.config.section import Section, key, part
from moe_jax.model.fields import Need

TEACHER = Need(
    lambda run: bool(run.objective.distillation.source), "config.objective.distillation.source"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation(Section, path="objective.distillation", needs=(TEACHER,)):
    source: str = key(
        "", "teacher with the same vocabulary: a run, RUN@STEP or a Hugging Face folder"
    )
    coefficient: float = key(0.0, "coefficient of the divergence from the teacher", NOT_NEGATIVE)
    temperature: float = key(1.0, "divisor of the logits of both model and teacher", POSITIVE)
    cross_entropy_coefficient: float = key(
        1.0,
        "coefficient of the text's cross-entropy; 0 trains on the divergence alone",
        NOT_NEGATIVE,
    )

    def problems(self) -> Iterator[str]:
        if self.source and not self.coefficient:
            yield (
                f"config.objective.distillation.source={self.source!r} teaches nothing "
                "with a coefficient of 0; set objective.distillation.coefficient"
            )
        if not self.cross_entropy_coefficient and not self.source:
            yield (
                "config.objective.distillation.cross_entropy_coefficient=0 leaves nothing to train "
                "on without a teacher; set objective.distillation.source"
            )
        if self.coefficient and not self.source:
            yield (
                f"config.objective.distillation.coefficient={self.coefficient} needs "
                "a teacher; set objective.distillation.source"
            )


PAIRS = Need(lambda run: run.objective.name != "next_token", "config.objective.name='dpo'")
# A row of pairs is not packed, the mask tells its two answers apart, and each answer has the
# positions with which the reference model has read it.
TEXT = Need(
    lambda run: not run.objective.preference.reference, "config.objective.name='next_token'"
)
SMOOTHED = Need(lambda run: run.objective.name == "cdpo", "config.objective.name='cdpo'")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preference(Section, path="objective.preference", needs=(PAIRS,)):
    """Settings of the losses on pairs of answers: `training.preferences.LOSSES`."""

    reference: str = key(
        "",
        "reference model, usually the value of init.source: a run, RUN@STEP or a Hugging Face "
        "folder",
    )
    reference_log_probs: str = key(
        "cached",
        "cached computes those of the reference once, before the first step, and keeps them in the "
        "cache folder; frozen computes them in each step, with the reference in memory",
        one_of("cached", "frozen"),
    )
    beta: float = key(0.1, "factor of an answer's log-ratio in its reward", POSITIVE)
    label_smoothing: float = key(
        0.0, "share of the pairs that are taken to be the wrong way round", SHARE, SMOOTHED
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective(Section, path="objective"):
    name: str = key("next_token", "name of the loss that is minimised")
    average: str = key(
        "token",
        "token, or document for equal weights of all records",
        one_of("token", "document"),
        TEXT,
    )
    logit_z_coefficient: float = key(
        0.0, "coefficient of the z-loss on the output logits", NOT_NEGATIVE
    )
    distillation: Distillation = part(Distillation)
    preference: Preference = part(Preference)
