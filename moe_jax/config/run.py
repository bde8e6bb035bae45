"""All settings of a run, with checks of each and of their combinations."""

import dataclasses
import math
import re
from collections.abc import Iterator

from ml_collections import ConfigDict

from moe_jax.config import checks, monitoring, objectives, sections
from moe_jax.config.data import Data
from moe_jax.config.section import Section, key, part
from moe_jax.model.config import ModelConfig
from moe_jax.model.router import ROUTERS
from moe_jax.upcycle import recipes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Section, path=""):
    """All settings of a run. In a config, `model` is a preset with the fields that differ from it,
    or all fields without a default in ModelConfig, or empty if `init.source` provides a model.
    """

    seed: int = key(
        0, "seed of the parameters and of the order of the text", checks.seed, fixed=True
    )
    # The router must not change in a resumed run: it decides whether routing is learned at all.
    model: ModelConfig = dataclasses.field(metadata={"fixed": ("router",)})
    init: sections.Init = part(sections.Init)
    data: Data = part(Data)
    mesh: sections.Mesh = part(sections.Mesh)
    optimizer: sections.Optimizer = part(sections.Optimizer)
    lora: sections.Lora = part(sections.Lora)
    training: sections.Training = part(sections.Training)
    balance: sections.Balance = part(sections.Balance)
    objective: objectives.Objective = part(objectives.Objective)
    evaluation: monitoring.Evaluation = part(monitoring.Evaluation)
    checkpoint: monitoring.Checkpoint = part(monitoring.Checkpoint)
    guards: monitoring.Guards = part(monitoring.Guards)
    profile: monitoring.Profile = part(monitoring.Profile)
    # The config that the settings come from; it is stored in the run's workdir and checkpoints.
    config: ConfigDict = dataclasses.field(default_factory=ConfigDict, compare=False, repr=False)

    def with_rows_per_epoch(self, rows: int) -> "Run":
        """The settings with `training.num_steps` in place of `training.num_epochs`.

        Raises: ConfigError for settings that do not fit the steps.
        """
        training = self.training
        num_steps = math.ceil(training.num_epochs * rows / training.batch_size)
        config = self.config.copy_and_resolve_references()
        config.training.update(num_steps=num_steps, num_epochs=0.0)
        resolved = dataclasses.replace(training, num_steps=num_steps, num_epochs=0.0)
        return dataclasses.replace(self, training=resolved, config=config)

    def problems(self) -> Iterator[str]:
        with checks.refusing("config.data.sequence_length: "):
            self.model.check_rows(self.data.sequence_length)
        optimizer, num_steps = self.optimizer, self.training.num_steps
        if num_steps and optimizer.warmup_steps + optimizer.decay_steps > num_steps:
            yield (
                f"config.optimizer: warmup_steps={optimizer.warmup_steps} and "
                f"decay_steps={optimizer.decay_steps} exceed training.num_steps={num_steps}"
            )
        last = self.training.last_step
        if last and self.profile.steps and self.profile.steps[1] > last:
            yield (
                f"config.profile.steps={self.profile.steps} end after the run's last step, {last}; "
                "choose earlier ones"
            )
        model = self.model
        yield from _problems_of_biases(model, self.balance)
        for step, _ in self.data.mixture.stages:
            if 0 < num_steps <= step:
                yield (
                    f"config.data.mixture.stages, step {step}, never begins: training.num_steps="
                    f"{num_steps}; lower the step, or leave the stage out"
                )
        if self.lora.rank and not optimizer.frozen:
            yield (
                f"config.lora.rank={self.lora.rank} would train the matrices besides their pairs; "
                "set optimizer.frozen='^(?!.*lora)', or lora.rank=0"
            )
        yield from _problems_of_merging(model, self.data.sequence_length)
        yield from _problems_of_top_1(model, optimizer.frozen)
        if self.evaluation.num_experts_per_tok > model.num_experts:
            yield (
                f"config.evaluation.num_experts_per_tok={self.evaluation.num_experts_per_tok} is "
                f"more than the {model.num_experts} experts of the model"
            )
        every, evaluated = self.checkpoint.every_steps, self.evaluation.every_steps
        if self.checkpoint.keep_best and evaluated and every % evaluated:
            yield (
                "config.checkpoint.keep_best needs the held-out loss of each checkpoint: set "
                f"checkpoint.every_steps={every} to a multiple of "
                f"evaluation.every_steps={evaluated}"
            )
        recipe = self.init.upcycle.recipe
        if recipe and not model.num_experts and recipes.RECIPES[recipe].gives == recipes.MIXTURE:
            yield (
                f"config.init.upcycle.recipe={recipe!r} makes a sparse model; "
                "set config.model.num_experts"
            )


def _problems_of_biases(model: ModelConfig, balance: sections.Balance) -> Iterator[str]:
    rate, quantile = balance.bias_update_rate, balance.bias_update == "quantile"
    if not model.num_experts or not (rate or quantile):
        return
    if "bias" not in ROUTERS[model.router].leaves:
        biased = " or ".join(repr(n) for n, row in ROUTERS.items() if "bias" in row.leaves)
        what, off = (
            ("bias_update='quantile'", "bias_update='sign'")
            if quantile
            else (f"bias_update_rate={rate}", "a rate of 0")
        )
        yield (
            f"config.balance.{what} needs a router with a bias, "
            f"not model.router={model.router!r}; use {biased}, or {off}"
        )
    if quantile and (model.num_expert_groups > 1 or model.num_experts_per_tok == model.num_experts):
        yield (
            "config.balance.bias_update='quantile' reads the largest score that is not chosen; set "
            f"model.num_expert_groups={model.num_expert_groups} to 1 and "
            f"model.num_experts_per_tok={model.num_experts_per_tok} below num_experts="
            f"{model.num_experts}"
        )


def _problems_of_merging(model: ModelConfig, T: int) -> Iterator[str]:
    S = model.merge_segment_length
    if model.num_experts and model.dispatch == "merge" and (T % S or T == S):
        yield (
            f"config.model.merge_segment_length={S} does not cut rows of {T} tokens into two or "
            "more segments, of which the first sees its own later tokens; use a smaller divisor of "
            "data.sequence_length"
        )


def _problems_of_top_1(model: ModelConfig, frozen: str) -> Iterator[str]:
    to_be_trained = not (frozen and re.search(frozen, "moe/router/kernel"))
    if model.weight_is_constant and to_be_trained:
        yield (
            f"config.model.num_experts_per_tok=1 with weights that sum to one "
            f"(router={model.router!r}, norm_topk_prob={model.norm_topk_prob}) gives the router "
            "no gradient of the text; use router='softmax_topk' with norm_topk_prob=False "
            "(Switch), 2 experts per token, or keep the router by optimizer.frozen='moe/router'"
        )
